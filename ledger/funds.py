"""Customers' funds moved from code, each call a commit of its own (ValueError on a connection that is in a transaction): for
services that still call instead of writing events.

| call | debit | credit |
| --- | --- | --- |
| credit_usdc | usdc_balance | system_buffer_usdc |
| reserve, execute_investment, release | as the events `orders.placed`, `orders.filled`, `orders.cancelled` (ledger/orders.py) | |
| move_to_fiat_exposure | system_buffer_usdc (USDC); fiat_exposure (USD) | usdc_balance (USDC); system_buffer_fiat (USD) |
| check_available | nothing moves | |

A call that is repeated with the same ids does nothing and answers the same; with other contents it raises. An order may be
reserved here and filled by events, or the other way round: its row and its ledger transactions are the same. `writer` names the
caller's chain of commits (ledger/book.py); give `sealed` to the relay before telling anybody. No event is written: the caller knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import NamedTuple

from ledger import book, store
from ledger.accounts import AccountType, asset_of, buffer, shard_of, spendable
from ledger.commit import OVERTAKEN, Sealed, Unchanged, check_outside, lock_writer, seal
from ledger.errors import BalancesDisagree, GroupRefused, OrderNotReserved, PostingRefused
from ledger.levels import buffer_levels
from ledger.orders import (
    UNSHARDED,
    Fill,
    Order,
    Shards,
    Status,
    Step,
    ended,
    fill_key,
    filled,
    moved_without_order,
    order_key,
    placed,
)
from ledger.posting import Transaction, credit, debit
from ledger.reading import owner_balances
from ledger.rows import Changes, Connection
from ledger.shadow import Phase, mirror_of
from ledger.shadow_phases import store_differences
from ledger.stored_orders import lock_orders, read_fills
from ledger.tables import ORDER_FILLS, ORDERS


class Moved(NamedTuple):
    """What a call did. `sealed` None: it was done before."""

    sealed: Sealed | None
    order: Order | None = None


async def credit_usdc(
    connection: Connection,
    writer: str,
    user_id: str,
    amount: int,
    at: datetime,
    *,
    reference: str,
    shards: Shards = UNSHARDED,
) -> Moved:
    """More USDC for a customer. `reference`: what for, and once only. Raises PostingRefused."""
    legs = (debit(spendable(user_id), amount), credit(buffer(shard_of(user_id, shards.usdc)), amount))
    return await _post(
        connection, writer, Transaction(_id("credit", user_id, reference), "credit", reference, legs), at
    )


async def move_to_fiat_exposure(
    connection: Connection,
    writer: str,
    user_id: str,
    amount: int,
    at: datetime,
    *,
    reference: str,
    shards: Shards = UNSHARDED,
) -> Moved:
    """From the balance to the broker's side, without an order. `reference`: what for, and once only. Raises PostingRefused."""
    id = _id("to the broker", user_id, reference)
    return await _post(connection, writer, moved_without_order(id, user_id, amount, reference, shards), at)


async def reserve(
    connection: Connection, writer: str, user_id: str, amount: int, at: datetime, *, order_id: str
) -> Moved:
    """Sets an order's money aside. Raises PostingRefused (nothing is stored then: the id may be used again), OrderReused, and
    OrderNotReserved where `orders.placed` told of this order and was rejected: that answer stands."""

    def rule(order: Order | None, _fill: Fill | None) -> Step | None:
        step = placed(order, order_id, user_id, amount, at)
        if order is not None and order.status == Status.REJECTED:
            # "done before" would send to the broker what nothing is held for
            raise OrderNotReserved(order_id, order.code)
        return step

    return await _step(connection, writer, at, order_id, None, rule)


