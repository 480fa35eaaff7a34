"""Withdrawals that Circle sends, on real Kafka, PostgreSQL and USDC: each is paid once or given back, whatever Circle's day is like."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import uuid4

import orjson
import pytest

from agents.acting import Acting
from agents.recovery import comparing, restoring
from agents.sweeper import ABANDONED_S, Sweeper
from agents.withdrawals import poll_transfers, requests, settle_transfers, transfer_by_custodian, transfer_calls
from agents.withdrawals.errors import NotCancellable
from agents.withdrawals.transfer_calls import CircleTransfers, TransferDeeds
from agents.withdrawals.withdrawal import withdrawal_id
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.gate import Fault, Weather
from connectors.circle.sandbox.state import Plan
from connectors.circle.sandbox.tokens import usdc_token_id
from ledger.record import Message
from stablerail import denied
from stablerail.dev.anvil import Node
from stablerail.dev.kafka import Kafka
from stablerail.dev.usdc import Usdc
from stablerail.metrics import Metrics
from stablerail.wiring import build
from tests.support import withdrawals
from tests.support.custodian_rig import PATH, POLICY, TOPICS, Rig, custodian_rig, new_address
from tests.support.in_process import running, until
from tests.support.withdrawals import assert_whole, has, settled
from topics.money import SCALE


@pytest.fixture
async def rig(database: str, kafka: Kafka, topic_prefix: str, anvil: Node, usdc: Usdc) -> AsyncIterator[Rig]:
    async with custodian_rig(database, kafka.bootstrap, topic_prefix, anvil, usdc) as it:
        yield it


SOMEWHERE_ON_SOLANA = "9WzDXwBbmkg8ZTbNMqUxvQRAyrZzDsGYdLVL9zYtAWWM"


async def test_a_transfer_ends_its_withdrawal_as_circle_and_the_chain_say(rig: Rig) -> None:
    blocked = new_address()
    await rig.anvil.wait_mined(await rig.usdc.blacklist(blocked))
    sent = "SENT"
    plans = {
        "paid": (None, ("completed", None)),
        "denied": (Plan("INITIATED", "DENIED"), ("failed", "custodian_denied")),
        "cancelled": (Plan("QUEUED", "CANCELED"), ("cancelled", None)),
        "failed": (Plan("QUEUED", "FAILED", "SOMETHING"), ("failed", "custodian_failed")),
        "short of gas": (Plan("QUEUED", "FAILED", "INSUFFICIENT_NATIVE_TOKEN"), ("failed", "custodian_short")),
        "failed after sent, and paid": (Plan(sent, "FAILED"), ("completed", None)),
        "cancelled after sent, and paid": (Plan(sent, "CANCELED"), ("completed", None)),
        "failed after sent, and nowhere": (Plan(sent, "FAILED", broadcast=False), ("failed", "custodian_failed")),
        "complete, and nowhere": (Plan("COMPLETE", broadcast=False), ("manual_review", "unproven_payment")),
        "stuck": (Plan(sent, "STUCK", broadcast=False), ("manual_review", "stuck")),
    }
    to = {user: new_address() for user in plans}
    ids = {user: await rig.ask(user, plan, to=to[user]) for user, (plan, _) in plans.items()}
    ids["reverted"] = await rig.ask("reverted", to=blocked)
    ids["solana"] = await rig.ask("solana", to=SOMEWHERE_ON_SOLANA, chain="SOL")
    ids["too much for solana"] = await rig.ask(
        "too much for solana", Plan(), to=SOMEWHERE_ON_SOLANA, chain="SOL", amount="99"
    )
    rig.circle.sandbox.state.refused = {await rig.ask("refused")}
    wanted = {user: end for user, (_, end) in plans.items()} | {
        "reverted": ("failed", "custodian_failed"),
        "solana": ("completed", None),
        "too much for solana": ("completed", None),
        "refused": ("failed", "custodian_refused"),
    }
    async with rig.worker():
        await rig.became(wanted, step_s=20.0)
    assert {user: len(found) for user, key in ids.items() for found in [rig.at_circle()[key]]} == dict.fromkeys(ids, 1)
    paid = {to[user] for user, (_, end) in plans.items() if end[0] == "completed"}
    assert dict(await rig.paid()) == {(address, 25 * SCALE): 1 for address in paid}
    for user, (status, _) in wanted.items():
        amount = 99 if user.startswith("too") else 25
        left = {"completed": (100 - amount, 0), "manual_review": (100 - amount, amount)}.get(status, (100, 0))
        assert await has(rig.at, user) == left, user
    ends = await settled(rig.at, len(wanted) - 2)
    assert {end.user_id: (end.outcome, end.code) for end in ends.values()} == {
        user: end for user, end in wanted.items() if end[0] != "manual_review"
    }
    hashes = {key: [t.tx_hash for t in found] for key, found in rig.at_circle().items()}
    assert all([end.tx_hash] == hashes[ids[end.user_id]] for end in ends.values() if end.outcome == "completed")
    await assert_whole(rig.at)


async def test_lost_replies_refusals_to_answer_and_a_worker_that_dies_pay_every_withdrawal_once(rig: Rig) -> None:
    rig.circle.sandbox.gate.weather = Weather(unavailable=0.3, lost_replies=0.2, limited=0.1, seed=7)
    policy = replace(POLICY, retry_first_s=0.2, retry_max_s=0.5)
    users = [f"user{number}" for number in range(20)]
    to = {user: new_address() for user in users}
    ids = [await rig.ask(user, to=to[user]) for user in users]
    async with rig.worker(policy):
        await until(lambda: _asked(rig, 8), "some were asked for")
    rig.at.clock.forward(120)  # the leases of the dead run out
    async with rig.worker(policy):
        await rig.became(dict.fromkeys(users, ("completed", None)), step_s=0.2)
        assert rig.calls > len(users)
    assert {key: len(found) for key, found in rig.at_circle().items()} == dict.fromkeys(ids, 1)
    assert await rig.paid() == Counter((address, 25 * SCALE) for address in to.values())
    await assert_whole(rig.at)


@pytest.mark.parametrize("fault", [("page", 404), ("page", 302), ("status", 409)])
async def test_what_circle_made_is_not_given_back_for_an_answer_that_is_no_refusal_of_it(
    rig: Rig, fault: tuple[Any, int]
) -> None:
    """What stands before Circle answers in its place; or something between us has sent the request twice."""
    kind, status = fault
    rig.circle.sandbox.deliveries.disorder.drop = 1_000
    rig.circle.sandbox.gate.faults.append(Fault(PATH, kind, status=status, acts=True))
    async with rig.worker(replace(POLICY, retry_first_s=0.2, retry_max_s=0.2)):
        ada = await rig.ask("ada")
        await rig.became({"ada": ("completed", None)}, step_s=0.2)
    assert len(rig.at_circle()[ada]) == 1
    assert sum((await rig.paid()).values()) == 1
    assert await has(rig.at, "ada") == (75, 0)
    await assert_whole(rig.at)


async def test_while_circle_refuses_our_entity_secret_withdrawals_wait_and_none_is_failed(rig: Rig) -> None:
    state = rig.circle.sandbox.state
    registered, state.entity_secret = state.entity_secret, bytes(32)
    async with rig.worker(replace(POLICY, retry_first_s=0.2, retry_max_s=0.2)) as services:
        await rig.ask("ada")

        async def heard() -> bool:
            rig.at.clock.forward(0.2)
            return rig.calls >= 3

        await until(heard, "Circle was asked again and again")
        assert services.unready == {"transfer_by_custodian": "circle refuses our credentials"}
        assert await has(rig.at, "ada") == (75, 25)
        state.entity_secret = registered
        await rig.became({"ada": ("completed", None)}, step_s=0.2)
        assert services.unready == {}
    await assert_whole(rig.at)


async def _asked(rig: Rig, count: int) -> bool:
    return len(rig.at_circle()) >= count


async def test_webhooks_that_are_quicker_than_the_reply_late_doubled_or_out_of_order_change_nothing(rig: Rig) -> None:
    gate, deliveries = rig.circle.sandbox.gate, rig.circle.sandbox.deliveries
    gate.faults.append(Fault(PATH, "lost_reply", times=1))
    policy = replace(POLICY, retry_first_s=3_600, retry_max_s=3_600)
    async with rig.worker(policy, polls=False):
        quick = await rig.ask("quick")
        # the reply is lost and nobody asks again for an hour: all that is known comes from the webhooks
        await rig.became({"quick": ("completed", None)}, step_s=1.0)
        transfer = rig.at_circle()[quick][0].id
        assert await rig.transfers() == {"quick": (transfer, "COMPLETE")}
        rig.at.clock.forward(7_200)
        await until(lambda: _ended(rig), "the call was repeated, with its key")
        assert len(rig.at_circle()[quick]) == 1

        deliveries.disorder.duplicate, deliveries.disorder.reorder = 4, 4
        await rig.ask("mixed")
        await rig.became({"mixed": ("completed", None)}, step_s=1.0)
        told = [d for d in deliveries.records if d.notification_type == "transactions.outbound"]
        for delivery in reversed(told):
            await rig.notify(delivery.body)  # once more, the last first
            await rig.notify(orjson.dumps({**orjson.loads(delivery.body), "notificationId": str(uuid4())}))
        await rig.ask("next")
        await rig.became({"next": ("completed", None)}, step_s=1.0)
    assert len(await settled(rig.at, 3)) == 3
    assert sum((await rig.paid()).values()) == 3
    await assert_whole(rig.at)


async def _ended(rig: Rig) -> bool:
    return bool(await rig.at.observer.fetchval("SELECT count(*) = 0 FROM calls WHERE state = 'open'"))


async def test_what_lost_webhooks_would_have_told_is_asked_for(rig: Rig) -> None:
    rig.circle.sandbox.deliveries.disorder.drop = 1_000
    rig.wallets["SOL"] = rig.wallets["SOL"].model_copy(update={"id": str(uuid4())})
    async with rig.worker() as services:
        await rig.ask("ada")
        await rig.ask("bob", Plan("QUEUED", "DENIED"))
        await rig.became({"ada": ("completed", None), "bob": ("failed", "custodian_denied")}, step_s=1.0)
        assert services.unready == {"poll_transfers": "wrong_wallet"}, (
            "of another chain Circle does not know the wallet"
        )
    wallet = rig.wallets["MATIC"]
    rows = await rig.at.observer.fetch("SELECT chain, address, wallet_id FROM custodian_wallets WHERE chain = 'MATIC'")
    assert [tuple(row) for row in rows] == [("MATIC", wallet.address, wallet.id)]
    told = [d for d in rig.circle.sandbox.deliveries.records if d.notification_type == "transactions.outbound"]
    assert told
    assert all(delivery.dropped for delivery in told)
    await assert_whole(rig.at)


async def test_neither_what_stays_as_it_is_nor_what_circle_cannot_answer_keeps_the_poller_from_the_others(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poll_transfers, "LOOKUPS_MAX", 1)
    rig.circle.sandbox.deliveries.disorder.drop = 10**6
    async with rig.worker(polls=False):
        for number, (user, plan) in enumerate({"mute": None, "stays": Plan("SENT"), "paid": None}.items(), 1):
            id = await rig.ask(user, plan)
            await until(lambda count=number: _taken(rig, count), "Circle has it, and we know")  # type: ignore[misc]
            if user == "mute":
                (transfer,) = rig.at_circle()[id]
                path = f"/v1/w3s/transactions/{transfer.id}"
                rig.circle.sandbox.gate.faults.append(Fault(path, "status", status=500, times=10**9))
    rig.at.clock.forward(120)
    async with rig.worker():
        await rig.became({"paid": ("completed", None)}, step_s=20)
    assert (await rig.statuses())["mute"] == (await rig.statuses())["stays"] == ("broadcasting", None)


async def _taken(rig: Rig, count: int) -> bool:
    found = await rig.at.observer.fetchval("SELECT count(*) FROM custodian_transfers WHERE transfer_id IS NOT NULL")
    return bool(found == count)


async def test_what_a_worker_had_committed_and_not_told_when_it_died_is_told_by_another(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else would: no poller is at work, and Circle tells of a transfer once."""
    held: set[str] = set()

    async def emit(messages: Sequence[Message], source: str, at: datetime) -> None:
        if messages and source in ("sweeper", "transfer_by_custodian.conclude"):
            held.add(source)
            await asyncio.Event().wait()
        await told(messages, source, at)

    async def scheduled() -> bool:
        return bool(await rig.at.observer.fetchval("SELECT count(*) FROM schedule WHERE code = 'not_final'"))

    async def both() -> bool:
        return len(held) == 2

    async with rig.worker(polls=False) as services:
        told = services.emitter.emit
        monkeypatch.setattr(services.emitter, "emit", emit)
        await rig.ask("nowhere", Plan("SENT", "FAILED", broadcast=False))
        await until(scheduled, "it is looked for again, later")
        rig.circle.sandbox.state.refused = {withdrawal_id("refused", "k")}
        await rig.ask("refused")
        rig.at.clock.forward(settle_transfers.ABSENT_LOOK_S)
        await until(both, "both are committed")
    assert [row["code"] for row in await rig.at.observer.fetch("SELECT code FROM schedule")] == ["sent"]
    rig.at.clock.forward(ABANDONED_S + 1)
    async with rig.worker(polls=False, abandoned_s=ABANDONED_S):
        wanted = {"nowhere": ("failed", "custodian_failed"), "refused": ("failed", "custodian_refused")}
        await rig.became(wanted, step_s=20)
    assert (await has(rig.at, "nowhere"), await has(rig.at, "refused")) == ((100, 0), (100, 0))
    await assert_whole(rig.at)


