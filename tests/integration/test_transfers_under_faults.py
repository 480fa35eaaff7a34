"""A thousand withdrawals that Circle sends, on its bad day and on ours: each is settled or given back, once, as Circle and the chain say.

Drawn from a seed: what Circle makes of each, replies that are lost, refused for a while or never come, notifications that are lost,
doubled and mixed up, and a worker that dies. Most leave on a chain that we do not read, where Circle's word is all there is.
"""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest
from solders.pubkey import Pubkey

from agents.sweeper import ABANDONED_S
from agents.withdrawals.withdrawal import withdrawal_id
from connectors.circle.sandbox.gate import Fault, Weather
from connectors.circle.sandbox.state import Plan
from ledger.accounts import buffer, spendable
from ledger.book import post
from ledger.posting import Transaction, credit, debit
from stablerail.dev.anvil import Node
from stablerail.dev.kafka import Kafka
from stablerail.dev.usdc import Usdc
from tests.support import withdrawals
from tests.support.custodian_rig import PATH, POLICY, Rig, custodian_rig, new_address
from tests.support.in_process import until
from tests.support.withdrawals import assert_whole
from topics.catalog import WITHDRAWALS_REQUESTED, WITHDRAWALS_SETTLED
from topics.events import WithdrawalSettled
from topics.money import SCALE

NUMBER = 1_000
ON_MATIC = 100
USERS = 100
HANGS = 15
SEED = 9

End = tuple[str, str | None]
COMPLETED: End = ("completed", None)
FAILED: End = ("failed", "custodian_failed")
ANYWHERE: list[tuple[Plan | None, End]] = [
    *[(None, COMPLETED)] * 5,
    (Plan("QUEUED", "DENIED"), ("failed", "custodian_denied")),
    (Plan("QUEUED", "CANCELED"), ("cancelled", None)),
    (Plan("QUEUED", "FAILED", "INSUFFICIENT_NATIVE_TOKEN"), ("failed", "custodian_short")),
]
UNREAD: list[tuple[Plan | None, End]] = [*ANYWHERE, (Plan("SENT", "FAILED"), FAILED)]
READ: list[tuple[Plan | None, End]] = [
    *ANYWHERE,
    (Plan("SENT", "FAILED"), COMPLETED),
    (Plan("SENT", "FAILED", broadcast=False), FAILED),
]
"""Where we read the chain it has the last word."""


@dataclass(frozen=True)
class Asked:
    id: str
    user: str
    to: str
    chain: str
    end: End


@pytest.fixture
async def rig(database: str, kafka: Kafka, topic_prefix: str, anvil: Node, usdc: Usdc) -> AsyncIterator[Rig]:
    async with custodian_rig(database, kafka.bootstrap, topic_prefix, anvil, usdc, poll_s=0.3, rsa_bits=1024) as it:
        yield it


async def ask(rig: Rig, drawn: random.Random) -> list[Asked]:
    """A USDC each; their customers have twice as much. One in thirty Circle refuses."""
    connection = await rig.at.connect()
    gifts = []
    for number in range(USERS):
        amount = 2 * NUMBER // USERS * SCALE
        gifts.append(
            Transaction(
                uuid.uuid4().hex, "test", "", (debit(spendable(f"user{number}"), amount), credit(buffer(), amount))
            )
        )
    await post(connection, "tests", gifts, rig.at.clock())
    await connection.close()
    made, sends = [], []
    for number in range(NUMBER):
        user, key = f"user{number % USERS}", f"k{number}"
        chain, to = ("MATIC", new_address()) if number < ON_MATIC else ("SOL", str(Pubkey.new_unique()))
        plan, end = drawn.choice(READ if chain == "MATIC" else UNREAD)
        id = withdrawal_id(user, key)
        if drawn.random() < 1 / 30:
            end = ("failed", "custodian_refused")
            rig.circle.sandbox.state.refused.add(id)
        elif plan is not None:
            rig.circle.sandbox.state.plans[id] = plan
        made.append(Asked(id, user, to, chain, end))
        body = withdrawals.wish(user, chain=chain, to=to, amount="1", rail="circle", idempotency_key=key)
        topic = WITHDRAWALS_REQUESTED.named(rig.at.prefix)
        sends.append(await rig.at.producer.send(topic, json.dumps(body).encode(), key=user.encode(), partition=0))
    await asyncio.gather(*sends)
    return made


