"""Withdrawals as they are stored: read and locked."""

from __future__ import annotations

from collections.abc import Iterable

from agents.withdrawals.withdrawal import Withdrawal
from ledger.rows import Connection, uuids
from ledger.sql import load

_sql = load("agents.withdrawals", "withdrawals.sql")


async def lock(connection: Connection, ids: Iterable[str]) -> dict[str, Withdrawal]:
    """Those of the withdrawals that exist, locked, sorted by id."""
    found = {}
    for row in await connection.fetch(_sql.lock, uuids(set(ids))):
        withdrawal = Withdrawal(*row)
        found[withdrawal.id] = withdrawal._replace(amount=int(withdrawal.amount))
    return found


async def read(connection: Connection, id: str) -> Withdrawal | None:
    """Not locked."""
    row = await connection.fetchrow(_sql.read, id)
    if row is None:
        return None
    withdrawal = Withdrawal(*row)
    return withdrawal._replace(amount=int(withdrawal.amount))
