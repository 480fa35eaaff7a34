"""Withdrawals in review that two people end, on real Kafka, PostgreSQL and USDC: paid or given back once, and never against a chain."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson
import pytest

from agents.withdrawals import ended_by_people
from agents.withdrawals.ended_by_people import STOPPED_FOR, Outside
from agents.withdrawals.look import ChainWriter
from agents.withdrawals.settle_transfers import ABSENT_S
from agents.withdrawals.withdrawal import Attempt, Lane, Withdrawal, lane_row
from chain.outcomes import fates
from chain.rpc import Rpc
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.gate import Fault
from connectors.circle.sandbox.state import Plan, Transaction
from ledger import corrections
from ledger.accounts import SHORTFALL, buffer
from ledger.audit_logs import Wanted, page
from ledger.commit import lock_writer
from ledger.corrections import Correction
from ledger.errors import LedgerError
from ledger.posting import credit, debit
from ledger.record import unpack
from ledger.rows import Connection
from stablerail.custody import Custody
from stablerail.dev.anvil import Node
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.usdc import Usdc, calldata
from stablerail.metrics import Metrics
from tests.integration.test_runbook import day, follow
from tests.support import ledger_rig
from tests.support.custodian_rig import DEPTH as CIRCLE_DEPTH
from tests.support.custodian_rig import PATH, Rig, custodian_rig, new_address
from tests.support.in_process import until
from tests.support.ledger_rig import assert_holds, connect_to, owner
from tests.support.payouts import CHAIN, DEPTH, FEE_WEI, GAS, Payouts, asked, open_withdrawal, payouts
from tests.support.withdrawals import assert_whole, has, settled
from topics.events import Chain
from topics.money import SCALE

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection

AMOUNT = 25 * SCALE
SOMEWHERE_ON_SOLANA = "9WzDXwBbmkg8ZTbNMqUxvQRAyrZzDsGYdLVL9zYtAWWM"


async def code_of(refused: Awaitable[Any]) -> str:
    with pytest.raises(LedgerError) as caught:
        await refused
    return caught.value.code


# -- what we signed ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def desk(connection: Connection, dsn: str, tmp_path: Path, tools: Tools) -> AsyncIterator[Payouts]:
    async with payouts(connection, connect_to(dsn), tmp_path, tools) as made:
        yield made


def outside_of(desk: Payouts, endpoints: int = 2) -> Outside:
    return Outside(ChainWriter((desk.rpc, desk.liar)[:endpoints], desk.usdc.address.lower(), DEPTH), None)


async def ask(desk: Payouts, withdrawal: Withdrawal, tx_hash: str | None = None, endpoints: int = 2) -> Correction:
    outside = outside_of(desk, endpoints)
    return await ended_by_people.request(
        desk.connection, secrets.token_hex(16), withdrawal.id, tx_hash, outside, "seen", "ann", desk.now
    )


async def approve(desk: Payouts, asked_for: Correction, actor: str = "bob") -> Correction:
    return await ended_by_people.approve(desk.connection, asked_for.id, outside_of(desk), actor, desk.now)


async def told(desk: Payouts) -> list[dict[str, Any]]:
    """Every end that a commit of ours wants told."""
    rows = await desk.connection.fetch("SELECT record FROM outbox ORDER BY seq")
    messages = [message for (record,) in rows for message in unpack(record).messages]
    return [orjson.loads(message.value) for message in messages if message.topic == "withdrawals.settled"]


async def unexpected(desk: Payouts, moved: int, to: str = "") -> tuple[Withdrawal, Attempt]:
    """In review, for its payment moved so much to its recipient, or to another."""
    withdrawal = asked(f"user-{secrets.token_hex(4)}", AMOUNT, "0x" + secrets.token_hex(20))
    nonce = desk.next_nonce
    lane = Lane(CHAIN, desk.signer, nonce + 1, 0, "open", "", nonce + 1, desk.now)
    await open_withdrawal(desk.connection, withdrawal, lane_row(lane))
    attempt = await desk.sign(withdrawal._replace(amount=moved), nonce=nonce, to=to)
    await desk.send(attempt)
    await desk.head()
    await desk.head(DEPTH + 2)
    assert await desk.status(withdrawal) == ("manual_review", "unexpected_transfers")
    return withdrawal, attempt


async def stolen(desk: Payouts, to: str, amount: int) -> tuple[Withdrawal, str]:
    """In review, for another of the key's transactions, which moved so much there, used its nonce: that one's hash."""
    withdrawal = asked(f"user-{secrets.token_hex(4)}", AMOUNT, to)
    attempt = await desk.sign(withdrawal)
    fee = hex(2 * FEE_WEI)
    tx_hash: str = await desk.anvil.rpc("eth_sendTransaction", {
        "from": desk.signer, "to": desk.usdc.address, "data": calldata("transfer(address,uint256)", to, amount),
        "nonce": hex(attempt.nonce), "gas": hex(GAS), "maxFeePerGas": fee, "maxPriorityFeePerGas": fee,
    })  # fmt: skip
    await desk.head()
    await desk.head(DEPTH + 2)
    assert await desk.status(withdrawal) == ("manual_review", "nonce_taken")
    return withdrawal, tx_hash


async def test_a_payment_that_moved_nothing_to_its_recipient_is_given_back_by_two_people_once(desk: Payouts) -> None:
    withdrawal, attempt = await unexpected(desk, AMOUNT, to="0x" + secrets.token_hex(20))
    assert await code_of(ask(desk, withdrawal, attempt.tx_hash)) == "payment_not_proven"
    assert await code_of(ask(desk, withdrawal, endpoints=1)) == "may_still_be_paid"
    plain = [debit(buffer(), 1), credit(SHORTFALL, 1)]
    other = await corrections.request(desk.connection, secrets.token_hex(16), plain, "found", "ann", desk.now)
    assert await code_of(approve(desk, other)) == "other_command"
    asked_for = await ask(desk, withdrawal)
    assert (asked_for.kind, asked_for.reference) == ("withdrawal_failed", withdrawal.id)
    assert await desk.balances(withdrawal) == (0, AMOUNT)
    assert await code_of(approve(desk, asked_for, "Ann")) == "same_actor"
    assert await code_of(corrections.approve(desk.connection, asked_for.id, "bob", desk.now)) == "other_command"
    assert await desk.status(withdrawal) == ("manual_review", "unexpected_transfers")
    done = await approve(desk, asked_for)
    assert (done.state, done.decided_by) == ("approved", "bob")
    assert await approve(desk, asked_for, "eve") == done
    assert await desk.status(withdrawal) == ("failed", "not_paid")
    assert await desk.balances(withdrawal) == (AMOUNT, 0)
    assert await desk.attempt_status(attempt) == "reverted"
    (end,) = await told(desk)
    assert (end["withdrawal_id"], end["outcome"], end["code"]) == (withdrawal.id, "failed", "not_paid")
    line = "SELECT status, code, actor FROM withdrawal_history WHERE withdrawal_id = $1 ORDER BY version DESC LIMIT 1"
    assert tuple(await desk.connection.fetchrow(line, withdrawal.id) or ()) == ("failed", "not_paid", "bob")
    logs = [(one.log.actor, one.log.action, one.log.error)
            for one in await page(desk.connection, Wanted(resource_id=asked_for.id), None, 10)]  # fmt: skip
    assert logs == [
        ("ann", "correction.requested", None), ("Ann", "correction.approved", "same_actor"),
        ("bob", "correction.approved", "other_command"), ("bob", "correction.approved", None),
    ]  # fmt: skip
    await desk.head(2)
    assert (await desk.status(withdrawal), len(await told(desk))) == (("failed", "not_paid"), 1)
    assert await code_of(ask(desk, withdrawal)) == "not_on_its_way"
    await assert_holds(desk.connection)


async def test_a_payment_of_another_amount_to_its_recipient_is_paid_and_never_given_back(desk: Payouts) -> None:
    withdrawal, attempt = await unexpected(desk, AMOUNT - SCALE)
    assert await code_of(ask(desk, withdrawal)) == "was_paid"
    done = await approve(desk, await ask(desk, withdrawal, attempt.tx_hash.upper().replace("0X", "0x")))
    assert done.reference == f"{withdrawal.id}:{attempt.tx_hash}"
    assert await desk.status(withdrawal) == ("completed", None)
    assert await desk.balances(withdrawal) == (0, 0)
    assert await desk.attempt_status(attempt) == "confirmed"
    (end,) = await told(desk)
    assert (end["outcome"], end["tx_hash"]) == ("completed", attempt.tx_hash)
    await assert_holds(desk.connection)


async def test_a_payment_by_a_transaction_that_we_did_not_store_is_one_withdrawals_alone(
    desk: Payouts, dsn: str
) -> None:
    to = "0x" + secrets.token_hex(20)
    first, tx_hash = await stolen(desk, to, AMOUNT)
    second, other = await stolen(desk, to, 1)
    assert await code_of(ask(desk, first, other)) == "payment_not_proven"
    assert await code_of(ask(desk, first, "0x" + "0" * 64)) == "payment_not_proven"
    assert await code_of(ask(desk, first, "no hash")) == "payment_not_proven"
    ends = await raced(desk, dsn, [await ask(desk, one, tx_hash) for one in (first, second)])
    assert sorted(getattr(end, "code", "done") for end in ends) == ["done", "payment_not_proven"], ends
    paid, left = (first, second) if isinstance(ends[0], Correction) else (second, first)
    assert (await desk.status(paid), await desk.status(left)) == (("completed", None), ("manual_review", "nonce_taken"))
    assert await code_of(ask(desk, left, tx_hash)) == "payment_not_proven"
    await approve(desk, await ask(desk, left))
    assert await desk.status(left) == ("failed", "not_paid")
    attempts = await desk.connection.fetch("SELECT status, error FROM attempts ORDER BY nonce")
    assert [tuple(row) for row in attempts] == [("replaced", "nonce_taken")] * 2
    assert [(end["outcome"], end["tx_hash"]) for end in await told(desk)] == [("completed", tx_hash), ("failed", None)]
    await assert_holds(desk.connection)


async def test_what_may_still_be_mined_is_ended_by_nobody_and_goes_on_by_itself(desk: Payouts) -> None:
    await desk.anvil.rpc("evm_setAutomine", False)
    waiting, attempt = await desk.sent()
    assert await code_of(ask(desk, waiting)) == "may_still_be_paid"
    await desk.anvil.rpc("anvil_dropTransaction", attempt.tx_hash)
    assert await code_of(ask(desk, waiting)) == "may_still_be_paid", "gone from the pool, it may be sent again"
    desk.endpoint.lies["eth_getTransactionCount"] = lambda _params, _honest: "0x9"
    assert await code_of(ask(desk, waiting)) == "may_still_be_paid", "one of two endpoints says that it is used"
    desk.endpoint.lies.clear()
    await desk.send(attempt)
    await desk.head(2)
    assert await code_of(ask(desk, waiting, attempt.tx_hash)) == "may_still_be_paid", "it is not final yet"
    await desk.head(DEPTH)
    assert await desk.status(waiting) == ("completed", None)
    await assert_holds(desk.connection)


async def test_an_attempt_that_is_signed_while_somebody_approves_keeps_it(desk: Payouts, dsn: str) -> None:
    withdrawal, _ = await stolen(desk, "0x" + secrets.token_hex(20), 1)
    asked_for = await ask(desk, withdrawal)

    async def sign() -> None:
        await desk.sign(withdrawal, nonce=desk.next_nonce - 1, n=2)

    (end,) = await raced(desk, dsn, [asked_for], sign)
    assert getattr(end, "code", end) == "may_still_be_paid"
    await approve(desk, asked_for)
    assert await desk.status(withdrawal) == ("failed", "not_paid")
    await assert_holds(desk.connection)


async def raced(
    desk: Payouts, dsn: str, wanted: Sequence[Correction], meanwhile: Callable[[], Awaitable[None]] | None = None
) -> list[Correction | BaseException]:
    """Approved at once: all of them have looked, and wait for one lock, before any of them goes on."""
    gate, watcher = await owner(dsn), await owner(dsn)
    connections = [await connect_to(dsn)() for _ in wanted]
    try:
        async with gate.transaction():
            await lock_writer(gate, corrections.WRITER)
            acts = [
                asyncio.create_task(ended_by_people.approve(one, each.id, outside_of(desk), f"bob{number}", desk.now))
                for number, (one, each) in enumerate(zip(connections, wanted, strict=True))
            ]

            async def waiting() -> bool:
                query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
                return bool(await watcher.fetchval(query) == len(wanted))

            await until(waiting, "all of them wait")
            if meanwhile is not None:
                await meanwhile()
        return await asyncio.gather(*acts, return_exceptions=True)
    finally:
        for one in (gate, watcher, *connections):
            await one.close()


async def test_endpoints_that_are_behind_are_no_evidence_that_a_transaction_is_nowhere(desk: Payouts) -> None:
    await desk.anvil.mine(DEPTH)
    withdrawal, attempt = await desk.sent()
    stale = await desk.anvil.rpc("eth_getBlockByNumber", "latest", False)
    await desk.anvil.mine(DEPTH + 1)
    desk.endpoint.lies = {
        "eth_getBlockByNumber": lambda params, honest: stale if params[0] == "latest" else honest,
        "eth_getTransactionReceipt": lambda _params, _honest: None,
        "eth_getTransactionByHash": lambda _params, _honest: None,
    }
    urls = [desk.endpoint.url, desk.anvil.rpc_url, desk.endpoint.url, desk.anvil.rpc_url, desk.endpoint.url]
    async with AsyncExitStack() as stack:
        rpcs = [await stack.enter_async_context(Rpc(url, desk.anvil.chain_id)) for url in urls]
        found = await fates(rpcs, 2, [attempt.tx_hash], desk.usdc.address.lower(), DEPTH)
    assert found is not None
    assert found[attempt.tx_hash].transfers == ((desk.signer, withdrawal.recipient, AMOUNT),)


async def test_an_approval_looks_again(desk: Payouts) -> None:
    """What was a stranger's when it was asked for is ours when it is approved: the chain went back below its depth."""
    withdrawal, attempt = await desk.sent()
    await desk.head()
    foreign = {"from": desk.signer, "to": desk.signer, "value": "0x1", "nonce": hex(attempt.nonce)}
    await desk.anvil.rpc("anvil_reorg", 1, [[foreign, 0]])
    await desk.head(DEPTH)
    assert await desk.status(withdrawal) == ("manual_review", "nonce_taken")
    await desk.head(1)
    asked_for, again = await ask(desk, withdrawal), await ask(desk, withdrawal)
    await desk.anvil.rpc("anvil_reorg", DEPTH + 2, [["0x" + attempt.raw.hex(), 0]])
    assert await code_of(approve(desk, asked_for)) in ("was_paid", "may_still_be_paid")
    await desk.head(DEPTH + 2)
    assert await desk.status(withdrawal) == ("completed", None)
    assert await code_of(approve(desk, again)) == "not_on_its_way"
    found = await corrections.find(desk.connection, again.id)
    assert (found.state, await desk.balances(withdrawal)) == ("requested", (0, 0))
    await assert_holds(desk.connection)


