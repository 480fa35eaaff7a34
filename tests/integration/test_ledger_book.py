"""`post`: what a batch answers, on a real PostgreSQL. Repeats, groups, holds, reversals, closed accounts, edges."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from ledger import funds
from ledger.accounts import AMOUNT_MAX, SYSTEM, USD, USDC, Account, AccountType, buffer, spendable
from ledger.book import Atomic, Request, Result, close_account, expire_due, post
from ledger.errors import (
    AccountInUse,
    AmountOutOfRange,
    ClosedAccount,
    GroupRefused,
    HoldEnded,
    HoldExceeded,
    HoldNotDue,
    InsufficientFunds,
    LedgerError,
    LegsOutOfRange,
    NotReversible,
    PostingRefused,
    ReversalExceeded,
    TransactionReused,
    Unbalanced,
    UnknownAccount,
    UnknownHold,
    UnknownTransaction,
    WrongAsset,
)
from ledger.holds import capture, expire, hold, void
from ledger.posting import Leg, Transaction, credit, debit
from ledger.reversals import reversal, reversal_of_parts
from ledger.rows import Connection
from ledger.store import BESIDE_MIN, Posted
from tests.support import ledger_rig
from tests.support.ledger_rig import AT, assert_holds, balance, connect_to, differences, dump, rebuild

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection

ADA, BOB = spendable("ada"), spendable("bob")
HELD = Account("ada", AccountType.PENDING_WITHDRAWAL)
FIAT = Account(SYSTEM, AccountType.SYSTEM_BUFFER_FIAT)


def t(number: int, *legs: Leg, reference: str = "") -> Transaction:
    return Transaction(f"{number:032x}", "test", reference, legs)


def fund(number: int, amount: int, user: Account = ADA) -> Transaction:
    return t(number, debit(user, amount), credit(buffer(), amount))


def pay(number: int, amount: int, *, reference: str = "") -> Transaction:
    return t(number, debit(BOB, amount), credit(ADA, amount), reference=reference)


def set_aside(number: int, amount: int, hours: int | None = None) -> Transaction:
    until = None if hours is None else AT + timedelta(hours=hours)
    return hold(f"{number:032x}", "hold", "w", source=ADA, pending=HELD, amount=amount, expires_at=until)


def take(number: int, hold_number: int, amount: int) -> Transaction:
    legs = (debit(buffer(), amount),)
    return capture(f"{number:032x}", "capture", "w", hold_id=f"{hold_number:032x}", amount=amount, legs=legs)


def give_back(number: int, hold_number: int) -> Transaction:
    return void(f"{number:032x}", "void", "w", hold_id=f"{hold_number:032x}")


def undo(number: int, of: int, amount: int | None = None) -> Transaction:
    return reversal(f"{number:032x}", "reversal", "", of=f"{of:032x}", amount=amount)


async def say(connection: Connection, *requests: Request, hours: int = 0) -> list[Result]:
    return (await post(connection, "test", requests, AT + timedelta(hours=hours))).results


async def posted(connection: Connection, *requests: Request, hours: int = 0) -> list[Posted]:
    results = await say(connection, *requests, hours=hours)
    for result in results:
        assert isinstance(result, Posted), result
    return [result for result in results if isinstance(result, Posted)]


async def refused(
    connection: Connection, request: Request, kind: type[PostingRefused], hours: int = 0, **facts: Any
) -> None:
    """The request's first result is this refusal with these facts, and nothing was written."""
    before = await dump(connection)
    result = (await say(connection, request, hours=hours))[0]
    assert isinstance(result, kind), result
    assert {name: vars(result)[name] for name in facts} == facts
    assert differences(before, await dump(connection)) == {}


async def held(connection: Connection, number: int) -> tuple[Any, ...]:
    row = await connection.fetchrow(
        "SELECT state, remaining::int, captured::int, version FROM holds WHERE id = $1", f"{number:032x}"
    )
    assert row is not None
    return tuple(row)


