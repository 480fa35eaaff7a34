"""Withdrawals accepted, refused, limited, asked for twice and cancelled, on real Kafka and PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx
import pytest

from agents.outcome import Rejected
from agents.recovery import store_dead_letters
from agents.recovery.maintain import Maintain
from agents.recovery.redrive_dead_letters import redrive
from agents.withdrawals import accept_withdrawals, requests
from agents.withdrawals.withdrawal import withdrawal_id
from ledger.commit import lock_writer, seal
from ledger.limits import set_limits
from ledger.rows import Op, block
from ledger.tables import DENIED_ADDRESSES, KYC_STANDINGS, LANES, WALLETS
from stablerail.dev.kafka import Kafka
from tests.support.in_process import Ground, ground, running, until
from tests.support.invariants import may_break
from tests.support.withdrawals import (
    OUTSIDE,
    TOKEN,
    TOPICS,
    api_of,
    ask,
    assert_whole,
    decided,
    fund,
    has,
    policy_of,
    settled,
    statuses,
    tell,
    wish,
)
from topics.catalog import WITHDRAWALS_ACCEPTED, WITHDRAWALS_REQUESTED
from topics.events import WithdrawalAccepted, WithdrawalRequested
from topics.money import SCALE

OTHER = "0x" + "55" * 20
LANE, WALLET, DENIED = "0x" + "17" * 20, "0x" + "18" * 20, "0x" + "66" * 20


@pytest.fixture
async def at(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    async with ground(database, kafka.bootstrap, topic_prefix, TOPICS) as it:
        yield it


async def accepted(at: Ground) -> list[str]:
    """The ids of what was told to be accepted."""
    records = await at.told(WITHDRAWALS_ACCEPTED)
    return [WithdrawalAccepted.model_validate_json(record.value).withdrawal_id for record in records]


async def dead_letters(at: Ground) -> list[str]:
    records = await at.told(WITHDRAWALS_REQUESTED.dlq)
    return sorted(dict(record.headers)["dlq_code"].decode() for record in records)


async def limit(at: Ground, **values: int | None) -> None:
    names = {f"withdrawal.{name.replace('_MATIC', '.MATIC')}": value for name, value in values.items()}
    connection = await at.connect()
    await set_limits(connection, names, at.clock(), actor="the tests")
    await connection.close()


async def own_addresses(at: Ground) -> None:
    """A lane on another chain of the same keys, a customer's wallet, an address on the deny-list."""
    now = at.clock()
    connection = await at.connect()
    async with connection.transaction():
        owners = await lock_writer(connection, "tests")
        blocks = [
            block(LANES, Op.INSERT, [("ETH", LANE, 0, 0, "open", "", 1, now)]),
            block(WALLETS, Op.INSERT, [("MATIC", WALLET, "bob", "wallet", now)]),
            block(DENIED_ADDRESSES, Op.INSERT, [("MATIC", DENIED, "a list", "the tests", now)]),
        ]
        await seal(connection, "tests", owners, blocks=blocks, messages=[], at=now, actor="tests", summary={})
    await connection.close()


async def rejected(at: Ground, user: str) -> None:
    """What the stage `freeze_wallets` stores."""
    connection = await at.connect()
    now = at.clock()
    async with connection.transaction():
        owners = await lock_writer(connection, "tests")
        blocks = [block(KYC_STANDINGS, Op.UPSERT, [(user, "rejected", "test", "e1", "2026-07-01", now)])]
        await seal(connection, "tests", owners, blocks=blocks, messages=[], at=now, actor="tests", summary={})
    await connection.close()


