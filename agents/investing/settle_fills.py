"""orders.filled -> order_fills; ledger: hold captured into system_buffer_usdc, debit fiat_exposure, credit system_buffer_fiat -> orders.settled

Decides:  that a part of what is reserved is spent, and with the last part that the rest is given back (price improvement).
Key:      order id.
Repeats:  harmless; a fill is told apart by the broker's id of it.
Refuses:  order_overfilled, order_not_reserved, fill_id_reused, fills_disagree, unknown_order (when the order does not come),
          insufficient_funds (late, and the customer has spent it)  ->  orders.filled.dlq

Fills may come in any order, before the order was placed (they wait for it), and after its end: then the customer's balance pays,
and `order_filled_late` alerts.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from agents.investing.order_facts import Facts, done, fold, load_orders, refused
from agents.outcome import Outcome, Stage
from ledger.errors import OrderRefused
from ledger.orders import Shards, fill_key, filled, order_key
from ledger.rows import Connection
from topics.catalog import ORDERS_FILLED, ORDERS_SETTLED
from topics.envelope import Received
from topics.events import OrderFilled

NAME: Final = "settle_fills"


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, OrderFilled)
    order = facts.orders.get(order_key(event.order_id))
    known = facts.fills.get(fill_key(event.order_id, event.fill_id))
    try:
        step = filled(
            order, known, event.order_id, event.fill_id, event.amount, event.filled_total, facts.now, facts.shards
        )
    except OrderRefused as refusal:
        return refused(received, refusal)
    return done(step)


def stage(shards: Shards) -> Stage[Facts]:
    async def load(connection: Connection, events: Sequence[Received], _prepared: Any, at: datetime) -> Facts:
        return await load_orders(connection, events, at, shards)

    return Stage(name=NAME, source=ORDERS_FILLED, load=load, decide=decide, fold=fold, emits=(ORDERS_SETTLED,))
