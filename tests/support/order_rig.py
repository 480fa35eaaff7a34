"""A rig for crash tests of orders: the movement's worker behind both proxies, and what came of every order.

What was told to the workers, what the ledger and the orders hold and what they told are compared as wholes: everything so far,
however many workers died on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from ledger.accounts import buffer, spendable
from ledger.book import post
from ledger.posting import Transaction, credit, debit
from ledger.verify import verify
from stablerail.dev.stack import Stack
from tests.support.ledger_rig import connect_to
from tests.support.proxies import KafkaProxy, PostgresProxy
from tests.support.worker_rig import WorkerRig, worker_rig
from topics.catalog import ORDERS_FILLED, ORDERS_PLACED, ORDERS_RESERVED, ORDERS_SETTLED, Topic
from topics.envelope import headers_of, value_of
from topics.events import Event, OrderCancelled, OrderFilled, OrderPlaced, OrderReserved, OrderSettled
from topics.money import SCALE

FUNDS = 1_000_000 * SCALE
USER = "ada"
STAGES = ("reserve_orders", "settle_fills", "release_cancelled_orders", "release_expired_orders")
_MOVED = "SELECT kind, count(*) FROM transactions WHERE kind LIKE 'order%' GROUP BY 1"


@dataclass
class Told:
    """An order as the tests told it. Base units."""

    amount: int
    fills: tuple[int, ...] = ()
    end: str | None = None


class OrderRig(WorkerRig):
    movement = "investing"

    def __init__(self, stack: Stack, prefix: str, postgres: PostgresProxy, kafka: KafkaProxy) -> None:
        super().__init__(stack, prefix, postgres, kafka)
        self.orders: dict[str, Told] = {}
        self._told: dict[str, list[Any]] = {ORDERS_RESERVED.name: [], ORDERS_SETTLED.name: []}

    # -- what happens ------------------------------------------------------------------------------------------------

    async def place(self, count: int) -> list[str]:
        """Orders as one record batch: one fetch, one run, one transaction."""
        names = [f"o{len(self.orders) + number}" for number in range(count)]
        for name in names:
            self.orders[name] = Told(10 * SCALE + len(self.orders))
        events = [OrderPlaced(order_id=one, user_id=USER, amount=_text(self.orders[one].amount)) for one in names]
        await self._send(ORDERS_PLACED, events)
        return names

    async def fill(self, fills: Mapping[str, Sequence[int]], filled: str) -> None:
        """Parts of orders, as one record batch; `filled` is the one whose last part says that it is the last."""
        events = []
        for name, parts in fills.items():
            told = self.orders[name]
            for number, part in enumerate(parts):
                last = name == filled and number == len(parts) - 1
                total = {"filled_total": _text(sum(parts))} if last else {}
                events.append(OrderFilled(order_id=name, fill_id=f"f{number}", amount=_text(part), **total))
            told.fills = tuple(parts)
            told.end = "filled" if name == filled else told.end
        await self._send(ORDERS_FILLED, events)

    async def end(self, event: type[OrderCancelled], topic: Topic, totals: Mapping[str, int | None]) -> None:
        """Ends of orders, as one record batch."""
        events = []
        for name, total in totals.items():
            given = {} if total is None else {"filled_total": _text(total)}
            events.append(event(order_id=name, **given))
            self.orders[name].end = topic.name.removeprefix("orders.")
        await self._send(topic, events)

    async def _send(self, topic: Topic, events: Sequence[Event]) -> None:
        batch = self._producer.create_batch()
        for event in events:
            headers = headers_of(event.ce_type(), event_id=event.identity(), source="test", time=datetime.now(UTC))
            batch.append(key=event.identity().encode(), value=value_of(event), timestamp=None, headers=headers)
        await (await self._producer.send_batch(batch, topic.named(self.prefix), partition=0))

    # -- looking -----------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Everything told so far, repeats too."""
        for record in await self.news():
            name = record.topic.removeprefix(self.prefix)
            model = OrderReserved if name == ORDERS_RESERVED.name else OrderSettled
            self._told[name].append(model.model_validate_json(record.value))

    def _told_once(self, topic: Topic, *fields: str) -> dict[str, tuple[Any, ...]]:
        """What was told of each order; every repeat says the same."""
        found = {(event.order_id, *(getattr(event, name) for name in fields)) for event in self._told[topic.name]}
        assert len({one[0] for one in found}) == len(found), f"an order was told of in two ways: {found}"
        return {one[0]: one[1:] for one in found}

    # -- judging -----------------------------------------------------------------------------------------------------

    async def until_told(self) -> None:
        """Until all that was said of the orders came to what it must, was told, and is journaled."""

        async def said() -> bool:
            await self._read()
            ended = {name for name, told in self.orders.items() if told.end}
            reserved = {event.order_id for event in self._told[ORDERS_RESERVED.name]}
            settled = {event.order_id for event in self._told[ORDERS_SETTLED.name]}
            filled = await self.database.fetchval("SELECT count(*) FROM order_fills")
            count = sum(len(told.fills) for told in self.orders.values())
            return reserved >= self.orders.keys() and settled >= ended and filled == count and await self.is_idle()

        await self.until(said, "every order comes to what was said of it")

    async def check(self) -> None:
        """Holds, balances, rows and what was told are what the orders make them, each once."""
        await self.until_told()
        orders = {name: (told.amount,) for name, told in self.orders.items()}
        assert self._told_once(ORDERS_RESERVED, "amount") == orders
        ends = {
            name: (told.end, sum(told.fills), told.amount - sum(told.fills))
            for name, told in self.orders.items()
            if told.end
        }
        assert self._told_once(ORDERS_SETTLED, "outcome", "filled", "released") == ends
        rows = await self.database.fetch(
            "SELECT order_id, status, filled::text, remaining::text FROM orders JOIN holds ON holds.id = hold_id"
        )
        assert {row[0]: (row[1], int(row[2]), int(row[3])) for row in rows} == {
            name: (told.end or "reserved", sum(told.fills), 0 if told.end else told.amount - sum(told.fills))
            for name, told in self.orders.items()
        }
        moved = Counter(order_reserved=len(self.orders))
        moved["order_filled"] = sum(len(told.fills) for told in self.orders.values())
        moved["order_released"] = sum(1 for _, _, released in ends.values() if released)
        assert Counter({row[0]: row[1] for row in await self.database.fetch(_MOVED)}) == moved
        assert await self._balances() == self._expected_balances()
        assert [result for result in await verify(self.database) if not result.holds] == []

    async def _balances(self) -> dict[str, int]:
        sql = "SELECT owner || '.' || type, sum(balance)::text FROM accounts GROUP BY 1"
        return {name: int(balance) for name, balance in await self.database.fetch(sql) if int(balance)}

    def _expected_balances(self) -> dict[str, int]:
        spent = sum(sum(told.fills) for told in self.orders.values())
        held = sum(told.amount - sum(told.fills) for told in self.orders.values() if not told.end)
        expected = {
            f"{USER}.usdc_balance": FUNDS - spent - held, f"{USER}.pending_investment": held, f"{USER}.fiat_exposure": spent,
            "system.system_buffer_usdc": spent - FUNDS, "system.system_buffer_fiat": -spent,
        }  # fmt: skip
        return {name: balance for name, balance in expected.items() if balance}

    def quiet(self) -> None:
        """The test has ended well."""
        assert [hold for hold in self.holds if not hold.is_hit] == [], "a hold that was never hit proves nothing"
        self.holds.clear()
        self.is_quiet = True

    # -- life --------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Schema, topics, a customer with money, and the clients of the test's own, which go past the proxies."""
        await self._stack.prepare()
        await self.connect()
        writer = await connect_to(self.dsn)()
        gift = Transaction("f" * 32, "gift", "", (debit(spendable(USER), FUNDS), credit(buffer(), FUNDS)))
        await post(writer, "test", [gift], datetime.now(UTC))  # the worker's relay journals it
        await writer.close()
        await self.start_clients(ORDERS_RESERVED, ORDERS_SETTLED)

    async def first_worker(self) -> None:
        """A worker, and an order through it, so that every topic has a leader before anything is held."""
        self.start_worker()

        async def owned() -> bool:
            rows = await self.database.fetch("SELECT stage, count(*) FROM owners GROUP BY 1")
            partitions = {stage: count for stage, count in rows if stage in STAGES}
            return partitions == dict.fromkeys(STAGES, ORDERS_PLACED.partitions)

        await self.until(owned, "a worker owns every partition")
        (name,) = await self.place(1)
        await self.until_told()
        await self.fill({name: (SCALE,)}, name)
        await self.check()


def _text(amount: int) -> str:
    return f"{amount // SCALE}.{amount % SCALE:06d}"


order_rig = partial(worker_rig, OrderRig)