async def bad_day(rig: Rig, drawn: random.Random) -> None:
    """Until cancelled."""
    gate, disorder = rig.circle.sandbox.gate, rig.circle.sandbox.deliveries.disorder
    gate.weather = Weather(unavailable=0.1, lost_replies=0.1, limited=0.03, seed=SEED)
    hangs = HANGS
    while True:
        setattr(disorder, drawn.choice(("drop", "duplicate", "reorder")), drawn.randint(1, 20))
        if hangs and drawn.random() < 0.3:
            # Circle makes the transfer, tells of it, and never answers
            gate.faults.append(Fault(PATH, "hang", acts=True, times=1))
            hangs -= 1
        await asyncio.sleep(0.05)


async def test_a_thousand_transfers_under_random_faults_end_once_each_as_circle_and_the_chain_say(rig: Rig) -> None:
    drawn = random.Random(SEED)
    asked = await ask(rig, drawn)
    policy = replace(POLICY, timeout_s=1, retry_first_s=0.2, retry_max_s=1, concurrency_max=20)
    day = asyncio.create_task(bad_day(rig, drawn))
    try:
        async with rig.worker(policy):
            await until(lambda: _asked(rig, NUMBER // 3), "a third was asked for")
        rig.at.clock.forward(120)  # the leases of the dead run out, and what they had not told is told
        async with rig.worker(policy, abandoned_s=ABANDONED_S) as services:
            await until(lambda: _asked(rig, NUMBER * 9 // 10), "most were asked for")
            day.cancel()
            await asyncio.gather(day, return_exceptions=True)
            rig.circle.sandbox.gate.weather = Weather()
            rig.circle.sandbox.deliveries.release()
            wanted = {one.id: one.end for one in asked}

            async def ended() -> bool:
                rig.at.clock.forward(20)
                await rig.anvil.mine()
                return await withdrawals.statuses(rig.at) == wanted

            try:
                await until(ended, "every withdrawal has ended as wanted")
            except AssertionError:
                found = await withdrawals.statuses(rig.at)
                wrong = {id: (found.get(id), end) for id, end in wanted.items() if found.get(id) != end}
                told = [await rig.standing(id) for id in [*wrong][:3]]
                raise AssertionError("\n\n".join([f"{wrong}; stopped: {services.stop.reason}", *told])) from None
    finally:
        day.cancel()
        await asyncio.gather(day, return_exceptions=True)
    assert rig.calls > NUMBER * 1.1, "many a call was made again"
    taken = [one.id for one in asked if one.end[1] != "custodian_refused"]
    assert {key: len(found) for key, found in rig.at_circle().items()} == dict.fromkeys(taken, 1)
    paid = Counter((one.to, SCALE) for one in asked if one.chain == "MATIC" and one.end == COMPLETED)
    assert await rig.paid() == paid, "the chain's Transfer logs"
    calls = await rig.at.observer.fetch("SELECT state, count(*) FROM calls GROUP BY state")
    assert [tuple(row) for row in calls] == [("concluded", NUMBER)]
    left = Counter({f"user{number}": 2 * NUMBER // USERS * SCALE for number in range(USERS)})
    left.subtract(Counter({user: count * SCALE for user, count in _completed(asked).items()}))
    rows = await rig.at.observer.fetch(
        "SELECT owner, balance::bigint FROM accounts WHERE owner <> 'system' AND balance <> 0"
    )
    assert dict(tuple(row) for row in rows) == dict(left), "nobody has anything held"
    told = [WithdrawalSettled.model_validate_json(record.value) for record in await rig.at.told(WITHDRAWALS_SETTLED)]
    assert {(one.withdrawal_id, one.outcome, one.code) for one in told} == {(one.id, *one.end) for one in asked}
    await assert_whole(rig.at)


def _completed(asked: list[Asked]) -> Counter[str]:
    return Counter(one.user for one in asked if one.end == COMPLETED)


async def _asked(rig: Rig, count: int) -> bool:
    return len(rig.at_circle()) >= count
