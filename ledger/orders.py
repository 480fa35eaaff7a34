"""What an order is: its identity, its row, the fills it had, and the money it moves. Pure.

```
 placed ─▶ reserved ─▶ filled | cancelled | expired        placed ─▶ rejected
              │ fills, in any order
              └ an end that tells a total waits for the fills it sums (`fills_due`)
```

| step | debit | credit |
| --- | --- | --- |
| placed | pending_investment | usdc_balance: a hold |
| filled | system_buffer_usdc (USDC); fiat_exposure (USD) | pending_investment, out of the hold (USDC); system_buffer_fiat (USD) |
| ended | usdc_balance | pending_investment: what remains |
| filled after the end | as filled | usdc_balance in pending_investment's place |

An order ends when what it was filled for in all is known and every such fill has come, so messages may come in any order. An
end without a total gives back at once what remains; a fill of that order that comes later is a fact all the same and is paid
from the balance. USDC and USD are exchanged one to one.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from enum import StrEnum
from typing import Final, NamedTuple

from ledger.accounts import buffer, fiat_buffer, fiat_exposure, pending_investment, shard_of, spendable
from ledger.errors import FillReused, FillsDisagree, OrderNotReserved, OrderOverfilled, OrderReused, UnknownOrder
from ledger.holds import capture, hold, void
from ledger.posting import Leg, Transaction, credit, debit


class Status(StrEnum):
    RESERVED = "reserved"
    REJECTED = "rejected"
    FILLED = "filled"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


ENDS: Final = frozenset({Status.FILLED, Status.CANCELLED, Status.EXPIRED})


class Order(NamedTuple):
    """A row of `orders`."""

    id: str
    order_id: str
    """As whoever placed it calls it."""
    fingerprint: str
    user_id: str
    amount: int
    filled: int
    """Of the fills that have come; never more than `amount`."""
    status: str
    code: str | None
    hold_id: str | None
    """It remains `amount` − `filled` while the order is reserved."""
    ends_as: str | None
    """What an end that told a total makes of it."""
    fills_due: int | None
    """That total."""
    placed_at: datetime
    updated_at: datetime
    ended_at: datetime | None
    version: int


class Fill(NamedTuple):
    """A row of `order_fills`."""

    id: str
    order_id: str
    """The order's `id`."""
    fill_id: str
    amount: int
    paid_from: str
    """`hold`, or `balance` when the order had ended."""
    at: datetime


class Shards(NamedTuple):
    """How many rows each buffer has."""

    usdc: int = 1
    fiat: int = 1


UNSHARDED: Final = Shards()
"""For steps that touch no buffer."""


class Step(NamedTuple):
    """What a message makes of an order. The postings stand or fall together."""

    order: Order
    postings: tuple[Transaction, ...] = ()
    fill: Fill | None = None
    released: int | None = None
    """Given back, where this is the order's end."""


def order_key(order_id: str) -> str:
    """The row's id, 32 hex digits."""
    return hashlib.blake2b(order_id.encode(), digest_size=16, person=b"order").hexdigest()


def fill_key(order_id: str, fill_id: str) -> str:
    """Of the fill's row and of its ledger transaction."""
    return _transaction_id(order_key(order_id), f"fill {fill_id}")


def _transaction_id(key: str, movement: str) -> str:
    return hashlib.blake2b(f"{key}\0{movement}".encode(), digest_size=16, person=b"order money").hexdigest()


def placed(known: Order | None, order_id: str, user_id: str, amount: int, at: datetime) -> Step | None:
    """Reserves the amount. None: it was placed before. Raises OrderReused."""
    name = f"{user_id}\0{amount}".encode()
    fingerprint = hashlib.blake2b(name, digest_size=16, person=b"order").hexdigest()
    if known is not None:
        if known.fingerprint != fingerprint:
            raise OrderReused(order_id)
        return None
    key = order_key(order_id)
    reservation = hold(
        _transaction_id(key, "reserve"), "order_reserved", key,
        source=spendable(user_id), pending=pending_investment(user_id), amount=amount,
    )  # fmt: skip
    order = Order(
        key, order_id, fingerprint, user_id, amount, 0, Status.RESERVED.value, None, reservation.id, None, None, at, at,
        None, 1,
    )  # fmt: skip
    return Step(order, (reservation,))


def rejected(order: Order, code: str) -> Order:
    """An order that was just placed, and nothing could be reserved for."""
    return order._replace(status=Status.REJECTED.value, code=code, hold_id=None, ended_at=order.placed_at)


