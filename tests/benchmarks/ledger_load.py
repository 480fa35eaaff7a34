"""What the ledger's benchmarks post, and into what: transfers between one hot account and ten thousand users, and databases.

Every database is a copy of one template: our migrations, the baselines' tables, the users' accounts at zero. A run begins with
a checkpoint just made, and ends with a look at what is there: a side that lost or repeated a transfer has no figure.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NamedTuple

from ledger.accounts import Account, buffer, spendable
from ledger.migrate import upgrade
from ledger.posting import Transaction, credit, debit
from ledger.rows import Connection
from stablerail.config import load_settings
from stablerail.connections import connector
from stablerail.dev.postgres import Postgres
from tests.benchmarks.baselines import plain_fold
from tests.benchmarks.parts import SCHEMA

TEMPLATE: Final = "benchmark_ledger_template"
START: Final = datetime(2026, 1, 1, tzinfo=UTC)
BATCH: Final = 1_000
HOT: Final = buffer()
ACCOUNT_COLUMNS: Final = ("id", "owner", "type", "asset", "shard", "balance", "version", "updated_at")


@dataclass(frozen=True)
class Sizes:
    """How many transfers a run posts, and between how many users."""

    users: int
    hot: int
    naive: int
    single: int
    floor: int
    growth: int
    small_entries: int
    large_entries: int


FULL: Final = Sizes(
    users=10_000, hot=102_000, naive=3_000, single=1_500, floor=42_000, growth=102_000,
    small_entries=10_000, large_entries=10_000_000,
)  # fmt: skip
QUICK: Final = Sizes(
    users=500, hot=4_000, naive=200, single=50, floor=3_000, growth=4_000, small_entries=1_000, large_entries=20_000
)
"""Two batches more than are measured."""


class Transfer(NamedTuple):
    """From the hot account to a user. Both ids random, 32 hex digits."""

    id: str
    reference: str
    user: int
    amount: int


def users(count: int) -> list[Account]:
    return [spendable(f"user_{number}") for number in range(count)]


def batches(transfers: int, among: int, seed: int, size: int = BATCH) -> list[list[Transfer]]:
    """The whole of a run's work, drawn before its clock runs. Users and amounts are the seed's, ids are never the same."""
    draw, ids = random.Random(seed), os.urandom(32 * transfers).hex()
    every = [
        Transfer(ids[at : at + 32], ids[at + 32 : at + 64], draw.randrange(among), draw.randrange(1, 10**9))
        for at in range(0, 64 * transfers, 64)
    ]
    return [every[first : first + size] for first in range(0, transfers, size)]


def transaction_of(transfer: Transfer, among: Sequence[Account]) -> Transaction:
    id, reference, user, amount = transfer
    return Transaction(id, "deposit", reference, (debit(among[user], amount), credit(HOT, amount)))


async def make_template(postgres: Postgres, count: int) -> None:
    postgres.drop_database(TEMPLATE)
    dsn = postgres.create_database(TEMPLATE)
    await upgrade(dsn, SCHEMA)
    connection = await connect(dsn)
    try:
        names = [HOT, *users(count)]
        rows = ["\t".join((a.id, a.owner, a.type, a.asset, a.shard, "0", "0", START.isoformat())) for a in names]
        await copy(connection, "accounts", ACCOUNT_COLUMNS, "\n".join([*rows, ""]))
        await connection.execute(plain_fold.SCHEMA)
        await connection.execute("VACUUM ANALYZE")
    finally:
        await connection.close()


async def connect(dsn: str, **server: str) -> Connection:
    """The product's own way, for all sides; as the owner, because the baselines have tables of their own."""
    settings = load_settings(env_file=None, database_url=dsn, database_schema=SCHEMA)
    return await connector(settings, role="none", **server)()


async def copy(connection: Connection, table: str, columns: Iterable[str], lines: str, schema: str = SCHEMA) -> None:
    async def source() -> AsyncIterator[bytes]:
        yield lines.encode()

    await connection.copy_to_table(table, source=source(), columns=list(columns), schema_name=schema)


@asynccontextmanager
async def database(postgres: Postgres, name: str, template: str = TEMPLATE) -> AsyncIterator[str]:
    """The DSN of a fresh copy of the template; gone afterwards."""
    postgres.drop_database(name)
    dsn = postgres.create_database(name, template=template)
    postgres.execute("CHECKPOINT")
    try:
        yield dsn
    finally:
        postgres.drop_database(name)


async def seconds(post: Callable[[list[Transfer]], Awaitable[None]], work: Iterable[list[Transfer]]) -> float:
    """How long the batches take, one after the other."""
    gc.collect()
    gc.set_threshold(100_000, 50, 100)  # as the worker has it
    started = time.perf_counter()
    for batch in work:
        await post(batch)
    return time.perf_counter() - started


async def check(connection: Connection, schema: str, transfers: int) -> None:
    """Raises RuntimeError unless each transfer is there once and all accounts sum to zero."""
    found = await connection.fetchrow(
        f"SELECT (SELECT count(*) FROM {schema}.entries), (SELECT count(*) FROM {schema}.transactions),"
        f" (SELECT sum(balance)::bigint FROM {schema}.accounts)"
    )
    if found is None or tuple(found) != (2 * transfers, transfers, 0):
        raise RuntimeError(f"{transfers} transfers posted into {schema}, and found are {found}")
