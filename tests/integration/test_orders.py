"""Orders reserved, filled and ended, in any order and told twice, on real Kafka and PostgreSQL."""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from agents.investing import release_orders, reserve_orders, settle_fills
from agents.treasury import fund_broker
from ledger.accounts import buffer, fiat_buffer
from ledger.orders import Shards
from stablerail import order_figures
from stablerail.dev.kafka import Kafka
from stablerail.metrics import Metrics
from tests.integration.test_accept_withdrawals import rejected as freeze
from tests.integration.test_runbook import day, follow
from tests.support.in_process import Ground, ground, until
from tests.support.orders import (
    TOPICS,
    fill,
    held,
    investing,
    letters,
    orders,
    owns,
    place,
    say,
    stages,
    until_orders,
)
from tests.support.withdrawals import assert_whole, balance, fund
from topics.catalog import (
    BROKER_FUNDED,
    ORDERS_CANCELLED,
    ORDERS_EXPIRED,
    ORDERS_FILLED,
    ORDERS_PLACED,
    ORDERS_REJECTED,
    ORDERS_RESERVED,
    ORDERS_SETTLED,
)
from topics.events import OrderRejected, OrderReserved, OrderSettled
from topics.money import SCALE


@pytest.fixture
async def at(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    async with ground(database, kafka.bootstrap, topic_prefix, [*TOPICS, BROKER_FUNDED]) as it:
        yield it


async def settled(at: Ground, count: int) -> dict[str, tuple[str, int, int]]:
    """(outcome, filled, released) that was told of each order: one event of each, as often as it may have been told again."""

    async def so_many() -> set[tuple[bytes, bytes]]:
        found = {(dict(record.headers)["ce_id"], record.value) for record in await at.told(ORDERS_SETTLED)}
        return found if len(found) >= count else set()

    events = [OrderSettled.model_validate_json(value) for _, value in await until(so_many, "told")]
    assert len({event.order_id for event in events}) == len(events) == count
    return {event.order_id: (event.outcome, event.filled, event.released) for event in events}


async def test_an_order_is_reserved_filled_in_parts_and_what_it_did_not_need_comes_back(at: Ground) -> None:
    await fund(at, "ada", 1_000 * SCALE)
    async with investing(at):
        await place(at, "o1", "100", envelope=False)
        await until_orders(at, {"o1": ("reserved", 0)})
        assert await owns(at) == (900 * SCALE, 100 * SCALE, 0)
        await fill(at, "o1", "f1", "30.5", envelope=False)
        await fill(at, "o1", "f2", "39.5", envelope=False)
        await until_orders(at, {"o1": ("reserved", 70 * SCALE)})
        assert await owns(at) == (900 * SCALE, 30 * SCALE, 70 * SCALE)
        await fill(at, "o1", "f3", "27.499999", filled_total="97.499999", envelope=False)
        filled = 97_499_999
        await until_orders(at, {"o1": ("filled", filled)})
        assert await settled(at, 1) == {"o1": ("filled", filled, 100 * SCALE - filled)}
    assert await owns(at) == (1_000 * SCALE - filled, 0, filled)
    assert await balance(at, buffer()) == -1_000 * SCALE + filled
    assert await balance(at, fiat_buffer()) == -filled
    (told,) = [OrderReserved.model_validate_json(record.value) for record in await at.told(ORDERS_RESERVED)]
    assert (told.order_id, told.user_id, told.amount) == ("o1", "ada", 100 * SCALE)
    assert await held(at) == 0
    await assert_whole(at)


async def test_an_order_that_nothing_can_be_reserved_for_is_answered(at: Ground) -> None:
    await fund(at, "ada", 10 * SCALE)
    await fund(at, "eve", 10 * SCALE)
    await freeze(at, "eve")
    async with investing(at):
        await place(at, "frozen", "1", "eve")
        await place(at, "dear", "10.000001")
        await place(at, "ours", "1", "system")
        await place(at, "whole", "10")
        await place(at, "whole", "9")  # the id is used
        frozen = {"frozen": ("rejected", 0)}
        await until_orders(at, {**frozen, "dear": ("rejected", 0), "whole": ("reserved", 0)})
        await fill(at, "dear", "f1", "1")
        await say(at, ORDERS_CANCELLED, "dear")
        await say(at, ORDERS_EXPIRED, "whole")
        await until_orders(at, {**frozen, "dear": ("rejected", 0), "whole": ("expired", 0)})

        async def all_refused() -> bool:
            refused = await letters(at, ORDERS_PLACED, ORDERS_FILLED, ORDERS_CANCELLED)
            return refused == ["order_id_reused", "order_not_reserved", "order_not_reserved", "reserved_user"]

        await until(all_refused, "the dead letters")
    told = [OrderRejected.model_validate_json(record.value) for record in await at.told(ORDERS_REJECTED)]
    codes = {("dear", "insufficient_funds"), ("frozen", "frozen_customer")}
    assert {(event.order_id, event.code) for event in told} == codes
    assert await owns(at) == await owns(at, "eve") == (10 * SCALE, 0, 0)
    await assert_whole(at)


async def test_more_than_was_reserved_is_never_filled_and_the_last_unit_ends_the_hold(at: Ground) -> None:
    await fund(at, "ada", 100 * SCALE)
    async with investing(at):
        await place(at, "o1", "0.000003")
        for n in range(3):
            await fill(at, "o1", f"f{n}", "0.000001")
        await until_orders(at, {"o1": ("filled", 3)})
        await fill(at, "o1", "f3", "0.000001")
        await fill(at, "o1", "f0", "0.000002")
        await fill(at, "o1", "f1", "0.000001")  # told again under another id

        async def refused() -> bool:
            return await letters(at, ORDERS_FILLED) == ["fill_id_reused", "order_overfilled"]

        await until(refused, "the dead letters")
    assert await settled(at, 1) == {"o1": ("filled", 3, 0)}
    assert await owns(at) == (100 * SCALE - 3, 0, 3)
    assert await held(at) == 0
    await assert_whole(at)


async def figures(at: Ground) -> dict[str, tuple[float, float]]:
    """(how many, age of the oldest in seconds) by state."""
    told = Metrics()
    await order_figures.look(at.observer, told, 50, at.clock())
    limits = {"reserved": 50.0, "fills_missing": 3600.0, "unplaced": 600.0}

    def of(name: str, state: str) -> float:
        return told.registry.get_sample_value(f"stablerail_orders_{name}", {"state": state}) or 0.0

    assert {state: of("age_limit_seconds", state) for state in limits} == limits
    return {state: (of("open", state), of("oldest_age_seconds", state)) for state in limits}


async def test_what_comes_before_its_order_waits_for_it(at: Ground) -> None:
    """Fills and ends are read by their stages before the orders are; then the orders come."""
    await fund(at, "ada", 100 * SCALE)
    async with investing(at, settle_fills.stage(Shards()), *release_orders.stages()):
        await fill(at, "bought", "f2", "4", filled_total="9")
        await fill(at, "bought", "f1", "5")
        await say(at, ORDERS_CANCELLED, "half", filled_total="5")
        await fill(at, "half", "f1", "5")
        await say(at, ORDERS_EXPIRED, "none")

        async def all_wait() -> bool:
            return bool(await at.observer.fetchval("SELECT count(*) = 5 FROM schedule WHERE code = 'unknown_order'"))

        await until(all_wait, "all wait")
    assert await orders(at) == {}
    at.clock.forward(900)
    none = (0, 0)
    waits = {"reserved": none, "fills_missing": none, "unplaced": (5, pytest.approx(900, abs=100))}
    assert await figures(at) == waits
    for name in ("bought", "half", "none"):
        await place(at, name, "10")
    async with investing(at, reserve_orders.stage()):
        await until_orders(at, dict.fromkeys(("bought", "half", "none"), ("reserved", 0)))
    at.clock.forward(60)
    async with investing(at, *release_orders.stages()):

        async def half_lacks_a_fill() -> bool:
            found = await figures(at)
            return (found["reserved"][0], found["fills_missing"][0]) == (1, 1)

        await until(half_lacks_a_fill, "the ends are there")
    at.clock.forward(60)
    found = await figures(at)
    assert found["reserved"] == (1, pytest.approx(120, abs=100))
    assert found["fills_missing"] == (1, pytest.approx(60, abs=50))
    async with investing(at):
        ends = {"bought": ("filled", 9 * SCALE), "half": ("cancelled", 5 * SCALE), "none": ("expired", 0)}
        await until_orders(at, ends)
        told = await settled(at, 3)
        assert await figures(at) == {"reserved": none, "fills_missing": none, "unplaced": none}
    assert {name: released for name, (_, _, released) in told.items()} == {
        "bought": 1 * SCALE, "half": 5 * SCALE, "none": 10 * SCALE,
    }  # fmt: skip
    assert await owns(at) == (86 * SCALE, 0, 14 * SCALE)
    assert await held(at) == 0
    assert await letters(at, *TOPICS) == []
    await assert_whole(at)


async def test_a_fill_that_comes_after_the_money_was_given_back_is_paid_from_the_balance(at: Ground) -> None:
    """The cancel did not say that something was filled: the fill is a fact all the same."""
    await fund(at, "ada", 10 * SCALE)
    async with investing(at):
        await place(at, "o1", "10")
        await until_orders(at, {"o1": ("reserved", 0)})
        await say(at, ORDERS_CANCELLED, "o1")
        await until_orders(at, {"o1": ("cancelled", 0)})
        await fill(at, "o1", "f1", "4")
        await until_orders(at, {"o1": ("cancelled", 4 * SCALE)})
        await place(at, "o2", "6")  # what the next fill would need
        await until_orders(at, {"o1": ("cancelled", 4 * SCALE), "o2": ("reserved", 0)})
        await fill(at, "o1", "f2", "6")

        async def refused() -> bool:
            return await letters(at, ORDERS_FILLED) == ["insufficient_funds"]

        await until(refused, "the dead letter")
        await say(at, ORDERS_CANCELLED, "o2")
        await until_orders(at, {"o1": ("cancelled", 4 * SCALE), "o2": ("cancelled", 0)})
    assert await owns(at) == (6 * SCALE, 0, 4 * SCALE)
    assert await held(at) == 0
    await assert_whole(at)


async def test_an_end_whose_total_was_refused_is_told_again_put_right(at: Ground) -> None:
    """By producers without envelopes too: all they have for an id is what they say."""
    await fund(at, "ada", 10 * SCALE)
    async with investing(at):
        for name, end in (("o1", ORDERS_CANCELLED), ("o2", ORDERS_EXPIRED)):
            await place(at, name, "5")
            await fill(at, name, "f1", "4")
            await until_orders(at, {**await orders(at), name: ("reserved", 4 * SCALE)})
            await say(at, end, name, filled_total="3", envelope=False)

        async def refused() -> bool:
            return await letters(at, ORDERS_CANCELLED, ORDERS_EXPIRED) == ["fills_disagree"] * 2

        await until(refused, "the dead letters")
        await say(at, ORDERS_CANCELLED, "o1", filled_total="4", envelope=False)
        await say(at, ORDERS_EXPIRED, "o2", envelope=False)
        await until_orders(at, {"o1": ("cancelled", 4 * SCALE), "o2": ("expired", 4 * SCALE)})
    assert await owns(at) == (2 * SCALE, 0, 8 * SCALE)
    assert await held(at) == 0
    await assert_whole(at)


async def test_a_fill_that_the_broker_takes_back_is_corrected_as_the_runbook_says(
    at: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("DATABASE_URL", at.dsn), ("KAFKA_BOOTSTRAP", at.bootstrap), ("TOPIC_PREFIX", at.prefix)):
        monkeypatch.setenv(f"STABLERAIL_{name}", value)
    await fund(at, "ada", 100 * SCALE)
    async with investing(at):
        await place(at, "o1", "100")
        await fill(at, "o1", "f1", "30.5")
        await fill(at, "o1", "f2", "20")
        await until_orders(at, {"o1": ("reserved", 50_500_000)})
        steps = day("A fill is taken back or changed")
        assert len(steps) == 3
        await follow(steps, {"ID": str(uuid.uuid4())}, monkeypatch)
        assert await owns(at) == (30_500_000, 49_500_000, 20 * SCALE)
        await say(at, ORDERS_CANCELLED, "o1")
        await until_orders(at, {"o1": ("cancelled", 50_500_000)})
    assert await owns(at) == (80 * SCALE, 0, 20 * SCALE)
    await assert_whole(at)


async def test_orders_told_twice_and_in_any_order_by_two_workers_leave_no_hold(at: Ground) -> None:
    """Each order's events go to any partition, some twice under new ids, in a random order."""
    dice = random.Random(7)
    users = ["ada", "bob", "eve"]
    for user in users:
        await fund(at, user, 1_000 * SCALE)
    events: list[Callable[[], Coroutine[Any, Any, None]]] = []
    ends: dict[str, tuple[str, int]] = {}
    spent = dict.fromkeys(users, 0)
    for n in range(24):
        name, user = f"o{n}", users[n % 3]
        parts = [dice.randint(1, 4_000_000) for _ in range(dice.randint(0, 4))]
        total, end = sum(parts), dice.choice(["filled", "cancelled", "expired"] if parts else ["cancelled", "expired"])
        amount = total + dice.choice([0, dice.randint(1, SCALE)])
        amount = amount or SCALE
        end = "filled" if total == amount else end
        spent[user] += total
        ends[name] = (end, total)
        mine = [partial(place, at, name, _text(amount), user)]
        for k, part in enumerate(parts):
            last = {"filled_total": _text(total)} if end == "filled" and k == len(parts) - 1 else {}
            mine.append(partial(fill, at, name, f"f{k}", _text(part), **last))
        if end != "filled":
            topic = ORDERS_CANCELLED if end == "cancelled" else ORDERS_EXPIRED
            mine.append(partial(say, at, topic, name, filled_total=_text(total)))
        events += [partial(one, partition=dice.randrange(4)) for one in (*mine, *dice.sample(mine, len(mine) // 2))]
    dice.shuffle(events)
    async with investing(at), investing(at):
        for event in events:
            await event()

        async def all_ended() -> bool:
            at.clock.forward(1)  # what waits is due
            return await orders(at) == {**await orders(at), **ends}

        await until(all_ended, "every order's end")

        async def none_waits() -> bool:
            at.clock.forward(1)
            return not await at.observer.fetchval("SELECT count(*) FROM schedule")

        await until(none_waits, "the repeats are settled")
    assert await orders(at) == ends
    assert {name: (end, total) for name, (end, total, _) in (await settled(at, 24)).items()} == ends
    for user in users:
        assert await owns(at, user) == (1_000 * SCALE - spent[user], 0, spent[user])
    assert await held(at) == 0
    assert await letters(at, *TOPICS) == []
    await assert_whole(at)


def _text(amount: int) -> str:
    return f"{amount // SCALE}.{amount % SCALE:06d}"


async def test_usd_that_arrive_at_the_broker_leave_the_fiat_buffer_once(at: Ground) -> None:
    async with investing(at, fund_broker.stage(1)):
        for partition, amount in ((0, "50000"), (0, "50000"), (1, "50000"), (0, "49999.5")):
            await say(at, BROKER_FUNDED, "wire", funding_id="wire 1", amount=amount, partition=partition)
        await say(at, BROKER_FUNDED, "wire", funding_id="wire 2", amount="0.5")

        async def all_settled() -> bool:
            return bool(await at.observer.fetchval("SELECT count(*) = 5 FROM inbox"))

        await until(all_settled, "all fundings")
    refused = await letters(at, BROKER_FUNDED)
    amounts = {int(row[0]) for row in await at.observer.fetch("SELECT amount::text FROM entries")}
    # the first of an id that is settled stands: they come by two partitions
    assert refused in (["transaction_reused"], ["transaction_reused"] * 3)
    first = 50_000 * SCALE if refused == ["transaction_reused"] else 49_999 * SCALE + SCALE // 2
    assert amounts == {first, SCALE // 2}
    assert await balance(at, fund_broker.BROKER) == -await balance(at, fiat_buffer()) == first + SCALE // 2
    await assert_whole(at)


def test_every_stage_of_the_movement_is_named_once() -> None:
    assert len({stage.name for stage in stages()}) == len(stages()) == 4
