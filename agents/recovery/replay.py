"""A stage over old input once more: what it would do with it, and its events sent to their topic again.

| step | how | why |
| --- | --- | --- |
| look | the inbox rows of the events, without a lock | what is done is a repeat, what waits in the schedule waits |
| rehearse | the real stage settles the others in a transaction that is rolled back | the rules are those of the worker, written once |
| publish | the events with their bytes and ids, their log and the reason in one commit | the worker settles them as it does all others |

A rehearsal writes nothing and tells nobody. Its batches are small, since the stage's partitions wait while one is decided; each
is decided on the state as it is, without what the batch before would have changed.

Publishing is harmless however often and by whomever it is done: what is done is a repeat, and what was refused is settled again
only by the first message with the next attempt. It repairs what a bug left undone, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, NamedTuple

import asyncpg

from agents.item import Item, is_for, read_item
from agents.outcome import Done, Outcome, Rejected, Stage
from agents.stage import Settled, settle
from ledger.audit_logs import Log
from ledger.commit import OVERTAKEN, Sealed, lock_writer, seal
from ledger.record import Message
from ledger.rows import Connection, uuids
from ledger.sql import load
from topics.catalog import fits
from topics.envelope import ATTEMPT_MAX, with_attempt

_sql = load("agents.recovery", "replay.sql")
_commit = load("ledger", "sql/commit.sql")

WRITER: Final = "replay"
EVENTS_MAX: Final = 200
"""Rehearsed in one transaction, and published in one commit at most."""
BYTES_MAX: Final = 4_000_000
"""Of the values of one batch: its record fits the journal."""
TRIES_MAX: Final = 5


class Verdict(StrEnum):
    DONE = "would be done"
    LATER = "would wait"
    REFUSED = "would be refused"
    IDLE = "nothing left to do"
    REPEAT = "done already"
    SCHEDULED = "waits in the schedule"
    REUSED = "its id was settled with other contents"
    UNREADABLE = "cannot be read"
    LARGE = "is larger than its topic takes once more"
    BUG = "stops its worker"


WANTED: Final = frozenset({Verdict.DONE, Verdict.LATER})
"""What is published when nobody asks for more."""
NEVER: Final = frozenset({Verdict.REUSED, Verdict.UNREADABLE, Verdict.LARGE, Verdict.BUG})
"""What is not published whoever asks: it can only become a dead letter, or stop the worker, or whoever sends it."""


@dataclass(slots=True)
class Given:
    """A message as it was: of a topic, or of a file."""

    topic: str
    """As the broker names it."""
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]
    serialized_key_size: int = 0
    serialized_value_size: int = 0


class Told(NamedTuple):
    """What would become of one event."""

    item: Item
    verdict: Verdict
    code: str = ""
    done: Done | None = None
    """What it would do."""


class _Row(NamedTuple):
    """Of the inbox."""

    attempt: int
    fingerprint: str
    outcome: str


class _Undone(Exception):
    """Rolls the rehearsal back."""


@dataclass
class Replay:
    """One run over the input of one stage."""

    stage: Stage[Any]
    connection: Connection
    seen: set[str] = field(default_factory=set)
    """Events of the batches so far: the topic may hold an event and its repeats."""

    async def rehearse(self, records: Sequence[Given], at: datetime) -> list[Told]:
        """What would become of them, in their order; at most EVENTS_MAX. Nothing is changed."""
        items = [read_item(self.stage, record) for record in records]
        rows = await self._settled(items)
        told: dict[int, Told] = {}
        live: list[tuple[int, Item]] = []
        for index, item in enumerate(items):
            if not is_for(self.stage, item):
                told[index] = _told(item, Done())
                continue
            verdict, code = self._looked(item, rows.get(item.uid))
            if verdict is not None:
                told[index] = Told(item, verdict, code)
                continue
            self.seen.add(item.uid)
            row = rows.get(item.uid)
            live.append((index, item if row is None else _next_attempt(self.stage, item, row.attempt)))
        outcomes = await self._outcomes([item for _, item in live], at)
        for (index, item), outcome in zip(live, outcomes, strict=True):
            told[index] = _told(item, outcome)
        return [told[index] for index in range(len(items))]

    async def publish(self, told: Iterable[Told], at: datetime, actor: str, reason: str, what: str) -> Sealed:
        """Sends them to their topic again. `what`: the range, for the log."""
        messages = [_again(self.stage, one.item) for one in told]
        about = {"events": len(messages), "input": what, "reason": reason}
        log = Log(actor, "stage.replayed", "stage", self.stage.name, None, about)
        for tries in range(1, TRIES_MAX + 1):
            try:
                async with self.connection.transaction():
                    owners = await lock_writer(self.connection, WRITER)
                    return await seal(
                        self.connection, WRITER, owners, blocks=[], messages=messages, at=at, actor=actor,
                        summary={"replayed": len(messages)}, logs=[log],
                    )  # fmt: skip
            except OVERTAKEN:
                if tries == TRIES_MAX:
                    raise
        raise AssertionError("unreachable")

    async def _settled(self, items: Sequence[Item]) -> dict[str, _Row]:
        found = await self.connection.fetch(_sql.settled, self.stage.name, uuids({item.uid for item in items}))
        return {uid: _Row(*rest) for uid, *rest in found}

    def _looked(self, item: Item, row: _Row | None) -> tuple[Verdict | None, str]:
        """None: its stage has yet to say."""
        if item.refusal is not None:
            return Verdict.UNREADABLE, item.refusal.code
        if not fits(self.stage.source.name, item.key, item.record.value, item.record.headers):
            return Verdict.LARGE, ""
        if row is not None and row.fingerprint != item.fingerprint:
            return Verdict.REUSED, ""
        if item.uid in self.seen or (row is not None and row.outcome == "done"):
            return Verdict.REPEAT, ""
        if row is not None and row.outcome == "retry":
            return Verdict.SCHEDULED, ""
        if row is not None and row.attempt >= ATTEMPT_MAX:
            return Verdict.REPEAT, ""
        return None, ""

    async def _outcomes(self, items: Sequence[Item], at: datetime) -> list[Outcome | None]:
        """None: it is done by now. A batch that fails is halved until the event stands alone that is to blame."""
        if not items:
            return []
        careful = False
        for tries in range(1, TRIES_MAX + 1):
            try:
                settled = await self._settle(items, at, careful)
                break
            except OVERTAKEN as error:
                careful = careful or isinstance(error, asyncpg.UniqueViolationError)
                if tries == TRIES_MAX:
                    raise
            except (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError):
                raise
            except Exception as error:
                if len(items) > 1:
                    middle = len(items) // 2
                    return [
                        *(await self._outcomes(items[:middle], at)),
                        *(await self._outcomes(items[middle:], at)),
                    ]
                return [Rejected(_BUG, type(error).__name__)]
        found = {item.uid: outcome for item, outcome in zip(*settled.decided, strict=True)}
        return [found.get(item.uid) for item in items]

    async def _settle(self, items: Sequence[Item], at: datetime, careful: bool) -> Settled:
        stage, connection = self.stage, self.connection
        prepared = await stage.prepare([item.received for item in items if item.received is not None])
        keys = sorted({(item.topic, item.partition) for item in items})
        topics, partitions = [topic for topic, _ in keys], [partition for _, partition in keys]
        try:
            async with connection.transaction():
                await connection.execute(_commit.make_owners, stage.name, topics, partitions)  # it may never have run
                rows = await connection.fetch(_sql.epochs, stage.name, topics, partitions)
                epochs = {(topic, partition): epoch for topic, partition, epoch in rows}
                settled = await settle(connection, stage, items, epochs, at, prepared, careful=careful)
                raise _Undone
        except _Undone:
            return settled


_BUG: Final = "bug"


def _told(item: Item, outcome: Outcome | None) -> Told:
    if outcome is None:
        return Told(item, Verdict.REPEAT)
    if isinstance(outcome, Done):
        rows = (outcome.postings, outcome.inserts, outcome.upserts, outcome.updates, outcome.emits, outcome.calls)
        return Told(item, Verdict.DONE if any(rows) else Verdict.IDLE, done=outcome)
    if not isinstance(outcome, Rejected):
        return Told(item, Verdict.LATER, outcome.code)
    if outcome.code == _BUG:
        return Told(item, Verdict.BUG, outcome.reason)
    return Told(item, Verdict.REFUSED, outcome.code)


def _next_attempt(stage: Stage[Any], item: Item, attempt: int) -> Item:
    """The event as its stage takes it once more."""
    assert isinstance(item.record, Given)
    headers = with_attempt(item.record.headers, max(item.attempt, attempt + 1))
    return read_item(stage, replace(item.record, headers=headers))


def _again(stage: Stage[Any], item: Item) -> Message:
    record = item.record
    return Message(stage.source.name, record.key, record.value, headers=list(record.headers))
