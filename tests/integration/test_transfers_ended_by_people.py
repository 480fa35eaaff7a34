"""Withdrawals that Circle sends and two people end, on real Kafka, PostgreSQL and USDC: paid or given back once, never against a
chain or Circle, and never asked of Circle afterwards."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from agents.concluding import Concluder
from agents.withdrawals import ended_by_people, transfer_by_custodian
from agents.withdrawals.ended_by_people import STOPPED_FOR, Outside
from agents.withdrawals.look import ChainWriter
from agents.withdrawals.settle_transfers import ABSENT_S
from agents.withdrawals.transfer_calls import TransferDeeds
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.gate import Fault
from connectors.circle.sandbox.state import Plan, Transaction
from ledger.corrections import Correction
from stablerail.custody import Custody
from stablerail.dev.anvil import Node
from stablerail.dev.kafka import Kafka
from stablerail.dev.usdc import Usdc
from stablerail.metrics import Metrics
from tests.integration.test_runbook import day, follow
from tests.integration.test_withdrawals_ended_by_people import code_of
from tests.support.custodian_rig import DEPTH as CIRCLE_DEPTH
from tests.support.custodian_rig import PATH, POLICY, Rig, custodian_rig, new_address
from tests.support.in_process import until
from tests.support.withdrawals import assert_whole, has, settled
from topics.events import Chain
from topics.money import SCALE

AMOUNT = 25 * SCALE
SOMEWHERE_ON_SOLANA = "9WzDXwBbmkg8ZTbNMqUxvQRAyrZzDsGYdLVL9zYtAWWM"


@pytest.fixture
async def rig(database: str, kafka: Kafka, topic_prefix: str, anvil: Node, usdc: Usdc) -> AsyncIterator[Rig]:
    async with custodian_rig(database, kafka.bootstrap, topic_prefix, anvil, usdc) as it:
        yield it


def outside(rig: Rig, chain: str = "MATIC") -> Outside:
    read = ChainWriter(list(rig.rpcs), rig.usdc.address.lower(), CIRCLE_DEPTH) if chain == "MATIC" else None
    return Outside(read, rig.client)


async def asked_of(rig: Rig, id: str, tx_hash: str | None = None, chain: str = "MATIC") -> Correction:
    connection = await rig.at.connect()
    try:
        return await ended_by_people.request(
            connection, secrets.token_hex(16), id, tx_hash, outside(rig, chain), "seen", "ann", rig.at.clock()
        )
    finally:
        await connection.close()


async def approved(rig: Rig, asked_for: Correction, chain: str = "MATIC") -> Correction:
    connection = await rig.at.connect()
    try:
        return await ended_by_people.approve(connection, asked_for.id, outside(rig, chain), "bob", rig.at.clock())
    finally:
        await connection.close()


async def from_our_wallet(rig: Rig, to: str, amount: int = AMOUNT) -> str:
    """Paid by the wallet at Circle, by whoever; the transaction's hash."""
    sender = rig.wallets["MATIC"].address
    tx_hash = await rig.usdc.transfer(to, amount, sender=sender)
    await rig.anvil.wait_mined(tx_hash)
    await rig.anvil.mine(CIRCLE_DEPTH + 1)
    return tx_hash


async def differs(rig: Rig) -> int:
    """Of our wallets on chain and the mirror: what invariant 4 says."""
    custody = Custody(Chain.MATIC, list(rig.rpcs), rig.usdc.address.lower(), CIRCLE_DEPTH)
    return (await custody.look(rig.at.observer)).difference