async def test_each_refusal_is_an_answer_with_its_code_and_moves_no_money(at: Ground) -> None:
    at.clock.to_noon()
    await own_addresses(at)
    await fund(at, "ada", 1_000 * SCALE)
    await fund(at, "poor", 25 * SCALE - 1)
    wishes = {
        "unsupported_rail": {"rail": "pigeon"}, "unsupported_network": {"chain": "ETH"},
        "unsupported_token": {"asset": "POL"}, "bad_amount": {"amount": "much"},
        "too_many_decimals": {"amount": "1.0000001"}, "bad_address": {"to": "'; DROP TABLE withdrawals; --"},
        "zero_address": {"to": "0x" + "0" * 40}, "token_contract": {"to": TOKEN}, "own_wallet": {"to": WALLET},
        "denied_address": {"to": DENIED}, "below_minimum": {"amount": "4.999999"},
        "above_maximum": {"amount": "100.000001"}, "insufficient_funds": {"user_id": "poor"},
        "frozen_customer": {"user_id": "rejected"},
    }  # fmt: skip
    await rejected(at, "rejected")
    await limit(at, min_MATIC=5 * SCALE, max_MATIC=100 * SCALE, user_day=120 * SCALE)
    async with at.process() as services, running(accept_withdrawals.stage(policy_of(at)), services, at):
        ids = {await tell(at, code, **fields): code for code, fields in wishes.items()}
        lane = await tell(at, "lane", to=LANE)
        found = await decided(at, *ids, lane)
        assert found == {id: ("failed", code) for id, code in ids.items()} | {lane: ("failed", "own_wallet")}
        assert await has(at, "ada") == (1_000, 0)
        first, second = await tell(at, "first", amount="100"), await tell(at, "second", amount="20.000001")
        assert await decided(at, first, second) == {first: ("signing", None), second: ("failed", "user_day_limit")}
        await limit(at, user_day=None, network_day_MATIC=120 * SCALE)
        third = await tell(at, "third", amount="20.000001")
        assert await decided(at, third) == {third: ("failed", "network_day_limit")}
        fourth = await tell(at, "fourth", amount="20")
        assert await decided(at, fourth) == {fourth: ("signing", None)}
    told = await settled(at, len(ids) + 3)
    assert {id: told[id].code for id in ids} == ids
    assert {told[id].amount for id in ids if ids[id] == "bad_amount"} == {"much"}
    assert await accepted(at) == [first, fourth]
    assert await has(at, "ada") == (880, 120)
    assert await dead_letters(at) == []
    await assert_whole(at)


async def test_of_two_withdrawals_that_together_exceed_the_balance_one_is_accepted(at: Ground) -> None:
    await fund(at, "ada", 40 * SCALE)
    one, other = await tell(at, "one"), await tell(at, "other")
    async with at.process() as services, running(accept_withdrawals.stage(policy_of(at)), services, at):
        found = await decided(at, one, other)
    assert sorted(found.values()) == [("failed", "insufficient_funds"), ("signing", None)]
    assert await has(at, "ada") == (15, 25)
    await assert_whole(at)


async def test_limits_are_exact_across_two_workers(at: Ground) -> None:
    """Each worker has two partitions; everybody's day of the network is one counter, ada's is another."""
    at.clock.to_noon()
    stage = accept_withdrawals.stage(
        policy_of(at, withdrawal_network_day_maximum="150", withdrawal_user_day_maximum="50")
    )
    users = ["ada", *(f"user {n}" for n in range(3))]
    for user in users:
        await fund(at, user, 1_000 * SCALE)

    async def wishes(user: str, partitions: Sequence[int]) -> list[str]:
        return [
            await tell(at, f"{user} {n}", user, amount="10", partition=partition, source=f"producer {partition}")
            for n, partition in enumerate(partitions)
        ]

    # ada's on all partitions, as from producers that key otherwise
    ids = [id for n, user in enumerate(users) for id in await wishes(user, range(4) if n == 0 else [n] * 6)]
    more = [await tell(at, f"ada more {n}", amount="10", partition=n % 4) for n in range(4)]
    async with (
        at.process() as one,
        at.process() as other,
        running(stage, one, at, (0, 1)),
        running(stage, other, at, (2, 3)),
    ):
        found = await decided(at, *ids, *more)
    taken = [id for id, (status, _) in found.items() if status == "signing"]
    codes = sorted({code for _, code in found.values() if code})
    assert len(taken) == 15, "a hundred and fifty by tens, of twenty-six that were tried"
    assert set(codes) <= {"network_day_limit", "user_day_limit"}
    of_ada = [id for id in taken if id in {*ids[:4], *more}]
    assert len(of_ada) <= 5
    counters = {name: int(value) for name, value in await at.observer.fetch("SELECT name, value FROM counters")}
    network = [value for name, value in counters.items() if name.endswith("network MATIC")]
    assert network == [150 * SCALE]
    assert sum(value for name, value in counters.items() if " user " in name) == 150 * SCALE
    assert (await has(at, "ada"))[1] == 10 * len(of_ada)
    await assert_whole(at)


