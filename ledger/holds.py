"""Holds: money set aside in a pending account until it is captured, voided or expired. Pure.

| step | debit | credit | hold after it |
| --- | --- | --- | --- |
| open | pending | source | open; its id is the transaction's |
| capture | what the caller's legs say | pending | open, or posted when nothing remains |
| void | source | pending | voided; posted when a part was captured |
| expire, from its time on | source | pending | expired |

The last capture of a part is a capture and a void in one atomic group. Whatever runs at once: the hold's row is locked
before any account, so what remains is never captured twice, and nothing is after the end. From `expires_at` on nothing is
captured, also when the expiry is not posted yet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final, Literal, NamedTuple

from ledger.accounts import Account
from ledger.counters import StateKey
from ledger.errors import HoldEnded, HoldExceeded, HoldNotDue, UnknownHold
from ledger.posting import Fold, Leg, Marks, State, Transaction, credit, debit

HOLDS: Final = "holds"

HoldState = Literal["open", "posted", "voided", "expired"]


class Hold(NamedTuple):
    """A row of `holds`."""

    id: str
    """That of the transaction that opened it."""
    source: Account
    pending: Account
    amount: int
    remaining: int
    """What the pending account still holds of it; 0 after the end."""
    captured: int
    state: HoldState
    expires_at: datetime | None
    created_at: datetime
    ended_at: datetime | None
    version: int
    stored: bool
    """The row exists."""

    def accounts(self) -> Iterable[Account]:
        return self.source, self.pending


class Open(NamedTuple):
    source: Account
    pending: Account
    amount: int
    expires_at: datetime | None

    def marks(self, transaction_id: str) -> Marks:
        return Marks(transaction_id, "open")

    def key(self, transaction_id: str) -> StateKey:
        return HOLDS, transaction_id

    def contents(self) -> str:
        until = self.expires_at.astimezone(UTC).isoformat() if self.expires_at else ""
        return f"open {self.source.id} {self.pending.id} {self.amount} {until}"

    def accounts(self) -> Iterable[Account]:
        return self.source, self.pending

    def apply(self, transaction: Transaction, fold: Fold) -> tuple[Sequence[Leg], State]:
        source, pending, amount, expires_at = self
        hold = Hold(
            transaction.id, source, pending, amount, amount, 0, "open", expires_at, fold.at, None, 1, stored=False
        )
        return (debit(pending, amount), credit(source, amount), *transaction.legs), hold


class Capture(NamedTuple):
    hold_id: str
    amount: int

    def marks(self, _transaction_id: str) -> Marks:
        return Marks(self.hold_id, "capture")

    def key(self, _transaction_id: str) -> StateKey:
        return HOLDS, self.hold_id

    def contents(self) -> str:
        return f"capture {self.hold_id} {self.amount}"

    def accounts(self) -> Iterable[Account]:
        return ()

    def apply(self, transaction: Transaction, fold: Fold) -> tuple[Sequence[Leg], State]:
        hold = _open(fold, self.hold_id)
        if hold.expires_at is not None and hold.expires_at <= fold.at:
            raise HoldEnded(hold.id, "expired", hold.expires_at)
        if self.amount > hold.remaining:
            raise HoldExceeded(hold.id, hold.remaining, self.amount)
        after = hold._replace(
            remaining=hold.remaining - self.amount, captured=hold.captured + self.amount, version=hold.version + 1
        )
        if not after.remaining:
            after = after._replace(state="posted", ended_at=fold.at)
        return (credit(hold.pending, self.amount), *transaction.legs), after


class Release(NamedTuple):
    hold_id: str
    step: Literal["void", "expire"]

    def marks(self, _transaction_id: str) -> Marks:
        return Marks(self.hold_id, self.step)

    def key(self, _transaction_id: str) -> StateKey:
        return HOLDS, self.hold_id

    def contents(self) -> str:
        return f"{self.step} {self.hold_id}"

    def accounts(self) -> Iterable[Account]:
        return ()

    def apply(self, transaction: Transaction, fold: Fold) -> tuple[Sequence[Leg], State]:
        hold = _open(fold, self.hold_id)
        state: HoldState = "posted" if hold.captured else "voided"
        if self.step == "expire":
            if hold.expires_at is None or hold.expires_at > fold.at:
                raise HoldNotDue(hold.id, hold.expires_at)
            state = "expired"
        legs = (debit(hold.source, hold.remaining), credit(hold.pending, hold.remaining), *transaction.legs)
        return legs, hold._replace(remaining=0, state=state, ended_at=fold.at, version=hold.version + 1)


def hold(
    id: str,
    kind: str,
    reference: str,
    *,
    source: Account,
    pending: Account,
    amount: int,
    expires_at: datetime | None = None,
    legs: tuple[Leg, ...] = (),
) -> Transaction:
    """Sets `amount` aside. `legs`: what else the transaction moves, balanced by itself (a fee)."""
    return Transaction(id, kind, reference, legs, Open(source, pending, amount, expires_at))


def capture(id: str, kind: str, reference: str, *, hold_id: str, amount: int, legs: tuple[Leg, ...]) -> Transaction:
    """Takes `amount` out of the hold. `legs`: where it goes; with the pending account's credit they balance."""
    return Transaction(id, kind, reference, legs, Capture(hold_id, amount))


def void(id: str, kind: str, reference: str, *, hold_id: str) -> Transaction:
    """Gives what remains back to its source."""
    return Transaction(id, kind, reference, (), Release(hold_id, "void"))


def expire(hold_id: str, kind: str, reference: str) -> Transaction:
    """Gives what remains back when the hold's time has come. The id follows from the hold's, so a repeat is the same."""
    key = hashlib.blake2b(hold_id.encode(), digest_size=16, person=b"hold expired").hexdigest()
    return Transaction(key, kind, reference, (), Release(hold_id, "expire"))


def _open(fold: Fold, hold_id: str) -> Hold:
    found: Hold | None = fold.states.get((HOLDS, hold_id))
    if found is None:
        raise UnknownHold(hold_id)
    if found.state != "open":
        assert found.ended_at is not None
        raise HoldEnded(hold_id, found.state, found.ended_at)
    return found
