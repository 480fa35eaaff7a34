"""The relay: commit records go to the one partition of the journal topic, in sequence, by group commit.

| phase | what | why there |
| --- | --- | --- |
| lock | the relay row | one publisher at a time; whoever waited finds its records done |
| read | all visible records that are not journaled, in sequence | what is journaled is closed under dependency |
| publish | acks=all, awaited; of many bytes a part at a time | nothing is told to anyone before the journal has it; from here on it may be |
| mark | journaled, and rows whose messages have left are deleted | one statement for both; a lost mark only repeats a record |

The relay's connection runs with synchronous_commit off: a mark lost in a crash repeats a record, and readers drop
sequence numbers they have seen. The commit's own connection never does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Final

import structlog

from ledger.commit import TRANSIENT, lost_not_cancelled
from ledger.errors import ACopy, DatabaseBehind
from ledger.links import Placed
from ledger.rows import Connection
from ledger.sql import load

_sql = load("ledger", "sql/journal.sql")
_log = structlog.get_logger()

Publish = Callable[[Sequence[tuple[int, bytes]], int], Awaitable[None]]
"""Sends (sequence, record) pairs in order; returns when the broker has them all. With them the lowest sequence number whose
messages may not have left: whoever has only the journal knows that all below it were told."""
Connect = Callable[[], Awaitable[Connection]]
LastJournaled = Callable[[], Awaitable[Sequence[Placed]]]
"""The records at the journal's end, of those whose places in the chains can be read."""

BYTES_AT_ONCE: Final = 64_000_000
"""Of records of the outbox that are read at once; one may have as many."""
RETRY_WAIT_S_MAX = 2.0
_LOCK: Final = f"BEGIN; {_sql.lock_relay}"
"""One round trip; what comes back of it is what the last statement did."""
_LOCKED: Final = "SELECT 1"


class _Floor:
    """The sequence number from which on a turn looks: so that it does not walk over all rows that went while somebody reads a
    snapshot for an hour (a dump, `verify`), and PostgreSQL must keep them.

    Below the lowest row that one look finds, only transactions that ran at that moment can still show one. When they have
    ended and another look finds none either, none will come. They are all older than the next turn's own transaction. The look's
    own snapshot does not tell: its xmax is behind the youngest that has ended, and younger ones may run.
    """

    def __init__(self) -> None:
        self.seq = 0
        self._next = 0
        self._younger: int | None = None
        """A transaction that began after the look that found `_next`: that of the next one."""

    def look(self, lowest: int, xmin: int, own: int) -> None:
        """`lowest` row at or above `seq` of a look by the transaction `own`; below `xmin` every transaction has ended."""
        if self._younger is None:
            self._younger = own
        if xmin >= self._younger:
            self.seq = max(self.seq, min(self._next, lowest))
            self._next, self._younger = lowest, None


def _portions(sizes: Iterable[tuple[int, int]]) -> Iterator[list[int]]:
    """The numbers of (seq, bytes), in parts that are read and published at once."""
    some: list[int] = []
    total = 0
    for seq, size in sizes:
        if some and total + size > BYTES_AT_ONCE:
            yield some
            some, total = [], 0
        some.append(seq)
        total += size
    if some:
        yield some


async def is_copy(connection: Connection) -> bool:
    """Whether what is committed there gets nowhere: a rebuild made it, and it has not taken over."""
    return bool(await connection.fetchval(_sql.is_copy))


