"""Transactions of legs, folded over locked balances in memory. Pure: no database, no clock.

| phase | what | why here |
| --- | --- | --- |
| accounts_of | which accounts a batch touches | they are locked sorted, in one statement, before anything is read |
| fold | each transaction in order: check, then move balances and versions | a refused one leaves no trace for its neighbours; the next sees the one before |

One writer that folds a hot account in memory beats many connections that fight for its row. The single posting is the
batch of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ledger.accounts import Account
from ledger.errors import InsufficientFunds, PostingRefused, Unbalanced

Direction = Literal["d", "c"]


class Leg(NamedTuple):
    """`amount` base units, above zero, to the debit or the credit side of `account`."""

    account: Account
    direction: Direction
    amount: int
    remainder: Account | None = None
    """Takes what a credit leg cannot take from an account that may not go below its floor (a reversed deposit that its
    owner has spent)."""


def debit(account: Account, amount: int) -> Leg:
    return Leg(account, "d", amount)


def credit(account: Account, amount: int, *, remainder: Account | None = None) -> Leg:
    return Leg(account, "c", amount, remainder)


class Transaction(NamedTuple):
    """One balanced movement. The caller chooses the id, so that a repeat is recognised for ever."""

    id: str
    """32 hex digits."""
    kind: str
    reference: str
    """What it is about: a deposit's id."""
    legs: tuple[Leg, ...]

    def fingerprint(self) -> bytes:
        """16 bytes over the contents: the same id with another fingerprint is refused."""
        legs = "\n".join(
            f"{account.id} {direction} {amount} {remainder.id if remainder else ''}"
            for account, direction, amount, remainder in self.legs
        )
        return hashlib.blake2b(f"{self.kind}\0{self.reference}\0{legs}".encode(), digest_size=16).digest()


class Entry(NamedTuple):
    """One line of one account: it proves itself, because it has the balance after it and the account's version."""

    account_id: str
    version: int
    transaction_id: str
    seq: int
    direction: Direction
    amount: int
    balance_after: int


_entry = Entry._make


@dataclass(slots=True)
class Balance:
    """A locked account: what it holds and how many entries it has. `stored`: the row exists."""

    balance: int = 0
    version: int = 0
    stored: bool = False


@dataclass(slots=True)
class Fold:
    """Balances under our locks and what a batch has made of them."""

    balances: dict[Account, Balance]
    transactions: list[Transaction] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    touched: set[Account] = field(default_factory=set)

    def post(self, transaction: Transaction) -> None:
        """Posts one transaction. Raises PostingRefused and changes nothing when it cannot be."""
        moves = _moves(transaction, self.balances)
        entries, touched, balances = self.entries, self.touched, self.balances
        for seq, (account, direction, amount) in enumerate(moves):
            state = balances[account]
            state.balance += amount if direction == "d" else -amount
            state.version += 1
            touched.add(account)
            entries.append(_entry((account.id, state.version, transaction.id, seq, direction, amount, state.balance)))
        self.transactions.append(transaction)


def accounts_of(transactions: Iterable[Transaction]) -> set[Account]:
    """Every account that the transactions may touch."""
    found: set[Account] = set()
    for transaction in transactions:
        for account, _, _, remainder in transaction.legs:
            found.add(account)
            if remainder is not None:
                found.add(remainder)
    return found


def _moves(transaction: Transaction, balances: dict[Account, Balance]) -> list[tuple[Account, Direction, int]]:
    """The legs with remainders resolved, checked as a whole before any balance moves."""
    moves: list[tuple[Account, Direction, int]] = []
    difference: dict[str, int] = {}
    running: dict[Account, int] = {}

    def move(account: Account, direction: Direction, amount: int, before: int) -> None:
        change = amount if direction == "d" else -amount
        moves.append((account, direction, amount))
        difference[account.asset] = difference.get(account.asset, 0) + change
        running[account] = before + change

    for account, direction, amount, remainder in transaction.legs:
        if amount <= 0:
            raise Unbalanced(account.asset, amount)
        before = running[account] if account in running else balances[account].balance
        if direction == "c" and remainder is not None and account.floor is not None:
            taken = min(amount, max(before - account.floor, 0))
            if taken:
                move(account, "c", taken, before)
            if taken < amount:
                rest_before = running[remainder] if remainder in running else balances[remainder].balance
                move(remainder, "c", amount - taken, rest_before)
        else:
            move(account, direction, amount, before)
    for asset, rest in difference.items():
        if rest:
            raise Unbalanced(asset, rest)
    for account, after in running.items():
        floor = account.floor
        if floor is not None and after < floor:
            held = balances[account].balance
            raise InsufficientFunds(str(account), held - floor, held - after)
    return moves


def try_post(fold: Fold, transactions: Iterable[Transaction]) -> PostingRefused | None:
    """Posts all of one event's transactions or none; the refusal, if any."""
    transactions = tuple(transactions)
    if len(transactions) == 1:  # nothing to undo: a refused one has changed nothing
        try:
            fold.post(transactions[0])
        except PostingRefused as refusal:
            return refusal
        return None
    done = len(fold.transactions), len(fold.entries)
    saved: dict[Account, tuple[int, int, bool]] = {}
    for transaction in transactions:
        for account in accounts_of((transaction,)):
            state = fold.balances[account]
            saved.setdefault(account, (state.balance, state.version, account in fold.touched))
        try:
            fold.post(transaction)
        except PostingRefused as refusal:
            for account, (balance, version, touched) in saved.items():
                fold.balances[account].balance, fold.balances[account].version = balance, version
                if not touched:
                    fold.touched.discard(account)
            del fold.transactions[done[0] :], fold.entries[done[1] :]
            return refusal
    return None
