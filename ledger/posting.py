"""Transactions of legs, folded over locked balances in memory. Pure: no database, no clock.

| phase | what | why here |
| --- | --- | --- |
| accounts_of | which accounts a batch touches | they are locked sorted, in one statement, before anything is read |
| fold | each transaction in order: check, then move balances and versions | a refused one leaves no trace for its neighbours; the next sees the one before |

One writer that folds a hot account in memory beats many connections that fight for its row. The single posting is the
batch of one. What a transaction does beside moving money is its operation: ledger/holds.py, ledger/reversals.py. Several that
stand or fall together: ledger/groups.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from hashlib import blake2b
from typing import Any, Final, Literal, NamedTuple, Protocol

from ledger.accounts import AMOUNT_MAX, OUT_OF_REACH, Account, refusal_of
from ledger.counters import Count, StateKey, counted
from ledger.errors import AmountOutOfRange, ClosedAccount, InsufficientFunds, LegsOutOfRange, Unbalanced
from ledger.rows import Block

Direction = Literal["d", "c"]
LEGS_MAX: Final = 32_767
"""`entries.seq` is a smallint."""


class Leg(NamedTuple):
    """`amount` base units, 1 to AMOUNT_MAX, to the debit or the credit side of `account`."""

    account: Account
    direction: Direction
    amount: int
    remainder: Account | None = None
    """Takes what a credit leg cannot take from an account that may not go below its floor (a reversed deposit that its
    owner has spent)."""


_leg: Callable[[tuple[Account, Direction, int, Account | None]], Leg] = partial(tuple.__new__, Leg)
"""Half the price of Leg(…), twice for each transaction."""


def debit(account: Account, amount: int) -> Leg:
    return _leg((account, "d", amount, None))


def credit(account: Account, amount: int, *, remainder: Account | None = None) -> Leg:
    return _leg((account, "c", amount, remainder))


class Transaction(NamedTuple):
    """One balanced movement. The caller chooses the id, so that a repeat is recognised for ever."""

    id: str
    """32 hex digits."""
    kind: str
    reference: str
    """What it is about: a deposit's id."""
    legs: tuple[Leg, ...]
    operation: Operation | None = None
    counts: tuple[Count, ...] = ()
    """What it counts towards. Not part of its contents: a repeat on another day, or under another limit, is the same."""

    def fingerprint(self) -> str:
        """32 hex digits over the contents: the same id with another fingerprint is refused."""
        _, kind, reference, legs, operation, _ = self
        if operation is None and len(legs) == 2:  # nearly all are such a pair; the same text, made at once
            (one, side, amount, rest), (other, other_side, same, other_rest) = legs
            contents = (
                f"{kind}\0{reference}\0{one.id} {side} {amount} {rest.id if rest else ''}"
                f"\n{other.id} {other_side} {same} {other_rest.id if other_rest else ''}"
            )
        else:
            parts = [
                f"{account.id} {direction} {amount} {remainder.id if remainder else ''}"
                for account, direction, amount, remainder in legs
            ]
            if operation is not None:
                parts.append(operation.contents())
            contents = f"{kind}\0{reference}\0" + "\n".join(parts)
        return blake2b(contents.encode(), digest_size=16).hexdigest()


class Marks(NamedTuple):
    """Columns of `transactions`: what its operation was. For a plain one all are None."""

    hold_id: str | None = None
    hold_step: Literal["open", "capture", "void", "expire"] | None = None
    reverses: str | None = None


class State(Protocol):
    """A locked state row and what the fold has made of it: a hold, or what is left of a transaction."""

    def accounts(self) -> Iterable[Account]:
        """What an operation on it may touch."""


class Operation(Protocol):
    """What a transaction does to a state row while it moves money."""

    def marks(self, transaction_id: str) -> Marks:
        """What stays of it on the transaction's row."""

    def key(self, transaction_id: str) -> StateKey:
        """The state row, locked before any account."""

    def contents(self) -> str:
        """All of it, for the fingerprint."""

    def accounts(self) -> Iterable[Account]:
        """The accounts it names itself."""

    def apply(self, transaction: Transaction, fold: Fold) -> tuple[Sequence[Leg], State]:
        """All legs of the transaction, and the state after it. Raises PostingRefused."""


class Entry(NamedTuple):
    """One line of one account: it proves itself, because it has the balance after it and the account's version."""

    account_id: str
    version: int
    transaction_id: str
    seq: int
    direction: Direction
    amount: int
    balance_after: int
    at: datetime


@dataclass(slots=True)
class Balance:
    """A locked account: what it holds and how many entries it has. `stored`: the row exists."""

    balance: int = 0
    version: int = 0
    stored: bool = False
    closed_at: datetime | None = None


Move = tuple[Account, Direction, int]


class Draft(NamedTuple):
    """What can be made of transactions before it is known which of them are posted."""

    transactions: Sequence[Transaction]
    fingerprints: dict[str, tuple[Transaction, str]]
    """By id, each with the transaction that it is of: an id may be there twice, with other contents."""
    rows: Block
    """Of all of them, but for the time and the batch."""