# -- repeats --------------------------------------------------------------------------------------------------------------


async def test_the_same_id_with_the_same_contents_is_answered_with_the_first_result(connection: Connection) -> None:
    first = await posted(connection, fund(1, 50), pay(2, 20), set_aside(3, 10), take(4, 3, 4), undo(5, 2, 5))
    assert not any(result.existed for result in first)
    assert [(e.version, e.balance_after) for e in first[1].entries] == [(1, 20), (2, 30)]
    await posted(connection, fund(6, 1), hours=1)
    before = await dump(connection)
    again = await posted(connection, pay(2, 20), undo(5, 2, 5), fund(1, 50), take(4, 3, 4), set_aside(3, 10), hours=2)
    by_id = {result.transaction_id: result for result in first}
    assert again == [by_id[result.transaction_id]._replace(existed=True) for result in again]
    assert differences(before, await dump(connection)) == {}


async def test_a_repeat_is_the_first_result_even_when_it_could_not_happen_now(connection: Connection) -> None:
    await posted(connection, fund(1, 50), pay(2, 50), fund(9, 5))
    await posted(connection, set_aside(4, 5), take(5, 4, 5))
    results = await posted(connection, pay(2, 50), set_aside(4, 5), take(5, 4, 5), undo(6, 2), undo(6, 2), hours=1)
    assert [result.existed for result in results] == [True, True, True, False, True]
    assert await balance(connection, ADA) == 50


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("earlier_s", [0, 60])
async def test_rows_drafted_under_the_locks_are_those_that_are_sealed(
    connection: Connection, refused: bool, earlier_s: int
) -> None:
    """A batch that is drafted, one of it refused, or posted at a later time than it was drafted for."""
    await post(connection, "test", [fund(1, 1_000)], AT)
    batch = [pay(100 + number, 1, reference=f"r{number}") for number in range(2 * BESIDE_MIN)]
    if refused:
        batch[BESIDE_MIN] = pay(5, 10**9)
    results = (await post(connection, "test", batch, AT - timedelta(seconds=earlier_s))).results
    assert [isinstance(result, PostingRefused) for result in results] == [one.id == f"{5:032x}" for one in batch]
    expected = {one.id: one.fingerprint() for one in batch if one.id != f"{5:032x}"}
    rows = await connection.fetch(
        "SELECT replace(id::text, '-', ''), replace(fingerprint::text, '-', ''), at FROM transactions WHERE reference <> ''"
    )
    assert {id: fingerprint for id, fingerprint, _ in rows} == expected
    assert {at for *_, at in rows} == {AT}
    await assert_holds(connection)


async def test_the_same_id_with_other_contents_is_refused_with_both_fingerprints(connection: Connection) -> None:
    await posted(connection, fund(1, 50), pay(2, 20))
    for other in (pay(2, 21), pay(2, 20, reference="else"), set_aside(2, 20), undo(2, 1), take(2, 1, 20)):
        facts = {"transaction_id": other.id, "stored": pay(2, 20).fingerprint(), "given": other.fingerprint()}
        await refused(connection, other, TransactionReused, **facts)


async def test_the_same_id_twice_in_a_batch_works_both_ways(connection: Connection) -> None:
    one, two, three, four = await say(connection, fund(1, 50), fund(1, 50), fund(1, 51), pay(2, 20))
    assert isinstance(one, Posted)
    assert not one.existed
    assert two == one._replace(existed=True)
    assert isinstance(three, TransactionReused)
    assert (three.stored, three.given) == (fund(1, 50).fingerprint(), fund(1, 51).fingerprint())
    assert isinstance(four, Posted)
    assert await balance(connection, ADA) == 30
    again = await say(connection, fund(1, 51), fund(1, 50), fund(1, 51))
    assert [type(result) for result in again] == [TransactionReused, Posted, TransactionReused]