async def test_a_key_that_circle_has_forgotten_makes_no_second_transfer(rig: Rig) -> None:
    rig.circle.sandbox.deliveries.disorder.drop = 1_000
    rig.circle.sandbox.gate.faults.append(Fault(PATH, "lost_reply", times=1))
    policy = replace(POLICY, retry_first_s=90_000, retry_max_s=90_000)
    async with rig.worker(policy):
        ada = await rig.ask("ada")
        await until(lambda: _asked(rig, 1), "it was asked for")
        await until(lambda: _put_off(rig), "the reply was lost")
        rig.circle.sandbox.state.answers.clear()
        rig.at.clock.forward(2 * 90_000)
        await rig.became({"ada": ("completed", None)}, step_s=1.0)
    assert len(rig.at_circle()[ada]) == 1
    assert sum((await rig.paid()).values()) == 1


async def _put_off(rig: Rig) -> bool:
    return bool(await rig.at.observer.fetchval("SELECT count(*) FROM calls WHERE attempts > 0"))


async def test_without_an_answer_a_person_must_look_and_it_goes_on_by_itself(rig: Rig) -> None:
    rig.review_attempts = 2
    fault = Fault(PATH, "status", status=503, times=1_000)
    rig.circle.sandbox.gate.faults.append(fault)
    async with rig.worker(replace(POLICY, retry_first_s=0.2, retry_max_s=0.2)):
        await rig.ask("ada")
        await rig.became({"ada": ("manual_review", "custodian_silent")}, step_s=0.2)
        assert await has(rig.at, "ada") == (75, 25)
        fault.times = 0
        await rig.became({"ada": ("completed", None)}, step_s=0.2)
    assert sum((await rig.paid()).values()) == 1
    await assert_whole(rig.at)


