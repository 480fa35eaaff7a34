"""Reconciliation of the ledger with a legacy table, by customer and account.

| pass | pages of | looks up | finds |
| --- | --- | --- | --- |
| 1 | the legacy table | the ledger's balances of those customers | values that differ, also where the ledger has none |
| 2 | the ledger's customers who have anything | their legacy rows | customers whose row is missing |

Each side is asked in its own order, so that it does not matter how either sorts. Neither pass keeps more than a page. A value that is
zero on one side and missing on the other is no difference, nor is what the table has no digits for.

In one database both sides are read in one snapshot. A table elsewhere follows the ledger by and by: who differs there is looked at
again, and told when every look found a difference.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Final

from ledger.accounts import AMOUNT_MAX, AccountType, asset_of
from ledger.legacy import Held, Legacy
from ledger.reading import AccountName, Reader
from ledger.reconciling import Comparison, Difference, Found
from ledger.sql import load

_sql = load("ledger", "sql/reconciling.sql")

PAGE: Final = 5_000


async def compare_legacy(
    connection: Reader,
    legacy: Legacy,
    found: Found,
    *,
    elsewhere: Reader | None = None,
    looks: int = 1,
    pause_s: float = 0.0,
) -> AsyncIterator[int]:
    """Compares every customer; yields how many were, page by page. `connection`: in a snapshot, unless the table is `elsewhere`."""
    there = elsewhere or connection
    found.compared(Comparison.LEGACY, 0)
    after: str | None = None
    done = 0
    while True:
        rows = await legacy.page(there, after, PAGE)
        users = [user for user, _ in rows]
        await _compare(connection, there, legacy, found, users, dict(rows), looks, pause_s)
        done += len(users)
        yield done
        if len(rows) < PAGE:
            break
        after = users[-1]
    types, last = [type.value for type in legacy.types], ""
    while True:
        users = [row[0] for row in await connection.fetch(_sql.owners, last, types, PAGE)]
        known = await legacy.read(there, users) if users else {}
        missing = [user for user in users if user not in known]
        await _compare(connection, there, legacy, found, missing, {}, looks, pause_s)
        done += len(missing)
        yield done
        if len(users) < PAGE:
            return
        last = users[-1]


async def _compare(
    connection: Reader,
    there: Reader,
    legacy: Legacy,
    found: Found,
    users: Sequence[str],
    rows: Mapping[str, Held],
    looks: int,
    pause_s: float,
) -> None:
    """Tells which of the customers differ in every look; `rows`: what the first look saw of them."""
    found.compared(Comparison.LEGACY, len(users))
    for look in range(looks):
        if look and users:
            await asyncio.sleep(pause_s)
            rows = await legacy.read(there, users)
        ours = await _balances(connection, legacy, users)
        differ = [one for user in users for one in _differences(legacy, user, ours.get(user, {}), rows.get(user))]
        users = list(dict.fromkeys(one.user_id for one in differ))
    for one in differ:
        found.differ(one)


async def _balances(connection: Reader, legacy: Legacy, users: Sequence[str]) -> dict[str, dict[AccountType, int]]:
    balances: dict[str, dict[AccountType, int]] = {}
    if users:
        types = [type.value for type in legacy.types]
        for owner, type, balance in await connection.fetch(_sql.balances, users, types):
            balances.setdefault(owner, {})[AccountType(type)] = legacy.shown(int(balance))
    return balances


def _differences(legacy: Legacy, user: str, ours: Mapping[AccountType, int], theirs: Held | None) -> list[Difference]:
    found = []
    for type in legacy.types:
        mine, shown = ours.get(type), None if theirs is None else theirs[type]
        if (mine or 0) != (shown or 0):
            account = str(AccountName(user, type.value, asset_of(type)))
            found.append(Difference(Comparison.LEGACY, user, account, mine, _whole(shown, mine or 0)))
    return found


def _whole(shown: Decimal | None, ours: int) -> int | None:
    """In whole base units; what the table has below one is rounded away from ours, so that a difference stays one. None also for
    what is no balance: NaN, infinity, more digits than an account has."""
    if shown is None or not shown.is_finite() or abs(shown) > AMOUNT_MAX:
        return None
    return int(shown.to_integral_value(ROUND_FLOOR if shown < ours else ROUND_CEILING))