async def test_a_refused_id_is_not_used_up(connection: Connection) -> None:
    await refused(connection, pay(2, 20), InsufficientFunds, account=str(ADA), available=0, wanted=20)
    results = await say(connection, pay(2, 20), fund(1, 50), pay(2, 20))
    assert [type(result) for result in results] == [InsufficientFunds, Posted, Posted]
    assert isinstance(results[2], Posted)
    assert not results[2].existed


async def test_a_batch_that_changes_nothing_commits_nothing(connection: Connection) -> None:
    batch = await post(connection, "nobody yet", [pay(2, 20)], AT)
    assert batch.sealed is None
    assert await connection.fetchval("SELECT count(*) FROM owners") == 0
    assert (await post(connection, "test", [], AT)).results == []


# -- groups and neighbours --------------------------------------------------------------------------------------------------


async def test_a_refused_transaction_harms_no_neighbour_and_results_come_in_request_order(
    connection: Connection,
) -> None:
    results = await say(connection, fund(1, 50), pay(2, 51), pay(3, 50), t(4, debit(ADA, 1)), pay(5, 1), fund(6, 7))
    kinds = [Posted, InsufficientFunds, Posted, Unbalanced, InsufficientFunds, Posted]
    assert [type(result) for result in results] == kinds
    assert [r.transaction_id for r in results if isinstance(r, Posted)] == [f"{n:032x}" for n in (1, 3, 6)]


async def test_an_atomic_group_stands_or_falls_together_and_each_member_says_why(connection: Connection) -> None:
    await posted(connection, fund(1, 50))
    group = Atomic((pay(2, 20), set_aside(3, 20), take(4, 3, 5), pay(5, 11), undo(6, 1)))
    results = await say(connection, group, pay(7, 30))
    first, *_, fourth, last, alone = results
    assert [type(r) for r in results[:3]] == [GroupRefused] * 3
    assert isinstance(fourth, InsufficientFunds)
    assert (fourth.available, fourth.wanted) == (10, 11)
    for member in (first, last):
        assert isinstance(member, GroupRefused)
        assert (member.transaction_id, member.cause) == (pay(5, 11).id, fourth)
    assert isinstance(alone, Posted)
    assert await connection.fetchval("SELECT count(*) FROM holds") == 0
    assert await balance(connection, ADA) == 20
    await posted(connection, Atomic((pay(2, 20), fund(3, 20))))
    await assert_holds(connection)


async def test_a_group_that_exists_is_answered_and_one_with_a_used_id_is_refused(connection: Connection) -> None:
    group = Atomic((fund(1, 50), pay(2, 50)))
    await posted(connection, group)
    assert all(result.existed for result in await posted(connection, group, hours=1))
    results = await say(connection, Atomic((fund(3, 5), fund(1, 51), fund(2, 1))))
    assert [type(result) for result in results] == [GroupRefused, TransactionReused, GroupRefused]
    results = await say(connection, Atomic((fund(1, 50), fund(4, 5), fund(4, 5))))
    assert [result.existed for result in results if isinstance(result, Posted)] == [True, False, True]


async def test_the_first_member_of_a_group_that_is_refused_is_the_cause(connection: Connection) -> None:
    await posted(connection, fund(1, 50), pay(2, 20))
    unknown, reused = take(5, 9, 1), pay(2, 21)
    for group, wanted in (
        ((unknown, reused), [UnknownHold, GroupRefused]),
        ((reused, unknown), [TransactionReused, GroupRefused]),
        ((pay(6, 5), reused, unknown), [GroupRefused, TransactionReused, GroupRefused]),
    ):
        results = (await post(connection, "test", [Atomic(group)], AT)).results
        assert [type(result) for result in results] == wanted
    assert await balance(connection, BOB) == 20


# -- refusals carry their facts ---------------------------------------------------------------------------------------------


