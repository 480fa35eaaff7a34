"""How a rebuild writes: the records of a batch by one transaction, while the next ones are read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, NamedTuple

import asyncpg

from ledger.errors import HistoriesDiffer, JournalBroken
from ledger.folding import count_of, fold
from ledger.links import Link, name
from ledger.record import CommitRecord
from ledger.rows import Block, Connection, write
from ledger.sql import load

_sql = load("ledger", "sql/rebuild.sql")

ROWS_MAX: Final = 20_000
BYTES_MAX: Final = 8 * 1024 * 1024
"""Of literals, in a transaction: enough that its statements' own cost is none, and little to do again."""


Before = Callable[[Connection], Awaitable[object]]
"""Called before the first record is written."""


class Journaled(NamedTuple):
    """A whole record as the journal has it."""

    seq: int
    packed: bytes
    offset: int
    """Of its last part."""
    open: int | None = None
    """Everything that was journaled before and is below this number had been told. None: an older program's record."""

    def broken(self, why: str) -> JournalBroken:
        return JournalBroken(f"record {self.seq} at offset {self.offset}: {why}")

    def differs(self, why: str) -> HistoriesDiffer:
        return HistoriesDiffer(
            f"record {self.seq} at offset {self.offset}: {why}; is it this database's journal? If another database has taken over"
            " meanwhile, rebuild an empty one, or a newer backup"
        )


class Known(NamedTuple):
    """A record that the database must have already: at this place in the audit."""

    one: Journaled
    link: Link
    is_repeat: bool


class Untold(NamedTuple):
    """A row of the outbox, for a record whose messages may not have left."""

    seq: int
    stage: str
    topic: str
    partitions: list[int]
    at: datetime
    packed: bytes


@dataclass
class Batch:
    """What one transaction does."""

    records: list[tuple[Journaled, CommitRecord]] = field(default_factory=list)
    untold: dict[int, Untold] = field(default_factory=dict)
    known: list[Known] = field(default_factory=list)
    rows: int = 0
    size: int = 0

    def add(self, one: Journaled, record: CommitRecord) -> int:
        """The number of its rows."""
        rows = 0
        for block in (*record.blocks, *record.proof):
            rows += count_of(block)
            self.size += sum(map(len, block.columns))
        self.records.append((one, record))
        self.rows += rows
        return rows

    def is_full(self) -> bool:
        return self.rows >= ROWS_MAX or self.size >= BYTES_MAX or len(self.known) >= ROWS_MAX

    def blocks(self) -> Iterator[Block]:
        for _, record in self.records:
            yield from record.blocks
            yield from record.proof


class Writer:
    """One batch at a time. Whoever waits for it gets what went wrong with the one before."""

    def __init__(self, connection: Connection, before: Before | None) -> None:
        self._connection = connection
        self._before = before
        self._task: asyncio.Task[None] | None = None

    async def put(self, batch: Batch) -> None:
        await self.settle()
        self._task = asyncio.create_task(self._write(batch))
        await asyncio.sleep(0)

    async def settle(self) -> None:
        """Returns when everything is written. Raises JournalBroken, HistoriesDiffer; the batch is then not in the database,
        or only whole records of it."""
        task, self._task = self._task, None
        if task is not None:
            await task

    async def let_go(self) -> None:
        """Something else failed: the batch ends as it may."""
        task, self._task = self._task, None
        if task is not None:
            await asyncio.gather(task, return_exceptions=True)

    async def breathe(self) -> None:
        """What PostgreSQL is to write goes on its way."""
        if self._task is not None and not self._task.done():
            await asyncio.sleep(0)

    async def _write(self, batch: Batch) -> None:
        connection = self._connection
        if batch.records and self._before is not None:
            await self._before(connection)
            self._before = None
        try:
            deleted, written = fold(batch.blocks())
            async with connection.transaction():
                await write(connection, deleted)
                await write(connection, written)
                await self._tell_again(batch.untold.values())
        except (
            asyncpg.IntegrityConstraintViolationError,
            asyncpg.DataError,
            asyncpg.CardinalityViolationError,
            ValueError,
        ):
            await self._one_by_one(batch)
        await self._compare(batch.known)

    async def _one_by_one(self, batch: Batch) -> None:
        """As the commits were made: finds the one that cannot be, and goes where a fold cannot (two rows that exchange a
        value which must be unique)."""
        for one, record in batch.records:
            try:
                async with self._connection.transaction():
                    await write(self._connection, [*record.blocks, *record.proof])
                    await self._tell_again([batch.untold[one.seq]] if one.seq in batch.untold else [])
            except (asyncpg.PostgresError, ValueError) as error:
                raise one.broken(f"it cannot be written: {error}") from error

    async def _tell_again(self, untold: Iterable[Untold]) -> None:
        if rows := list(untold):
            await self._connection.executemany(_sql.tell_again, rows)

    async def _compare(self, known: list[Known]) -> None:
        if not known:
            return
        keys = zip(*(each.link.owner for each in known), strict=True)
        places = [[each.link.place.position for each in known], [each.link.digest for each in known]]
        heads = [each.link.place.head for each in known]
        number = await self._connection.fetchval(_sql.another, *map(list, keys), *places, heads)
        if number is not None:
            one, link, is_repeat = known[number - 1]
            if is_repeat:
                raise one.broken(f"{name(link.owner)} has another record at position {link.place.position} before it")
            raise one.differs(
                f"the database has another commit of {name(link.owner)} at position {link.place.position}"
            )
