"""What went wrong in the ledgers people use today, each as a test that it does not here.

Each names whose and which. Those about HTTP answers, reading, or rows edited by SQL are tested where that is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest

from ledger.accounts import Account, AccountType, buffer, spendable
from ledger.book import Atomic, Request, Result, post
from ledger.errors import (
    GroupRefused,
    HoldEnded,
    HoldExceeded,
    InsufficientFunds,
    NotReversible,
    PostingRefused,
    ReversalExceeded,
    TransactionReused,
)
from ledger.holds import capture, hold, void
from ledger.posting import Transaction, credit, debit
from ledger.reversals import reversal
from ledger.rows import Connection
from ledger.store import Posted
from tests.support import ledger_rig
from tests.support.ledger_rig import AT, assert_holds, balance, connect_to, differences, dump, owner, unguard

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection

ADA, BOB = spendable("ada"), spendable("bob")
HELD = Account("ada", AccountType.PENDING_WITHDRAWAL)
RACERS = 12


def fund(id: str, amount: int) -> Transaction:
    return Transaction(id * 32, "test", "", (debit(ADA, amount), credit(buffer(), amount)))


def pay(id: str, amount: int) -> Transaction:
    return Transaction(id * 32, "test", "", (debit(BOB, amount), credit(ADA, amount)))


def set_aside(id: str, amount: int) -> Transaction:
    return hold(id * 32, "hold", "", source=ADA, pending=HELD, amount=amount)


def take(id: str, hold_id: str, amount: int) -> Transaction:
    return capture(id, "capture", "", hold_id=hold_id * 32, amount=amount, legs=(debit(buffer(), amount),))


async def say(connection: Connection, *requests: Request) -> list[Result]:
    return (await post(connection, "test", requests, AT)).results


async def race(dsn: str, wishes: Sequence[Transaction]) -> list[Result]:
    """Each on a connection and a writer of its own, at once."""
    connections = [await connect_to(dsn)() for _ in wishes]
    batches = await asyncio.gather(
        *(
            post(each, f"w{number}", [wish], AT)
            for number, (each, wish) in enumerate(zip(connections, wishes, strict=True))
        )
    )
    for each in connections:
        await each.close()
    return [batch.results[0] for batch in batches]


def kinds(results: Sequence[Result]) -> list[Any]:
    return [type(result) for result in results]


async def test_a_lost_answer_is_asked_for_again_without_a_second_payment(connection: Connection) -> None:
    """pgledger #38: there is no idempotency key."""
    await say(connection, fund("1", 50), pay("2", 20))
    again = (await say(connection, pay("2", 20)))[0]
    assert isinstance(again, Posted)
    assert again.existed
    assert await balance(connection, BOB) == 20


async def test_one_id_twice_in_a_batch_is_posted_once(connection: Connection) -> None:
    """Formance stack#1633: the same key twice in one batch crashes it."""
    results = await say(connection, fund("1", 50), pay("2", 20), pay("2", 20))
    assert [result.existed for result in results if isinstance(result, Posted)] == [False, False, True]
    assert await balance(connection, BOB) == 20


async def test_one_id_from_many_connections_at_once_is_posted_once(dsn: str, connection: Connection) -> None:
    await say(connection, fund("1", 50))
    results = await race(dsn, [pay("2", 20)] * RACERS)
    assert sorted(result.existed for result in results if isinstance(result, Posted)) == [False] + [True] * (RACERS - 1)
    assert await balance(connection, BOB) == 20


async def test_an_id_used_for_something_else_is_a_refusal_of_its_own_kind(connection: Connection) -> None:
    """Formance ledger#921: key reuse answers 500. Blnk: the same answer as to a true repeat, in its queue a success."""
    await say(connection, fund("1", 50), pay("2", 20))
    other, same = await say(connection, pay("2", 21), pay("2", 20))
    assert isinstance(other, TransactionReused)
    assert isinstance(same, Posted)
    assert same.existed
    assert await balance(connection, BOB) == 20


async def test_a_hold_captured_by_many_at_once_is_captured_once(dsn: str, connection: Connection) -> None:
    """Blnk #171: two commits of one hold race."""
    await say(connection, fund("1", 50), set_aside("2", 30))
    results = await race(dsn, [take(f"{n:032x}", "2", 30) for n in range(RACERS)])
    assert kinds(results).count(Posted) == 1
    assert kinds(results).count(HoldEnded) == RACERS - 1
    assert await balance(connection, buffer()) == -20
    await assert_holds(connection)


async def test_a_hold_captured_and_voided_at_once_ends_one_way(dsn: str, connection: Connection) -> None:
    await say(connection, fund("1", 50), set_aside("2", 30))
    wishes = [take(f"{n:032x}", "2", 30) for n in range(6)]
    wishes += [void(f"{n:032x}", "void", "", hold_id="2" * 32) for n in range(6, 12)]
    results = await race(dsn, wishes)
    assert kinds(results).count(Posted) == 1
    assert await balance(connection, HELD) == 0
    await assert_holds(connection)


async def test_money_that_is_held_is_not_there_to_be_spent(connection: Connection) -> None:
    """Blnk #181: inflight debits are not counted."""
    await say(connection, fund("1", 50), set_aside("2", 30))
    refusal = (await say(connection, pay("3", 21)))[0]
    assert isinstance(refusal, InsufficientFunds)
    assert (refusal.available, refusal.wanted) == (20, 21)