async def test_each_refusal_says_what_it_saw_and_writes_nothing(connection: Connection) -> None:
    await posted(connection, fund(1, 50))
    await refused(connection, pay(2, 51), InsufficientFunds, account=str(ADA), available=50, wanted=51)
    both = t(2, debit(ADA, 5), credit(FIAT, 5))
    await refused(connection, both, Unbalanced, asset=USDC, difference=5)
    in_usd = Account("ada", AccountType.USDC_BALANCE, asset=USD)
    wrong = t(2, debit(in_usd, 5), credit(FIAT, 5))
    await refused(connection, wrong, WrongAsset, account=str(in_usd), asset=USD)
    for stranger in (
        Account("ada", "savings"), Account("ada", AccountType.SYSTEM_BUFFER_USDC), Account("", AccountType.USDC_BALANCE),
        Account(SYSTEM, AccountType.USDC_BALANCE), Account("ada", AccountType.USDC_BALANCE, shard="1"),
        Account("a\0da", AccountType.USDC_BALANCE),
    ):  # fmt: skip
        await refused(connection, t(2, debit(stranger, 5), credit(buffer(), 5)), UnknownAccount, name=str(stranger))
        rest = credit(stranger, 5, remainder=buffer("1"))
        await refused(connection, t(2, debit(buffer(), 5), rest), UnknownAccount, name=str(stranger))
    for amount in (0, -1, AMOUNT_MAX + 1):
        await refused(connection, fund(2, amount), AmountOutOfRange, amount=amount, limit=AMOUNT_MAX)


async def test_what_moves_nothing_or_in_too_many_steps_is_refused_alone(connection: Connection) -> None:
    many = [debit(ADA, 1) for _ in range(20_000)] + [credit(buffer(), 1) for _ in range(20_000)]
    results = (await post(connection, "api", [t(1), fund(2, 5), t(3, *many)], AT)).results
    assert [type(result) for result in results] == [LegsOutOfRange, Posted, LegsOutOfRange]
    assert await balance(connection, ADA) == 5
    assert isinstance((await post(connection, "api", [t(1)], AT)).results[0], LegsOutOfRange), "asked again"


async def test_several_assets_balance_each_by_itself(connection: Connection) -> None:
    exposure = Account("ada", AccountType.FIAT_EXPOSURE)
    await posted(connection, fund(1, 50))
    legs = (debit(buffer(), 30), debit(exposure, 29), credit(ADA, 30), credit(FIAT, 29))
    await posted(connection, t(2, *legs))
    assert [await balance(connection, account) for account in (ADA, exposure, FIAT)] == [20, 29, -29]
    await assert_holds(connection)


async def test_amounts_at_the_edges_are_kept_to_the_last_unit(connection: Connection) -> None:
    await posted(connection, fund(1, 1), fund(2, 10**30), pay(3, 1))
    assert await balance(connection, ADA) == 10**30
    most = await posted(connection, fund(4, AMOUNT_MAX - 10**30 - 1), hours=1)
    assert most[0].entries[1].balance_after == -AMOUNT_MAX
    await refused(connection, fund(5, 1), AmountOutOfRange, amount=-AMOUNT_MAX - 1, limit=AMOUNT_MAX)
    other = t(5, debit(ADA, 2), credit(buffer("1"), 2))
    await refused(connection, other, AmountOutOfRange, amount=AMOUNT_MAX + 1, limit=AMOUNT_MAX)
    await posted(connection, pay(6, AMOUNT_MAX - 1))
    assert await balance(connection, BOB) == AMOUNT_MAX
    await assert_holds(connection)


@pytest.mark.parametrize("id", ["", "1" * 31, "g" * 32, "A" * 32])
async def test_what_is_no_id_is_told_before_anything_is_read(connection: Connection, id: str) -> None:
    with pytest.raises(ValueError, match="no transaction id"):
        await say(connection, fund(1, 5), fund(2, 5)._replace(id=id))
    for about in (void("1" * 32, "void", "", hold_id=id), reversal("1" * 32, "reversal", "", of=id)):
        with pytest.raises(ValueError, match="no transaction id"):
            await say(connection, fund(1, 5), about)
    with pytest.raises(ValueError, match="NUL"):
        await say(connection, fund(1, 5), fund(2, 5)._replace(reference="a\0"))
    assert await connection.fetchval("SELECT count(*) FROM transactions") == 0