async def test_after_an_hour_without_an_answer_a_person_must_look_whatever_was_counted(rig: Rig) -> None:
    """What is refused for the rate, by a wrong key, or not asked while the partner rests, is no attempt."""
    fault = Fault(PATH, "status", status=429, times=10**6)
    rig.circle.sandbox.gate.faults.append(fault)
    async with rig.worker():
        await rig.ask("ada")
        await until(lambda: _heard(rig), "Circle has refused to hear it")
        assert await rig.statuses() == {"ada": ("broadcasting", None)}
        rig.at.clock.forward(transfer_calls.SILENT_FOR.total_seconds())
        await rig.became({"ada": ("manual_review", "custodian_silent")})
        assert await rig.at.observer.fetchval("SELECT attempts FROM calls") == 0
        fault.times = 0
        await rig.became({"ada": ("completed", None)}, step_s=1.0)
    await assert_whole(rig.at)


async def _heard(rig: Rig) -> bool:
    return rig.calls > 1


async def test_what_circle_does_not_show_any_more_or_not_readably_is_a_persons_business_until_it_shows_it_as_it_was(
    rig: Rig,
) -> None:
    users = ("gone", "garbled")
    rig.circle.sandbox.deliveries.disorder.drop = 10**6
    async with rig.worker(polls=False):
        ids = [await rig.ask(user, Plan("SENT")) for user in users]
        await until(lambda: _taken(rig, 2), "Circle has them, and we know")

    async def sent() -> bool:
        return [rig.at_circle()[id][0].state for id in ids] == ["SENT", "SENT"]

    await until(sent, "Circle changes them no more")
    gone, garbled = (rig.at_circle()[id][0] for id in ids)
    state, gate = rig.circle.sandbox.state, rig.circle.sandbox.gate
    gate.faults.append(Fault(f"/v1/w3s/transactions/{gone.id}", "status", status=404, times=10**9))
    amounts = garbled.amounts
    state.change(garbled.id, amounts=[*amounts, "1"])
    looked = "GET /v1/w3s/transactions/{id}"
    async with rig.worker() as services:
        before = gate.calls[looked]

        async def seen() -> bool:
            return gate.calls[looked] >= before + 4

        await until(seen, "Circle was asked for both more than once")
        assert await rig.statuses() == dict.fromkeys(users, ("broadcasting", None))
        await rig.became(dict.fromkeys(users, ("manual_review", "transfer_not_shown")), step_s=20.0)
        metrics = services.observer
        assert isinstance(metrics, Metrics)
        labels = {"stage": "settle_transfers", "code": "transfer_not_shown"}
        assert metrics.registry.get_sample_value("stablerail_stage_alerts_total", labels) == 2
        gate.faults.clear()
        state.change(garbled.id, amounts=amounts)
        await rig.became(dict.fromkeys(users, ("broadcasting", None)), step_s=20.0)
        state.change(gone.id, state="STUCK")
        await rig.became({"gone": ("manual_review", "stuck")}, step_s=20.0)
        state.change(gone.id, state="SENT")
        await rig.became(dict.fromkeys(users, ("broadcasting", None)), step_s=20.0)
        for one in (gone, garbled):
            state.change(one.id, state="COMPLETE")
        await rig.became(dict.fromkeys(users, ("completed", None)), step_s=20.0)
    await assert_whole(rig.at)