async def test_a_transfer_that_is_nowhere_is_given_back_and_what_is_paid_afterwards_is_told(rig: Rig) -> None:
    to = new_address()
    ada = await rig.ask("ada", Plan("COMPLETE", broadcast=False), to=to)
    async with rig.worker(abandoned_s=0.1) as services:
        await rig.became({"ada": ("manual_review", "unproven_payment")}, step_s=20.0)
        before = await differs(rig)
        assert await code_of(asked_of(rig, ada, rig.at_circle()[ada][0].tx_hash)) == "payment_not_proven"
        asked_for = await asked_of(rig, ada)
        assert await code_of(approved(rig, asked_for)) == "may_still_be_paid", "it may be on its way"
        rig.at.clock.forward(ABSENT_S + 1)
        await approved(rig, asked_for)
        assert (await rig.statuses(), await has(rig.at, "ada")) == ({"ada": ("failed", "not_paid")}, (100, 0))
        (end,) = (await settled(rig.at, 1)).values()
        assert (end.outcome, end.code) == ("failed", "not_paid")
        assert await differs(rig) == before

        await from_our_wallet(rig, to)
        rig.circle.sandbox.deliveries.announce(rig.at_circle()[ada][0])
        metrics = services.observer
        assert isinstance(metrics, Metrics)
        labels = {"stage": "settle_transfers", "code": "custodian_contradicted"}

        async def rung() -> float | None:
            return metrics.registry.get_sample_value("stablerail_stage_alerts_total", labels)

        await until(rung, "the alert")
        assert await differs(rig) == before - AMOUNT, "invariant 4"
        assert (await rig.statuses(), await has(rig.at, "ada")) == ({"ada": ("failed", "not_paid")}, (100, 0))
    await assert_whole(rig.at)


async def test_a_second_transfer_that_paid_completes_it_and_one_that_may_pay_keeps_it(rig: Rig) -> None:
    to = new_address()
    ada = await rig.ask("ada", Plan("QUEUED"), to=to)
    async with rig.worker():
        await until(lambda: _known(rig), "the first is known")
        (first,) = rig.at_circle()[ada]
        twin = await twin_of(rig, first)
        await rig.became({"ada": ("manual_review", "second_transfer")})
        assert await code_of(asked_of(rig, ada)) == "may_still_be_paid", "both may pay"
        rig.circle.sandbox.deliveries.announce(rig.circle.sandbox.state.change(first.id, state="FAILED"))
        assert await code_of(asked_of(rig, ada)) == "may_still_be_paid", "the second may"
        tx_hash = await from_our_wallet(rig, to)
        rig.circle.sandbox.state.change(twin.id, state="COMPLETE")
        assert await code_of(asked_of(rig, ada)) == "was_paid", "by what it does not name"
        rig.circle.sandbox.state.change(twin.id, tx_hash=tx_hash)
        assert await code_of(asked_of(rig, ada)) == "was_paid"
        await approved(rig, await asked_of(rig, ada, tx_hash))
        assert (await rig.statuses(), await has(rig.at, "ada")) == ({"ada": ("completed", None)}, (75, 0))
        row = await rig.at.observer.fetchrow("SELECT tx_hashes, block_number FROM custodian_transfers")
        assert (row[0], row[1] is not None) == (tx_hash, True)

        bob = await rig.ask("bob", Plan("QUEUED"), to=to)
        await until(lambda: _known(rig, 2), "Circle has bob's")
        assert await code_of(asked_of(rig, bob, tx_hash)) == "payment_not_proven", "it is ada's"
    await assert_whole(rig.at)


async def twin_of(rig: Rig, first: Transaction, **fields: Any) -> Transaction:
    twin = first.model_copy(update={"id": str(uuid4()), "state": "SENT", **fields})
    rig.circle.sandbox.state.transactions[twin.id] = twin
    rig.circle.sandbox.deliveries.announce(twin)
    return twin


async def _known(rig: Rig, count: int = 1) -> bool:
    query = "SELECT count(*) FROM custodian_transfers WHERE transfer_id IS NOT NULL"
    calls = "SELECT count(*) FROM calls WHERE state = 'open'"
    return bool(await rig.at.observer.fetchval(query) == count and not await rig.at.observer.fetchval(calls))


