"""What the API's commits wait for before they are answered: the journal. Their messages leave after that.

A caller is told within seconds that Kafka does not answer; the commit stands, and goes on to the journal and to its topics
when Kafka is back, by this process or by a worker's sweeper.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from aiokafka.errors import KafkaError

from agents.emitter import Emitter
from ledger.commit import TRANSIENT, Sealed
from ledger.errors import ACopy, DatabaseBehind, LedgerError
from ledger.journal import Relay
from stablerail.config import Settings
from stablerail.connections import relay_of
from stablerail.problems import Problem

ANSWER_S_MAX: Final = 5.0
WAITING_MAX: Final = 1_000
"""Commits that wait for a Kafka that is away; more are refused before they are made."""
RETRY_AFTER_S: Final = 2


class Journal:
    """One per process; `start` and `stop` around its life."""

    def __init__(self, relay: Relay, emitter: Emitter) -> None:
        self._relay = relay
        self._emitter = emitter
        self._waiting: set[asyncio.Task[None]] = set()
        self.unfit: LedgerError | None = None
        """Why the database turned out not to be the deployment's."""
        self.on_unfit: Callable[[], None] = lambda: None
        """Called then: there is nothing more to do for this process."""

    @classmethod
    def of(cls, settings: Settings) -> Journal:
        emitter = Emitter(settings.kafka_bootstrap, settings.topic_prefix)
        return cls(relay_of(settings, emitter.journal), emitter)

    async def start(self) -> None:
        """Connects, when Kafka is there; else with the first commit. Raises DatabaseBehind and ACopy, which are found out then."""
        with contextlib.suppress(KafkaError, TimeoutError, *TRANSIENT):
            async with asyncio.timeout(ANSWER_S_MAX):
                await self._emitter.start()
                await self._relay.check()

    async def stop(self) -> None:
        """What still waits is a worker's to finish."""
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_S_MAX):
                with contextlib.suppress(ACopy, DatabaseBehind):  # nothing is deleted there
                    await self._relay.close()
                await self._emitter.stop()

    def check(self) -> None:
        """Before a commit. Raises the problem when too many wait already, or the database turned out not to be the deployment's."""
        if self.unfit is not None:
            raise _unfit(self.unfit)
        if len(self._waiting) >= WAITING_MAX:
            raise _unavailable("Too many requests wait for Kafka; nothing was done. Try again later.")

    async def take(self, sealed: Sealed | None) -> None:
        """Returns when the journal has this commit and all before it (None: a repeat, whose first commit may still wait). Raises
        the problem when that takes too long."""
        records = [(sealed.seq, sealed.record)] if sealed else ()
        journaling = asyncio.create_task(self._relay.journal(records))
        telling = asyncio.create_task(self._tell(sealed, journaling))
        self._waiting.add(telling)
        telling.add_done_callback(self._waiting.discard)
        await asyncio.wait({journaling}, timeout=ANSWER_S_MAX)
        if not journaling.done():
            raise _unavailable("What you asked for is stored and waits for Kafka; ask again for its answer.")
        try:
            await journaling
        except (ACopy, DatabaseBehind) as error:
            self.found_unfit(error)
            raise _unfit(error) from None

    async def _tell(self, sealed: Sealed | None, journaling: asyncio.Task[None]) -> None:
        try:
            await journaling
            if sealed is None:
                return
            await self._emitter.emit(sealed.messages, sealed.stage, sealed.at)
            self._relay.emitted([sealed.seq])
            with contextlib.suppress(*TRANSIENT):  # else with the next commit
                await self._relay.tidy()
        except (ACopy, DatabaseBehind) as error:  # also long after the caller had its answer
            self.found_unfit(error)

    def found_unfit(self, error: LedgerError) -> None:
        self.unfit = error
        self.on_unfit()


def _unfit(error: LedgerError) -> Problem:
    return Problem(503, error.code, str(error))


def _unavailable(detail: str) -> Problem:
    return Problem(503, "journal_unavailable", detail, headers={"Retry-After": str(RETRY_AFTER_S)})
