"""Reorgs before finality on a real node: kind × depth × what the customer did meanwhile. The ledger ends as the chain does."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from agents.withdrawals.withdrawal import Status
from chain.rpc import Rpc
from ledger.accounts import SHORTFALL, custody, pending_withdrawal, spendable
from ledger.rows import Changes
from ledger.tables import CHAIN_CURSORS
from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools
from stablerail.dev.usdc import BATCH_CODE, BATCH_CONSTRUCTOR, Usdc, calldata, deploy
from tests.support import ledger_rig
from tests.support.deposit_rig import DEPTH, USDC, Shore, Till, now, policy
from tests.support.ledger_rig import assert_holds, connect_to, owner
from tests.support.rpc_stub import LyingEndpoint
from topics.catalog import DEPOSITS_FINALIZED, WITHDRAWALS_SETTLED
from topics.envelope import Received
from topics.events import Chain, DepositNotified, Evidence, HeadSeen

databases = ledger_rig.databases

pytestmark = pytest.mark.timeout(120)

PAID = 25 * USDC


@pytest.fixture
async def shore(databases: Callable[[], str], tmp_path: Path, tools: Tools) -> AsyncIterator[Shore]:
    dsn = databases()
    connection = await connect_to(dsn)()
    with Anvil(tmp_path, tools) as anvil:
        usdc: Usdc = await deploy(anvil, tools.contracts)
        async with Rpc(anvil.rpc_url, anvil.chain_id) as rpc:
            yield Shore(Till(connection), anvil, usdc, rpc, dsn=dsn)
    await connection.close()


CUSTOMERS = ("idle", "spent_some", "asked", "signed", "paid_out", "asked_twice_and_spent")


async def _act(shore: Shore, customer: str, user: str) -> None:
    """What a customer does with 25 USDC that are credited and not final."""
    till = shore.till
    if customer == "spent_some":
        await till.spend(user, 10 * USDC)
    elif customer == "asked":
        await till.withdrawal(user, 15 * USDC)
    elif customer == "signed":
        await till.withdrawal(user, 15 * USDC, Status.BROADCASTING)
    elif customer == "paid_out":
        await till.withdrawal(user, PAID, Status.COMPLETED)
    elif customer == "asked_twice_and_spent":
        await till.withdrawal(user, 5 * USDC)
        await till.withdrawal(user, 8 * USDC)
        await till.spend(user, 12 * USDC)


SHORT = {"spent_some": 10, "signed": 15, "paid_out": 25, "asked_twice_and_spent": 12}
"""USDC that the customer has not any more when the deposit is taken back."""
STILL_HELD = {"signed": 15}
LEFT = {"idle": 25, "spent_some": 15, "asked": 10, "signed": 10, "paid_out": 0, "asked_twice_and_spent": 0}
"""Spendable while the deposit stands."""


@pytest.mark.parametrize("depth", range(1, 6))
async def test_a_deposit_that_the_chain_drops_is_taken_back_as_far_as_it_is_there_and_the_rest_is_owed(
    shore: Shore, depth: int
) -> None:
    till = shore.till
    users = {customer: await shore.wallet() for customer in CUSTOMERS}
    _, raw = await shore.pay(*[(address, PAID) for _, address in users.values()])
    if depth > 1:
        await shore.anvil.mine(depth - 1)
    await shore.scan()
    for customer, (user, _) in users.items():
        assert await till.balance(spendable(user)) == PAID
        await _act(shore, customer, user)
    mirror = await till.balance(custody("MATIC"))
    await shore.anvil.rpc("anvil_reorg", depth, [])
    await shore.head(DEPTH - depth + 1)
    assert {status for _, address in users.values() for status in await till.statuses(address)} == {("orphaned", 1)}
    assert till.alerts == {}, "nobody is alarmed before it is sure"
    await shore.head()
    for customer, (user, address) in users.items():
        assert await till.statuses(address) == [("reversed", 1)]
        assert await till.balance(spendable(user)) == 0, customer
        assert await till.balance(pending_withdrawal(user)) == STILL_HELD.get(customer, 0) * USDC
        (end,) = till.said(DEPOSITS_FINALIZED.name, user_id=user)
        short = SHORT.get(customer, 0)
        assert (end["outcome"], end["shortfall"]) == ("reversed", f"{short}.000000" if short else None)
    assert await till.balance(SHORTFALL) == -sum(SHORT.values()) * USDC
    assert till.alerts == {"deposit_shortfall": len(SHORT)}
    assert await till.balance(custody("MATIC")) == mirror
    told = till.said(WITHDRAWALS_SETTLED.name)
    assert sorted((event["user_id"], event["outcome"], event["code"], event["amount"]) for event in told) == sorted(
        (users[customer][0], "cancelled", "deposit_reversed", amount)
        for customer, amount in (
            ("asked", "15.000000"),
            ("asked_twice_and_spent", "8.000000"),
            ("asked_twice_and_spent", "5.000000"),
        )
    )
    await assert_holds(till.connection)

    # the same transaction, mined again
    await shore.anvil.wait_mined(await shore.anvil.rpc("eth_sendRawTransaction", raw))
    await shore.scan()
    await shore.scan()
    for user, address in users.values():
        assert await till.statuses(address) == [("credited", 2)]
        assert await till.balance(spendable(user)) == PAID
    await shore.final()
    for user, address in users.values():
        assert await till.statuses(address) == [("finalized", 2)]
        assert await till.balance(spendable(user)) == PAID
    assert await till.balance(custody("MATIC")) == mirror + PAID * len(users)
    await assert_holds(till.connection)


@pytest.mark.parametrize("depth", range(1, 6))
async def test_a_deposit_that_moves_to_another_block_and_place_among_the_logs_stays_one_credit(
    shore: Shore, depth: int
) -> None:
    till = shore.till
    users = {customer: await shore.wallet() for customer in CUSTOMERS}
    await shore.usdc.mint(shore.usdc.batch, PAID * len(users))
    await shore.anvil.rpc("evm_setAutomine", False)
    tx_hash = await shore.usdc.transfer_many([(address, PAID) for _, address in users.values()])
    await shore.anvil.mine(depth)  # the first block has other logs of the token's before these
    await shore.anvil.rpc("evm_setAutomine", True)
    raw = await shore.anvil.rpc("eth_getRawTransactionByHash", tx_hash)
    await shore.scan()
    for customer, (user, _) in users.items():
        await _act(shore, customer, user)
    before = await till.rows(
        "SELECT block_hash, log_index FROM deposits WHERE tx_hash = $1 ORDER BY log_index", tx_hash
    )
    await shore.anvil.rpc("anvil_reorg", depth, [[raw, depth - 1]])
    receipt = await shore.anvil.wait_mined(tx_hash)
    await shore.final()
    after = await till.rows("SELECT block_hash, log_index FROM deposits WHERE tx_hash = $1 ORDER BY log_index", tx_hash)
    assert {block for block, _ in after} == {receipt["blockHash"]}
    assert before[0][0] != after[0][0]
    assert (before[0][1] > 0, after[0][1]) == (True, 0), "another block, and first in it"
    for customer, (user, address) in users.items():
        assert await till.statuses(address) == [("finalized", 1)]
        assert await till.balance(spendable(user)) == LEFT[customer] * USDC
        assert [end["outcome"] for end in till.said(DEPOSITS_FINALIZED.name, user_id=user)] == ["finalized"]
    assert (await till.balance(SHORTFALL), till.said(WITHDRAWALS_SETTLED.name)) == (0, [])
    await assert_holds(till.connection)


@pytest.mark.parametrize("depth", range(1, 6))
async def test_a_deposit_whose_sender_pays_another_one_instead_is_taken_back_and_the_other_is_credited(
    shore: Shore, depth: int
) -> None:
    till = shore.till
    user, address = await shore.wallet()
    other, elsewhere = await shore.wallet()
    tx_hash = await shore.usdc.transfer(address, PAID)
    await shore.anvil.wait_mined(tx_hash)
    raw = await shore.anvil.rpc("eth_getRawTransactionByHash", tx_hash)
    if depth > 1:
        await shore.anvil.mine(depth - 1)
    await shore.scan()
    await till.withdrawal(user, 20 * USDC)
    await shore.anvil.rpc("anvil_reorg", depth, [])
    await shore.anvil.wait_mined(await shore.usdc.transfer(elsewhere, PAID))  # the same sender's same nonce
    await shore.final()
    assert (await till.statuses(address), await till.statuses(elsewhere)) == ([("reversed", 1)], [("finalized", 1)])
    balances = [
        await till.balance(account(who)) for who in (user, other) for account in (spendable, pending_withdrawal)
    ]
    assert balances == [0, 0, PAID, 0]
    assert await till.balance(custody("MATIC")) == PAID == await shore.usdc.balance_of(elsewhere)
    assert await till.balance(SHORTFALL) == 0
    with pytest.raises(Exception, match="nonce too low"):
        await shore.anvil.rpc("eth_sendRawTransaction", raw)
    await assert_holds(till.connection)


async def _pays_while_it_can(shore: Shore) -> str:
    """A contract as the batch is, that goes on where a transfer is refused: how often it pays depends on what it has."""
    code = BATCH_CODE.format(token=shore.usdc.address[2:].lower())
    refusal, nothing = "600080fd", "5b5b5b5b"
    assert code.count(refusal) == 1
    made = {"from": shore.usdc.owner, "data": f"0x{BATCH_CONSTRUCTOR}{code.replace(refusal, nothing)}"}
    receipt = await shore.anvil.wait_mined(await shore.anvil.rpc("eth_sendTransaction", made))
    return str(receipt["contractAddress"])


async def _twice(shore: Shore, address: str) -> tuple[str, str]:
    """One transaction that pays it twice: its contract, and its raw form. Two blocks: what the contract has, the payments."""
    contract = await _pays_while_it_can(shore)
    await shore.anvil.wait_mined(await shore.usdc.mint(contract, 2 * PAID))
    call = calldata("transfer(address,uint256)", address, PAID)
    paying = {"from": shore.usdc.payer, "to": contract, "data": call + call[2:], "gas": hex(500_000)}
    tx_hash = await shore.anvil.rpc("eth_sendTransaction", paying)
    assert len((await shore.anvil.wait_mined(tx_hash))["logs"]) == 2
    return contract, await shore.anvil.rpc("eth_getRawTransactionByHash", tx_hash)


async def _again(shore: Shore, contract: str, raw: str, times: int) -> str:
    """The same transaction, mined anew, when its contract has enough to pay so often: the block."""
    await shore.anvil.wait_mined(await shore.usdc.mint(contract, times * PAID))
    receipt = await shore.anvil.wait_mined(await shore.anvil.rpc("eth_sendRawTransaction", raw))
    assert len(receipt["logs"]) == times
    return str(receipt["blockHash"])


async def test_a_transaction_that_pays_once_where_it_paid_twice_keeps_one_credit(shore: Shore) -> None:
    till = shore.till
    user, address = await shore.wallet()
    contract, raw = await _twice(shore, address)
    await shore.scan()
    assert await till.balance(spendable(user)) == 2 * PAID
    await shore.anvil.rpc("anvil_reorg", 2, [])
    block = await _again(shore, contract, raw, 1)
    await shore.head(DEPTH)
    assert await till.statuses(address) == [("finalized", 1), ("orphaned", 1)]
    await shore.head()
    assert await till.statuses(address) == [("finalized", 1), ("reversed", 1)]
    assert await till.rows("SELECT DISTINCT block_hash FROM deposits WHERE recipient = $1", address) == [(block,)]
    assert await till.balance(spendable(user)) == PAID == await shore.usdc.balance_of(address)
    ends = sorted(end["outcome"] for end in till.said(DEPOSITS_FINALIZED.name, user_id=user))
    assert ends == ["finalized", "reversed"]
    await assert_holds(till.connection)


async def test_a_transaction_that_pays_once_and_then_twice_again_keeps_both_credits(shore: Shore) -> None:
    till = shore.till
    user, address = await shore.wallet()
    contract, raw = await _twice(shore, address)
    await shore.scan()
    await shore.anvil.rpc("anvil_reorg", 2, [])
    await shore.anvil.mine(DEPTH)
    await _again(shore, contract, raw, 1)
    await shore.head()
    assert await till.statuses(address) == [("credited", 1), ("orphaned", 1)], "only its old block is deep"
    await shore.anvil.rpc("anvil_reorg", 3, [])
    block = await _again(shore, contract, raw, 2)
    await shore.head()
    assert await till.statuses(address) == [("credited", 1)] * 2
    await shore.final()
    assert await till.statuses(address) == [("finalized", 1)] * 2
    assert await till.rows("SELECT DISTINCT block_hash FROM deposits WHERE recipient = $1", address) == [(block,)]
    assert await till.balance(spendable(user)) == 2 * PAID == await shore.usdc.balance_of(address)
    await assert_holds(till.connection)


async def test_of_a_transaction_that_waits_for_finality_what_it_pays_no_more_is_not_credited(shore: Shore) -> None:
    till = shore.till
    shore.use(policy(at_finality=frozenset({"MATIC"})))
    user, address = await shore.wallet()
    contract, raw = await _twice(shore, address)
    await shore.scan()
    assert await till.statuses(address) == [("pending", 0)] * 2
    await shore.anvil.rpc("anvil_reorg", 2, [])
    await _again(shore, contract, raw, 1)
    await shore.final()
    assert await till.statuses(address) == [("finalized", 1), ("pending", 0)]
    await shore.verified()
    await shore.head(DEPTH)
    assert await till.statuses(address) == [("finalized", 1), ("vanished", 0)]
    assert await till.balance(spendable(user)) == PAID == await shore.usdc.balance_of(address)
    await shore.verified()


async def test_a_deposit_that_is_mined_again_while_the_endpoints_are_asked_where_it_was_still_waits(
    shore: Shore,
) -> None:
    till = shore.till
    shore.use(policy(at_finality=frozenset({"MATIC"})))
    user, address = await shore.wallet()
    _, raw = await shore.pay((address, PAID))
    await shore.scan()
    await shore.anvil.rpc("anvil_reorg", 1, [])
    prepare = shore.finalize.prepare

    async def slowly(events: Sequence[Received]) -> Any:
        looks = await prepare(events)
        await shore.anvil.wait_mined(await shore.anvil.rpc("eth_sendRawTransaction", raw))
        await shore.scan()
        return looks

    shore.finalize = replace(shore.finalize, prepare=slowly)
    await shore.head(DEPTH)
    assert await till.statuses(address) == [("pending", 0)]
    shore.use(shore.policy)
    await shore.final()
    assert await till.statuses(address) == [("finalized", 1)]
    assert await till.balance(spendable(user)) == PAID
    await shore.verified()


async def test_a_waiting_deposit_that_was_missed_once_is_credited_where_it_is_mined_again(shore: Shore) -> None:
    """Nobody reads the chain but those who judge: a vendor reported it, and reports nothing more."""
    till = shore.till
    shore.use(policy(at_finality=frozenset({"MATIC"})))
    user, address = await till.wallet()
    tx_hash = await shore.usdc.transfer(address, PAID)
    receipt = await shore.anvil.wait_mined(tx_hash)
    raw = await shore.anvil.rpc("eth_getRawTransactionByHash", tx_hash)
    told = DepositNotified(
        source="circle", transfer_id="w1", chain="MATIC", tx_hash=tx_hash, to=address, asset="USDC", amount=PAID,
        evidence=Evidence.CONFIRMED, block_hash=receipt["blockHash"], block_number=int(receipt["blockNumber"], 16),
    )  # fmt: skip
    await till.settle(shore.credit, told)
    await shore.anvil.rpc("anvil_reorg", 1, [])
    await shore.head(DEPTH)
    assert await till.statuses(address) == [("pending", 0)]
    await shore.verified()
    await shore.anvil.wait_mined(await shore.anvil.rpc("eth_sendRawTransaction", raw))
    await shore.final()
    assert await till.statuses(address) == [("finalized", 1)]
    assert await till.balance(spendable(user)) == PAID
    await shore.verified()


async def _until_waiting(dsn: str) -> None:
    """Until somebody waits for a lock in this database."""
    looker = await owner(dsn)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    try:
        async with asyncio.timeout(100):
            while not await looker.fetchval(waiting):
                await asyncio.sleep(0.01)
    finally:
        await looker.close()


async def _gone(shore: Shore) -> tuple[str, str]:
    """A customer whose deposit is orphaned: the next head takes it back."""
    user, address = await shore.wallet()
    await shore.pay((address, PAID))
    await shore.scan()
    await shore.anvil.rpc("anvil_reorg", 1, [])
    await shore.head(DEPTH)
    assert await shore.till.statuses(address) == [("orphaned", 1)]
    return user, address


async def test_a_reversal_under_the_head_that_judges_money_of_nobody_too(shore: Shore) -> None:
    till = shore.till
    _, address = await _gone(shore)
    nobody = "0x" + secrets.token_hex(20)
    tx_hash = await shore.usdc.transfer(nobody, 9 * USDC)
    await till.settle(
        shore.credit,
        DepositNotified(
            source="circle", transfer_id="w1", chain="MATIC", tx_hash=tx_hash, to=nobody, asset="USDC", amount=9 * USDC,
            evidence=Evidence.CONFIRMED,
        ),
    )  # fmt: skip
    await shore.head()
    assert await till.statuses(address) == [("reversed", 1)]
    await shore.final()
    assert await till.statuses(nobody) == [("parked", 0)]
    await assert_holds(till.connection)


async def test_a_withdrawal_that_is_signed_while_its_deposit_is_taken_back_is_not_cancelled(shore: Shore) -> None:
    till = shore.till
    user, address = await _gone(shore)
    withdrawal = await till.withdrawal(user, 15 * USDC)
    signer = await owner(shore.dsn)
    signing = signer.transaction()
    await signing.start()
    await signer.execute("UPDATE withdrawals SET status = 'broadcasting' WHERE id = $1", withdrawal.id)
    taking = asyncio.create_task(shore.head())
    await _until_waiting(shore.dsn)
    await signing.commit()
    await taking
    await signer.close()
    assert await till.statuses(address) == [("reversed", 1)]
    assert (await till.balance(pending_withdrawal(user)), await till.balance(SHORTFALL)) == (15 * USDC, -15 * USDC)
    assert till.said(WITHDRAWALS_SETTLED.name) == []
    await assert_holds(till.connection)


async def test_a_withdrawal_that_is_accepted_while_its_deposit_is_taken_back_is_cancelled_by_the_next_try(
    shore: Shore,
) -> None:
    till = shore.till
    user, address = await _gone(shore)
    other = await connect_to(shore.dsn)()
    accepting = other.transaction()
    await accepting.start()
    await Till(other).withdrawal(user, 15 * USDC)
    taking = asyncio.create_task(shore.head())
    await _until_waiting(shore.dsn)
    await accepting.commit()
    with pytest.raises(asyncpg.SerializationError):
        await taking
    await shore.head()
    await other.close()
    assert await till.statuses(address) == [("reversed", 1)]
    assert (await till.balance(pending_withdrawal(user)), await till.balance(SHORTFALL)) == (0, 0)
    assert [event["outcome"] for event in till.said(WITHDRAWALS_SETTLED.name)] == ["cancelled"]
    await assert_holds(till.connection)


async def test_an_old_head_that_is_replayed_does_not_shorten_the_time_that_a_missing_deposit_is_given(
    shore: Shore,
) -> None:
    """Credited on Circle's word, and on no chain yet: it is looked for until the depth has passed from now on, not from back then."""
    old = (await shore.rpc.head()).number
    user, address = await shore.wallet()
    circle = DepositNotified(
        source="circle", transfer_id=secrets.token_hex(8), chain="MATIC", tx_hash="0x" + secrets.token_hex(32), to=address,
        asset="USDC", amount=5 * USDC, evidence=Evidence.CONFIRMED,
    )  # fmt: skip
    await shore.anvil.mine(3 * DEPTH)
    await shore.scan()
    changes = Changes()
    changes.upsert(CHAIN_CURSORS, ("MATIC", shore.state.as_json(), now()))
    await shore.till.commit(changes)
    await shore.till.settle(shore.credit, circle)
    block = await shore.rpc.head()
    await shore.till.settle(
        shore.finalize,
        HeadSeen(chain=Chain.MATIC, chain_id=1, number=old, block_hash="0x" + "0" * 64, timestamp_s=block.timestamp_s),
    )
    assert await shore.till.statuses(address) == [("orphaned", 1)]
    await shore.head(1)
    assert await shore.till.statuses(address) == [("orphaned", 1)], "not even a depth ago"
    await shore.head(DEPTH)
    assert await shore.till.statuses(address) == [("reversed", 1)]
    assert await shore.till.balance(spendable(user)) == 0


