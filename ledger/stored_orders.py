"""Orders and fills as they are stored: read under the order's lock, and the rows of a step."""

from __future__ import annotations

from collections.abc import Iterable

from ledger.orders import Fill, Order
from ledger.rows import Connection, uuids
from ledger.sql import load

_sql = load("ledger", "sql/orders.sql")


async def lock_orders(connection: Connection, keys: Iterable[str]) -> dict[str, Order]:
    """Those of the orders that exist, locked, sorted by id; by their `id`."""
    found = {}
    for row in await connection.fetch(_sql.lock_orders, uuids(set(keys))):
        order = Order(*row)
        due = None if order.fills_due is None else int(order.fills_due)
        found[order.id] = order._replace(amount=int(order.amount), filled=int(order.filled), fills_due=due)
    return found


async def read_fills(connection: Connection, keys: Iterable[str]) -> dict[str, Fill]:
    """Those of the fills that have come; their orders are locked."""
    rows = await connection.fetch(_sql.fills, uuids(set(keys)))
    return {row[0]: Fill(*row)._replace(amount=int(row[3])) for row in rows}
