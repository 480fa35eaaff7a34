"""Withdrawals in review that two people end, on real Kafka, PostgreSQL and USDC: paid or given back once, and never against a chain."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest

from agents.withdrawals import ended_by_people
from agents.withdrawals.ended_by_people import Outside
from agents.withdrawals.look import ChainWriter
from agents.withdrawals.withdrawal import Attempt, Lane, Withdrawal, lane_row
from chain.outcomes import fates
from chain.rpc import Rpc
from ledger import corrections
from ledger.accounts import SHORTFALL, buffer
from ledger.audit_logs import Wanted, page
from ledger.commit import lock_writer
from ledger.corrections import Correction
from ledger.errors import LedgerError
from ledger.posting import credit, debit
from ledger.record import unpack
from ledger.rows import Connection
from stablerail.dev.fetch import Tools
from stablerail.dev.usdc import calldata
from tests.support import ledger_rig
from tests.support.in_process import until
from tests.support.ledger_rig import assert_holds, connect_to, owner
from tests.support.payouts import CHAIN, DEPTH, FEE_WEI, GAS, Payouts, asked, open_withdrawal, payouts
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