async def test_what_somebody_placed_far_above_the_head_is_judged_before_the_chain_gets_there(shore: Shore) -> None:
    """An endpoint that lied while it was alone, or a producer's mistake: such a block would never be deep."""
    till = shore.till
    shore.use(policy(instant_max={"MATIC": PAID}))
    true, false = await shore.wallet(), await shore.wallet()
    tx_hash, _ = await shore.pay((true[1], PAID))
    block = await shore.rpc.head()

    def told(address: str, amount: int, **place: Any) -> DepositNotified:
        return DepositNotified(
            source="outside", transfer_id=secrets.token_hex(8), chain="MATIC", to=address, asset="USDC", amount=amount,
            evidence=Evidence.CONFIRMED, block_number=2**63 - 1, **place,
        )  # fmt: skip

    await till.settle(shore.credit, told(true[1], PAID, tx_hash=tx_hash, block_hash=block.hash))
    for amount in (PAID, PAID + 1):  # credited, and waiting for finality
        nowhere = {"tx_hash": "0x" + secrets.token_hex(32), "block_hash": "0x" + secrets.token_hex(32)}
        await till.settle(shore.credit, told(false[1], amount, **nowhere))
    alone = HeadSeen(chain=Chain.MATIC, chain_id=1, number=2**63 - 1, block_hash=block.hash, timestamp_s=2**40 - 1)
    await till.settle(shore.finalize, alone)
    await shore.head()
    await shore.head()
    assert await till.statuses(true[1]) + await till.statuses(false[1]) == [
        ("credited", 1), ("credited", 1), ("pending", 0)
    ], "the endpoint may be catching up"  # fmt: skip
    await shore.anvil.rpc("evm_increaseTime", 700)
    await shore.head()
    await shore.head()
    assert await till.statuses(false[1]) == [("orphaned", 1), ("pending", 0)], "missed, and not for a depth"
    await shore.final()
    assert await till.statuses(true[1]) == [("finalized", 1)]
    assert await till.statuses(false[1]) == [("reversed", 1), ("vanished", 0)]
    assert await till.balance(spendable(false[0])) == 0
    await shore.verified()


async def test_of_a_transaction_with_many_deposits_one_receipt_is_asked_for(shore: Shore) -> None:
    """Whoever pays us a thousand times in one transaction must not have each endpoint send its thousand logs a thousand times."""
    async with (
        LyingEndpoint(shore.anvil.rpc_url) as endpoint,
        Rpc(endpoint.url, shore.anvil.chain_id) as counted,
    ):
        shore.reader = replace(shore.reader, rpcs=(counted, shore.rpc))
        shore.use(shore.policy)
        wallets = [await shore.wallet() for _ in range(20)]
        await shore.pay(*[(address, PAID) for _, address in wallets], (wallets[0][1], PAID), (wallets[1][1], 2 * PAID))
        await shore.head(DEPTH)
    rows = await shore.till.rows("SELECT status, count(*), count(DISTINCT log_index) FROM deposits GROUP BY status")
    assert rows == [("finalized", 22, 22)]
    assert [method for method, _ in endpoint.calls].count("eth_getTransactionReceipt") == 1
    await shore.verified()
