"""Holds, reversals and groups in the fold, against the plain model of the rules: no database, any order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ledger.accounts import SYSTEM, Account, AccountType, buffer, spendable
from ledger.book import Atomic, judge
from ledger.holds import HOLDS, Hold, capture, expire, hold, void
from ledger.posting import Balance, Fold, Transaction, credit, debit
from ledger.reversals import reversal
from ledger.store import Posted
from tests.support.ledger_model import Model, Wishes

AT = datetime(2026, 7, 1, 12, tzinfo=UTC)
USERS = ["ada", "bob", "cyd"]
ACCOUNTS = [*map(spendable, USERS), *(Account(user, AccountType.PENDING_WITHDRAWAL) for user in USERS), buffer()]


def empty() -> Fold:
    return Fold({account: Balance() for account in ACCOUNTS}, AT)


def state(fold: Fold) -> Any:
    balances = {account: (b.balance, b.version) for account, b in fold.balances.items()}
    lists = list(fold.transactions), list(fold.entries)
    return balances, dict(fold.states), lists, set(fold.touched), set(fold.changed)


@given(st.integers(0, 2**32), st.lists(st.integers(1, 4), min_size=1, max_size=25))
def test_any_groups_in_one_batch_end_as_the_rules_say_and_a_refused_one_leaves_no_trace(
    seed: int, sizes: list[int]
) -> None:
    fold, model, wishes = empty(), Model(), Wishes(Random(seed), USERS, [buffer()], amount_max=9)
    known: dict[str, Posted] = {}
    for size in sizes:
        group = [wishes.next() for _ in range(size)]
        for transaction in group:
            wishes.learn(transaction)
        codes = model.post_all(group, AT)
        before = state(fold)
        results = judge(fold, [Atomic(tuple(group))], known)
        for result in results:
            if isinstance(result, Posted):
                known[result.transaction_id] = result._replace(existed=True)
        assert all(isinstance(result, Posted) for result in results) == (not any(codes))
        if any(codes):
            assert state(fold) == before
        assert {a: b.balance for a, b in fold.balances.items()} == {a: model.balances[a] for a in ACCOUNTS}
    for id, held in model.holds.items():
        found: Hold = fold.states[HOLDS, id]
        assert (found.state, found.remaining, found.captured) == (held.state, held.remaining, held.captured)
        assert found.remaining + found.captured <= found.amount
    for account in ACCOUNTS[3:6]:  # what is pending is what open holds hold
        remaining = sum(h.remaining for h in fold.states.values() if isinstance(h, Hold) and h.pending is account)
        assert fold.balances[account].balance == remaining
    assert all(b.balance >= 0 for a, b in fold.balances.items() if a.owner != SYSTEM)


def test_each_operation_has_contents_of_its_own() -> None:
    ada, pending = ACCOUNTS[0], ACCOUNTS[3]
    id, other = "1" * 32, "2" * 32

    def aside(**changed: Any) -> Transaction:
        return hold(id, "k", "r", **{"source": ada, "pending": pending, "amount": 5, "expires_at": None, **changed})

    transactions = [
        Transaction(id, "k", "r", (debit(pending, 5), credit(ada, 5))),
        aside(), aside(amount=6), aside(expires_at=AT), aside(expires_at=AT + timedelta(1)), aside(source=ACCOUNTS[1]),
        aside(legs=(debit(ada, 1), credit(buffer(), 1))),
        void(id, "k", "r", hold_id=other), expire(other, "k", "r")._replace(id=id), void(id, "k", "r", hold_id=id),
        capture(id, "k", "r", hold_id=other, amount=5, legs=()), capture(id, "k", "r", hold_id=other, amount=6, legs=()),
        reversal(id, "k", "r", of=other), reversal(id, "k", "r", of=other, amount=5), reversal(id, "k", "r", of=id),
    ]  # fmt: skip
    assert len({transaction.fingerprint() for transaction in transactions}) == len(transactions)


def test_an_expiry_has_one_id_for_ever() -> None:
    assert expire("1" * 32, "k", "r").id == expire("1" * 32, "other", "").id != expire("2" * 32, "k", "r").id
