"""When a deposit is credited, and what becomes of one that nobody may have: real PostgreSQL, a real chain, the stages themselves."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agents.deposits.policy import outstanding_of
from chain.rpc import Rpc
from ledger import corrections
from ledger.accounts import SUSPENSE, buffer, custody, spendable
from ledger.book import close_account
from ledger.commit import OVERTAKEN
from ledger.rows import Changes
from ledger.tables import LANES
from stablerail import denied
from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools
from stablerail.dev.usdc import deploy
from tests.support import ledger_rig
from tests.support.deposit_rig import USDC, Shore, Till, now, policy
from tests.support.ledger_rig import connect_to
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_FINALIZED, DEPOSITS_PARKED
from topics.events import DepositNotified

databases, dsn = ledger_rig.databases, ledger_rig.dsn

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
async def shore(dsn: str, tmp_path: Path, tools: Tools) -> AsyncIterator[Shore]:
    connection = await connect_to(dsn)()
    with Anvil(tmp_path, tools) as anvil:
        usdc = await deploy(anvil, tools.contracts)
        async with Rpc(anvil.rpc_url, anvil.chain_id) as rpc:
            yield Shore(Till(connection), anvil, usdc, rpc, dsn=dsn)
    await connection.close()


def told(address: str, amount: int, **fields: Any) -> DepositNotified:
    """Somebody's word for a transfer."""
    body = {
        "source": "circle", "transfer_id": secrets.token_hex(8), "chain": "MATIC", "tx_hash": "0x" + secrets.token_hex(32),
        "to": address, "asset": "USDC", "amount": amount, "evidence": "confirmed",
    }  # fmt: skip
    return DepositNotified.model_validate({**body, **fields})


async def held(till: Till, address: str) -> list[tuple[str, str | None]]:
    return await till.rows("SELECT status, held FROM deposits WHERE recipient = $1 ORDER BY amount, n", address)


async def counter(till: Till, user: str) -> int | None:
    rows = await till.rows("SELECT value::bigint FROM counters WHERE name = $1", outstanding_of(user))
    return rows[0][0] if rows else None


async def mirrored(shore: Shore) -> None:
    """What our wallets hold is what the mirror says, all of it being final."""
    on_chain = [await shore.usdc.balance_of(address) for address in shore.watched]
    assert await shore.till.balance(custody("MATIC")) == sum(on_chain)
    await shore.verified()


# -- limits -----------------------------------------------------------------------------------------------------------


async def test_what_is_above_a_limit_waits_and_is_credited_with_its_mirror_at_finality(shore: Shore) -> None:
    till = shore.till
    shore.use(policy(instant_max={"MATIC": 20 * USDC}, outstanding_max={"MATIC": 30 * USDC}))
    user, address = await shore.wallet()
    await shore.pay((address, 14 * USDC), (address, 15 * USDC), (address, 16 * USDC), (address, 25 * USDC))
    await shore.scan()
    assert await held(till, address) == [
        ("credited", None), ("credited", None), ("pending", "above_outstanding_limit"), ("pending", "above_instant_limit"),
    ]  # fmt: skip
    assert (await till.balance(spendable(user)), await counter(till, user)) == (29 * USDC, 29 * USDC)
    assert len(till.said(DEPOSITS_CREDITED.name)) == 2
    commits = await till.rows("SELECT max(batch) FROM transactions")
    await shore.final()
    assert {status for status, _ in await held(till, address)} == {"finalized"}
    assert (await till.balance(spendable(user)), await counter(till, user)) == (70 * USDC, 0)
    assert len(till.said(DEPOSITS_CREDITED.name)) == len(till.said(DEPOSITS_FINALIZED.name)) == 4
    after = await till.rows("SELECT count(DISTINCT batch), count(*) FROM transactions WHERE batch > $1", commits[0][0])
    assert after == [(1, 6)], "four mirrors and two credits in one commit"
    await shore.pay((address, 16 * USDC))
    await shore.scan()
    assert (await held(till, address))[2:4] == [("finalized", "above_outstanding_limit"), ("credited", None)], (
        "room again"
    )
    await shore.final()
    await mirrored(shore)


