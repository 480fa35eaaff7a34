"""kill -9 of the real worker of `investing` at each boundary of its stages, three times in each life of a few orders: while they
are reserved, filled and ended. Nothing is held, moved, given back or told twice, and nothing is lost.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from tests.support.crash_rig import Rigs
from tests.support.order_rig import OrderRig, order_rig
from tests.support.rebuild import differences, empty_database, rebuild
from tests.support.withdrawal_points import boundaries, killed_at
from tests.support.worker_rig import PATIENCE_S
from topics.catalog import ORDERS_CANCELLED, ORDERS_EXPIRED
from topics.events import OrderCancelled, OrderExpired
from topics.money import SCALE

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTINGS = {
    "STABLERAIL_KAFKA_SESSION_TIMEOUT_S": "2",
    "STABLERAIL_DATABASE_IDLE_TIMEOUT_S": "60",  # a held statement is not a frozen worker here
}
RESERVE, SETTLE, CANCEL, EXPIRE = (
    boundaries(stage)
    for stage in ("reserve_orders", "settle_fills", "release_cancelled_orders", "release_expired_orders")
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rigs(scratch: Path, postgres: Postgres, kafka: Kafka) -> AsyncIterator[Rigs[OrderRig]]:
    rigs = Rigs(partial(order_rig, scratch, postgres, kafka, SETTINGS))
    yield rigs
    await rigs.close()


@pytest_asyncio.fixture(loop_scope="module")
async def rig(rigs: Rigs[OrderRig]) -> OrderRig:
    """One worker, idle, that owns every partition."""
    return await rigs.quiet()


@pytest.mark.parametrize("n", range(len(RESERVE)), ids=map(str, RESERVE))
async def test_a_worker_killed_there_holds_moves_and_gives_back_every_orders_money_once(rig: OrderRig, n: int) -> None:
    names: list[str] = []

    async def place() -> None:
        names.extend(await rig.place(4))

    await killed_at(rig, RESERVE[n], place())
    bought, sold_out, half, none = names
    whole = rig.orders[sold_out].amount
    fills = {bought: (2 * SCALE, SCALE), sold_out: (whole - 1, 1), half: (3,)}
    # the last unit ends `sold_out` by itself; of `bought` its last fill says that it is the last
    rig.orders[sold_out].end = "filled"
    await killed_at(rig, SETTLE[n], rig.fill(fills, bought))
    end, event, topic = (CANCEL, OrderCancelled, ORDERS_CANCELLED) if n % 2 else (EXPIRE, OrderExpired, ORDERS_EXPIRED)
    await killed_at(rig, end[n], rig.end(event, topic, {half: 3, none: None}))
    rig.quiet()


async def test_the_worker_tells_how_many_orders_are_open_and_since_when(rig: OrderRig) -> None:
    names = await rig.place(2)

    async def told() -> bool:
        async with httpx.AsyncClient() as client:
            with suppress(httpx.TransportError):  # it may still be starting
                text = (await client.get(f"http://127.0.0.1:{rig.port}/metrics")).text
                return 'stablerail_orders_open{state="reserved"} 2.0' in text
        return False

    await rig.until(told, "two orders are open")
    await rig.end(OrderCancelled, ORDERS_CANCELLED, dict.fromkeys(names))
    await rig.check()
    rig.quiet()


async def test_the_journal_alone_makes_the_same_orders_and_holds(rig: OrderRig) -> None:
    # A worker may take its partitions anew at any time, as when one that was killed is missed at last. It ends, so that
    # nothing is committed between the journal's end and the comparison.
    assert rig.worker.stop(timeout_s=PATIENCE_S) == 0
    assert await rig.is_idle(), rig.logs()
    async with empty_database(rig.dsn) as empty:
        await rebuild(rig.bootstrap, rig.prefix, empty, "stablerail")
        assert await differences(rig.dsn, empty) == {}
    rig.quiet()
