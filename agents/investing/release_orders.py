"""orders.cancelled, orders.expired -> ledger: debit usdc_balance, credit pending_investment -> orders.settled

Decides:  that what an order has left is given back: at once, or when the fills that its end sums have come.
Key:      order id.
Repeats:  harmless; an order that has ended is left alone.
Refuses:  order_not_reserved, order_overfilled, fills_disagree, unknown_order (when the order does not come)
          ->  orders.cancelled.dlq, orders.expired.dlq
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from agents.investing.order_facts import Facts, done, fold, load_orders, refused
from agents.outcome import Outcome, Stage
from ledger.errors import OrderRefused
from ledger.orders import UNSHARDED, Status, ended, order_key
from ledger.rows import Connection
from topics.catalog import ORDERS_CANCELLED, ORDERS_EXPIRED, ORDERS_SETTLED, Topic
from topics.envelope import Received
from topics.events import OrderCancelled, OrderExpired

CANCELLED: Final = "release_cancelled_orders"
EXPIRED: Final = "release_expired_orders"


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, OrderCancelled)
    end = Status.EXPIRED if isinstance(event, OrderExpired) else Status.CANCELLED
    order = facts.orders.get(order_key(event.order_id))
    try:
        return done(ended(order, event.order_id, end, event.filled_total, facts.now))
    except OrderRefused as refusal:
        return refused(received, refusal)


async def load(connection: Connection, events: Sequence[Received], _prepared: Any, at: datetime) -> Facts:
    return await load_orders(connection, events, at, UNSHARDED)


def stages() -> tuple[Stage[Facts], ...]:
    def of(name: str, source: Topic) -> Stage[Facts]:
        return Stage(name=name, source=source, load=load, decide=decide, fold=fold, emits=(ORDERS_SETTLED,))

    return of(CANCELLED, ORDERS_CANCELLED), of(EXPIRED, ORDERS_EXPIRED)