async def test_what_commits_by_itself_does_nothing_within_anothers_transaction(connection: Connection) -> None:
    """The relay would take a record that it does not see yet for one that another has journaled."""
    await posted(connection, fund(1, 5))
    for act in (
        lambda: post(connection, "w", [fund(2, 5)], AT),
        lambda: close_account(connection, "w", BOB, AT, actor="ann", reason="gone"),
        lambda: funds.release(connection, "w", AT, order_id="o1"),
    ):
        async with connection.transaction():
            with pytest.raises(ValueError, match="must not be in a transaction"):
                await act()
    assert await connection.fetchval("SELECT count(*) FROM transactions") == 1


# -- holds ------------------------------------------------------------------------------------------------------------------


async def test_a_hold_is_captured_in_parts_and_posted_when_nothing_remains(connection: Connection) -> None:
    await posted(connection, fund(1, 50), set_aside(2, 30))
    assert (await balance(connection, ADA), await balance(connection, HELD)) == (20, 30)
    await posted(connection, take(3, 2, 10), take(4, 2, 5))
    assert await held(connection, 2) == ("open", 15, 15, 3)
    await refused(connection, take(5, 2, 16), HoldExceeded, hold_id=f"{2:032x}", remaining=15, wanted=16)
    await posted(connection, take(5, 2, 15), hours=1)
    assert await held(connection, 2) == ("posted", 0, 30, 4)
    assert (await balance(connection, ADA), await balance(connection, HELD)) == (20, 0)
    ended = {"state": "posted", "ended_at": AT + timedelta(hours=1)}
    await refused(connection, take(6, 2, 1), HoldEnded, **ended)
    await refused(connection, give_back(6, 2), HoldEnded, **ended)
    await refused(connection, take(6, 99, 1), UnknownHold, hold_id=f"{99:032x}")
    await assert_holds(connection)


async def test_the_last_capture_gives_the_rest_back_in_one_group(connection: Connection) -> None:
    await posted(connection, fund(1, 50), set_aside(2, 30), Atomic((take(3, 2, 12), give_back(4, 2))))
    assert await held(connection, 2) == ("posted", 0, 12, 3)
    assert (await balance(connection, ADA), await balance(connection, HELD)) == (38, 0)


async def test_a_void_gives_back_what_remains(connection: Connection) -> None:
    await posted(connection, fund(1, 50), set_aside(2, 30), give_back(3, 2))
    assert await held(connection, 2) == ("voided", 0, 0, 2)
    assert await balance(connection, ADA) == 50
    await refused(connection, take(4, 2, 1), HoldEnded, state="voided", ended_at=AT)


async def test_holds_whose_time_has_come_are_given_back_once(connection: Connection) -> None:
    await posted(
        connection, fund(1, 90), set_aside(2, 10, 1), set_aside(3, 10, 2), set_aside(4, 10, 3), set_aside(5, 10)
    )
    await posted(connection, take(6, 3, 4))
    early = expire(f"{4:032x}", "hold_expired", "w")
    await refused(connection, early, HoldNotDue, hours=2, expires_at=AT + timedelta(hours=3))
    await refused(connection, expire(f"{5:032x}", "hold_expired", "w"), HoldNotDue, hours=9, expires_at=None)
    # from its time on it is not captured, posted or not
    await refused(connection, take(7, 3, 1), HoldEnded, hours=2, state="expired", ended_at=AT + timedelta(hours=2))
    first = await expire_due(connection, "sweeper", AT + timedelta(hours=2), holds_max=1)
    second = await expire_due(connection, "sweeper", AT + timedelta(hours=2))
    assert [len(batch.results) for batch in (first, second)] == [1, 1]
    assert [await held(connection, n) for n in (2, 3)] == [("expired", 0, 0, 2), ("expired", 0, 4, 3)]
    assert [(await held(connection, n))[0] for n in (4, 5)] == ["open", "open"]
    assert (await expire_due(connection, "sweeper", AT + timedelta(hours=2))).sealed is None
    again = await posted(connection, expire(f"{2:032x}", "hold_expired", "w"), hours=3)
    assert again[0].existed
    assert await balance(connection, ADA) == 90 - 4 - 20
    await assert_holds(connection)