async def test_it_is_cancelled_until_it_is_asked_for_and_then_no_more(rig: Rig) -> None:
    ada = await rig.ask("ada")
    async with rig.at.process() as services, running(rig.accept, services, rig.at):
        await rig.became({"ada": ("signing", None)})
    connection = await rig.at.connect()
    await requests.cancel(connection, ada, rig.at.clock(), actor="ann")
    async with rig.worker():
        bob = await rig.ask("bob")
        await rig.became({"bob": ("completed", None)}, step_s=1.0)
        with pytest.raises(NotCancellable):
            await requests.cancel(connection, bob, rig.at.clock(), actor="ann")
    await connection.close()
    assert (set(rig.at_circle()), await has(rig.at, "ada")) == ({bob}, (100, 0))


async def test_what_a_customer_asked_for_who_was_rejected_since_waits_and_keeps_nobody_else_waiting(rig: Rig) -> None:
    async def put_off() -> bool:
        return await rig.at.observer.fetchval("SELECT code FROM schedule") == "frozen_customer"

    ids = {user: await rig.ask(user) for user in ("ada", "bob")}
    async with rig.at.process() as services, running(rig.accept, services, rig.at):
        await rig.became(dict.fromkeys(ids, ("signing", None)))
    connection = await rig.at.connect()
    await connection.execute("INSERT INTO kyc_standings VALUES ('ada', 'rejected', 'test', 'e1', 'now', now())")
    async with rig.worker():
        await rig.became({"bob": ("completed", None)}, step_s=1.0)
        await until(put_off, "the other waits")
        assert set(rig.at_circle()) == {ids["bob"]}
        await connection.execute("DELETE FROM kyc_standings")
        await rig.became({"ada": ("completed", None)}, step_s=20.0)
    await connection.close()
    await assert_whole(rig.at)