async def test_a_transfer_that_circle_does_not_know_any_more_is_given_back_to_who_may_see_the_wallet(rig: Rig) -> None:
    ada = await rig.ask("ada", Plan("QUEUED"))
    state = rig.circle.sandbox.state
    async with rig.worker():
        await until(lambda: _known(rig), "Circle has it")
        (transfer,) = rig.at_circle()[ada]
        del state.transactions[transfer.id]
        await rig.became({"ada": ("manual_review", "transfer_not_shown")}, step_s=20.0)
        wallet = state.wallets.pop(transfer.wallet_id)
        assert await code_of(asked_of(rig, ada)) == "may_still_be_paid", "another entity's key"
        state.wallets[wallet.id] = wallet
        asked_for, again = await asked_of(rig, ada), await asked_of(rig, ada)
        assert await code_of(approved(rig, asked_for)) == "may_still_be_paid", "Circle may be slow to show it"
        rig.at.clock.forward(ABSENT_S + 1)
        state.transactions[transfer.id] = transfer
        assert await code_of(approved(rig, asked_for)) == "may_still_be_paid", "it is there"
        del state.transactions[transfer.id]
        await approved(rig, again)
        assert (await rig.statuses(), await has(rig.at, "ada")) == ({"ada": ("failed", "not_paid")}, (100, 0))
    await assert_whole(rig.at)


async def test_a_call_that_circle_does_not_answer_is_made_no_more_and_ended(rig: Rig) -> None:
    gate = rig.circle.sandbox.gate
    rig.review_attempts = 1
    to = new_address()
    users = ("paid", "failed", "goes on")
    async with rig.worker():
        hangs = Fault(PATH, "hang")
        gate.faults.append(hangs)
        other = await rig.ask("other")
        await until(lambda: _heard(rig, 1), "Circle is asked")
        assert await code_of(asked_of(rig, other)) == "may_still_be_paid", "somebody asks at this moment"
    rig.at.clock.forward(120)
    async with rig.worker():
        await rig.became({"other": ("completed", None)}, step_s=1.0)
        gate.faults.append(Fault(PATH, "status", status=500, times=10**6))
        ids = {user: await rig.ask(user, to=to) for user in users}
        await rig.became(dict.fromkeys(users, ("manual_review", "custodian_silent")), step_s=1.0)
        strangers = await from_our_wallet(rig, "0x" + "1" * 40)
        assert await code_of(asked_of(rig, ids["paid"], strangers)) == "payment_not_proven"

        tx_hash = await from_our_wallet(rig, to)
        await approved(rig, await asked_of(rig, ids["paid"], tx_hash))
        assert (await rig.statuses())["paid"] == ("completed", None)
        assert await code_of(asked_of(rig, ids["failed"], tx_hash)) == "payment_not_proven"

        first = await asked_of(rig, ids["failed"])
        asked_for, too_old = await asked_of(rig, ids["failed"]), await asked_of(rig, ids["goes on"])
        assert await code_of(approved(rig, asked_for)) == "may_still_be_paid", "it was asked for just before"
        heard = rig.calls
        gate.faults.clear()
        rig.at.clock.forward(ABSENT_S + 1)
        assert await code_of(approved(rig, first)) == "may_still_be_paid", "the second has stopped it since"
        await approved(rig, asked_for)
        last = await rig.ask("last")
        await rig.became({"last": ("completed", None)})
        assert (rig.calls, set(rig.at_circle())) == (heard + 1, {other, last}), "nobody has asked for the others"
        rig.at.clock.forward(STOPPED_FOR.total_seconds())
        assert await code_of(approved(rig, too_old)) == "may_still_be_paid"
        await rig.became({"goes on": ("completed", None)}, step_s=60.0)
        assert await code_of(asked_of(rig, ids["goes on"])) == "not_on_its_way"
        assert set(rig.at_circle()) == {other, last, ids["goes on"]}
    assert (await rig.statuses())["failed"] == ("failed", "not_paid")
    assert [await has(rig.at, user) for user in users] == [(75, 0), (100, 0), (75, 0)]
    assert await rig.at.observer.fetchval("SELECT count(*) FROM leases") == 0
    await assert_whole(rig.at)