class Relay:
    """One per process. `journal` is called by every committer of the process, at once if they like. It raises ACopy where the
    database is one, and DatabaseBehind where it is not the one that the journal is of; `last_journaled` None: nobody asks that.

    Both are asked anew with each connection: at the same address another server may answer, which was promoted when the first
    died and never heard of its last commits."""

    def __init__(
        self,
        connect: Connect,
        publish: Publish,
        retry_on: tuple[type[Exception], ...] = (),
        last_journaled: LastJournaled | None = None,
    ) -> None:
        self._connect = connect
        self._publish = publish
        self._retry_on: tuple[type[Exception], ...] = (*TRANSIENT, *retry_on)
        self._last_journaled = last_journaled
        self._connection: Connection | None = None
        self._is_checked = False
        """The connection's database is the one that the journal is of."""
        self._lock = asyncio.Lock()
        self._fresh: dict[int, bytes] = {}
        self._emitted: list[int] = []
        self._marking: asyncio.Task[None] | None = None
        """The end of a turn whose records are in the journal. It has the connection until then, and the relay row."""
        self._floor = _Floor()
        self.group_sizes: deque[int] = deque(maxlen=1_000)
        """Records per turn, the last thousand."""

    async def journal(self, records: Sequence[tuple[int, bytes]] = (), *, marked: bool = True) -> None:
        """Returns when these records (just committed by the caller) and all before them are in the journal; with `marked` also
        marked: who then asks the database what is journaled needs that, who only tells does not."""
        self._fresh.update(records)
        wait_s = 0.05
        async with self._lock:
            # along with another caller's turn
            taken = bool(records) and not any(seq in self._fresh for seq, _ in records)
            while True:
                if taken and not marked:
                    return
                try:
                    with lost_not_cancelled():
                        await self._settled()
                        if taken:
                            return
                        await self._turn(await self._checked())
                        if marked:
                            await self._settled()
                    for seq, _ in records:  # visible and not waiting: another process's relay may have taken them
                        self._fresh.pop(seq, None)
                    return
                except self._retry_on as error:
                    taken = False  # what was published and not marked goes again
                    _log.warning("journal.retry", error=type(error).__name__)
                    await self._disconnect()
                    await asyncio.sleep(wait_s)
                    wait_s = min(wait_s * 2, RETRY_WAIT_S_MAX)

    async def check(self) -> None:
        """Before anything is told or done: the database is the one that the journal is of, at its end. A commit is there before
        the journal has it, so a record that is missing was made by a database that was lost; not only the last is looked for, since a
        server that came in its place may have made more before it heard of that one. Raises DatabaseBehind and ACopy."""
        async with self._lock:
            await self._checked()

    async def _checked(self) -> Connection:
        """The connection, whose database was looked at. Raises as `check`."""
        if (ready := self._ready()) is not None:
            return ready
        connection = await self._connected()
        await self._compare(connection)
        self._is_checked = True
        return connection

    async def look(self) -> None:
        """As `check`, by a connection of its own: for whoever has just connected, and has others beside the relay's."""
        connection = await self._connect()
        try:
            await self._compare(connection)
        finally:
            connection.terminate()

    async def _compare(self, connection: Connection) -> None:
        if self._last_journaled is None:
            return
        last = await self._last_journaled()  # first: what the journal has, the database had before
        relay, first_seq = await connection.fetchrow(_sql.standing) or (None, 0)
        if relay is None:
            raise ACopy
        # below it: the history before a rebuild, and late ones of the database that was lost
        wanted = [(one, link) for one in last if one.seq >= first_seq for link in one.links]
        places = [(*link.owner, link.place.position, link.place.head) for _, link in wanted]
        if places:
            number = await connection.fetchval(_sql.missing, *map(list, zip(*places, strict=True)))
            if number is not None:
                one, _ = wanted[number - 1]
                raise DatabaseBehind(one.seq, one.at)

    def emitted(self, seqs: Sequence[int]) -> None:
        """The messages of these records have left: their rows go with the next turn."""
        self._emitted.extend(seqs)

    async def tidy(self) -> None:
        """Deletes what has been emitted: without a next commit no turn would, and the sweeper would emit it again. After a lost
        connection a turn does it, which asks first whose numbers they are; it raises what `journal` does."""
        if not self._emitted:
            return
        async with self._lock:
            await self._settled()
            connection = self._ready()
            if connection is not None:
                gone = list(self._emitted)
                await connection.execute(_sql.delete, gone)
                del self._emitted[: len(gone)]
                return
        await self.journal()

    async def close(self) -> None:
        """Deletes what has been emitted and closes the connection."""
        try:
            if self._emitted:
                await self.journal()
            elif self._marking is not None:
                await asyncio.gather(self._marking, return_exceptions=True)
        finally:
            await self._disconnect()

    async def _turn(self, connection: Connection) -> None:
        """Until the records are published. `_settled` waits for the rest of it."""
        gone = list(self._emitted)
        try:
            if await connection.execute(_LOCK) != _LOCKED:
                raise ACopy
            rows = await connection.fetch(_sql.waiting, self._floor.seq, gone)
            seqs: list[int] = []
            if rows:
                first, _, oldest, xmin, own = rows[0]
                untold = first if oldest is None else min(first, oldest)
                self._floor.look(untold, xmin, own)
                for some in _portions((seq, size) for seq, size, *_ in rows):
                    if records := await self._records(connection, some):
                        await self._publish(records, untold)
                        seqs += [seq for seq, _ in records]
        except BaseException:
            await self._disconnect()
            raise
        for seq in seqs:
            self._fresh.pop(seq, None)
        self.group_sizes.append(len(seqs))
        self._marking = asyncio.create_task(self._mark(connection, seqs, gone))

    async def _records(self, connection: Connection, seqs: Sequence[int]) -> list[tuple[int, bytes]]:
        known = {seq: self._fresh.get(seq) for seq in seqs}
        if missing := [seq for seq, record in known.items() if record is None]:
            known.update(dict(tuple(row) for row in await connection.fetch(_sql.records, missing)))
        # without a record: deleted since the turn's look, by another process, which had published and told it
        return [(seq, record) for seq, record in known.items() if record is not None]

    async def _mark(self, connection: Connection, seqs: Sequence[int], gone: Sequence[int]) -> None:
        try:
            with lost_not_cancelled():
                if seqs or gone:
                    await connection.execute(_sql.mark, seqs, gone)
                await connection.execute("COMMIT")
        except BaseException:
            connection.terminate()
            raise
        del self._emitted[: len(gone)]

    async def _settled(self) -> None:
        """When the turn before has marked what it published, or failed to, which is raised."""
        marking = self._marking
        if marking is None:
            return
        try:
            await asyncio.shield(marking)  # others wait for it too: it does not end with whoever is cancelled
        finally:
            if marking.done():
                self._marking = None

    def _ready(self) -> Connection | None:
        """The connection, while it lives and its database was looked at."""
        alive = self._connection is not None and not self._connection.is_closed()
        return self._connection if alive and self._is_checked else None

    async def _connected(self) -> Connection:
        if self._connection is None or self._connection.is_closed():
            self._connection = await self._connect()
            self._is_checked = False
            # another server counts its transactions, and may count its records, from somewhere else
            self._floor = _Floor()
        return self._connection

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()
