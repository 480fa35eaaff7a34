"""The fold of postings, on any transactions over any accounts: zero sums, floors, lines that prove themselves."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.accounts import (
    AMOUNT_MAX,
    COIN,
    CUSTOMERS,
    OUT_OF_REACH,
    SHORTFALL,
    USD,
    USDC,
    Account,
    AccountType,
    buffer,
    custody,
    may_own,
    shard_of,
    spendable,
)  # fmt: skip
from ledger.accounts import SYSTEM as SYSTEM_OWNER
from ledger.errors import AmountOutOfRange, InsufficientFunds, PostingRefused, Unbalanced
from ledger.groups import try_post
from ledger.posting import Balance, Entry, Fold, Leg, Transaction, accounts_of, credit, debit
from topics.partitioner import partition_of

USERS = tuple(spendable(name) for name in ("ada", "bob", "cyd"))
SYSTEM = (buffer(), buffer("1"), custody("MATIC"), SHORTFALL)
OTHER_ASSET = Account(SYSTEM_OWNER, AccountType.SYSTEM_BUFFER_FIAT)
AT = datetime(2026, 7, 1, 12, tzinfo=UTC)

accounts = st.sampled_from((*USERS, *SYSTEM))
amounts = st.integers(1, 50)


@st.composite
def legs(draw: st.DrawFn) -> tuple[Leg, ...]:
    """Mostly pairs that balance, with or without a remainder; now and then legs that do not."""
    found: list[Leg] = []
    for _ in range(draw(st.integers(1, 3))):
        amount = draw(amounts)
        remainder = draw(st.sampled_from((None, None, SHORTFALL, buffer("1"), *USERS)))
        found += [debit(draw(accounts), amount), credit(draw(accounts), amount, remainder=remainder)]
    if draw(st.integers(0, 9)) == 0:
        found.append(draw(st.builds(Leg, accounts, st.sampled_from("dc"), st.integers(-2, 5), st.none())))
    return tuple(draw(st.permutations(found)))


@st.composite
def groups(draw: st.DrawFn) -> list[list[Transaction]]:
    """The postings of consecutive events, one to three each."""
    number = 0
    found = []
    for _ in range(draw(st.integers(1, 8))):
        group = []
        for _ in range(draw(st.integers(1, 3))):
            number += 1
            group.append(Transaction(f"{number:032x}", "test", str(number), draw(legs())))
        found.append(group)
    return found


def empty(transactions: Iterable[Transaction]) -> Fold:
    return Fold({account: Balance() for account in accounts_of(transactions)}, AT)


def state(fold: Fold) -> object:
    balances = {account: (b.balance, b.version) for account, b in fold.balances.items()}
    return balances, list(fold.transactions), list(fold.entries), set(fold.touched)


def lines(fold: Fold) -> list[Entry]:
    return [Entry(*row) for row in fold.entries]


def proved(fold: Fold) -> dict[str, tuple[int, int]]:
    """Each account as its lines tell it, every line checked against the one before."""
    told: dict[str, tuple[int, int]] = {}
    for entry in lines(fold):
        balance, version = told.get(entry.account_id, (0, 0))
        balance += entry.amount if entry.direction == "d" else -entry.amount
        assert entry.amount > 0
        assert (entry.balance_after, entry.version) == (balance, version + 1)
        told[entry.account_id] = (balance, version + 1)
    return told


@given(groups())
def test_whatever_is_posted_sums_to_zero_proves_itself_and_leaves_no_customer_below_zero(
    events: list[list[Transaction]],
) -> None:
    fold = empty(t for group in events for t in group)
    for group in events:
        before = state(fold)
        refusal = try_post(fold, group)
        if refusal is not None:
            assert state(fold) == before, "a refused event leaves a trace"
        assert all(b.balance >= 0 for a, b in fold.balances.items() if a.owner != SYSTEM_OWNER)
    sums: defaultdict[str, int] = defaultdict(int)
    for entry in lines(fold):
        sums[entry.transaction_id] += entry.amount if entry.direction == "d" else -entry.amount
    assert set(sums) == {t.id for t in fold.transactions}
    assert not any(sums.values())
    assert sum(b.balance for b in fold.balances.values()) == 0
    told = proved(fold)
    assert told == {a.id: (b.balance, b.version) for a, b in fold.balances.items() if b.version}
    assert {a.id for a in fold.touched} == set(told), "an account is written when, and only when, it has a new line"


@given(groups(), st.data())
def test_batches_cut_anyhow_make_the_same_ledger(events: list[list[Transaction]], data: st.DataObject) -> None:
    everything = [t for group in events for t in group]
    whole, parts = empty(everything), empty(everything)
    answers = [try_post(whole, group) for group in events]
    entries = []
    start = 0
    while start < len(events):
        end = data.draw(st.integers(start + 1, len(events)))
        part = Fold(parts.balances, AT)  # a new transaction of the database, on the balances the last one left
        for group, answer in zip(events[start:end], answers[start:end], strict=True):
            assert type(try_post(part, group)) is type(answer)
        entries += part.entries
        start = end
    assert entries == whole.entries
    assert parts.balances == whole.balances


def test_an_overdraft_says_what_is_there_and_what_was_wanted() -> None:
    ada = spendable("ada")
    fold = Fold({ada: Balance(30, 4, stored=True), buffer(): Balance(-30, 9)}, AT)
    refusal = try_post(fold, [Transaction("1" * 32, "test", "", (debit(buffer(), 31), credit(ada, 31)))])
    assert isinstance(refusal, InsufficientFunds)
    assert (refusal.account, refusal.available, refusal.wanted) == ("ada.usdc_balance:USDC", 30, 31)
    assert fold.entries == []


def test_the_second_posting_of_an_event_undoes_the_first_when_it_is_refused() -> None:
    ada, bob = spendable("ada"), spendable("bob")
    fold = Fold({ada: Balance(), bob: Balance(), buffer(): Balance()}, AT)
    good = Transaction("1" * 32, "test", "", (debit(ada, 5), credit(buffer(), 5)))
    bad = Transaction("2" * 32, "test", "", (debit(buffer(), 6), credit(bob, 6)))
    before = state(fold)
    assert isinstance(try_post(fold, [good, bad]), InsufficientFunds)
    assert state(fold) == before
    assert try_post(fold, [good]) is None


@pytest.mark.parametrize(("held", "taken", "owed"), [(50, 50, 0), (30, 30, 20), (0, 0, 50)])
def test_a_remainder_takes_what_the_customer_no_longer_has(held: int, taken: int, owed: int) -> None:
    ada = spendable("ada")
    fold = Fold({ada: Balance(held, 1), buffer(): Balance(-held, 1), SHORTFALL: Balance()}, AT)
    legs_ = (debit(buffer(), 50), credit(ada, 50, remainder=SHORTFALL))
    fold.post(Transaction("1" * 32, "deposit_reversed", "", legs_))
    assert fold.balances[ada].balance == held - taken
    assert fold.balances[SHORTFALL].balance == -owed
    assert fold.balances[buffer()].balance == 50 - held
    assert len(fold.entries) == 1 + (taken > 0) + (owed > 0), "no line of nothing"


def test_a_remainder_that_is_a_customers_has_a_floor_too() -> None:
    ada, bob = spendable("ada"), spendable("bob")
    fold = Fold({ada: Balance(10, 1), bob: Balance(5, 1), buffer(): Balance(-15, 2)}, AT)
    with pytest.raises(InsufficientFunds):
        fold.post(Transaction("1" * 32, "test", "", (debit(buffer(), 20), credit(ada, 20, remainder=bob))))


@pytest.mark.parametrize("amount", [0, -1])
def test_an_amount_that_is_not_above_zero_is_refused(amount: int) -> None:
    fold = Fold({buffer(): Balance(), SHORTFALL: Balance()}, AT)
    with pytest.raises(AmountOutOfRange):
        fold.post(Transaction("1" * 32, "test", "", (debit(buffer(), amount), credit(SHORTFALL, amount))))


def test_each_asset_balances_by_itself() -> None:
    fold = Fold({buffer(): Balance(), OTHER_ASSET: Balance()}, AT)
    with pytest.raises(Unbalanced) as refusal:
        fold.post(Transaction("1" * 32, "test", "", (debit(buffer(), 5), credit(OTHER_ASSET, 5))))
    assert isinstance(refusal.value, PostingRefused)
    assert abs(refusal.value.difference) == 5


@given(legs(), legs())
def test_the_fingerprint_tells_other_contents(one: tuple[Leg, ...], other: tuple[Leg, ...]) -> None:
    first, second = (Transaction("1" * 32, "test", "ref", legs_) for legs_ in (one, other))
    assert (first.fingerprint() == second.fingerprint()) == (one == other)
    assert first._replace(kind="else").fingerprint() != first.fingerprint()
    assert first._replace(reference="else").fingerprint() != first.fingerprint()


texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8)


@given(st.tuples(texts, texts), st.tuples(texts, texts))
def test_accounts_with_other_names_have_other_ids(one: tuple[str, str], other: tuple[str, str]) -> None:
    first, second = (Account(owner, AccountType.USDC_BALANCE, shard=shard) for owner, shard in (one, other))
    assert (first.id == second.id) == (one == other)
    assert len(bytes.fromhex(first.id)) == 16


def test_an_accounts_id_never_changes() -> None:
    name = "\0".join(("ada", "usdc_balance", "USDC", ""))
    expected = hashlib.blake2b(name.encode(), digest_size=16, person=b"account").hexdigest()
    assert spendable("ada").id == expected


def test_only_the_companys_accounts_may_go_below_zero_and_no_customer_is_the_company() -> None:
    assert [a.floor for a in (*USERS, *SYSTEM)] == [0] * len(USERS) + [-AMOUNT_MAX] * len(SYSTEM)
    assert not may_own("system")
    assert may_own("System")
    assert str(buffer("3")) == "system.system_buffer_usdc[3]:USDC"


def test_a_posting_to_what_is_not_on_the_chart_or_closed_is_refused_and_leaves_no_trace() -> None:
    ada, closed = spendable("ada"), spendable("closed")
    strangers = {
        Account("ada", "savings"): "unknown_account",
        Account("ada", AccountType.USDC_BALANCE, asset="EURC"): "wrong_asset",
        Account("ada", AccountType.WORLD_USDC): "unknown_account",
        closed: "closed_account",
    }
    for account, code in strangers.items():
        fold = Fold({ada: Balance(9, 1), account: Balance(0, 1, True, AT if account is closed else None)}, AT)
        before = state(fold)
        for legs_ in ((debit(account, 5), credit(ada, 5)), (debit(account, 5), debit(account, 1), credit(ada, 6))):
            refusal = try_post(fold, [Transaction("1" * 32, "test", "", legs_)])
            assert refusal is not None
            assert refusal.code == code
            assert state(fold) == before


def test_every_account_of_the_chart_has_an_owner_an_asset_and_a_lowest_balance() -> None:
    for type_ in AccountType:
        owner = "ada" if type_ in CUSTOMERS else SYSTEM_OWNER
        account = Account(owner, type_)
        others = {AccountType.BROKER_OPERATIONAL: USD, AccountType.GAS_COINS: COIN}
        assert account.asset == others.get(type_, USD if "fiat" in type_ else USDC)
        assert account.floor == (0 if type_ in CUSTOMERS else -AMOUNT_MAX)
        stranger = Account(SYSTEM_OWNER if type_ in CUSTOMERS else "ada", type_)
        assert stranger.floor == OUT_OF_REACH


@given(st.integers(-AMOUNT_MAX, AMOUNT_MAX), st.integers(1, AMOUNT_MAX), st.booleans())
def test_no_balance_passes_38_digits_on_either_side(held: int, amount: int, debited: bool) -> None:
    fold = Fold({buffer(): Balance(held, 1), SHORTFALL: Balance(-held, 1)}, AT)
    sides = (buffer(), SHORTFALL) if debited else (SHORTFALL, buffer())
    after = held + (amount if debited else -amount)
    refusal = try_post(fold, [Transaction("1" * 32, "test", "", (debit(sides[0], amount), credit(sides[1], amount)))])
    assert isinstance(refusal, AmountOutOfRange) == (abs(after) > AMOUNT_MAX)
    assert fold.balances[buffer()].balance == (held if refusal else after)


@given(legs())
def test_the_short_way_of_a_pair_and_the_long_way_make_the_same_lines(legs_: tuple[Leg, ...]) -> None:
    transaction = Transaction("1" * 32, "test", "", legs_)
    short, long = empty([transaction]), empty([transaction])
    for fold in (short, long):
        for account, balance in fold.balances.items():
            balance.balance = 20 if account.owner != SYSTEM_OWNER else 0
    answers = []
    for post in (short.post, long._post):
        try:
            post(transaction)
            answers.append(None)
        except PostingRefused as refusal:
            answers.append(str(refusal))
    assert answers[0] == answers[1]
    assert state(short) == state(long)


def test_the_same_key_meets_in_the_same_shard() -> None:
    assert {shard_of("0xabc", 1), shard_of("0xdef", 1)} == {""}
    assert {shard_of(f"0x{n}", 4) for n in range(200)} == {"0", "1", "2", "3"}
    assert shard_of("0xabc", 4) == str(partition_of(b"0xabc", 4)), "one shard per partition where keys and counts agree"
