"""Orders in the test's own process: messages as the investing service and the broker send them, and what came of them."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from agents.investing import release_orders, reserve_orders, settle_fills
from agents.outcome import Stage
from agents.sweeper import Sweeper
from ledger.accounts import fiat_exposure, pending_investment, spendable
from ledger.orders import Shards
from tests.support.in_process import NEVER_S, Ground, running, until
from tests.support.withdrawals import balance
from topics.catalog import (
    ORDERS_CANCELLED,
    ORDERS_EXPIRED,
    ORDERS_FILLED,
    ORDERS_PLACED,
    ORDERS_REJECTED,
    ORDERS_RESERVED,
    ORDERS_SETTLED,
    Topic,
)
from topics.envelope import headers_of

TOPICS = (
    ORDERS_PLACED, ORDERS_RESERVED, ORDERS_REJECTED, ORDERS_FILLED, ORDERS_CANCELLED, ORDERS_EXPIRED, ORDERS_SETTLED,
)  # fmt: skip


def stages() -> tuple[Stage[Any], ...]:
    return reserve_orders.stage(), settle_fills.stage(Shards()), *release_orders.stages()


async def say(
    at: Ground, topic: Topic, order_id: str, *, partition: int = 0, envelope: bool = True, **body: Any
) -> None:
    """An event of an order. `envelope`: with an id of its own, so that the same again is another event of the same contents."""
    value = json.dumps({"order_id": order_id, **body}).encode()
    headers: list[tuple[str, bytes]] = []
    if envelope:
        headers = headers_of(topic.models[0].ce_type(), event_id=uuid.uuid4().hex, source="investing", time=at.clock())
    await at.send(topic, order_id.encode(), value, headers, partition)


async def place(at: Ground, order_id: str, amount: str, user_id: str = "ada", **more: Any) -> None:
    await say(at, ORDERS_PLACED, order_id, user_id=user_id, amount=amount, **more)


async def fill(at: Ground, order_id: str, fill_id: str, amount: str, **more: Any) -> None:
    await say(at, ORDERS_FILLED, order_id, fill_id=fill_id, amount=amount, **more)


@asynccontextmanager
async def investing(at: Ground, *some: Stage[Any]) -> AsyncIterator[None]:
    """A worker of the movement (or of some of its stages), with a sweeper."""
    async with AsyncExitStack() as stack:
        services = await stack.enter_async_context(at.process())
        for stage in some or stages():
            await stack.enter_async_context(running(stage, services, at))
        # the tests move the time: what leaves just now is not to look abandoned
        sweeper = asyncio.create_task(Sweeper(services, interval_s=0.02, abandoned_s=NEVER_S).work())
        try:
            yield
        finally:
            sweeper.cancel()
            await asyncio.gather(sweeper, return_exceptions=True)


async def orders(at: Ground) -> dict[str, tuple[str, int]]:
    """(status, filled) of every order."""
    rows = await at.observer.fetch("SELECT order_id, status, filled::text FROM orders")
    return {order_id: (status, int(filled)) for order_id, status, filled in rows}


async def until_orders(at: Ground, expected: dict[str, tuple[str, int]]) -> None:
    async def are_so() -> bool:
        return await orders(at) == expected

    try:
        await until(are_so, "the orders' ends")
    except AssertionError:
        assert await orders(at) == expected
        raise


async def owns(at: Ground, user_id: str = "ada") -> tuple[int, int, int]:
    """Base units that the customer may spend, that are reserved, and at the broker."""
    accounts = spendable(user_id), pending_investment(user_id), fiat_exposure(user_id)
    spend, held, exposed = [await balance(at, account) for account in accounts]
    return spend, held, exposed


async def held(at: Ground) -> int:
    """What all holds still hold."""
    return int(await at.observer.fetchval("SELECT coalesce(sum(remaining), 0) FROM holds"))


async def letters(at: Ground, *topics: Topic) -> list[str]:
    """Codes of the dead letters, sorted."""
    found = [record for topic in topics for record in await at.told(topic.dlq)]
    return sorted(dict(record.headers)["dlq_code"].decode() for record in found)
