"""ledger.reads: what reading costs on a hot account of millions of entries, over one asyncpg connection, one read at a time.

The account is filled with COPY as a worker would have filled it: 500 entries share a time, as a batch's do, the next batch
comes a moment later, and nights are quiet. Each entry has its transaction, whose id is random. A smaller account has a
thousand entries of the same kind; ten thousand customers have an account each.

Each side makes the same number of calls in a round, with times, versions and accounts drawn anew; the sides take turns. The
baselines are the shortest statements that could give the answer if somebody already knew where it is: the row by its primary
key.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

import asyncpg

from ledger.migrate import upgrade
from ledger.reading import AccountName, balance
from ledger.rows import Connection
from ledger.statement import open_statement, read_page
from tests.benchmarks.parts import SCHEMA, Parts

DATABASE: Final = "benchmark_reads"
HOT: Final = AccountName("system", "system_buffer_usdc", "USDC", "")
SMALL: Final = AccountName("system", "suspense_usdc", "USDC", "")
SMALL_ENTRIES: Final = 1_000
"""Of which the pages begin in the first half, so that all are full."""
CUSTOMERS: Final = 10_000
BATCH: Final = 500
BATCHES_A_DAY: Final = 200
PAGE: Final = 100
START: Final = datetime(2026, 1, 1, tzinfo=UTC)
TURN: Final = 25
COPY_ROWS: Final = 20_000
AMOUNT: Final = 25_000_000

ENTRY_COLUMNS: Final = [
    "account_id", "version", "transaction_id", "seq", "direction", "amount", "balance_after", "at",
]  # fmt: skip
TRANSACTION_COLUMNS: Final = ["id", "kind", "reference", "fingerprint", "at"]
BARE_ENTRY = "SELECT balance_after::text FROM entries WHERE account_id = $1 AND version = $2"
BARE_ACCOUNT = "SELECT balance::text FROM accounts WHERE id = $1"


@dataclass(frozen=True)
class Side:
    """One way to read. Where is drawn before the clock runs."""

    draw: Callable[[random.Random], Any]
    read: Callable[[Any], Awaitable[object]]


@dataclass(frozen=True)
class Reads:
    """Every second side is the baseline of the one before."""

    balance_at: Side
    bare_entry: Side
    balance: Side
    bare_account: Side
    page: Side
    page_of_small: Side


async def rates(sides: Sequence[Side], draw: random.Random, number: int) -> list[float]:
    """Reads a second of each, in turns of a few: what else the machine does meanwhile, it does to all.

    A tenth as many are made before and not counted, so that statements are prepared and planned.
    """
    seconds = [0.0] * len(sides)
    for turn in range(-(number // TURN // 10) - 1, number // TURN):
        for which, side in enumerate(sides):
            places, read = [side.draw(draw) for _ in range(TURN)], side.read
            started = time.perf_counter()
            for one in places:
                await read(one)
            if turn >= 0:
                seconds[which] += time.perf_counter() - started
    return [number // TURN * TURN / spent for spent in seconds]


@asynccontextmanager
async def filled(parts: Parts, entries: int) -> AsyncIterator[Reads]:
    """The accounts in a database of their own, analyzed, and the ways to read them."""
    parts.postgres.drop_database(DATABASE)
    dsn = parts.postgres.create_database(DATABASE)
    await upgrade(dsn, SCHEMA)
    connection: Connection = await asyncpg.connect(
        dsn, server_settings={"search_path": SCHEMA, "jit": "off", "plan_cache_mode": "force_generic_plan"}
    )
    try:
        await _fill(connection, entries)
        yield _reads(connection, entries)
    finally:
        await connection.close()
        parts.postgres.drop_database(DATABASE)


def _reads(connection: Connection, entries: int) -> Reads:
    names = [AccountName(f"user_{n}", "usdc_balance", "USDC") for n in range(CUSTOMERS)]
    ids = [UUID(name.account().id) for name in names]
    hot = UUID(HOT.account().id)

    def some_time(draw: random.Random, among: int) -> datetime:
        return _time_of(draw.randrange(among)) + timedelta(milliseconds=draw.randrange(100))

    async def page(name: AccountName, since: datetime) -> None:
        lines, _ = await read_page(connection, await open_statement(connection, name, since), PAGE)
        assert len(lines) == PAGE

    return Reads(
        Side(lambda draw: some_time(draw, entries), lambda at: balance(connection, HOT, at=at)),
        Side(
            lambda draw: draw.randrange(1, entries + 1), lambda version: connection.fetchval(BARE_ENTRY, hot, version)
        ),
        Side(lambda draw: draw.choice(names), lambda name: balance(connection, name)),
        Side(lambda draw: draw.choice(ids), lambda id_: connection.fetchval(BARE_ACCOUNT, id_)),
        Side(lambda draw: some_time(draw, entries - 2 * BATCH), lambda since: page(HOT, since)),
        Side(lambda draw: some_time(draw, SMALL_ENTRIES - BATCH), lambda since: page(SMALL, since)),
    )


async def _fill(connection: Connection, entries: int) -> None:
    rows = [(HOT, -AMOUNT * entries, entries), (SMALL, -AMOUNT * SMALL_ENTRIES, SMALL_ENTRIES)]
    rows += [(AccountName(f"user_{n}", "usdc_balance", "USDC", ""), AMOUNT, 1) for n in range(CUSTOMERS)]
    accounts = [(name.account().id, *name, held, version, START) for name, held, version in rows]
    columns = ["id", "owner", "type", "asset", "shard", "balance", "version", "updated_at"]
    await connection.copy_records_to_table("accounts", records=accounts, columns=columns, schema_name=SCHEMA)
    # random ids into an index that grows take longer than everything else; made afterwards it is the same index
    await connection.execute("ALTER TABLE transactions DROP CONSTRAINT transactions_pkey")
    for (id_, *_), count in zip(accounts[:2], (entries, SMALL_ENTRIES), strict=True):
        for first in range(0, count, COPY_ROWS):
            numbers = range(first, min(first + COPY_ROWS, count))
            ids = [os.urandom(16).hex() for _ in numbers]
            await _copy(connection, "entries", ENTRY_COLUMNS, _entries(id_, numbers, ids))
            await _copy(connection, "transactions", TRANSACTION_COLUMNS, _transactions(numbers, ids))
    await connection.execute("ALTER TABLE transactions ADD PRIMARY KEY (id)")
    await connection.execute(
        "UPDATE accounts a SET updated_at = e.at FROM entries e WHERE e.account_id = a.id AND e.version = a.version"
    )
    for table in ("accounts", "entries", "transactions"):
        await connection.execute(f"VACUUM ANALYZE {table}")
    await connection.execute("CHECKPOINT")


async def _copy(connection: Connection, table: str, columns: list[str], lines: Iterator[str]) -> None:
    async def source() -> AsyncIterator[bytes]:
        yield "".join(lines).encode()

    await connection.copy_to_table(table, source=source(), columns=columns, schema_name=SCHEMA)


def _entries(account: str, numbers: range, ids: list[str]) -> Iterator[str]:
    for number, id_ in zip(numbers, ids, strict=True):
        at = _text_of(number // BATCH)
        yield f"{account}\t{number + 1}\t{id_}\t0\tc\t{AMOUNT}\t{-AMOUNT * (number + 1)}\t{at}\n"


def _transactions(numbers: range, ids: list[str]) -> Iterator[str]:
    for number, id_ in zip(numbers, ids, strict=True):
        yield f"{id_}\tdeposit\t{id_[::-1]}\t{id_}\t{_text_of(number // BATCH)}\n"


def _time_of(number: int) -> datetime:
    """When an entry was made. A day's batches are dense around noon."""
    day, part = divmod(number // BATCH, BATCHES_A_DAY)
    share = part / BATCHES_A_DAY
    return START + timedelta(days=day + share - 0.9 * math.sin(2 * math.pi * share) / (2 * math.pi))


@lru_cache(maxsize=8)
def _text_of(batch: int) -> str:
    return _time_of(batch * BATCH).isoformat()
