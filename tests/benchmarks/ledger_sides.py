"""The sides of ledger.hot_batch, ledger.single and ledger.growth: each posts the same transfers over connections like a worker's.

Ours is `ledger.book.post` with all that belongs to it: transactions made of the transfers, fingerprints, versions, refusals,
results in order, audit chain, commit record; then the relay, which marks the record as journaled and deletes it, with a
publisher that keeps nothing (what Kafka costs is deposits.end_to_end's affair). As in a worker (agents/delivery.py) the next batch
commits while the relay does that with those before, in one turn what waits for it, and no more than IN_FLIGHT are between their
commit and the journal; the clock stops when the last is marked. The baselines stop at their COMMIT.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Final, NoReturn

from ledger import book
from ledger.commit import Sealed
from ledger.errors import PostingRefused
from ledger.journal import Relay
from ledger.rows import Connection
from tests.benchmarks.baselines import naive_posting, plain_fold
from tests.benchmarks.ledger_load import HOT, Transfer, check, connect, seconds, transaction_of, users
from tests.benchmarks.parts import SCHEMA

CONNECTIONS: Final = 16
IN_FLIGHT: Final = 2
"""As the setting of a stage has it."""
WARM: Final = 2
"""Batches before the clock: statements are prepared, caches filled."""
ON_DISK: Final = ("transactions", "entries", "accounts", "audit", "owners")
WAL: Final = "SELECT (pg_current_wal_lsn() - '0/0')::bigint"
TWO_ROWS: Final = """INSERT INTO plain.entries (account_id, transaction_id, at, direction, amount, balance_after)
VALUES ($1, $2, $3, 'd', $4, $4), ($5, $2, $3, 'c', $4, $4)"""

Batches = Sequence[list[Transfer]]


class Ours:
    """A writer and its relay."""

    def __init__(self, connection: Connection, relay: Relay, count: int) -> None:
        self._connection = connection
        self._relay = relay
        self._users = users(count)
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._finishing: asyncio.Queue[Sealed] = asyncio.Queue()

    async def post(self, transfers: list[Transfer]) -> None:
        among = self._users
        requests = [transaction_of(transfer, among) for transfer in transfers]
        await self._slots.acquire()
        batch = await book.post(self._connection, "benchmark", requests, datetime.now(UTC))
        if batch.sealed is None or any(isinstance(result, PostingRefused) for result in batch.results):
            raise RuntimeError("a transfer was refused")
        self._finishing.put_nowait(batch.sealed)

    async def settled(self) -> None:
        """When what was posted is in the journal, and marked."""
        for _ in range(IN_FLIGHT):
            await self._slots.acquire()
        await self._relay.journal()
        for _ in range(IN_FLIGHT):
            self._slots.release()

    async def finish(self) -> NoReturn:
        while True:
            sealed = [await self._finishing.get()]
            while not self._finishing.empty():
                sealed.append(self._finishing.get_nowait())
            await self._relay.journal([(one.seq, one.record) for one in sealed], marked=False)
            self._relay.emitted([one.seq for one in sealed])
            for _ in sealed:
                self._slots.release()


@asynccontextmanager
async def ours(dsn: str, count: int) -> AsyncIterator[tuple[Ours, Connection]]:
    """Also a connection to look at what is there."""

    async def keep_nothing(_records: Sequence[tuple[int, bytes]], _untold: int) -> None:
        pass

    relay = Relay(lambda: connect(dsn, synchronous_commit="off"), keep_nothing)
    connection = await connect(dsn)
    try:
        async with asyncio.TaskGroup() as tasks:
            side = Ours(connection, relay, count)
            finishing = tasks.create_task(side.finish())
            yield side, connection
            finishing.cancel()
    finally:
        await relay.close()
        await connection.close()


@dataclass(frozen=True)
class Run:
    rate: float
    """Transfers per second."""
    disk_bytes: float = 0.0
    """Per transfer, with indexes; ours without the outbox, whose rows go."""
    wal_bytes: float = 0.0
    """Per transfer."""


async def run_ours(dsn: str, count: int, work: Batches, *, before: int = 0, journaled: bool = False) -> Run:
    """`before`: transfers that are there. `journaled`: wait for the journal after each batch."""
    async with ours(dsn, count) as (side, connection):
        rate, wal = await _clocked(connection, side.post, work, side.settled, each=journaled)
        await check(connection, SCHEMA, before + sum(map(len, work)))
        on_disk = " + ".join(f"pg_total_relation_size('{SCHEMA}.{table}')" for table in ON_DISK)
        size = await connection.fetchval(f"SELECT {on_disk}")
        return Run(rate, size / (before + sum(map(len, work))), wal)


async def run_plain_fold(dsn: str, count: int, work: Batches) -> Run:
    connection = await connect(dsn)
    names = users(count)

    async def post(transfers: list[Transfer]) -> None:
        given = [(id, reference, names[user].id, amount) for id, reference, user, amount in transfers]
        await plain_fold.post(connection, HOT.id, given, datetime.now(UTC))

    try:
        rate, wal = await _clocked(connection, post, work)
        await check(connection, "plain", sum(map(len, work)))
        return Run(rate, wal_bytes=wal)
    finally:
        await connection.close()


async def run_naive(dsn: str, count: int, work: Batches) -> Run:
    async with AsyncExitStack() as stack:
        connections = []
        for _ in range(CONNECTIONS):
            connections.append(await connect(dsn))
            stack.push_async_callback(connections[-1].close)
        names = users(count)
        transfers = [
            (id, reference, names[user].id, amount) for id, reference, user, amount in chain.from_iterable(work)
        ]
        started = time.perf_counter()
        await naive_posting.post_all(connections, HOT.id, transfers, datetime.now(UTC))
        spent = time.perf_counter() - started
        await check(connections[0], "plain", len(transfers))
        return Run(len(transfers) / spent)


async def run_two_rows(dsn: str, count: int, work: Batches) -> Run:
    """BEGIN; INSERT two rows; COMMIT."""
    connection = await connect(dsn)
    names = users(count)

    async def post(transfers: list[Transfer]) -> None:
        for id, _, user, amount in transfers:
            async with connection.transaction():
                await connection.execute(TWO_ROWS, names[user].id, id, datetime.now(UTC), amount, HOT.id)

    try:
        return Run((await _clocked(connection, post, work))[0])
    finally:
        await connection.close()


async def _nothing() -> None:
    return None


async def _clocked(
    connection: Connection,
    post: Callable[[list[Transfer]], Awaitable[None]],
    work: Batches,
    settled: Callable[[], Awaitable[None]] = _nothing,
    *,
    each: bool = False,
) -> tuple[float, float]:
    """Transfers per second, and bytes of WAL per transfer."""

    async def one(transfers: list[Transfer]) -> None:
        await post(transfers)
        if each:
            await settled()

    for batch in work[:WARM]:
        await one(batch)
    await settled()
    wal = await connection.fetchval(WAL)
    spent = await seconds(one, work[WARM:])
    started = time.perf_counter()
    await settled()
    spent += time.perf_counter() - started
    wal = await connection.fetchval(WAL) - wal
    number = sum(map(len, work[WARM:]))
    return number / spent, wal / number