async def test_what_would_go_to_an_address_that_was_denied_since_waits_and_may_be_cancelled(rig: Rig) -> None:
    async def put_off() -> bool:
        rows = await rig.at.observer.fetch("SELECT code FROM schedule")
        return [row["code"] for row in rows] == ["denied_address"] * 3

    evm, solana = new_address(), SOMEWHERE_ON_SOLANA
    ids = {
        "ada": await rig.ask("ada", to=evm), "eve": await rig.ask("eve", to=evm),
        "sol": await rig.ask("sol", to=solana, chain="SOL"), "bob": await rig.ask("bob"),
    }  # fmt: skip
    async with rig.at.process() as services, running(rig.accept, services, rig.at):
        await rig.became(dict.fromkeys(ids, ("signing", None)))
    connection, now = await rig.at.connect(), rig.at.clock()
    listed = (("ETH", evm), ("SOL", solana))  # an EVM address is the same on every chain of its kind
    for chain, address in listed:
        assert await denied.add(connection, chain, address, "test", "ann", now)
    async with rig.worker():
        await rig.became({"bob": ("completed", None)}, step_s=1.0)
        await until(put_off, "the others wait")
        assert set(rig.at_circle()) == {ids["bob"]}
        await requests.cancel(connection, ids["eve"], now, actor="ann")
        for chain, address in listed:
            assert await denied.remove(connection, chain, address, "test", "ann", now)
        await rig.became({"ada": ("completed", None), "sol": ("completed", None)}, step_s=20.0)
    await connection.close()
    assert (await rig.statuses())["eve"] == ("cancelled", None)
    assert set(rig.at_circle()) == set(ids.values()) - {ids["eve"]}
    await assert_whole(rig.at)


