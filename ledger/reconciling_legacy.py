"""Reconciliation of the ledger with a legacy table, by customer and account. For a snapshot that shows both.

| pass | pages of | looks up | finds |
| --- | --- | --- | --- |
| 1 | the legacy table | the ledger's balances of those customers | values that differ, also where the ledger has none |
| 2 | the ledger's customers who have anything | their legacy rows | customers whose row is missing |

Each side is asked in its own order, so that it does not matter how either sorts. Neither pass keeps more than a page. A value that is
zero on one side and missing on the other is no difference.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final, Protocol, TypeAlias

from ledger.accounts import AccountType, asset_of
from ledger.reading import AccountName, Reader
from ledger.reconciling import Comparison, Difference, Found
from ledger.sql import load

_sql = load("ledger", "sql/reconciling.sql")

PAGE: Final = 5_000

Balances: TypeAlias = Mapping[str, Mapping[AccountType, int]]
"""Customer -> what each account has, in base units."""


class LegacyTable(Protocol):
    """What is asked of it, in the snapshot of the comparison."""

    @property
    def types(self) -> Sequence[AccountType]:
        """The customers' accounts that it has a column for."""

    def pages(self, limit: int) -> AsyncIterator[Balances]:
        """All its rows, each once, at most `limit` at a time."""

    async def balances(self, users: Sequence[str]) -> Balances:
        """The rows of these customers, as far as there are any."""


async def compare_legacy(connection: Reader, legacy: LegacyTable, found: Found) -> AsyncIterator[int]:
    """Compares every customer; yields how many were, page by page."""
    types = [type.value for type in legacy.types]
    done = 0
    found.compared(Comparison.LEGACY, 0)
    async for rows in legacy.pages(PAGE):
        ours = await _balances(connection, list(rows), types)
        for user, theirs in rows.items():
            mine = ours.get(user, {})
            for type in legacy.types:
                _compare(found, user, type, mine.get(type), theirs.get(type))
        found.compared(Comparison.LEGACY, len(rows))
        done += len(rows)
        yield done
    last = ""
    while True:
        users = [row[0] for row in await connection.fetch(_sql.owners, last, types, PAGE)]
        known = await legacy.balances(users) if users else {}
        missing = [user for user in users if user not in known]
        ours = await _balances(connection, missing, types)
        for user in missing:
            for type in legacy.types:
                _compare(found, user, type, ours[user].get(type), None)
        found.compared(Comparison.LEGACY, len(missing))
        if len(users) < PAGE:
            return
        last = users[-1]
        yield done


async def _balances(
    connection: Reader, users: Sequence[str], types: Sequence[str]
) -> dict[str, dict[AccountType, int]]:
    balances: dict[str, dict[AccountType, int]] = {}
    for owner, type, balance in await connection.fetch(_sql.balances, users, types):
        balances.setdefault(owner, {})[AccountType(type)] = int(balance)
    return balances


def _compare(found: Found, user: str, type: AccountType, ledger: int | None, legacy: int | None) -> None:
    if (ledger or 0) != (legacy or 0):
        account = str(AccountName(user, type.value, asset_of(type)))
        found.differ(Difference(Comparison.LEGACY, user, account, ledger, legacy))