@dataclass(slots=True)
class Fold:
    """Balances and state rows under our locks, and what a batch has made of them."""

    balances: dict[Account, Balance]
    at: datetime
    """Of everything in it: not before the last entry of any of its accounts."""
    states: dict[StateKey, Any] = field(default_factory=dict)
    transactions: list[Transaction] = field(default_factory=list)
    fingerprints: list[str] = field(default_factory=list)
    """Of the transactions, in their order."""
    entries: list[tuple[Any, ...]] = field(default_factory=list)
    """Rows of `entries`: what Entry names, as plain tuples, for speed."""
    touched: set[Account] = field(default_factory=set)
    changed: set[StateKey] = field(default_factory=set)
    draft: Draft | None = None

    def post(self, transaction: Transaction) -> None:
        """Posts one transaction. Raises PostingRefused and changes nothing when it cannot be."""
        key, _, _, legs, operation, counts = transaction
        if operation is None and len(legs) == 2 and not counts:
            # nearly all are such a pair. Whatever is odd about one is told by `_post`
            (one, side, amount, rest), (other, other_side, same, other_rest) = legs
            if (
                amount == same
                and side != other_side
                and 0 < amount <= AMOUNT_MAX
                and one is not other
                and one.asset == other.asset
                and rest is None
                and other_rest is None
            ):
                first, second = self.balances[one], self.balances[other]
                change = amount if side == "d" else -amount
                after, then = first.balance + change, second.balance - change
                if (
                    one.floor <= after <= AMOUNT_MAX
                    and other.floor <= then <= AMOUNT_MAX
                    and first.closed_at is None
                    and second.closed_at is None
                ):
                    first.balance, second.balance = after, then
                    first.version += 1
                    second.version += 1
                    at, entries = self.at, self.entries
                    entries.append((one.id, first.version, key, 0, side, amount, after, at))
                    entries.append((other.id, second.version, key, 1, other_side, amount, then, at))
                    self.touched.add(one)
                    self.touched.add(other)
                    self.transactions.append(transaction)
                    made = self.draft.fingerprints.get(key) if self.draft is not None else None
                    self.fingerprints.append(
                        made[1] if made is not None and made[0] is transaction else transaction.fingerprint()
                    )
                    return
        self._post(transaction)

    def _post(self, transaction: Transaction) -> None:
        operation, state = transaction.operation, None
        legs: Sequence[Leg] = transaction.legs
        if operation is not None:
            legs, state = operation.apply(transaction, self)
        moves = _moves(legs, self.balances)
        if len(moves) > LEGS_MAX or (operation is None and not moves):
            raise LegsOutOfRange(len(moves), LEGS_MAX)
        counters = counted(transaction.counts, self.states)
        for seq, (account, direction, amount) in enumerate(moves):
            held = self.balances[account]
            held.balance += amount if direction == "d" else -amount
            held.version += 1
            self.touched.add(account)
            line = (account.id, held.version, transaction.id, seq, direction, amount, held.balance, self.at)
            self.entries.append(line)
        if operation is not None:
            key = operation.key(transaction.id)
            self.states[key] = state
            self.changed.add(key)
        self.states.update(counters)
        self.changed.update(counters)
        self.transactions.append(transaction)
        self.fingerprints.append(transaction.fingerprint())


def accounts_of(transactions: Iterable[Transaction]) -> set[Account]:
    """Every account that the transactions name."""
    found: set[Account] = set()
    for _, _, _, legs, operation, _ in transactions:
        for account, _, _, remainder in legs:
            found.add(account)
            if remainder is not None:
                found.add(remainder)
        if operation is not None:
            found.update(operation.accounts())
    return found


def check_leg(account: Account, amount: int) -> None:
    """What a leg may be, whatever the balances: raises AmountOutOfRange, UnknownAccount, WrongAsset."""
    if not 0 < amount <= AMOUNT_MAX:
        raise AmountOutOfRange(amount, AMOUNT_MAX)
    refusal = refusal_of(account) if account.floor == OUT_OF_REACH else None
    if refusal is not None:
        raise refusal


def check_balanced(moves: Iterable[Move]) -> None:
    """Raises Unbalanced for the first asset whose debits and credits differ."""
    difference: dict[str, int] = {}
    for account, direction, amount in moves:
        difference[account.asset] = difference.get(account.asset, 0) + (amount if direction == "d" else -amount)
    for asset, rest in difference.items():
        if rest:
            raise Unbalanced(asset, rest)


def _moves(legs: Iterable[Leg], balances: dict[Account, Balance]) -> list[Move]:
    """The legs with remainders resolved, checked as a whole before any balance moves."""
    moves: list[Move] = []
    after: dict[Account, int] = {}
    for account, direction, amount, remainder in legs:
        check_leg(account, amount)
        taken = amount
        if direction == "c" and remainder is not None:
            before = after[account] if account in after else balances[account].balance
            taken = min(amount, max(before - account.floor, 0))
        for target, part in ((account, taken), (remainder, amount - taken)):
            if part and target is not None:
                before = after[target] if target in after else balances[target].balance
                after[target] = before + (part if direction == "d" else -part)
                moves.append((target, direction, part))
    for account in after:
        closed_at = balances[account].closed_at
        if closed_at is not None:
            raise ClosedAccount(str(account), closed_at)
    check_balanced(moves)
    for account, balance in after.items():
        if balance < account.floor == 0:
            held = balances[account].balance
            raise InsufficientFunds(str(account), held, held - balance)
        if abs(balance) > AMOUNT_MAX:
            raise AmountOutOfRange(balance, AMOUNT_MAX)
    return moves