async def test_a_second_transfer_of_a_withdrawal_is_a_persons_business(rig: Rig) -> None:
    ada = await rig.ask("ada", Plan("QUEUED"))
    async with rig.worker():
        await until(lambda: _asked(rig, 1), "it was asked for")
        (first,) = rig.at_circle()[ada]
        await until(lambda: _known(rig, first.id), "the first is known")
        twin = first.model_copy(update={"id": str(uuid4()), "state": "SENT"})
        rig.circle.sandbox.state.transactions[twin.id] = twin
        rig.circle.sandbox.deliveries.announce(twin)
        await rig.became({"ada": ("manual_review", "second_transfer")})
        rig.circle.sandbox.deliveries.announce(rig.circle.sandbox.state.change(first.id, state="FAILED"))
        await until(lambda: _known(rig, first.id, "FAILED"), "the first failed")
        assert (await rig.statuses(), await has(rig.at, "ada")) == (
            {"ada": ("manual_review", "second_transfer")},
            (75, 25),
        )
    await assert_whole(rig.at)


async def _known(rig: Rig, transfer: str, *states: str) -> bool:
    key, state = (await rig.transfers()).get("ada", (None, ""))
    return key == transfer and (not states or state in states)


async def test_after_a_restore_circle_is_not_asked_before_its_transfers_were_compared(rig: Rig) -> None:
    async with rig.worker():
        await rig.ask("ada")
        await rig.became({"ada": ("completed", None)}, step_s=1.0)
    connection = await rig.at.connect()
    assert await restoring.close(connection, rig.at.clock(), "ann", first_seq=1_000_000, records=7)
    (gate,) = await restoring.closed_gates(connection)
    async with rig.worker():
        await rig.ask("bob")
        await rig.became({"bob": ("broadcasting", None)})
        found = await comparing.compare_circle(connection, gate, rig.client, "testnet", None)
        assert (found.code, "1 transfers" in found.told) == ("", True), found
        # one that the database has forgotten
        lost = {"walletId": rig.wallets["MATIC"].id, "tokenId": usdc_token_id("MATIC-AMOY")}
        await rig.client.create_transfer(
            str(uuid4()), wallet_id=lost["walletId"], token_id=lost["tokenId"], destination_address=new_address(),
            amount="1", fee_level="LOW", ref_id="ab" * 16,
        )  # fmt: skip
        found = await comparing.compare_circle(connection, gate, rig.client, "testnet", None)
        assert (found.code, len(found.unknown)) == ("transfers_unknown", 1), found
        assert "ab" * 16 in found.unknown[0]
        assert rig.calls == 2
        await restoring.open_compared(connection, [], [gate], [found.log("ann")], rig.at.clock(), "ann")
        await rig.became({"bob": ("completed", None)}, step_s=1.0)
    await connection.close()