async def test_ten_identical_requests_at_once_and_the_same_by_kafka_are_one_withdrawal(at: Ground) -> None:
    await fund(at, "ada", 100 * SCALE)
    stage = accept_withdrawals.stage(policy_of(at))
    async with at.process() as services, running(stage, services, at), api_of(at) as client:
        answers = await asyncio.gather(
            *(ask(client, "k1") for _ in range(10)),
            *(_told(at, source) for source in ("erp", "app")),
        )
        asked = [answer for answer in answers if isinstance(answer, httpx.Response)]
        id = withdrawal_id("ada", "k1")
        assert {(answer.status_code, answer.json()["id"]) for answer in asked} == {(202, id)}
        assert {answer.headers["location"] for answer in asked} == {f"/v1/withdrawals/{id}"}
        assert sum("idempotency-replayed" not in answer.headers for answer in asked) <= 1
        assert await decided(at, id) == {id: ("signing", None)}
        late = await ask(client, "k1")
        assert (late.status_code, late.json()["status"]) == (202, "signing")
        assert late.headers["idempotency-replayed"] == "true"
        await _settled_events(at, 2)
    assert await accepted(at) == [id]
    assert await has(at, "ada") == (75, 25)
    assert await dead_letters(at) == []
    await assert_whole(at)


async def _told(at: Ground, source: str) -> None:
    await tell(at, "k1", source=source)


async def _settled_events(at: Ground, count: int) -> None:
    async def so_many() -> bool:
        return bool(
            await at.observer.fetchval("SELECT count(*) FROM inbox WHERE stage = 'accept_withdrawals'") >= count
        )

    await until(so_many, f"{count} requests are settled")


async def test_the_same_key_with_other_contents_is_refused_whichever_way_it_comes(at: Ground) -> None:
    await fund(at, "ada", 100 * SCALE)
    stage = accept_withdrawals.stage(policy_of(at))
    async with at.process() as services, running(stage, services, at), api_of(at) as client:
        first = await ask(client, "k1")
        id = first.json()["id"]
        await decided(at, id)
        for fields in ({"to": OTHER}, {"amount": "25.01"}, {"amount": "25"}):
            answer = await ask(client, "k1", **fields)
            assert (answer.status_code, answer.json()["code"]) == (409, "idempotency_key_reused")
        await tell(at, "k1", to=OTHER, source="erp")  # an id of its own: the withdrawal's row knows better
        by_kafka = await tell(at, "k2")
        await decided(at, by_kafka)
        await tell(at, "k2", to=OTHER)  # its id is made of customer and key: the inbox knows

        async def refused() -> bool:
            return await dead_letters(at) == ["event_id_reused", "idempotency_key_reused"]

        await until(refused, "both are dead letters")
        another = await ask(client, "k1", user_id="bob")
        assert another.status_code == 202, "a key is the customer's own"
        await decided(at, another.json()["id"])
    assert await has(at, "ada") == (50, 50)
    assert {row[0] for row in await at.observer.fetch("SELECT recipient FROM withdrawals")} == {OUTSIDE}
    await assert_whole(at)


