"""What the worker of investing tells of orders that have not come to their end, so that one which never does is noticed.

| state | since when | limit |
| --- | --- | --- |
| reserved | it was placed; no end was told | `STABLERAIL_ORDER_OPEN_MAX_S` |
| fills_missing | the last word of it: its end told a total, and fills that the total sums have not come | `FILLS_MISSING_MAX_S` |
| unplaced | fills and ends that came before their order, and wait for it | `UNPLACED_MAX_S` |

All is read from the database, so every worker tells the same. A limit is a gauge too: the alert compares the two.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from agents.investing import release_orders, settle_fills
from agents.investing.order_facts import waited_s
from ledger.errors import UnknownOrder
from ledger.rows import Connection
from ledger.sql import load
from stablerail.metrics import Metrics

_sql = load("stablerail", "orders.sql")

LOOK_S: Final = 5.0
FILLS_MISSING_MAX_S: Final = 60 * 60.0
UNPLACED_MAX_S: Final = 10 * 60.0
"""Long before it is a dead letter: the order's message was lost, or whoever places orders stands still."""
_STAGES: Final = (settle_fills.NAME, release_orders.CANCELLED, release_orders.EXPIRED)


async def look(connection: Connection, metrics: Metrics, open_max_s: float, now: datetime) -> None:
    """Reads all of it once, and sets the gauges anew."""
    count = dict.fromkeys(("reserved", "fills_missing", "unplaced"), 0)
    oldest = dict.fromkeys(count, now)
    for state, orders, since in await connection.fetch(_sql.open_by_state):
        count[state], oldest[state] = orders, since
    for attempt, events, due in await connection.fetch(_sql.unplaced, _STAGES, UnknownOrder.code):
        count["unplaced"] += events
        oldest["unplaced"] = min(oldest["unplaced"], due - timedelta(seconds=waited_s(attempt)))
    limits = {"reserved": open_max_s, "fills_missing": FILLS_MISSING_MAX_S, "unplaced": UNPLACED_MAX_S}
    metrics.orders_open(
        (state, count[state], max((now - oldest[state]).total_seconds(), 0.0), limits[state]) for state in count
    )
