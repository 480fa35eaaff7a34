"""Withdrawals as they are stored: read and locked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from agents.withdrawals.withdrawal import Withdrawal
from ledger.rows import Connection, uuids
from ledger.sql import load

_sql = load("agents.withdrawals", "withdrawals.sql")


async def lock(connection: Connection, ids: Iterable[str]) -> dict[str, Withdrawal]:
    """Those of the withdrawals that exist, locked, sorted by id."""
    rows = await connection.fetch(_sql.lock, uuids(set(ids)))
    return {withdrawal.id: withdrawal for withdrawal in map(withdrawal_of, rows)}


async def read(connection: Connection, id: str) -> Withdrawal | None:
    """Not locked."""
    row = await connection.fetchrow(_sql.read, id)
    return None if row is None else withdrawal_of(row)


_AMOUNT: Final = Withdrawal._fields.index("amount")


def withdrawal_of(row: Iterable[Any]) -> Withdrawal:
    """Of a row in the order of its fields, the amount as text."""
    values = [*row]
    values[_AMOUNT] = int(values[_AMOUNT])
    return Withdrawal._make(values)