async def test_of_two_that_use_one_key_at_once_for_different_things_one_withdraws(at: Ground) -> None:
    await fund(at, "ada", 1_000 * SCALE)
    stage = accept_withdrawals.stage(policy_of(at))
    keys = [f"k{n}" for n in range(12)]
    async with at.process() as services, running(stage, services, at), api_of(at) as client:
        await decided(at, await tell(at, "warm"))

        async def both(key: str) -> bool:
            """Whether the API's was taken."""
            answer, _ = await asyncio.gather(ask(client, key), tell(at, key, to=OTHER, source="erp"))
            assert answer.status_code in (202, 409)
            return answer.status_code == 202

        taken = dict(zip(keys, await asyncio.gather(*map(both, keys)), strict=True))
        ids = {withdrawal_id("ada", key): key for key in keys}
        assert set((await decided(at, *ids)).values()) == {("signing", None)}

        async def refused() -> bool:
            return await dead_letters(at) == ["idempotency_key_reused"] * sum(taken.values())

        await until(refused, "where the API's was taken, the other is a dead letter")
    rows = await at.observer.fetch("SELECT replace(id::text, '-', ''), recipient FROM withdrawals")
    assert {id: to for id, to in map(tuple, rows) if id in ids} == {
        id: OUTSIDE if taken[key] else OTHER for id, key in ids.items()
    }
    assert await has(at, "ada") == (1_000 - 13 * 25, 13 * 25)
    await assert_whole(at)


async def test_a_cancel_that_races_the_decision_gives_back_what_was_held_once(at: Ground) -> None:
    await fund(at, "ada", 100 * SCALE)
    stage = accept_withdrawals.stage(policy_of(at))
    async with at.process() as services, running(stage, services, at), api_of(at) as client:

        async def ask_and_cancel(number: int) -> str:
            id = str((await ask(client, f"k{number}", amount="10")).json()["id"])
            for _ in range(number % 3):
                await asyncio.sleep(0)
            cancels = await asyncio.gather(*(client.post(f"/v1/withdrawals/{id}/cancel") for _ in range(2)))
            assert [(answer.status_code, answer.json()["status"]) for answer in cancels] == [(200, "cancelled")] * 2
            assert sum("idempotency-replayed" in answer.headers for answer in cancels) == 1
            return id

        ids = await asyncio.gather(*map(ask_and_cancel, range(12)))
        await _settled_events(at, 12)
        held = await tell(at, "held")
        assert await decided(at, held) == {held: ("signing", None)}
        cancelled = await client.post(f"/v1/withdrawals/{held}/cancel")
        assert cancelled.json()["status"] == "cancelled"
    assert set((await statuses(at)).values()) == {("cancelled", None)}
    told = await settled(at, 13)
    assert told.keys() == {*ids, held}
    assert {event.outcome for event in told.values()} == {"cancelled"}
    assert await has(at, "ada") == (100, 0)
    holds = await at.observer.fetch("SELECT state, count(*) FROM holds GROUP BY state")
    assert [row[0] for row in holds] == ["voided"]
    assert {int(row[0]) for row in await at.observer.fetch("SELECT value FROM counters")} == {0}
    await assert_whole(at)


async def test_what_may_be_on_its_way_is_not_cancelled_and_neither_is_what_has_ended(at: Ground) -> None:
    may_break(at.dsn, "a status is edited, no transaction is sent")
    await fund(at, "ada", 100 * SCALE)
    stage = accept_withdrawals.stage(policy_of(at))
    async with at.process() as services, running(stage, services, at), api_of(at) as client:
        id, failed = (await ask(client, "k1")).json()["id"], (await ask(client, "k2", to=TOKEN)).json()["id"]
        await decided(at, id, failed)
    connection = await at.connect()
    await connection.execute("UPDATE withdrawals SET status = 'broadcasting' WHERE id = $1", id)
    await connection.close()
    async with api_of(at) as client:
        for one in (id, failed):
            answer = await client.post(f"/v1/withdrawals/{one}/cancel")
            assert (answer.status_code, answer.json()["code"]) == (409, "not_cancellable")
        unknown = await client.post(f"/v1/withdrawals/{'0' * 32}/cancel")
        assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_withdrawal")
    assert await has(at, "ada") == (75, 25)