async def test_the_worker_as_it_is_wired_has_circle_send_a_withdrawal(rig: Rig) -> None:
    settings = withdrawals.settings_of(
        rig.at, withdrawal_chains="", circle_api_url=rig.circle.base_url, circle_api_key=TEST_API_KEY,
        circle_entity_secret=TEST_ENTITY_SECRET, circle_withdrawal_wallets={"MATIC": rig.wallets["MATIC"].id},
        circle_usdc_token_ids={"MATIC": usdc_token_id("MATIC-AMOY")}, circle_fee_level="HIGH", circle_transfer_poll_s=0.2,
        rpc_urls={"MATIC": [rig.anvil.rpc_url]}, chain_ids={"MATIC": rig.anvil.chain_id},
        usdc_contracts={"MATIC": rig.usdc.address}, finality_depths_blocks={"MATIC": 1}, call_poll_interval_s=0.05,
    )  # fmt: skip
    async with AsyncExitStack() as stack:
        services = await stack.enter_async_context(rig.at.process())
        metrics = services.observer
        assert isinstance(metrics, Metrics)
        movement = await build("withdrawals", settings, services, metrics)
        for close in movement.closing:
            stack.push_async_callback(close)
        for delivery in movement.deliveries:
            if delivery.stage.source in TOPICS:
                await stack.enter_async_context(running(delivery.stage, services, rig.at))
        tasks = [
            asyncio.create_task(work())
            for work in (*movement.workers, Sweeper(services, interval_s=0.05, abandoned_s=10**8).work)
        ]
        try:
            ada = await rig.ask("ada")
            await withdrawals.tell(rig.at, "own", "ada")  # by our own wallet, which is not set up
            await rig.became({"ada": ("completed", None)}, step_s=1.0)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    (transfer,) = rig.at_circle()[ada]
    assert transfer.fee_level == "HIGH"
    assert sum((await rig.paid()).values()) == 1


