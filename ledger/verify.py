"""The invariants that can be told from the database alone. Each gives the rows that break it.

All but the audit chain are views of the schema, one text of each rule. `verify` looks at all of them; `verify_ledger` at the ledger's
own (1, 2, 3, 11), on all data or since a checkpoint. Both look at one snapshot and hold little in memory, however many rows there are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
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
JUDGED: Final = "every final transfer is credited, rejected or parked"
EMITTED: Final = "every commit record is journaled and emitted, in order per key"
SETTLED: Final = "every input event has exactly one outcome"
DRAINED: Final = "after faults stop, everything drains"
HELD: Final = "of what an order reserved each unit is spent, given back, or held while it is open"
_CHAIN: Final = "the audit chain verifies, and the rows are those it sealed"


@dataclass(frozen=True, slots=True)
class Result:
    """One invariant: how much was looked at, and the first rows that break it."""

    number: int
    name: str
    checked: int
    offending: tuple[str, ...] = ()
    at: datetime | None = None
    """When it was looked at; None: now."""
    waits: str = ""
    """What is not done yet and need not be."""

    @property
    def holds(self) -> bool:
        return not self.offending


@dataclass(frozen=True, slots=True)
class Invariant:
    """One that is told by a view: its rows are the offending ones."""

    number: int
    name: str
    view: str
    count: str
    """A query: how much the view looks at."""
    ages: bool = False
    """It holds or not depending on the clock: what has just been done may still be on its way."""
    overdue: str = ""
    """A query: those of the view's rows that nobody's absence excuses; where it is empty, all of them."""


VIEWS: Final = (
    Invariant(1, _BALANCED, "invariant_1_transactions_balance", _sql.count_transactions),
    Invariant(2, _ASSETS, "invariant_2_assets_balance", _sql.count_accounts),
    Invariant(3, _PROVED, "invariant_3_accounts_proved", _sql.count_accounts),
    Invariant(5, "one transfer, at most one credit", "invariant_5_transfers_credited_once", _sql.count_deposits),
    Invariant(6, JUDGED, "invariant_6_deposits_judged", _sql.count_deposits, ages=True),
    Invariant(
        7,
        "a withdrawal debits at most once and pays at most once; settled xor released",
        "invariant_7_withdrawals_settled_once",
        _sql.count_withdrawals,
    ),
    Invariant(
        8,
        "nonces per lane without gap, one mined transaction per nonce",
        "invariant_8_nonces_used_once",
        _sql.count_nonces,
    ),
    Invariant(9, EMITTED, "invariant_9_records_emitted", _sql.count_commits, ages=True, overdue=_sql.records_overdue),
    Invariant(10, SETTLED, "invariant_10_events_settled_once", _sql.count_events),
    Invariant(10, SETTLED, "invariant_10_refusals_kept", _sql.count_events, ages=True),
    Invariant(13, DRAINED, "invariant_13_nothing_stays", _sql.count_overdue, ages=True),
    Invariant(14, HELD, "invariant_14_orders_hold_what_they_need", _sql.count_orders),
)
_BY_NUMBER: Final = {invariant.number: invariant for invariant in VIEWS}
_FLOW: Final = tuple(invariant for invariant in VIEWS if invariant.number > 3)
"""Those beside the ledger's own."""


def unheard(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


async def verify(connection: Connection, *, rows_max: int = 5, progress: Progress = unheard) -> list[Result]:
    """All of them, in order of their numbers, in one snapshot."""
    results, _ = await verify_since(connection, BEGINNING, rows_max=rows_max, progress=progress)
    return results


async def verify_since(
    connection: Connection, since: Checkpoint, *, rows_max: int, progress: Progress = unheard
) -> tuple[list[Result], Checkpoint]:
    """All of them, the ledger's own since a checkpoint, and the checkpoint that later runs may start from when those hold."""
    async with _snapshot(connection):
        results, reached = await _ledger(connection, since, rows_max, progress)
        for invariant in _FLOW:
            progress(invariant.name, 0, 0)
            results.append(await _viewed(connection, invariant, rows_max))
    return together(results), reached


def together(results: Iterable[Result]) -> list[Result]:
    """One result of each invariant, in order: several checks may look at one."""
    found: dict[int, Result] = {}
    for result in results:
        known = found.get(result.number, result)
        if known is not result:
            offending = (*known.offending, *result.offending)
            waits = known.waits or result.waits
            result = replace(known, checked=max(known.checked, result.checked), offending=offending, waits=waits)
        found[result.number] = result
    return [found[number] for number in sorted(found)]


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
        balanced = await _viewed(connection, _BY_NUMBER[1], rows_max)
    else:
        balanced = await _queried(
            connection, 1, _BALANCED, _sql.transactions_balanced_since, _sql.count_transactions_since, rows_max, first
        )
    assets = await _viewed(connection, _BY_NUMBER[2], rows_max)
    proved = await _proved(connection, first, rows_max, progress)
    return [balanced, assets, proved, chain], Checkpoint(found.batch_last, found.heads)


async def _proved(connection: Connection, first: int | None, rows_max: int, progress: Progress) -> Result:
    """3. On all data in sixteen parts by account, each in the order of the entries' key."""
    rows: list[Any] = []
    if first is None:
        for part in range(16):
            progress(_PROVED, part, 16)
            bounds = (f"{part:x}{digit * 31}" for digit in "0f")
            query = f"SELECT * FROM {_BY_NUMBER[3].view} WHERE account BETWEEN $1 AND $2 LIMIT {rows_max}"  # noqa: S608
            rows += await connection.fetch(query, *bounds)
    else:
        progress(_PROVED, 0, 0)
        rows += await connection.fetch(f"{_sql.entries_proved_since} LIMIT {rows_max}", first)
        rows += await connection.fetch(f"{_sql.accounts_at_last_entry} LIMIT {rows_max}")
    return Result(3, _PROVED, await connection.fetchval(_sql.count_accounts), _told(rows, rows_max))


async def _viewed(connection: Connection, invariant: Invariant, rows_max: int) -> Result:
    view = f"SELECT * FROM {invariant.view}"  # noqa: S608  (a name of ours)
    query = invariant.overdue or view
    result = await _queried(connection, invariant.number, invariant.name, query, invariant.count, rows_max)
    if invariant.overdue and (waiting := await connection.fetchval(f"SELECT count(*) FROM ({view}) AS v")):  # noqa: S608
        return replace(result, waits=f"{waiting} commits wait for a worker to tell them")
    return result


async def _queried(
    connection: Connection, number: int, name: str, query: str, count: str, rows_max: int, *arguments: int
) -> Result:
    rows = await connection.fetch(f"{query} LIMIT {rows_max}", *arguments)
    return Result(number, name, await connection.fetchval(count, *arguments), _told(rows, rows_max))


def _told(rows: list[Any], rows_max: int) -> tuple[str, ...]:
    return tuple(str({name: str(value) for name, value in row.items()}) for row in rows[:rows_max])
