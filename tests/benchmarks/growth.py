"""deposits.growth: the end-to-end rate (end_to_end.py) of a full system with a backlog, over that of an empty one.

Full: the ledger's tables as ledger_fill.py fills them, and as many deposits, reports and inbox rows as its entries are of, all
with the indexes that they have. Between the runs nothing of it is copied or emptied: each adds its own. The backlog waits in Kafka.

After a checkpoint PostgreSQL writes each page whole at its first change: a hundred thousand deposits meet nearly every page of
indexes of random ids once. So that happens as often as a server as operations.md sets it up makes it happen, which is every quarter
of an hour, and not before each run: all databases are made before the first run, and the first is the one after a checkpoint.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

from tests.benchmarks import end_to_end, workload
from tests.benchmarks.end_to_end import Run
from tests.benchmarks.ledger_fill import fill
from tests.benchmarks.ledger_load import ACCOUNT_COLUMNS, HOT, START, connect, copy, users
from tests.benchmarks.parts import TEMPLATE, Parts
from tests.benchmarks.sides import WORKER
from tests.benchmarks.workload import Workload

GROWN: Final = "benchmark_grown"
EMPTY: Final = "benchmark_empty_{}"
USERS: Final = 10_000
SESSION_S: Final = 85
"""A worker that is frozen while the backlog is loaded must stay in its group; Faust takes no more than 90."""
SIDE: Final = replace(
    WORKER,
    settings={"STABLERAIL_KAFKA_SESSION_TIMEOUT_S": str(SESSION_S), "STABLERAIL_WORKER_STALLED_S_MAX": str(SESSION_S)},
)

# Rows of deposits that became final long ago. Ids as random as real ones.
_FILLS: Final = (
    """INSERT INTO deposits SELECT md5('d' || n)::uuid, 0, 'MATIC', '0x' || md5('t' || n) || md5('u' || n),
    '0x' || left(md5('r' || n % 10000) || md5('q' || n % 10000), 40), 'USDC', 25000000, 'user_' || n % 10000, 'finalized', 1, '',
    '0x' || md5('b' || n / 50) || md5('c' || n / 50), n / 50, n % 50, $2, $2, $2,
    '0x' || left(md5('s' || n) || md5('p' || n), 40), NULL, NULL FROM generate_series(1, $1::int) n""",
    """INSERT INTO deposit_reports SELECT md5('e' || n)::uuid, 'circle', md5('f' || n),
    md5('d' || n)::uuid, md5('d' || n)::uuid, 'complete', NULL, $2 FROM generate_series(1, $1::int) n""",
    """INSERT INTO inbox SELECT 'credit_deposits', md5('i' || n)::uuid, 1, md5('j' || n)::uuid, 'done', $2
    FROM generate_series(1, $1::int) n""",
)


@asynccontextmanager
async def databases(parts: Parts, addresses: Sequence[str], entries: int, rounds: int) -> AsyncIterator[None]:
    """A full one and for each round an empty one, all with the wallets, and a checkpoint just made; gone afterwards."""
    await parts.prepare(addresses)
    every = [GROWN, *(EMPTY.format(turn) for turn in range(rounds))]
    for name in every:
        parts.postgres.drop_database(name)
        parts.postgres.create_database(name, template=TEMPLATE)
    try:
        dsn = parts.postgres.dsn_of(GROWN)
        connection = await connect(dsn)
        try:
            rows = [
                "\t".join((a.id, a.owner, a.type, a.asset, a.shard, "0", "0", START.isoformat()))
                for a in (HOT, *users(USERS))
            ]
            await copy(connection, "accounts", ACCOUNT_COLUMNS, "\n".join([*rows, ""]))
            await fill(connection, USERS, entries // 2)
            for rows_of in _FILLS:
                await connection.execute(rows_of, entries // 2, START)
            await connection.execute("VACUUM ANALYZE")
        finally:
            await connection.close()
        parts.postgres.execute("CHECKPOINT")
        yield
    finally:
        for name in every:
            parts.postgres.drop_database(name)


async def run_grown(parts: Parts, load: Workload, backlog: int, seed: int, limit_s: float) -> Run:
    """One run in the full database. `seed`: of this round; its deposits are none of the rounds before."""
    connection = await connect(parts.postgres.dsn_of(GROWN))
    try:
        await connection.execute("DELETE FROM outbox")  # what the last round's killed worker had told already
    finally:
        await connection.close()
    work = workload.again(load, backlog, seed)
    return await end_to_end.run(parts, SIDE, work, limit_s, kept=GROWN, freeze_s_max=SESSION_S - 5)


async def run_empty(parts: Parts, load: Workload, turn: int, limit_s: float) -> Run:
    return await end_to_end.run(parts, SIDE, load, limit_s, kept=EMPTY.format(turn))