async def test_the_api_shows_what_circle_makes_of_a_withdrawal(rig: Rig) -> None:
    async with rig.worker(), withdrawals.api_of(rig.at) as client:
        await withdrawals.fund(rig.at, "ada", 100 * SCALE)
        asked = await withdrawals.ask(client, "k1", rail="circle", to=new_address())
        assert (asked.status_code, asked.json()["rail"]) == (202, "circle")
        await rig.became({"ada": ("completed", None)}, step_s=1.0)
        shown = (await client.get(f"/v1/withdrawals/{asked.json()['id']}")).json()
    (transfer,) = rig.at_circle()[asked.json()["id"]]
    assert (shown["attempts"], shown["transfer"]["transfer_id"]) == ([], transfer.id)
    assert (shown["transfer"]["state"], shown["transfer"]["tx_hashes"]) == ("COMPLETE", [transfer.tx_hash])


async def test_a_refusal_of_what_circle_made_before_the_restore_gives_nothing_back(rig: Rig) -> None:
    gate = rig.circle.sandbox.gate
    rig.circle.sandbox.deliveries.disorder.drop = 1_000
    gate.faults.append(Fault(PATH, "hang", acts=True, times=1))
    policy = replace(POLICY, retry_first_s=0.2, retry_max_s=0.2)
    async with rig.worker(policy, polls=False):
        ada = await rig.ask("ada")
        await until(lambda: _asked(rig, 1), "Circle has made it")
    await rig.at.observer.execute("DELETE FROM leases")  # as after a rebuild
    rig.at.clock.forward(300)
    gate.faults.append(Fault(PATH, "status", status=400, times=1_000))
    async with rig.worker(policy):
        await rig.became({"ada": ("completed", None)}, step_s=1.0)
    assert len(rig.at_circle()[ada]) == 1
    assert [one.id for one in rig.at_circle()[ada]] == [key for key, _ in (await rig.transfers()).values()]
    assert sum((await rig.paid()).values()) == 1


async def test_a_transfer_that_was_refused_and_given_back_is_not_paid_by_a_worker_that_stood_still(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had taken the call before, and waited for the journal while another took it, asked and ended it."""
    taken, kafka_is_back = asyncio.Event(), asyncio.Event()
    stage = transfer_by_custodian.stage(rig.sources)
    async with rig.at.process() as stood:
        journal = stood.relay.journal

        async def journaled_later(*args: Any, **kwargs: Any) -> None:
            taken.set()
            await kafka_is_back.wait()
            await journal(*args, **kwargs)

        monkeypatch.setattr(stood.relay, "journal", journaled_later)
        deeds = TransferDeeds(CircleTransfers(rig.client, stood.clock), rig.review_attempts)
        performers = asyncio.create_task(Acting(stage, deeds, stood, asyncio.Event(), POLICY).work())
        try:
            async with rig.deciding():
                ada = await rig.ask("ada")
                await until(lambda: _is_set(taken), "the first worker has taken it")
            rig.circle.sandbox.state.refused = {ada}
            rig.at.clock.forward(POLICY.lease_s + 1)
            async with rig.worker():
                await rig.became({"ada": ("failed", "custodian_refused")}, step_s=20)
                assert await has(rig.at, "ada") == (100, 0)
            rig.circle.sandbox.state.refused = set()
            heard = rig.calls
            kafka_is_back.set()
            async with rig.deciding():
                bob = await rig.ask("bob")  # asked for when the first worker is through with what it had
                await until(lambda: _has_heard_of(rig, bob), "its next call")
            assert stood.stop.reason is None
        finally:
            performers.cancel()
            await asyncio.gather(performers, return_exceptions=True)
    assert (rig.calls, set(rig.at_circle())) == (heard + 1, {bob})
    await assert_whole(rig.at)


async def _has_heard_of(rig: Rig, id: str) -> bool:
    return id in rig.at_circle()


async def _is_set(event: asyncio.Event) -> bool:
    return event.is_set()