async def test_a_refund_is_not_repeated_under_another_id(connection: Connection) -> None:
    """Blnk #152: a refund can be repeated."""
    await say(connection, fund("1", 50), pay("2", 20), reversal("3" * 32, "refund", "", of="2" * 32))
    results = await say(connection, *(reversal(id * 32, "refund", "", of="2" * 32) for id in "456"))
    assert kinds(results) == [ReversalExceeded] * 3
    assert await balance(connection, ADA) == 50


async def test_the_second_call_of_a_refund_neither_fails_nor_undoes_it(connection: Connection) -> None:
    """Blnk: the second refund call answers 409 and reverses the refund."""
    refund = reversal("3" * 32, "refund", "", of="2" * 32)
    first = (await say(connection, fund("1", 50), pay("2", 20), refund))[2]
    before = await dump(connection)
    again, undone = await say(connection, refund, reversal("4" * 32, "refund", "", of="3" * 32))
    assert isinstance(first, Posted)
    assert again == first._replace(existed=True)
    assert isinstance(undone, NotReversible)
    assert differences(before, await dump(connection)) == {}


async def test_refunds_of_a_capture_at_once_do_not_exceed_it(dsn: str, connection: Connection) -> None:
    """Hyperswitch #13182: concurrent refunds exceed the capture."""
    await say(connection, fund("1", 50), set_aside("2", 30), take("3" * 32, "2", 20))
    results = await race(dsn, [reversal(f"{n:032x}", "refund", "", of="3" * 32, amount=6) for n in range(RACERS)])
    assert kinds(results).count(Posted) == 3
    assert kinds(results).count(ReversalExceeded) == RACERS - 3
    assert await balance(connection, ADA) == 20 + 18
    await assert_holds(connection)


async def test_captures_in_parts_at_once_do_not_exceed_the_hold(dsn: str, connection: Connection) -> None:
    await say(connection, fund("1", 50), set_aside("2", 30))
    results = await race(dsn, [take(f"{n:032x}", "2", 7) for n in range(RACERS)])
    assert kinds(results).count(Posted) == 4
    assert kinds(results).count(HoldExceeded) == RACERS - 4
    assert await balance(connection, HELD) == 2


async def test_a_group_whose_last_member_fails_leaves_nothing_and_claims_nothing(connection: Connection) -> None:
    """Blnk #183: an atomic bulk leaves effects when a later item fails, and says "refunded" while they are there.
    Formance: it lists undone items as created."""
    await say(connection, fund("1", 50))
    before = await dump(connection)
    results = await say(connection, Atomic((pay("2", 20), set_aside("3", 20), pay("4", 11))))
    assert kinds(results) == [GroupRefused, GroupRefused, InsufficientFunds]
    assert differences(before, await dump(connection)) == {}


async def test_answers_come_in_the_order_of_the_questions(connection: Connection) -> None:
    """Formance: the parallel bulk answers out of order, without an index."""
    wishes = [Transaction(f"{n * 7919 % 1000:032x}", "test", "", fund("1", n % 5).legs) for n in range(200)]
    results = await say(connection, *wishes)
    for wish, result in zip(wishes, results, strict=True):
        assert isinstance(result, PostingRefused) == (wish.legs[0].amount == 0)
        if isinstance(result, Posted):
            assert result.transaction_id == wish.id


async def test_an_overdraft_is_refused_at_once_and_nothing_of_it_waits(connection: Connection) -> None:
    """Blnk's queue: an overdraft is accepted and says QUEUED for ever."""
    before = await dump(connection)
    batch = await post(connection, "test", [pay("1", 5)], AT)
    assert isinstance(batch.results[0], InsufficientFunds)
    assert batch.sealed is None
    assert differences(before, await dump(connection)) == {}


async def test_an_id_that_failed_succeeds_when_the_money_is_there(connection: Connection) -> None:
    """TigerBeetle: a failed id never becomes a success (`id_already_failed`)."""
    results = [*await say(connection, pay("1", 5)), *await say(connection, fund("2", 5), pay("1", 5))]
    assert kinds(results) == [InsufficientFunds, Posted, Posted]


async def test_money_is_whole_units_everywhere(connection: Connection) -> None:
    """Blnk keeps an amount as float beside the precise one."""
    amount = 2**53 + 1
    posted = (await say(connection, fund("1", amount), pay("2", amount)))[1]
    assert isinstance(posted, Posted)
    assert [entry.amount for entry in posted.entries] == [amount, amount]
    assert await balance(connection, BOB) == amount
    floats = await connection.fetchval(
        "SELECT count(*) FROM information_schema.columns"
        " WHERE table_schema = current_schema() AND data_type IN ('real', 'double precision')"
    )
    assert floats == 0


async def test_the_database_itself_holds_what_a_mistake_of_ours_would_break(dsn: str, connection: Connection) -> None:
    await say(
        connection, fund("1", 50), set_aside("2", 30), take("3" * 32, "2", 5), reversal("4" * 32, "r", "", of="3" * 32)
    )
    over = await owner(dsn)  # what binds whoever may do most
    await unguard(over)
    for statement in (
        "UPDATE accounts SET balance = -1 WHERE owner = 'ada'",
        "UPDATE accounts SET closed_at = now() WHERE owner = 'ada' AND balance <> 0",
        "UPDATE holds SET captured = captured + 26", "UPDATE holds SET state = 'voided'",
        "UPDATE holds SET remaining = -1", "UPDATE reversals SET reversed = amount + 1",
        "UPDATE transactions SET hold_id = id WHERE hold_step IS NULL",
    ):  # fmt: skip
        with pytest.raises(asyncpg.CheckViolationError):
            await over.execute(statement)
    await over.close()