async def execute_investment(
    connection: Connection,
    writer: str,
    amount: int,
    at: datetime,
    *,
    order_id: str,
    fill_id: str,
    filled_total: int | None = None,
    shards: Shards = UNSHARDED,
) -> Moved:
    """A fill. `filled_total` with the last one. Raises PostingRefused, OrderRefused."""

    def rule(order: Order | None, fill: Fill | None) -> Step | None:
        return filled(order, fill, order_id, fill_id, amount, filled_total, at, shards)

    return await _step(connection, writer, at, order_id, fill_id, rule)


async def release(
    connection: Connection, writer: str, at: datetime, *, order_id: str, filled_total: int | None = None
) -> Moved:
    """What the order has left goes back. Raises OrderRefused."""

    def rule(order: Order | None, _fill: Fill | None) -> Step | None:
        return ended(order, order_id, Status.CANCELLED, filled_total, at)

    return await _step(connection, writer, at, order_id, None, rule)


async def check_available(
    connection: Connection,
    user_id: str,
    amount: int,
    type: AccountType = AccountType.USDC_BALANCE,
    *,
    at: datetime | None = None,
) -> bool:
    """Whether the customer has so much now. No promise: only a posting decides. With a legacy table beside the ledger, its
    differences are stored as of `at` (now), and in the strict phase raise BalancesDisagree."""
    mirror = mirror_of(connection)
    if mirror is None:
        balances = await owner_balances(connection, user_id)
    else:
        balances, look, suspects = await mirror.balances(connection, user_id)
        differences = await mirror.confirmed(connection, suspects)
        mirror.tell(differences)
        await store_differences(connection, differences, at or datetime.now(UTC))
        if differences and look.phase is Phase.STRICT:
            raise BalancesDisagree([one.type.value for one in differences])
    held = balances.get(asset_of(type))
    return (held.by_type.get(type.value, 0) if held else 0) >= amount


async def _post(connection: Connection, writer: str, transaction: Transaction, at: datetime) -> Moved:
    batch = await book.post(connection, writer, [transaction], at)
    (result,) = batch.results
    if isinstance(result, PostingRefused):
        raise result
    return Moved(batch.sealed)


_Rule = Callable[[Order | None, Fill | None], Step | None]


async def _step(
    connection: Connection, writer: str, at: datetime, order_id: str, fill_id: str | None, rule: _Rule
) -> Moved:
    """One step of an order, tried again while another writer is faster; the last try's error is raised."""
    check_outside(connection)
    for _ in range(book.TRIES_MAX - 1):
        with suppress(*OVERTAKEN):
            return await _take(connection, writer, at, order_id, fill_id, rule)
    return await _take(connection, writer, at, order_id, fill_id, rule)


async def _take(
    connection: Connection, writer: str, at: datetime, order_id: str, fill_id: str | None, rule: _Rule
) -> Moved:
    key, order = order_key(order_id), None
    try:
        async with connection.transaction():
            owners = await lock_writer(connection, writer)
            order = (await lock_orders(connection, [key])).get(key)
            wanted = [] if fill_id is None else [fill_key(order_id, fill_id)]
            fills = await read_fills(connection, wanted)
            step = rule(order, next(iter(fills.values()), None))
            if step is None:
                raise Unchanged
            results, fold = await book.settle(connection, [book.Atomic(step.postings)], at)
            for result in results:
                if isinstance(result, PostingRefused):
                    raise result.cause if isinstance(result, GroupRefused) else result
            changes = Changes()
            (changes.insert if order is None else changes.update)(ORDERS, step.order)
            if step.fill is not None:
                changes.insert(ORDER_FILLS, step.fill)
            blocks = [*store.blocks_of(fold, owners[0].batch), *changes.blocks()]
            sealed = await seal(
                connection, writer, owners, blocks=blocks, messages=buffer_levels(fold), at=fold.at, actor=writer,
                summary={"order": order_id},
            )  # fmt: skip
    except Unchanged:
        return Moved(None, order)
    return Moved(sealed, step.order)


def _id(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16, person=b"funds").hexdigest()