async def test_what_circle_was_never_asked_for_is_given_back_while_circle_is_away_and_never_asked_for(rig: Rig) -> None:
    """The breaker is open: no call was made of it yet, and Circle's word cannot be had."""
    away = Fault("/*", "status", status=503, times=10**6)
    users = ("ada", "paid", "asked", "restored")
    to = new_address()
    async with rig.worker():
        wallets = "SELECT count(*) = 2 FROM custodian_wallets"
        await until(lambda: rig.at.observer.fetchval(wallets), "our wallets' addresses are known")
    ids = {user: await rig.ask(user, to=to) for user in users}
    async with rig.deciding():
        await rig.became(dict.fromkeys(users, ("broadcasting", None)))
    tx_hash = await from_our_wallet(rig, to)
    rig.circle.sandbox.gate.faults.append(away)
    wished = {user: await asked_of(rig, ids[user], tx_hash if user == "paid" else None) for user in users}
    for user in ("ada", "paid"):
        await approved(rig, wished[user])
    assert await approved(rig, wished["ada"]) == await approved(rig, wished["ada"])
    restored = "INSERT INTO restores VALUES (1, $1, 'ann', 1, 1)"
    await rig.at.observer.execute(restored, rig.at.clock())
    assert await code_of(approved(rig, wished["restored"])) == "may_still_be_paid", (
        "what is forgotten may have been asked for"
    )
    await rig.at.observer.execute("DELETE FROM restores")
    ends = {"ada": ("failed", "not_paid"), "paid": ("completed", None)}
    assert [await has(rig.at, user) for user in users] == [(100, 0), (75, 0), (75, 25), (75, 25)]
    async with rig.worker():
        await until(lambda: _heard(rig, 2), "Circle was asked for the others")
        assert await code_of(approved(rig, wished["asked"])) == "may_still_be_paid", "it may have been sent"
        away.times = 0
        await rig.became({**ends, "asked": ("completed", None), "restored": ("completed", None)}, step_s=20.0)
    assert set(rig.at_circle()) == {ids["asked"], ids["restored"]}
    calls = await rig.at.observer.fetch("SELECT state, error FROM calls WHERE error IS NOT NULL")
    assert [tuple(row) for row in calls] == [("concluded", "ended_by_people")] * 2
    assert await rig.at.observer.fetchval("SELECT count(*) FROM leases") == 0
    await assert_whole(rig.at)


async def test_of_a_performer_and_two_people_at_once_one_has_the_withdrawal(rig: Rig) -> None:
    users = ("peoples", "performers", "late")
    ids = {}
    async with rig.deciding():
        for user in users[:2]:
            ids[user] = await rig.ask(user)
        await rig.became(dict.fromkeys(ids, ("broadcasting", None)))
    rival, gate = await rig.at.connect(), await rig.at.connect()
    performer = Concluder(transfer_by_custodian.stage({}), TransferDeeds(None, 1), POLICY, "a performer")
    wished = await asked_of(rig, ids["peoples"])
    async with gate.transaction():
        await gate.execute("SELECT FROM withdrawals WHERE id = $1::text::uuid FOR UPDATE", ids["peoples"])
        approval = asyncio.create_task(approved(rig, wished))
        await until(lambda: _waiting(rig, 1), "people have it")
        intending = asyncio.create_task(performer.intend(rival, 2, rig.at.clock()))
        await until(lambda: _waiting(rig, 2), "the performer waits for them")
    await approval
    calls, _ = await intending
    assert [call.request["withdrawal_id"] for call in calls] == [ids["performers"]]

    async with rig.deciding():
        ids["late"] = await rig.ask("late")
        await rig.became({"late": ("broadcasting", None)})
    wished = await asked_of(rig, ids["late"])
    async with rival.transaction():
        await rival.execute("SELECT FROM call_members WHERE item = $1 FOR UPDATE", ids["late"])
        approval = asyncio.create_task(approved(rig, wished))
        await until(lambda: _waiting(rig, 1), "people wait for the performer")
        calls, _ = await performer.intend(rival, 2, rig.at.clock())
    assert [call.request["withdrawal_id"] for call in calls] == [ids["late"]]
    assert await code_of(approval) == "may_still_be_paid"
    for one in (rival, gate):
        await one.close()
    waits = ("broadcasting", None)
    assert await rig.statuses() == {"peoples": ("failed", "not_paid"), "performers": waits, "late": waits}
    assert [await has(rig.at, user) for user in users] == [(100, 0), (75, 25), (75, 25)]
    await assert_whole(rig.at)


