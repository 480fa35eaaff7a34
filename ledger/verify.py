"""The invariants that can be told from the database alone (DESIGN §7). Each gives the rows that break it.

`verify` looks at all of them; `verify_ledger` at the ledger's own (1, 2, 3, 11), on all data or since a checkpoint. Both look at one
snapshot and hold little in memory, however many rows there are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from ledger.checkpoint import BEGINNING, Checkpoint
from ledger.rows import Connection
from ledger.sql import load
from ledger.verify_chain import Progress, verify_chain

_sql = load("ledger", "sql/verify.sql")

ROWS_MAX: Final = 20
_BALANCED: Final = "entries of a transaction sum to zero per asset"
_ASSETS: Final = "all accounts of an asset sum to zero"
_PROVED: Final = "balance = sum of entries, versions without gaps"
_CHAIN: Final = "the audit chain verifies, and the rows are those it sealed"


@dataclass(frozen=True, slots=True)
class Result:
    """One invariant: how much was looked at, and the first rows that break it."""

    number: int
    name: str
    checked: int
    offending: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.offending


_FLOW: Final = (
    (5, "one transfer, at most one credit", _sql.credited_once, _sql.count_deposits),
    (
        7,
        "a withdrawal debits at most once and pays at most once; settled xor released",
        _sql.withdrawals_settled_once,
        _sql.count_withdrawals,
    ),
    (8, "nonces per lane without gap, one mined transaction per nonce", _sql.nonces_used_once, _sql.count_nonces),
    (9, "every commit record is journaled and emitted", _sql.waiting_records, _sql.count_commits),
    (10, "every input event has exactly one outcome", _sql.events_settled, _sql.count_events),
)


def unheard(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


async def verify(connection: Connection, *, rows_max: int = 5, progress: Progress = unheard) -> list[Result]:
    """All of them, in order of their numbers, in one snapshot."""
    async with _snapshot(connection):
        results, _ = await _ledger(connection, BEGINNING, rows_max, progress)
        for number, name, query, count in _FLOW:
            results.append(await _queried(connection, number, name, query, count, rows_max))
    return sorted(results, key=lambda result: result.number)


async def verify_ledger(
    connection: Connection,
    *,
    since: Checkpoint = BEGINNING,
    rows_max: int = ROWS_MAX,
    progress: Progress = unheard,
) -> tuple[list[Result], Checkpoint]:
    """1, 2, 3 and 11, and the checkpoint that later runs may start from when all of them hold."""
    async with _snapshot(connection):
        return await _ledger(connection, since, rows_max, progress)


async def verify_logs(connection: Connection, *, rows_max: int = ROWS_MAX, progress: Progress = unheard) -> Result:
    """The part of 11 that concerns `audit_logs`: the chain, and that the logs are those it sealed."""
    async with _snapshot(connection):
        found = await verify_chain(connection, BEGINNING, rows_max, progress, ledger=False)
    return Result(11, "the audit chain verifies, and the logs are those it sealed", found.checked, (*found.offending,))


@asynccontextmanager
async def _snapshot(connection: Connection) -> AsyncIterator[None]:
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        # sorts and hashes of millions of rows: beyond it they go to disk
        await connection.execute("SET LOCAL work_mem = '64MB'")
        yield


async def _ledger(
    connection: Connection, since: Checkpoint, rows_max: int, progress: Progress
) -> tuple[list[Result], Checkpoint]:
    found = await verify_chain(connection, since, rows_max, progress)
    chain = Result(11, _CHAIN, found.checked, (*found.offending,))
    first = None if since == BEGINNING else min(found.batch_first, since.batch + 1)
    progress(_BALANCED, 0, 0)
    if first is None:
        balanced = await _queried(
            connection, 1, _BALANCED, _sql.transactions_balanced, _sql.count_transactions, rows_max
        )
    else:
        balanced = await _queried(
            connection, 1, _BALANCED, _sql.transactions_balanced_since, _sql.count_transactions_since, rows_max, first
        )
    assets = await _queried(connection, 2, _ASSETS, _sql.assets_balanced, _sql.count_accounts, rows_max)
    proved = await _proved(connection, first, rows_max, progress)
    return [balanced, assets, proved, chain], Checkpoint(found.batch_last, found.heads)


async def _proved(connection: Connection, first: int | None, rows_max: int, progress: Progress) -> Result:
    """3. On all data in sixteen parts by account, each in the order of the entries' key."""
    rows: list[Any] = []
    if first is None:
        for part in range(16):
            progress(_PROVED, part, 16)
            bounds = (f"{part:x}{digit * 31}" for digit in "0f")
            rows += await connection.fetch(f"{_sql.accounts_proved} LIMIT {rows_max}", *bounds)
    else:
        progress(_PROVED, 0, 0)
        rows += await connection.fetch(f"{_sql.entries_proved_since} LIMIT {rows_max}", first)
        rows += await connection.fetch(f"{_sql.accounts_at_last_entry} LIMIT {rows_max}")
    return Result(3, _PROVED, await connection.fetchval(_sql.count_accounts), _told(rows, rows_max))


async def _queried(
    connection: Connection, number: int, name: str, query: str, count: str, rows_max: int, *arguments: int
) -> Result:
    rows = await connection.fetch(f"{query} LIMIT {rows_max}", *arguments)
    return Result(number, name, await connection.fetchval(count, *arguments), _told(rows, rows_max))


def _told(rows: list[Any], rows_max: int) -> tuple[str, ...]:
    return tuple(str({name: str(value) for name, value in row.items()}) for row in rows[:rows_max])
