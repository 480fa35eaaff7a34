"""A database from the journal: empty, or an old backup, made the one that was lost.

| phase | what | why there |
| --- | --- | --- |
| read | records in order, each checked against the ones before it in its owners' chains | edited, missing, moved: found before it is written |
| compare | what the database has already must be the very same record | a backup of another history is not mixed with ours |
| write | many records in one transaction of few statements, while the next are read | interrupted, it has whole records, and goes on when called again |
| finish | the untold waits in the outbox; numbers go on far above the used ones | a late record of the lost database shares its number with none |

A record's owners are all at a position that the database has (then it is skipped), or all at the next one (then it is
applied). There is no third case in a journal that is whole.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from ledger.errors import DatabaseAhead, HistoriesDiffer, JournalBroken
from ledger.journal import is_copy
from ledger.links import BEGINNING, Key, Link, Place, links_of, name
from ledger.rebuild_batch import Batch, Before, Journaled, Known, Untold, Writer
from ledger.record import CommitRecord, unpack
from ledger.rows import Connection
from ledger.sql import load
from ledger.tables import JOURNALED, RESTORES

_sql = load("ledger", "sql/rebuild.sql")

GAP: Final = 1_000_000
"""Numbers that a rebuilt database leaves out: a million records cannot have been on their way when the old one was lost."""
TELL_AGAIN: Final = timedelta(hours=1)
"""Of records that do not say what had been told: this much before the journal's end is told again."""
OUTGROWN_PAGES: Final = 100
"""By so much a table has more than twice what the planner knows of: workers that start on tables it takes for empty read them whole."""


class Restore(NamedTuple):
    """A rebuild that was closed by a commit into `restores`: the first `records` of the journal are the history up to it; what
    comes later under a lower number than `first_seq` is of the database that was lost, told to nobody."""

    first_seq: int
    records: int


@dataclass(frozen=True)
class Restored:
    """What a rebuild found and did."""

    records: int
    """Of the history: those that the database had and those that were applied."""
    applied: int
    rows: int
    """In the records that were applied."""
    repeats: int
    """Records that were there once more, as a relay that was killed leaves them."""
    late: int
    """Records of a database that had been lost before: left out."""
    seq_last: int
    """The highest number of the history's records; 0: there are none."""
    at_last: datetime | None
    """The latest time of a commit."""
    first_seq: int
    """The lowest number that a commit from now on can get."""
    to_tell: int
    """Records whose messages may not have left: they wait in the outbox and are emitted as after any crash."""
    foreign: int = 0
    """Messages of the journal that are no records, left out. No chain lacks one."""
    is_copy: bool = False
    """It may tell nobody anything."""


Progress = Callable[[int, int, int], None]
"""Is told the last offset, the records and the rows so far."""


async def rebuild(
    connection: Connection,
    records: AsyncIterable[Journaled],
    *,
    restores: Sequence[Restore] = (),
    tell_from: datetime | None = None,
    progress: Progress | None = None,
    before: Before | None = None,
) -> Restored:
    """Brings the database to the end of `records`, which begin at the journal's beginning. Called again it goes on.

    `connection`: the tables' owner, in the schema; best with synchronous_commit off. `restores`: all that the journal holds.
    `tell_from`: from which time on a record that does not say so is told again; None: always. `before`: called before the
    first record is written.
    Raises JournalBroken, HistoriesDiffer and DatabaseAhead; the database then has whole records only.
    """
    run = _Rebuild(connection, tuple(restores), tell_from, before)
    await run.start()
    try:
        async for one in records:
            await run.take(one)
            if progress is not None:
                progress(one.offset, run.records, run.rows)
        await run.settle()
    except BaseException:
        await run.writer.let_go()
        raise
    await run.check_end()
    return await run.finish()