async def test_on_a_chain_of_finality_first_nothing_is_credited_before_it(shore: Shore) -> None:
    till = shore.till
    shore.use(policy(at_finality=frozenset({"MATIC"})))
    user, address = await shore.wallet()
    tx_hash, _ = await shore.pay((address, 5 * USDC), (address, 5 * USDC))
    await shore.scan()
    assert await held(till, address) == [("pending", "at_finality")] * 2
    event = told(address, 5 * USDC, tx_hash=tx_hash, evidence="complete")
    await till.settle(shore.credit, event)  # a vendor's last word changes nothing on a chain that we read
    assert await till.balance(spendable(user)) == 0
    await shore.anvil.rpc("anvil_reorg", 1, [])
    await shore.final()
    assert [status for status, _ in await held(till, address)] == ["pending"] * 2, "missed once"
    await shore.verified()
    await shore.final()
    assert [status for status, _ in await held(till, address)] == ["vanished"] * 2
    assert till.said(DEPOSITS_FINALIZED.name) == []
    await shore.verified()


async def test_a_bound_that_comes_and_goes_leaves_the_counter_right(shore: Shore) -> None:
    till = shore.till
    user, address = await shore.wallet()
    bounded, free = policy(outstanding_max={"MATIC": 10 * USDC}), policy()
    raws = []
    for number, one in enumerate((free, bounded, free, bounded, bounded)):
        shore.use(one)
        raws.append((await shore.pay((address, (4 + number) * USDC)))[1])
        await shore.scan()
    # 4 free, 5 counted, 6 free, 7 too much, 8 too much
    assert [status for status, _ in await held(till, address)] == ["credited"] * 3 + ["pending"] * 2
    assert await counter(till, user) == 5 * USDC
    shore.use(free)
    await shore.anvil.rpc("anvil_reorg", 10, [[raw, 9] for raw in raws if raw is not raws[1]])
    await shore.final()
    shore.use(bounded)
    await shore.final()
    assert await counter(till, user) == 0
    await shore.verified()


async def test_without_a_bound_no_counter_is_touched(shore: Shore) -> None:
    user, address = await shore.wallet()
    await shore.pay((address, 5 * USDC))
    await shore.scan()
    await shore.final()
    assert await counter(shore.till, user) is None


async def test_two_workers_together_credit_no_more_than_the_bound(shore: Shore, dsn: str) -> None:
    """Deposits of one customer on two partitions at once; the first of them make the counter, both at the same moment."""
    shore.use(policy(outstanding_max={"MATIC": 50 * USDC}))
    user, address = await shore.wallet()
    connections = [await connect_to(dsn)() for _ in range(2)]
    tills = [Till(connection) for connection in connections]
    again: list[DepositNotified] = []

    async def work(partition: int) -> None:
        till = tills[partition]
        for _ in range(10):
            event = told(address, 10 * USDC)
            while True:
                try:
                    done = await till.settle(shore.credit, event, partition=partition)
                    break
                except OVERTAKEN:
                    pass
            again.extend([event] if any(kind == "retry" for kind, _ in done.outcomes) else [])

    await asyncio.gather(work(0), work(1))
    for event in again:
        await tills[0].settle(shore.credit, event, attempt=2)
    found = await held(shore.till, address)
    assert (found.count(("credited", None)), len(found)) == (5, 20)
    assert await shore.till.balance(spendable(user)) == await counter(shore.till, user) == 50 * USDC
    await shore.verified()
    for connection in connections:
        await connection.close()


# -- what nobody is credited for --------------------------------------------------------------------------------------


async def test_dust_is_kept_in_suspense_with_its_mirror_and_no_dead_letter(shore: Shore) -> None:
    till = shore.till
    user, address = await shore.wallet()
    await shore.pay((address, 1), (address, USDC - 1), (address, 2 * USDC), (address, 1))
    settled = await shore.scan()
    assert settled is not None
    assert settled.outcomes == {("done", ""): 4, ("repeat", ""): 0}
    assert await held(till, address) == [("pending", "below_minimum")] * 3 + [("credited", None)]
    before = await till.balance(buffer())
    await shore.anvil.mine(6)
    await shore.verified()  # it is final, and no head has judged it yet
    await shore.final()
    assert await held(till, address) == [("parked", "below_minimum")] * 3 + [("finalized", None)]
    assert (await till.balance(spendable(user)), await till.balance(SUSPENSE)) == (2 * USDC, USDC + 1)
    assert await till.balance(buffer()) == before - USDC - 1
    assert sorted(event["amount"] for event in till.said(DEPOSITS_PARKED.name, user_id=user, reason="below_minimum")) == [
        "0.000001", "0.000001", "0.999999",
    ]  # fmt: skip
    assert till.alerts == {}, "whoever sends dust alarms nobody"
    await shore.final()
    await mirrored(shore)