def filled(
    order: Order | None,
    known: Fill | None,
    order_id: str,
    fill_id: str,
    amount: int,
    total: int | None,
    at: datetime,
    shards: Shards,
) -> Step | None:
    """Moves a fill to the broker's side. `known`: the fill of this id. None: it came before. Raises UnknownOrder,
    OrderNotReserved, FillReused, OrderOverfilled, FillsDisagree."""
    order = _reserved(order, order_id)
    if known is not None:
        if known.amount != amount:
            raise FillReused(order_id, fill_id, known.amount, amount)
        # told again, perhaps by now as the last one
        return None if total is None else ended(order, order_id, Status.FILLED, total, at)
    after = order.filled + amount
    if after > order.amount:
        raise OrderOverfilled(order_id, order.amount, after)
    if order.fills_due is not None and after > order.fills_due:
        raise FillsDisagree(order_id, order.fills_due, after)
    late = order.ended_at is not None
    fill = Fill(fill_key(order_id, fill_id), order.id, fill_id, amount, "balance" if late else "hold", at)
    order = order._replace(filled=after, updated_at=at, version=order.version + 1)
    legs = _exchanged(order.user_id, amount, shards)
    if late:
        legs = (*legs, credit(spendable(order.user_id), amount))
        return Step(order, (Transaction(fill.id, "order_filled_late", order.id, legs),), fill)
    assert order.hold_id is not None
    paid = capture(fill.id, "order_filled", order.id, hold_id=order.hold_id, amount=amount, legs=legs)
    if total is not None:
        order = _due(order, Status.FILLED, total)
    if order.filled == order.amount and order.fills_due is None:
        order = order._replace(ends_as=Status.FILLED.value, fills_due=order.amount)
    step = _ended(order, at) if order.filled == order.fills_due else Step(order)
    return step._replace(postings=(paid, *step.postings), fill=fill)


def ended(order: Order | None, order_id: str, end: Status, total: int | None, at: datetime) -> Step | None:
    """The order's end, or that it waits for fills. `total`: what the order was filled for in all; None: what is known. None:
    it has ended, or waits already. Raises UnknownOrder, OrderNotReserved, OrderOverfilled, FillsDisagree."""
    order = _reserved(order, order_id)
    if order.ended_at is not None or (total is None and order.fills_due is not None):
        return None
    if total is None:
        due = order._replace(ends_as=end.value)
        return _ended(due._replace(updated_at=at, version=order.version + 1), at)
    due = _due(order, end, total)
    if due == order:
        return None
    due = due._replace(updated_at=at, version=order.version + 1)
    return _ended(due, at) if due.filled == due.fills_due else Step(due)


def moved_without_order(id: str, user_id: str, amount: int, reference: str, shards: Shards) -> Transaction:
    """Straight from the customer's balance to the broker's side."""
    legs = (*_exchanged(user_id, amount, shards), credit(spendable(user_id), amount))
    return Transaction(id, "moved_to_broker", reference, legs)


def _reserved(order: Order | None, order_id: str) -> Order:
    if order is None:
        raise UnknownOrder(order_id)
    if order.status == Status.REJECTED:
        raise OrderNotReserved(order_id, order.code)
    return order


def _due(order: Order, end: Status, total: int) -> Order:
    """The order with a total told; the first end that tells one stands."""
    if total > order.amount:
        raise OrderOverfilled(order.order_id, order.amount, total)
    if order.fills_due is not None and order.fills_due != total:
        raise FillsDisagree(order.order_id, total, order.fills_due)
    if total < order.filled:
        raise FillsDisagree(order.order_id, total, order.filled)
    return order if order.fills_due is not None else order._replace(ends_as=end.value, fills_due=total)


def _ended(order: Order, at: datetime) -> Step:
    """The order in its last state, with what remains given back."""
    assert order.ends_as is not None
    assert order.hold_id is not None
    remains = order.amount - order.filled
    ended = order._replace(status=order.ends_as, ended_at=at)
    if not remains:  # its last fill has ended the hold
        return Step(ended, released=0)
    back = void(_transaction_id(order.id, "release"), "order_released", order.id, hold_id=order.hold_id)
    return Step(ended, (back,), released=remains)


def _exchanged(user_id: str, amount: int, shards: Shards) -> tuple[Leg, ...]:
    return (
        debit(buffer(shard_of(user_id, shards.usdc)), amount),
        debit(fiat_exposure(user_id), amount),
        credit(fiat_buffer(shard_of(user_id, shards.fiat)), amount),
    )