class _Rebuild:
    def __init__(
        self,
        connection: Connection,
        restores: tuple[Restore, ...],
        tell_from: datetime | None,
        before: Before | None,
    ) -> None:
        self.writer = Writer(connection, before)
        self._connection = connection
        self._restores = restores
        self._tell_from = tell_from
        self._held: dict[Key, Place] = {}
        """Where the database's chains are, when all is written that was taken."""
        self._read: dict[Key, Place] = {}
        """Where the journal's are."""
        self._waiting: set[int] = set()
        """Rows of the outbox that are not marked as journaled."""
        self._arrived: set[int] = set()
        """Those of them that are."""
        self._open: int | None = None
        self._batch = Batch()
        self.records = self.rows = 0
        self._applied = self._repeats = self._late = self._seq_last = self._commit_last = 0
        self._at_last: datetime | None = None

    async def start(self) -> None:
        for stage, topic, partition, *place in await self._connection.fetch(_sql.owners):
            self._held[stage, topic, partition] = Place(*place)
        self._waiting = {row[0] for row in await self._connection.fetch(_sql.waiting)}

    async def take(self, one: Journaled) -> None:
        """The journal's next record."""
        if any(self.records >= restore.records and one.seq < restore.first_seq for restore in self._restores):
            self._late += 1
            return
        try:
            record = unpack(one.packed)
            links = links_of(record)
        except JournalBroken as error:
            raise one.broken(str(error)) from error
        if all(link.place.position <= self._of(link.owner).position for link in links):
            self._repeats += 1
            self._batch.known.append(Known(one, links[0], is_repeat=True))
        else:
            self._check_links(one, links)
            if self._is_there(one, links):
                self._batch.known.append(Known(one, links[0], is_repeat=False))
                if one.seq in self._waiting:
                    self._arrived.add(one.seq)
            else:
                self._apply(one, record, links)
            self._count(one, record, links)
        if self._batch.is_full():
            await self._flush()
        else:
            await self.writer.breathe()

    def _of(self, owner: Key) -> Place:
        """Where the journal is."""
        return self._read.get(owner, BEGINNING)

    def _check_links(self, one: Journaled, links: list[Link]) -> None:
        for link in links:
            last, place, owner = self._of(link.owner), link.place, name(link.owner)
            if place.position != last.position + 1:
                raise one.broken(f"it is position {place.position} of {owner}, after position {last.position}")
            if link.head_after(last.head) != place.head:
                raise one.broken(f"it does not follow from what {owner} was at position {last.position}")
            if place.epoch < last.epoch:
                raise one.broken(f"its writer had lost {owner}")

    def _is_there(self, one: Journaled, links: list[Link]) -> bool:
        """The database has it. Raises HistoriesDiffer when it has another instead."""
        held = [self._held.get(link.owner, BEGINNING) for link in links]
        there = [link.place.position <= place.position for link, place in zip(links, held, strict=True)]
        if all(there):
            return True
        if any(there):
            link = links[there.index(True)]
            raise one.differs(
                f"the database has another commit of {name(link.owner)} at position {link.place.position}"
            )
        for link, place in zip(links, held, strict=True):
            if place.head != self._of(link.owner).head:
                raise one.differs(f"the database has another head of {name(link.owner)} at position {place.position}")
        return False

    def _apply(self, one: Journaled, record: CommitRecord, links: list[Link]) -> None:
        left = sorted(self._waiting - self._arrived)
        if left and any(block.table is RESTORES for block in record.blocks):
            raise _overtaken(left)  # whatever their numbers: two that began from one journal count alike
        for link in links:
            self._held[link.owner] = link.place
        self.rows += self._batch.add(one, record)
        self._applied += 1
        if record.messages and self._may_be_untold(one, record):
            partitions = [link.owner[2] for link in links]
            self._batch.untold[one.seq] = Untold(one.seq, record.stage, record.topic, partitions, record.at, one.packed)

    def _may_be_untold(self, one: Journaled, record: CommitRecord) -> bool:
        if one.open is not None:
            return one.seq >= one.open
        return self._tell_from is None or record.at >= self._tell_from

    def _count(self, one: Journaled, record: CommitRecord, links: list[Link]) -> None:
        for link in links:
            self._read[link.owner] = link.place
            self._commit_last = max(self._commit_last, link.seals[0] or 0)
        self.records += 1
        self._seq_last = max(self._seq_last, one.seq)
        self._at_last = record.at if self._at_last is None else max(self._at_last, record.at)
        self._open = self._open if one.open is None else one.open

    async def settle(self) -> None:
        """Returns when all is written that was taken."""
        await self._flush()
        await self.writer.settle()

    async def _flush(self) -> None:
        batch, self._batch = self._batch, Batch()
        if self._open is not None:
            batch.untold = {seq: untold for seq, untold in batch.untold.items() if seq >= self._open}
        await self.writer.put(batch)

    async def check_end(self) -> None:
        """What the database has more than the journal waits for its relay. Raises DatabaseAhead, JournalBroken when it is the
        journal that lacks its end, or HistoriesDiffer when it would be left out there as late."""
        ahead = {key: place for key, place in self._held.items() if place.position > self._of(key).position}
        if not ahead:
            return
        rows = await self._connection.fetch(_sql.unjournaled, list(self._arrived))
        waiting = {(link.owner, link.place.position) for _, packed in rows for link in links_of(unpack(packed))}
        for owner, place in ahead.items():
            for position in range(self._of(owner).position + 1, place.position + 1):
                if (owner, position) not in waiting:
                    raise JournalBroken(
                        f"it ends before position {position} of {name(owner)}, which the database has: its end is missing"
                    )
        seqs = [seq for seq, _ in rows]
        if any(seqs[0] < restore.first_seq for restore in self._restores):
            raise _overtaken(seqs)
        raise DatabaseAhead(seqs, is_copy=await is_copy(self._connection))

    async def finish(self) -> Restored:
        connection = self._connection
        async with connection.transaction():
            await connection.execute("SET LOCAL synchronous_commit = on")  # and with it all that was committed before
            arrived = list(self._arrived)
            if self._open is not None:
                await connection.execute(_sql.told, self._open, arrived)
            await connection.execute(_sql.journaled, arrived)
            first_seq = await connection.fetchval(_sql.number_records, self._seq_last + GAP)
            await connection.execute(_sql.number_batches, self._commit_last + GAP)
            to_tell = await connection.fetchval(_sql.to_tell)
        await self._tell_the_planner()
        return Restored(
            records=self.records,
            applied=self._applied,
            rows=self.rows,
            repeats=self._repeats,
            late=self._late,
            seq_last=self._seq_last,
            at_last=self._at_last,
            first_seq=first_seq,
            to_tell=to_tell,
        )

    async def _tell_the_planner(self) -> None:
        """Of what there is, whoever wrote it: a rebuild that died at its last moment, perhaps."""
        await self._connection.execute(_sql.summarize)
        names = [table.name for table in JOURNALED]
        if outgrown := await self._connection.fetch(_sql.outgrown, names, OUTGROWN_PAGES):
            await self._connection.execute(f"ANALYZE {', '.join(name for (name,) in outgrown)}")


def _overtaken(seqs: Sequence[int]) -> HistoriesDiffer:
    return HistoriesDiffer(
        f"the database has {len(seqs)} commits (records {seqs[0]} to {seqs[-1]}) that the journal lacks, of before another"
        " database took over: the deployment goes on without them; rebuild an empty database, or a newer backup"
    )
