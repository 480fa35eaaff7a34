"""What the stages of orders know of a batch's orders, and what a step of an order makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from agents.outcome import Alert, Done, Emit, Outcome, Rejected, Retry
from ledger.errors import OrderRefused, UnknownOrder
from ledger.orders import Fill, Order, Shards, Step, fill_key, order_key
from ledger.rows import Connection
from ledger.stored_orders import lock_orders, read_fills
from ledger.tables import ORDER_FILLS, ORDERS
from topics.catalog import ORDERS_SETTLED
from topics.envelope import Received
from topics.events import OrderCancelled, OrderFilled, OrderPlaced, OrderSettled

WAIT_S: Final = 1.0
WAIT_S_MAX: Final = 300.0
WAITS_MAX: Final = 15
"""Some forty minutes for what an event builds on to come. Then it is a dead letter, which is sent again by itself."""
LATE: Final = "order_filled_late"
"""Alert: a fill came after what was reserved for it had been given back, and was paid from the balance."""


@dataclass
class Facts:
    now: datetime
    shards: Shards
    orders: dict[str, Order] = field(default_factory=dict)
    """Locked, by `id`."""
    fills: dict[str, Fill] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    """Customers whom the KYC vendor rejected."""


def fold(facts: Facts, done: Done) -> None:
    for _, row in (*done.inserts, *done.updates):
        if isinstance(row, Order):
            facts.orders[row.id] = row
        else:
            assert isinstance(row, Fill)
            facts.fills[row.id] = row


async def load_orders(connection: Connection, events: Sequence[Received], at: datetime, shards: Shards) -> Facts:
    named = [r.event for r in events if isinstance(r.event, OrderPlaced | OrderFilled | OrderCancelled)]
    orders = await lock_orders(connection, {order_key(event.order_id) for event in named})
    fills = {fill_key(event.order_id, event.fill_id) for event in named if isinstance(event, OrderFilled)}
    return Facts(at, shards, orders, await read_fills(connection, fills) if fills else {})


def done(step: Step | None) -> Done:
    """A step of an order that is stored already."""
    if step is None:
        return Done()
    order, fill = step.order, step.fill
    return Done(
        postings=step.postings,
        inserts=((ORDER_FILLS, fill),) if fill else (),
        updates=((ORDERS, order),),
        emits=() if step.released is None else (_settled(order, step.released),),
        alerts=(Alert(LATE, {"order_id": order.order_id}),) if fill and fill.paid_from == "balance" else (),
    )


def refused(received: Received, refusal: OrderRefused) -> Outcome:
    """What comes before the order itself waits for it."""
    if isinstance(refusal, UnknownOrder) and received.attempt < WAITS_MAX:
        return Retry(refusal.code, _wait_s(received.attempt))
    return Rejected(refusal.code, str(refusal))


def waited_s(attempt: int) -> float:
    """How long at least an event has waited for its order when this attempt of it is due."""
    return sum(map(_wait_s, range(1, attempt)))


def _wait_s(attempt: int) -> float:
    return min(WAIT_S * (1 << (attempt - 1)), WAIT_S_MAX)


def _settled(order: Order, released: int) -> Emit:
    event = OrderSettled.model_validate(
        {
            "order_id": order.order_id,
            "user_id": order.user_id,
            "outcome": order.status,
            "filled": order.filled,
            "released": released,
        }
    )
    return Emit(ORDERS_SETTLED, order.order_id, event, order.id)