async def test_what_a_denied_address_sends_is_kept_in_suspense_and_people_are_told(shore: Shore) -> None:
    till = shore.till
    user, address = await shore.wallet()
    assert await denied.add(till.connection, "MATIC", shore.usdc.batch, "sanctioned", "ann", now())
    await shore.pay((address, 30 * USDC))
    await shore.scan()
    # another's report does not know the sender
    (tx_hash,) = (await till.rows("SELECT tx_hash FROM deposits WHERE recipient = $1", address))[0]
    await till.settle(shore.credit, told(address, 30 * USDC, tx_hash=tx_hash, source="partner"))
    assert await held(till, address) == [("pending", "denied")]
    assert till.alerts == {"deposit_denied": 1}
    await shore.final()
    assert await held(till, address) == [("parked", "denied")]
    assert (await till.balance(spendable(user)), await till.balance(SUSPENSE)) == (0, 30 * USDC)
    (event,) = till.said(DEPOSITS_PARKED.name)
    assert (event["reason"], event["sender"], event["user_id"]) == ("denied", shore.usdc.batch.lower(), user)
    assert till.alerts == {"deposit_denied": 1}
    await mirrored(shore)


async def test_who_is_denied_is_asked_again_at_finality(shore: Shore) -> None:
    till = shore.till
    user, address = await shore.wallet()
    await denied.add(till.connection, "MATIC", shore.usdc.batch, "by mistake", "ann", now())
    await shore.pay((address, 30 * USDC))
    await shore.scan()
    assert await denied.remove(till.connection, "MATIC", shore.usdc.batch, "another one of that name", "bob", now())
    shore.use(policy(at_finality=frozenset({"MATIC"})))
    other, elsewhere = await shore.wallet()
    await shore.usdc.transfer(elsewhere, 7 * USDC)
    await shore.scan()
    await denied.add(till.connection, "MATIC", shore.usdc.payer, "sanctioned", "ann", now())
    await shore.final()
    assert await held(till, address) == [("finalized", "denied")]
    assert await held(till, elsewhere) == [("parked", "denied")]
    assert (await till.balance(spendable(user)), await till.balance(spendable(other))) == (30 * USDC, 0)
    await mirrored(shore)


async def test_a_credit_whose_sender_turns_out_to_be_denied_stays_and_people_are_told(shore: Shore) -> None:
    till = shore.till
    user, address = await shore.wallet()
    await denied.add(till.connection, "MATIC", shore.usdc.payer, "sanctioned", "ann", now())
    tx_hash = await shore.usdc.transfer(address, 30 * USDC)
    await till.settle(shore.credit, told(address, 30 * USDC, tx_hash=tx_hash))
    await shore.scan()
    await shore.scan()
    assert await held(till, address) == [("credited", None)]
    assert till.alerts == {"deposit_denied_after_credit": 1}
    await shore.final()
    assert await till.balance(spendable(user)) == 30 * USDC
    await mirrored(shore)


