"""The invariants as metrics: one worker of `recovery` looks again and again, and says what it found.

| what | how often | why |
| --- | --- | --- |
| all data | once a day, and while something of the ledger's own is broken | a row changed under unchanged hashes is found by nothing else |
| 1, 3 and 11 since the last look, the rest whole | every `STABLERAIL_VERIFY_INTERVAL_S` | a ledger of years is not read so often |
| 12 | as often as somebody runs `stablerail verify --rebuild`: what it stored is told | a rebuild wants a server's hour, not a worker's |

A look that took long is followed by a pause in proportion, so that looking never takes more than a small share of the database.
Nothing is written: a look that dies is made again by the next leader, from the beginning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import asyncpg
import structlog

from agents.lone_writer import STANDBY_S, LoneWriter
from agents.services import Services
from chain.errors import ChainError
from ledger.checkpoint import BEGINNING
from ledger.rows import Connection
from ledger.verify import Result, together, verify_since
from stablerail.config import Settings
from stablerail.verify import verify_chains
from stablerail.verify_rebuild import stored

_log = structlog.get_logger()

ROWS_MAX: Final = 100
WHOLE_S: Final = 24 * 60 * 60.0
PAUSE_RATIO: Final = 19.0
"""Of the time that the look took: looking is one twentieth of it all at most."""
LEDGER: Final = frozenset({1, 2, 3, 11})
"""A checkpoint may be kept when these hold."""


class Invariants:
    """`work` never returns."""

    def __init__(self, settings: Settings, services: Services, tell: Callable[[Sequence[Result]], None]) -> None:
        """`tell` gets every look's results; nothing when another worker leads."""
        self._settings, self._tell = settings, tell
        self._writer = LoneWriter("verify", services)
        self._checkpoint = BEGINNING
        self._whole_at = -WHOLE_S

    async def work(self) -> None:
        await self._writer.rounds(self._work, _failed, (asyncpg.PostgresError,), self._stand_by)

    def _stand_by(self) -> None:
        self._checkpoint = BEGINNING
        self._tell(())

    async def _work(self, connection: Connection) -> float:
        started = time.monotonic()
        self._tell(await self.look(connection))
        return max(self._settings.verify_interval_s, PAUSE_RATIO * (time.monotonic() - started))

    async def look(self, connection: Connection) -> list[Result]:
        """The results of one look, those that could be looked at."""
        now = time.monotonic()
        if now - self._whole_at >= WHOLE_S:
            self._checkpoint = BEGINNING
        whole = self._checkpoint == BEGINNING
        results, reached = await verify_since(connection, self._checkpoint, rows_max=ROWS_MAX)
        if all(result.holds for result in results if result.number in LEDGER):
            self._checkpoint = reached
            if whole:
                self._whole_at = now
        if self._settings.read_chains:
            try:
                results.extend(await verify_chains(self._settings, connection))
            except ChainError as error:
                _log.warning("invariants.chain_not_checked", error=type(error).__name__)
        results = together([*results, *await stored(connection)])
        for result in results:
            if not result.holds:
                _log.error("invariant.broken", number=result.number, name=result.name, rows=result.offending[:5])
        return results


def _failed(error: Exception) -> float:
    _log.warning("invariants.retry", error=type(error).__name__)
    return STANDBY_S
