"""Funds moved by calls from code, on a real PostgreSQL: each is a commit of its own, and a repeat moves nothing."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import asyncpg
import pytest

from agents.investing import reserve_orders
from agents.item import read_item
from agents.stage import settle
from ledger import funds
from ledger.accounts import AccountType, buffer, fiat_buffer, fiat_exposure, pending_investment, spendable
from ledger.commit import claim_owners
from ledger.errors import (
    InsufficientFunds,
    OrderNotReserved,
    OrderOverfilled,
    OrderReused,
    TransactionReused,
    UnknownOrder,
)
from ledger.funds import Moved
from ledger.orders import Shards
from ledger.record import unpack
from ledger.rows import Connection
from tests.support.ledger_rig import (
    AT,
    assert_holds,
    balance,
    connect_to,
    connection,
    databases,
    differences,
    dsn,
    dump,
)
from tests.support.ledger_rig import rebuild as rebuild_from
from topics.catalog import ORDERS_PLACED
from topics.envelope import headers_of, value_of
from topics.events import OrderPlaced
from topics.money import SCALE

__all__ = ["connection", "databases", "dsn"]

WRITER = "legacy"


async def owns(connection: Connection) -> tuple[int, ...]:
    accounts = (spendable("ada"), pending_investment("ada"), fiat_exposure("ada"), buffer(), fiat_buffer())
    return tuple([await balance(connection, account) or 0 for account in accounts])


async def test_an_order_from_code_is_reserved_filled_and_released_and_the_journal_rebuilds_it(
    connection: Connection, databases: object, dsn: str
) -> None:
    made: list[Moved] = []

    async def twice(call: object) -> Moved:
        """The call, and the same again, which does nothing."""
        first, again = await call(), await call()  # type: ignore[operator]
        assert first.sealed is not None
        assert again.sealed is None
        made.append(first)
        return first  # type: ignore[no-any-return]

    await twice(lambda: funds.credit_usdc(connection, WRITER, "ada", 1_000, AT, reference="deposit 1"))
    assert await funds.check_available(connection, "ada", 1_000)
    assert not await funds.check_available(connection, "ada", 1_001)
    assert not await funds.check_available(connection, "bob", 1)
    await twice(lambda: funds.reserve(connection, WRITER, "ada", 100, AT, order_id="o1"))
    assert await owns(connection) == (900, 100, 0, -1_000, 0)
    await twice(lambda: funds.execute_investment(connection, WRITER, 60, AT, order_id="o1", fill_id="f1"))
    assert await owns(connection) == (900, 40, 60, -940, -60)
    waits = await twice(lambda: funds.release(connection, WRITER, AT, order_id="o1", filled_total=70))
    assert waits.order is not None
    assert waits.order.status == "reserved"
    ended = await twice(lambda: funds.execute_investment(connection, WRITER, 10, AT, order_id="o1", fill_id="f2"))
    assert ended.order is not None
    assert (ended.order.status, ended.order.filled) == ("cancelled", 70)
    await twice(lambda: funds.move_to_fiat_exposure(connection, WRITER, "ada", 30, AT, reference="plan 1"))
    assert await owns(connection) == (900, 0, 100, -900, -100)
    assert await funds.check_available(connection, "ada", 100, AccountType.FIAT_EXPOSURE)
    await assert_holds(connection)

    other = await connect_to(databases())()  # type: ignore[operator]
    await rebuild_from(other, [(one.sealed.seq, one.sealed.record) for one in made if one.sealed])
    assert differences(await dump(connection), await dump(other)) == {}
    assert [unpack(one.sealed.record).stage for one in made if one.sealed] == [WRITER] * len(made)
    await other.close()


async def test_what_cannot_be_is_refused_and_stores_nothing(connection: Connection) -> None:
    await funds.credit_usdc(connection, WRITER, "ada", 100, AT, reference="deposit 1")
    with pytest.raises(TransactionReused):
        await funds.credit_usdc(connection, WRITER, "ada", 101, AT, reference="deposit 1")
    with pytest.raises(InsufficientFunds):
        await funds.reserve(connection, WRITER, "ada", 101, AT, order_id="o1")
    with pytest.raises(UnknownOrder):
        await funds.release(connection, WRITER, AT, order_id="o1")
    with pytest.raises(InsufficientFunds):
        await funds.move_to_fiat_exposure(connection, WRITER, "ada", 101, AT, reference="plan 1")
    await funds.reserve(connection, WRITER, "ada", 100, AT, order_id="o1")  # the id was not used up
    with pytest.raises(OrderOverfilled):
        await funds.execute_investment(connection, WRITER, 101, AT, order_id="o1", fill_id="f1")
    await funds.release(connection, WRITER, AT, order_id="o1")
    assert await owns(connection) == (100, 0, 0, -100, 0)
    await assert_holds(connection)


async def test_an_order_that_was_rejected_as_an_event_is_not_reserved_by_a_call(connection: Connection) -> None:
    stage, place = reserve_orders.stage(), (ORDERS_PLACED.name, 0)
    event = OrderPlaced(order_id="o1", user_id="ada", amount="100")
    headers = headers_of(event.ce_type(), event_id="o1", source="investing", time=AT)
    record = SimpleNamespace(
        topic=place[0], partition=0, offset=0, timestamp=0, key=b"o1", value=value_of(event), headers=headers
    )
    async with connection.transaction():
        epochs, _ = await claim_owners(connection, stage.name, [place], AT)
    await settle(connection, stage, [read_item(stage, record)], epochs, AT, None)  # type: ignore[arg-type]
    await funds.credit_usdc(connection, WRITER, "ada", 100 * SCALE, AT, reference="deposit 1")
    before = await dump(connection)
    with pytest.raises(OrderNotReserved, match="insufficient_funds"):
        await funds.reserve(connection, WRITER, "ada", 100 * SCALE, AT, order_id="o1")
    with pytest.raises(OrderReused):
        await funds.reserve(connection, WRITER, "ada", 99 * SCALE, AT, order_id="o1")
    assert await dump(connection) == before
    assert await owns(connection) == (100 * SCALE, 0, 0, -100 * SCALE, 0)
    await assert_holds(connection)


async def test_calls_at_once_by_two_services_fill_an_order_once(connection: Connection, dsn: str) -> None:
    await funds.credit_usdc(connection, WRITER, "ada", 100, AT, reference="deposit 1", shards=Shards(2, 2))
    others = [await connect_to(dsn)() for _ in range(4)]
    await asyncio.gather(
        *(funds.reserve(one, f"service {n}", "ada", 90, AT, order_id="o1") for n, one in enumerate(others))
    )
    moved = await asyncio.gather(
        *(
            funds.execute_investment(
                one, f"service {n}", 45, AT, order_id="o1", fill_id=f"f{n % 2}", shards=Shards(2, 2)
            )
            for n, one in enumerate(others)
        )
    )
    assert sum(one.sealed is not None for one in moved) == 2
    held, exposed = [
        await balance(connection, account) for account in (pending_investment("ada"), fiat_exposure("ada"))
    ]
    assert (await balance(connection, spendable("ada")), held, exposed) == (10, 0, 90)
    for one in others:
        await one.close()
    await assert_holds(connection)


async def test_a_step_that_others_are_faster_at_is_tried_again_and_given_back_after_many_times(
    connection: Connection, dsn: str
) -> None:
    await funds.credit_usdc(connection, WRITER, "ada", 100, AT, reference="deposit 1")
    await funds.reserve(connection, WRITER, "ada", 90, AT, order_id="o1")
    other = await connect_to(dsn)()
    await connection.execute("SET lock_timeout = '5ms'")

    async def spend() -> Moved:
        return await funds.execute_investment(connection, WRITER, 90, AT, order_id="o1", fill_id="f1")

    async with other.transaction():
        await other.execute("SELECT FROM orders FOR UPDATE")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await spend()
    assert (await spend()).sealed is not None
    assert (await spend()).sealed is None
    assert await owns(connection) == (10, 0, 90, -10, -90)
    await other.close()
    await assert_holds(connection)
