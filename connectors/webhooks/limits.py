"""What strangers may cost the bridge beyond one request: memory for large bodies, lines in the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import structlog

from connectors.webhooks.problems import Problem

log = structlog.get_logger()

LINE_S = 1.0


class LargeBodies:
    """How many large bodies are in memory: it must not grow with what strangers send, and small ones always have room."""

    def __init__(self, at_once_max: int, retry_after_s: int) -> None:
        self._max = at_once_max
        self._headers = {"Retry-After": str(retry_after_s), "Connection": "close"}
        self.held = 0

    @contextmanager
    def room(self) -> Generator[Callable[[], None]]:
        """For one request. What is given is called when its body turns out to be large, and raises Problem without room."""
        mine = False

        def take() -> None:
            nonlocal mine
            if mine:
                return
            if self.held >= self._max:
                raise Problem(503, "busy", "Too many large bodies at once; send it again.", headers=self._headers)
            self.held, mine = self.held + 1, True

        try:
            yield take
        finally:
            self.held -= mine


class Refusals:
    """A line a second for each kind of refusal, with the number of those that had none; the metric counts all."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[tuple[str, str], tuple[float, int]] = {}

    def tell(self, vendor: str, problem: Problem) -> None:
        now, kind = self._clock(), (vendor, problem.code)
        at, silent = self._told.get(kind, (now - LINE_S, 0))
        if now - at < LINE_S:
            self._told[kind] = (at, silent + 1)
            return
        self._told[kind] = (now, 0)
        log.warning("webhook_not_taken", vendor=vendor, status=problem.status, code=problem.code, silent_before=silent)