async def test_a_wallet_that_is_known_a_minute_later_gets_what_came_before(shore: Shore) -> None:
    till = shore.till
    address, never = "0x" + secrets.token_hex(20), "0x" + secrets.token_hex(20)
    hashes = [await shore.usdc.transfer(to, 9 * USDC) for to in (address, never)]
    await till.settle(
        shore.credit,
        *[told(to, 9 * USDC, tx_hash=tx_hash) for to, tx_hash in zip((address, never), hashes, strict=True)],
        told(address, 9 * USDC, tx_hash=hashes[0], source="partner"),
    )
    assert await held(till, address) == await held(till, never) == [("pending", "unknown_owner")]
    user, _ = await till.wallet(address=address)
    shore.watched |= {address, never}
    await shore.final()
    assert await till.statuses(address) == [("finalized", 1)]
    assert await held(till, never) == [("parked", "unknown_owner")]
    assert till.alerts == {"deposit_of_unknown_owner": 1}
    assert (await till.balance(spendable(user)), await till.balance(SUSPENSE)) == (9 * USDC, 9 * USDC)
    await mirrored(shore)
    # its owner is found
    found, _ = await till.wallet(address=never)
    asked = await corrections.assign_suspense(till.connection, "a" * 32, found, 9 * USDC, "mail", "ann", now())
    await corrections.approve(till.connection, asked.id, "bob", now())
    assert (await till.balance(spendable(found)), await till.balance(SUSPENSE)) == (9 * USDC, 0)
    await mirrored(shore)


async def test_what_a_signer_of_ours_is_sent_is_in_suspense_unless_it_comes_from_a_wallet_of_ours(shore: Shore) -> None:
    till = shore.till
    signer = "0x" + secrets.token_hex(20)
    changes = Changes()
    changes.insert(LANES, ("MATIC", signer, 0, 0, "open", "", 1, now()))
    await till.commit(changes)
    shore.watched.add(signer)
    _, address = await shore.wallet()
    await shore.pay((signer, 40 * USDC), (address, 10 * USDC))
    await shore.scan()
    await shore.anvil.mine(6)
    await shore.verified()
    await shore.final()
    await shore.usdc.transfer(signer, 10 * USDC, sender=address)
    await shore.scan()
    await shore.final()
    assert await held(till, signer) == [("parked", "unknown_owner")]
    assert await till.balance(SUSPENSE) == 40 * USDC
    await mirrored(shore)


async def test_a_deposit_to_a_closed_account_is_kept_in_suspense(shore: Shore) -> None:
    till = shore.till
    user, address = await shore.wallet()
    await shore.pay((address, 5 * USDC))
    await shore.scan()
    await till.spend(user, 5 * USDC)
    await close_account(till.connection, "test.close", spendable(user), now(), actor="ann", reason="gone")
    tx_hash = await shore.usdc.transfer(address, 7 * USDC)
    event = told(address, 7 * USDC, tx_hash=tx_hash)
    settled = await till.settle(shore.credit, event)
    assert settled.outcomes == {("retry", "closed_account"): 1, ("repeat", ""): 0}
    await till.settle(shore.credit, event, attempt=2)
    assert await held(till, address) == [("credited", None), ("pending", "account_closed")]
    await shore.final()
    assert await held(till, address) == [("finalized", None), ("parked", "account_closed")]
    assert await till.balance(SUSPENSE) == 7 * USDC
    await mirrored(shore)


async def test_an_equal_transfer_that_only_a_vendor_counts_is_credited_when_the_receipt_shows_it_and_else_vanishes(
    shore: Shore,
) -> None:
    """Our own reader has seen neither: it began later."""
    till = shore.till
    user, address = await till.wallet()
    twice, _ = await shore.pay((address, 5 * USDC), (address, 5 * USDC))
    once = await shore.usdc.transfer(address, 8 * USDC)
    reports = [
        told(address, amount * USDC, tx_hash=tx) for tx, amount in ((twice, 5), (twice, 5), (once, 8), (once, 8))
    ]
    await till.settle(shore.credit, *reports)
    assert await held(till, address) == [("credited", None), ("pending", "unproven")] * 2
    await shore.final()
    await shore.head(7)  # nobody named a block: the depth counts from the first look
    await shore.head()
    assert [status for status, _ in await held(till, address)] == ["finalized"] * 3 + ["vanished"]
    assert await till.balance(spendable(user)) == 18 * USDC
    shore.watched.add(address)
    await mirrored(shore)


async def test_what_is_far_below_the_final_block_and_not_judged_is_late(shore: Shore) -> None:
    _, address = await shore.wallet()
    await shore.pay((address, 5 * USDC), (address, 1))
    await shore.scan()
    await shore.anvil.mine(150)
    with pytest.raises(AssertionError, match="2 deposits are 100 blocks below the final one and not judged"):
        await shore.verified()
    await shore.head()
    await mirrored(shore)
