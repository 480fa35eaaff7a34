"""A stage that refuses too much is stopped instead of emptying its topic into the dead letters.

A bad deployment or a producer's mistake refuses everything; one bad message does not. Two rules: too many refusals in a
row, or too large a share of the last thousand (the window).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

WINDOW: Final = 1_000
"""A share is judged over this many events, no fewer: five bad ones of the first ten are no pattern."""


class FuseBlown(Exception):
    """The stage stops before this batch is committed; an operator looks, then restarts the worker."""


class Fuse:
    """`check` before a commit, `record` after it. True = refused."""

    def __init__(self, ratio: float, run_max: int, window: int = WINDOW) -> None:
        self._ratio = ratio
        self._run_max = run_max
        self._window = window
        self._recent: deque[bool] = deque(maxlen=window)
        self._run = 0

    def check(self, refused: Sequence[bool]) -> None:
        """Raises FuseBlown when these outcomes would be too many refusals."""
        if not any(refused):
            return
        run = longest = self._run
        for one in refused:
            run = run + 1 if one else 0
            longest = max(longest, run)
        if longest > self._run_max:
            raise FuseBlown(f"{longest} refusals in a row; at most {self._run_max}")
        recent = [*self._recent, *refused][-self._window :]
        if len(recent) == self._window and sum(recent) > self._ratio * self._window:
            raise FuseBlown(f"{sum(recent)} of the last {self._window} events refused; at most {self._ratio:.0%}")

    def record(self, refused: Sequence[bool]) -> None:
        """The outcomes are committed."""
        self._recent.extend(refused)
        for one in refused:
            self._run = self._run + 1 if one else 0