async def _waiting(rig: Rig, connections: int) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return bool(await rig.at.observer.fetchval(query) == connections)


async def _heard(rig: Rig, calls: int) -> bool:
    return rig.calls == calls


async def test_where_no_chain_can_be_asked_two_people_are_believed_but_not_against_circle(rig: Rig) -> None:
    async with rig.worker():
        ids = {}
        for number, user in enumerate(("ada", "bob", "eve"), 1):
            ids[user] = await rig.ask(user, Plan("SENT"), to=SOMEWHERE_ON_SOLANA, chain="SOL")
            await until(lambda count=number: _known(rig, count), "Circle has it")  # type: ignore[misc]
        state = rig.circle.sandbox.state
        twins = {}
        for user in ids:
            twins[user] = await twin_of(rig, rig.at_circle()[ids[user]][0])
        await rig.became(dict.fromkeys(ids, ("manual_review", "second_transfer")))
        for user, id in ids.items():
            for one in rig.at_circle()[id]:
                state.change(one.id, state="CANCELED" if user == "bob" else "FAILED")
        state.change(twins["ada"].id, state="COMPLETE", tx_hash="4" * 88)
        state.change(twins["eve"].id, state="COMPLETE", destination_address=SOMEWHERE_ON_SOLANA[::-1])
        assert await code_of(asked_of(rig, ids["ada"], chain="SOL")) == "was_paid"
        await approved(rig, await asked_of(rig, ids["ada"], "4" * 88, chain="SOL"), "SOL")
        for user in ("bob", "eve"):
            await approved(rig, await asked_of(rig, ids[user], chain="SOL"), "SOL")
        ends = {"ada": ("completed", None), "bob": ("failed", "not_paid"), "eve": ("failed", "not_paid")}
        assert await rig.statuses() == ends
        assert [await has(rig.at, user) for user in ids] == [(75, 0), (100, 0), (100, 0)]
    await assert_whole(rig.at)


async def test_the_runbooks_day_of_a_withdrawal_in_review(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    to = new_address()
    ada = await rig.ask("ada", Plan("COMPLETE", broadcast=False), to=to)
    async with rig.worker():
        await rig.became({"ada": ("manual_review", "unproven_payment")}, step_s=20.0)
        tx_hash = await from_our_wallet(rig, to)
    settings = {
        "DATABASE_URL": rig.at.dsn, "KAFKA_BOOTSTRAP": rig.at.bootstrap, "TOPIC_PREFIX": rig.at.prefix,
        "RPC_URLS": json.dumps({"MATIC": [rig.anvil.rpc_url] * 2}), "CHAIN_IDS": json.dumps({"MATIC": rig.anvil.chain_id}),
        "USDC_CONTRACTS": json.dumps({"MATIC": rig.usdc.address}), "CIRCLE_API_URL": rig.circle.base_url,
        "FINALITY_DEPTHS_BLOCKS": json.dumps({"MATIC": CIRCLE_DEPTH}), "CIRCLE_API_KEY": TEST_API_KEY,
        "CIRCLE_ENTITY_SECRET": TEST_ENTITY_SECRET,
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(f"STABLERAIL_{name}", value)
    names = {"ID": ada, "HASH": tx_hash, "CORRECTION": str(uuid4()), "WRONG": "0x" + "1" * 64}
    await follow(day("A withdrawal in review"), names, monkeypatch)
    assert (await rig.statuses(), await has(rig.at, "ada")) == ({"ada": ("completed", None)}, (75, 0))
    await assert_whole(rig.at)