async def test_of_two_approvals_at_once_one_ends_it(desk: Payouts, dsn: str) -> None:
    withdrawal, attempt = await unexpected(desk, AMOUNT - SCALE)
    rivals = [await ask(desk, withdrawal, attempt.tx_hash) for _ in range(2)]
    ends = await raced(desk, dsn, [*rivals, *rivals])
    codes = {end.code for end in ends if isinstance(end, LedgerError)}
    assert len([end for end in ends if isinstance(end, Correction)]) == 2, ends
    assert codes == {"not_on_its_way"}, ends
    assert len(await told(desk)) == 1
    assert await desk.balances(withdrawal) == (0, 0)
    await assert_holds(desk.connection)


# -- what Circle sends ---------------------------------------------------------------------------------------------------


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
        rig.circle.sandbox.state.change(twin.id, state="COMPLETE", tx_hash=tx_hash)
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


async def test_what_circle_is_still_to_be_asked_for_is_ended_by_nobody(rig: Rig) -> None:
    ada = await rig.ask("ada")
    async with rig.deciding():
        await rig.became({"ada": ("broadcasting", None)})
        assert await code_of(asked_of(rig, ada)) == "may_still_be_paid"
    async with rig.worker():
        await rig.became({"ada": ("completed", None)}, step_s=1.0)


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
