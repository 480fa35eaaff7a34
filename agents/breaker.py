"""A partner that keeps failing is left alone for a while. One per partner and process; time is a parameter."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from enum import IntEnum


class BreakerState(IntEnum):
    """As the metric shows it."""

    CLOSED = 0
    PROBING = 1
    """One request may try."""
    OPEN = 2


class Breaker:
    """`admits` says how many requests may leave now; each one's end is told by `succeeded` or `failed`."""

    def __init__(
        self,
        failures_max: int,
        open_s: float,
        clock: Callable[[], datetime],
        show: Callable[[BreakerState], None] = lambda _state: None,
    ) -> None:
        self._failures_max = failures_max
        self._open = timedelta(seconds=open_s)
        self._clock = clock
        self._show = show
        self._failures = 0
        self._until: datetime | None = None
        show(BreakerState.CLOSED)

    @property
    def closed(self) -> bool:
        return self._until is None

    def admits(self, wanted: int, in_flight: int) -> int:
        """While it rests none; then one, until that one has ended."""
        if self._until is None:
            return wanted
        if self._clock() < self._until or in_flight:
            return 0
        self._show(BreakerState.PROBING)
        return min(wanted, 1)

    def succeeded(self) -> None:
        """The partner answered, whatever it said."""
        self._failures = 0
        if self._until is not None:
            self._until = None
            self._show(BreakerState.CLOSED)

    def failed(self) -> None:
        """No answer, or that it cannot answer."""
        self._failures += 1
        if self._until is not None or self._failures >= self._failures_max:
            self._until = self._clock() + self._open
            self._show(BreakerState.OPEN)
