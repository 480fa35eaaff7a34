"""What is due, and what nobody else will finish: one sweeper at a time in the whole deployment.

| what | how |
| --- | --- |
| holds whose time has come | what they still hold goes back, in one commit |
| rows of `schedule` that are due | marked, and sent to their topic again with their attempt's number, in one commit |
| commit records that were not journaled | the relay takes them |
| commit records of the API and of owners that are gone, not emitted for a while | emitted, then deleted |

The stage deletes a row when it settles the repeat: until then newcomers of its key may not overtake it.
The next owner of a partition finishes what its last one left before that (delivery.py); here is what has no next owner.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Final

import orjson
import structlog

from agents.lone_writer import LoneWriter
from agents.parking import SENT
from agents.services import Services, tell
from ledger import journal
from ledger.book import expire_due
from ledger.commit import TRANSIENT, lock_writer, seal
from ledger.record import Message, told_of
from ledger.rows import Changes, Connection
from ledger.sql import load
from ledger.tables import SCHEDULE
from topics.envelope import with_attempt

_log = structlog.get_logger()
_journal = load("ledger", "sql/journal.sql")
_sql = load("agents", "sweeper.sql")


WRITER: Final = "sweeper"
DUE_MAX: Final = 500
DUE_BYTES_MAX: Final = 16_000_000
"""Of values and headers in one commit, whose record has them three times over: in hex in the row, and in the message."""
SILENCE_S: Final = 60.0
"""A leader that looks at nothing for so long is frozen: its next look would be half a second after the last."""
ABANDONED_S: Final = 30.0
"""A committed record is emitted within milliseconds while its owner lives; after this it has none."""


class Sweeper:
    """`work` never returns. Any number may run: an advisory lock lets one of them sweep."""

    def __init__(self, services: Services, *, interval_s: float = 0.5, abandoned_s: float = ABANDONED_S) -> None:
        self._services = services
        self._interval_s = interval_s
        self._abandoned = timedelta(seconds=abandoned_s)
        self._lone = LoneWriter(WRITER, services, SILENCE_S)

    async def work(self) -> None:
        while True:
            try:
                await self._services.relay.tidy()  # leader or not
                connection = await self._lone.lead()
                busy = connection is not None and await self.sweep(connection)
            except TRANSIENT as error:
                self._lone.give_up()  # the driver may have lost count of it
                _log.warning("sweeper.retry", error=type(error).__name__)
                busy = False
            except Exception as error:
                self._services.stop(f"sweeper: {error!r}", error)
                raise
            if not busy:
                await asyncio.sleep(self._interval_s)

    async def sweep(self, connection: Connection) -> bool:
        """One look; whether there may be more. Needs no leadership to be right, only to be economical."""
        full = await self._due(connection)
        full = await self._expired(connection) or full
        waiting = await connection.fetchval(_sql.waiting, self._services.clock() - self._abandoned)
        self._services.observer.outbox_rows(waiting)
        if waiting:
            await self._services.relay.journal()
            await self._abandoned_records(connection)
        return full

    async def _due(self, connection: Connection) -> bool:
        now = self._services.clock()
        if not await connection.fetchval(_sql.any_due, now, SENT):
            return False
        async with connection.transaction():
            owners = await lock_writer(connection, WRITER)
            rows = await connection.fetch(_sql.due, now, DUE_MAX, SENT, DUE_BYTES_MAX)
            if not rows:
                return False
            changes = Changes()
            messages: list[Message] = []
            for stage, event_id, attempt, topic, key, value, packed, due, _ in rows:
                headers = orjson.loads(packed)
                changes.upsert(SCHEDULE, (stage, event_id, attempt, topic, key, value, headers, SENT, due))
                messages.append(_again(attempt, topic, key, value, headers))
            sealed = await seal(
                connection,
                WRITER,
                owners,
                blocks=changes.blocks(),
                messages=messages,
                at=now,
                actor=WRITER,
                summary={"due": len(rows)},
            )
        await tell(self._services, sealed)
        found: int = rows[0]["found"]
        return found > len(rows) or found == DUE_MAX

    async def _expired(self, connection: Connection) -> bool:
        batch = await expire_due(connection, WRITER, self._services.clock(), holds_max=DUE_MAX)
        if batch.sealed is None:
            return False
        await tell(self._services, batch.sealed)
        return len(batch.results) == DUE_MAX

    async def _abandoned_records(self, connection: Connection) -> None:
        before = self._services.clock() - self._abandoned
        for seq, packed in await connection.fetch(_journal.left_behind, before, journal.BYTES_AT_ONCE):
            told = told_of(packed)
            await self._services.emitter.emit(told.messages, told.stage, told.at)
            await connection.execute(_journal.delete, [seq])
            _log.info("sweeper.finished", writer=told.stage, messages=len(told.messages))


def _again(attempt: int, topic: str, key: bytes | None, value: bytes, headers: list[list[str]]) -> Message:
    """The message as it came, with the number of its attempt."""
    pairs = [(bytes.fromhex(name).decode(), bytes.fromhex(content)) for name, content in headers]
    return Message(topic, key, value, headers=with_attempt(pairs, attempt))