# -- reversals --------------------------------------------------------------------------------------------------------------


async def test_a_reversal_undoes_a_transaction_in_whole_or_parts_and_never_more(connection: Connection) -> None:
    await posted(connection, fund(1, 50), pay(2, 20), fund(9, 100, BOB))
    await posted(connection, undo(3, 2, 5), undo(4, 2, 6))
    await refused(connection, undo(5, 2, 10), ReversalExceeded, seq=0, left=9, wanted=10)
    await posted(connection, undo(5, 2), hours=1)
    assert await balance(connection, ADA) == 50
    await refused(connection, undo(6, 2), ReversalExceeded, seq=None)
    await refused(connection, undo(6, 2, 1), ReversalExceeded, left=0, wanted=1)
    await refused(connection, undo(6, 77), UnknownTransaction, transaction_id=f"{77:032x}")
    marks = await connection.fetch(
        "SELECT replace(reverses::text, '-', '') FROM transactions WHERE reverses IS NOT NULL"
    )
    assert [row[0] for row in marks] == [f"{2:032x}"] * 3
    await assert_holds(connection)


async def test_parts_of_a_transaction_of_many_legs_are_reversed_by_their_numbers(connection: Connection) -> None:
    await posted(connection, t(1, debit(ADA, 7), debit(BOB, 5), credit(buffer(), 12)))
    parts = reversal_of_parts(f"{2:032x}", "reversal", "", of=f"{1:032x}", parts=((1, 3), (2, 3)))
    await posted(connection, parts)
    lopsided = reversal_of_parts(f"{3:032x}", "reversal", "", of=f"{1:032x}", parts=((0, 3), (2, 4)))
    await refused(connection, lopsided, Unbalanced, asset=USDC, difference=1)
    for part in ((9, 1), (0, 8)):
        wrong = reversal_of_parts(f"{3:032x}", "reversal", "", of=f"{1:032x}", parts=(part, (2, 1)))
        await refused(connection, wrong, ReversalExceeded, seq=part[0], wanted=part[1])
    nothing = reversal_of_parts(f"{3:032x}", "reversal", "", of=f"{1:032x}", parts=((0, 0), (2, 0)))
    await refused(connection, nothing, AmountOutOfRange, amount=0)
    await posted(connection, undo(3, 1))
    assert [await balance(connection, account) for account in (ADA, BOB, buffer())] == [0, 0, 0]


async def test_what_was_spent_since_cannot_be_reversed(connection: Connection) -> None:
    await posted(connection, fund(1, 50), pay(2, 20))
    await refused(connection, undo(3, 1), InsufficientFunds, account=str(ADA), available=30, wanted=50)


async def test_neither_a_reversal_nor_a_holds_opening_or_release_is_reversed(connection: Connection) -> None:
    await posted(connection, fund(1, 50), pay(2, 20), undo(3, 2, 5), set_aside(4, 10), set_aside(5, 3), give_back(6, 5))
    for of, why in ((3, "a reversal"), (4, "a hold's open"), (6, "a hold's void")):
        await refused(connection, undo(7, of), NotReversible, transaction_id=f"{of:032x}", why=why)
    one, two, three = await say(connection, fund(8, 1), undo(9, 8, 1), undo(10, 9))
    assert [type(result) for result in (one, two, three)] == [Posted, Posted, NotReversible]


