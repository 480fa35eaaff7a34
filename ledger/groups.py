"""Transactions that stand or fall together, folded: all of them, or the fold is as it was. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ledger.accounts import Account
from ledger.counters import StateKey
from ledger.errors import PostingRefused
from ledger.posting import Fold, State, Transaction, accounts_of


class Refused(NamedTuple):
    """Which of an event's transactions was refused, and why."""

    transaction: Transaction
    refusal: PostingRefused


def post_together(fold: Fold, transactions: Sequence[Transaction], then: Refused | None = None) -> Refused | None:
    """Posts all of the transactions or none. The first in order that is refused is the cause; `then` is a member after all of
    these that is known to be refused."""
    if len(transactions) == 1 and then is None:  # nothing to undo: a refused one has changed nothing
        try:
            fold.post(transactions[0])
        except PostingRefused as refusal:
            return Refused(transactions[0], refusal)
        return None
    undo = _Undo(fold)
    for transaction in transactions:
        undo.remember(transaction)
        try:
            fold.post(transaction)
        except PostingRefused as refusal:
            undo.undo()
            return Refused(transaction, refusal)
    if then is not None:
        undo.undo()
    return then


def try_post(fold: Fold, transactions: Iterable[Transaction]) -> PostingRefused | None:
    """Posts all of one event's transactions or none; the refusal, if any."""
    refused = post_together(fold, tuple(transactions))
    return refused.refusal if refused else None


class _Undo:
    """The fold as it was, as far as some transactions can change it."""

    def __init__(self, fold: Fold) -> None:
        self._fold = fold
        self._lengths = len(fold.transactions), len(fold.entries)
        self._accounts: dict[Account, tuple[int, int, bool]] = {}
        self._states: dict[StateKey, tuple[State | None, bool]] = {}

    def remember(self, transaction: Transaction) -> None:
        """To be called before the transaction is posted."""
        fold = self._fold
        accounts = accounts_of((transaction,))
        if transaction.operation is not None:
            key = transaction.operation.key(transaction.id)
            state: State | None = fold.states.get(key)
            self._states.setdefault(key, (state, key in fold.changed))
            # what it may touch is told by its state, or (made by this batch) is touched already
            accounts |= fold.touched if state is None else {*state.accounts()}
        for count in transaction.counts:
            self._states.setdefault(count.key, (fold.states.get(count.key), count.key in fold.changed))
        for account in accounts:
            held = fold.balances[account]
            self._accounts.setdefault(account, (held.balance, held.version, account in fold.touched))

    def undo(self) -> None:
        fold = self._fold
        for account, (balance, version, touched) in self._accounts.items():
            fold.balances[account].balance, fold.balances[account].version = balance, version
            if not touched:
                fold.touched.discard(account)
        for key, (state, changed) in self._states.items():
            if not changed:
                fold.changed.discard(key)
            if state is None:
                fold.states.pop(key, None)
            else:
                fold.states[key] = state
        transactions, entries = self._lengths
        del fold.transactions[transactions:], fold.fingerprints[transactions:], fold.entries[entries:]
