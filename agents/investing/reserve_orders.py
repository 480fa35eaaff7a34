"""orders.placed -> orders; ledger: debit pending_investment, credit usdc_balance -> orders.reserved | orders.rejected

Decides:  whether an order's money can be set aside.
Key:      order id.
Repeats:  harmless; the order's row says that it was decided.
Refuses:  reserved_user, order_id_reused  ->  orders.placed.dlq

A customer's mistake is an answer: the order's row and `orders.rejected` with one of these codes.

| code | why |
| --- | --- |
| frozen_customer | the KYC vendor's last word is a rejection |
| insufficient_funds | the balance is too small |
| closed_account | the customer's account was closed |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any, Final

from agents.investing.order_facts import Facts, fold, load_orders, refused
from agents.outcome import Done, Emit, Outcome, Rejected, Stage
from ledger.accounts import may_own
from ledger.errors import ClosedAccount, InsufficientFunds, OrderRefused, PostingRefused
from ledger.orders import UNSHARDED, Order, order_key, placed, rejected
from ledger.rows import Connection
from ledger.sql import load as load_sql
from ledger.tables import ORDERS
from topics.catalog import ORDERS_PLACED, ORDERS_REJECTED, ORDERS_RESERVED
from topics.envelope import Received
from topics.events import OrderPlaced, OrderRejected, OrderReserved

_sql = load_sql("agents.withdrawals", "withdrawals.sql")

NAME: Final = "reserve_orders"


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, OrderPlaced)
    if not may_own(event.user_id):
        return Rejected("reserved_user", f"{event.user_id!r} is the company's own")
    known = facts.orders.get(order_key(event.order_id))
    try:
        step = placed(known, event.order_id, event.user_id, event.amount, facts.now)
    except OrderRefused as refusal:
        return refused(received, refusal)
    if step is None:
        return Done()
    if event.user_id in facts.frozen:
        return _answered(step.order, "frozen_customer")
    told = OrderReserved.known(order_id=event.order_id, user_id=event.user_id, amount=event.amount)
    return Done(
        postings=step.postings,
        inserts=((ORDERS, step.order),),
        emits=(Emit(ORDERS_RESERVED, event.order_id, told, step.order.id),),
        if_refused=partial(_meaning, step.order),
    )


def _meaning(order: Order, refusal: PostingRefused) -> Outcome:
    """What a refusal of the hold means. One that no customer can cause is a bug of ours: a dead letter."""
    if isinstance(refusal, InsufficientFunds | ClosedAccount):
        return _answered(order, refusal.code)
    return Rejected(refusal.code, str(refusal))


def _answered(order: Order, code: str) -> Done:
    told = OrderRejected.known(order_id=order.order_id, user_id=order.user_id, amount=order.amount, code=code)
    emit = Emit(ORDERS_REJECTED, order.order_id, told, order.id)
    return Done(inserts=((ORDERS, rejected(order, code)),), emits=(emit,))


async def load(connection: Connection, events: Sequence[Received], _prepared: Any, at: datetime) -> Facts:
    facts = await load_orders(connection, events, at, UNSHARDED)
    users = {received.event.user_id for received in events if isinstance(received.event, OrderPlaced)}
    return replace(facts, frozen=frozenset(row[0] for row in await connection.fetch(_sql.frozen, sorted(users))))


def stage() -> Stage[Facts]:
    return Stage(
        name=NAME,
        source=ORDERS_PLACED,
        load=load,
        decide=decide,
        fold=fold,
        emits=(ORDERS_RESERVED, ORDERS_REJECTED),
    )