@pytest.mark.parametrize("together", [False, True])
async def test_a_refunded_capture_goes_back_to_where_the_hold_took_it_from(
    connection: Connection, together: bool
) -> None:
    story = [fund(1, 50), set_aside(2, 30), take(3, 2, 20), undo(4, 3, 8), undo(5, 3)]
    for requests in [story] if together else [[request] for request in story]:
        await posted(connection, *requests)
    assert (await balance(connection, ADA), await balance(connection, HELD)) == (40, 10)
    assert await held(connection, 2) == ("open", 10, 20, 2)
    await refused(connection, undo(6, 3, 1), ReversalExceeded, left=0)
    await assert_holds(connection)


# -- closed accounts --------------------------------------------------------------------------------------------------------


async def test_a_closed_account_takes_no_posting(connection: Connection) -> None:
    await posted(connection, fund(1, 50), pay(2, 50), fund(3, 10), set_aside(4, 10, 1))

    async def close(account: Account, hours: int = 0) -> Any:
        at = AT + timedelta(hours=hours)
        return await close_account(connection, "people", account, at, actor="ops", reason="asked for")

    for account, money, holds in ((BOB, 50, 0), (ADA, 0, 1)):
        with pytest.raises(AccountInUse) as used:
            await close(account)
        assert (used.value.balance, used.value.holds) == (money, holds)
    with pytest.raises(UnknownAccount):
        await close(spendable("nobody"))
    await posted(connection, take(5, 4, 10))
    closed_at, sealed = await close(ADA, hours=2)
    assert (closed_at, sealed is not None) == (AT + timedelta(hours=2), True)
    assert await close(ADA, hours=3) == (closed_at, None)
    await refused(connection, fund(6, 5), ClosedAccount, account=str(ADA), closed_at=closed_at)
    await refused(connection, set_aside(6, 5), ClosedAccount, account=str(ADA))
    await refused(connection, undo(6, 5), ClosedAccount, account=str(ADA))
    rest = credit(ADA, 5, remainder=BOB)
    assert (await posted(connection, t(7, debit(buffer(), 5), rest), hours=4))[0].entries[1].account_id == BOB.id
    who, what = await connection.fetchrow("SELECT actor, summary FROM audit WHERE stage = 'people'") or ("", "")
    assert (who, str(ADA) in what, "asked for" in what) == ("ops", True, True)
    await assert_holds(connection)


# -- the journal ------------------------------------------------------------------------------------------------------------


async def test_holds_reversals_and_closed_accounts_are_the_same_in_a_database_made_from_the_journal(
    connection: Connection, databases: Callable[[], str]
) -> None:
    sealed = []
    for requests in (
        [fund(1, 50), set_aside(2, 20, 1), set_aside(3, 5), take(4, 2, 5), fund(5, 5, BOB)],
        [undo(6, 4, 2), give_back(7, 3), undo(8, 1, 3)],
        [undo(9, 4), undo(10, 5)],
    ):
        sealed.append((await post(connection, "test", requests, AT)).sealed)
    sealed.append((await expire_due(connection, "test", AT + timedelta(hours=1))).sealed)
    sealed.append((await close_account(connection, "test", BOB, AT, actor="ops", reason=""))[1])
    other: Connection = await connect_to(databases())()
    await rebuild(other, [(one.seq, one.record) for one in sealed if one])
    assert differences(await dump(other), await dump(connection)) == {}
    await assert_holds(other)
    await other.close()


def test_every_refusal_has_a_code_of_its_own() -> None:
    def below(kind: type[LedgerError]) -> list[type[LedgerError]]:
        return [kind, *(found for each in kind.__subclasses__() for found in below(each))]

    codes = [kind.code for kind in below(LedgerError)]
    assert len(set(codes)) == len(codes)