async def test_requests_that_come_again_late_and_in_any_order_are_decided_once(at: Ground) -> None:
    await fund(at, "ada", 100 * SCALE)
    stage = accept_withdrawals.stage(policy_of(at))
    ids = [await tell(at, f"k{n}", amount="10") for n in range(3)]
    for n in (2, 0, 1):
        await tell(at, f"k{n}", amount="10", partition=n)
        await tell(at, f"k{n}", amount="10", source="erp")
    async with at.process() as services, running(stage, services, at):
        await decided(at, *ids)
        await _settled_events(at, 6)
    async with at.process() as services, running(stage, services, at):  # a new worker, from the first record
        last = await tell(at, "last", amount="10")
        await decided(at, last)
    assert sorted(await accepted(at)) == sorted([*ids, last])
    assert await has(at, "ada") == (60, 40)
    assert await dead_letters(at) == []
    await assert_whole(at)


async def test_a_request_that_is_redriven_when_its_day_may_be_forgotten_counts_exactly(at: Ground) -> None:
    """By the API it was asked for on the day when its row was made, whose counter stays as long as it is open; by Kafka alone it is
    asked for when the stage takes it."""
    may_break(at.dsn, "a payment is made up")
    at.clock.to_noon()
    days = [at.clock().date().isoformat(), (at.clock() + timedelta(days=20)).date().isoformat()]
    await fund(at, "ada", 1_000 * SCALE)
    await limit(at, user_day=120 * SCALE)
    stage = accept_withdrawals.stage(policy_of(at))
    async with at.process() as services:
        connection = await services.connect()
        async with running(stage, services, at):
            paid = await tell(at, "paid", amount="100")
            assert await decided(at, paid) == {paid: ("signing", None)}
        await at.observer.execute("UPDATE withdrawals SET status = 'completed', settled_at = updated_at")
        asked = WithdrawalRequested.model_validate({**wish("ada"), "idempotency_key": "by the API"})
        await requests.request(connection, asked, at.clock(), actor="the tests")
        broken = replace(stage, decide=lambda *_: Rejected("bug", "a bug"))
        async with running(broken, services, at), running(store_dead_letters.stage(stage.source.dlq), services, at):
            by_api, by_kafka = await tell(at, "by the API"), await tell(at, "by Kafka")

            async def stored() -> Any:
                rows = await at.observer.fetch("SELECT replace(id::text, '-', '') FROM dead_letters")
                return [row[0] for row in rows] if len(rows) == 2 else ()

            letters = await until(stored, "the dead letters")
        at.clock.forward(20 * 86_400.0)
        await Maintain(services, at.prefix, timedelta(days=14), declared).run(connection, "ann")
        async with running(stage, services, at):
            today = await tell(at, "today", amount="90")
            assert await decided(at, today) == {today: ("signing", None)}
            done = await redrive(connection, letters, "ann", at.clock(), force=True)
            assert done.sealed is not None
            await services.relay.journal([(done.sealed.seq, done.sealed.record)])
            await services.emitter.emit(done.sealed.messages, done.sealed.stage, done.sealed.at)
            assert await decided(at, by_api, by_kafka) == {
                by_api: ("failed", "user_day_limit"), by_kafka: ("signing", None),
            }  # fmt: skip
        counters = "SELECT name, value::bigint FROM counters WHERE name LIKE '% user %' ORDER BY name"
        assert [tuple(row) for row in await at.observer.fetch(counters)] == [
            (f"withdrawn {days[0]} user ada", 100 * SCALE), (f"withdrawn {days[1]} user ada", 115 * SCALE),
        ]  # fmt: skip
        await Maintain(services, at.prefix, timedelta(days=14), declared).run(connection, "ann")
        assert [row[0] for row in await at.observer.fetch(counters)] == [f"withdrawn {days[1]} user ada"]


async def declared() -> dict[str, int]:
    return {}
