"""Reversals: a posted transaction undone, in whole or in parts, never beyond what it moved. Pure.

For each entry of the original, the state says how much of it was reversed. The first reversal makes those rows, each
later one locks them before any account; two first ones at once make the same rows, and one of them runs again.

What can be reversed: a plain transaction, and the capture of a hold (a refund): what came out of the pending account then
goes to the hold's source. A reversal is not reversed, nor is a hold's opening or release (NotReversible says what to do).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from ledger.accounts import Account
from ledger.counters import StateKey
from ledger.errors import NotReversible, ReversalExceeded, UnknownTransaction
from ledger.holds import HOLDS, Hold
from ledger.posting import Direction, Fold, Leg, Marks, State, Transaction

REVERSALS: Final = "reversals"


class Line(NamedTuple):
    """An entry of the original, as a reversal undoes it. A row of `reversals` with the original's id."""

    seq: int
    account: Account
    direction: Direction
    amount: int
    reversed: int = 0


class Original(NamedTuple):
    """What is left of a transaction."""

    id: str
    lines: tuple[Line, ...]
    marks: Marks
    stored: bool
    """Its rows exist."""

    def accounts(self) -> Iterable[Account]:
        return [line.account for line in self.lines]

    def check(self) -> None:
        """Raises NotReversible."""
        if self.marks.reverses is not None:
            raise NotReversible(self.id, "a reversal")
        if self.marks.hold_step not in (None, "capture"):
            raise NotReversible(self.id, f"a hold's {self.marks.hold_step}")


class Reverse(NamedTuple):
    of: str
    parts: tuple[tuple[int, int], ...]
    """(seq of the original's entry, amount); empty = all that is left."""

    def marks(self, _transaction_id: str) -> Marks:
        return Marks(reverses=self.of)

    def key(self, _transaction_id: str) -> StateKey:
        return REVERSALS, self.of

    def contents(self) -> str:
        return f"reverse {self.of} " + " ".join(f"{seq}:{amount}" for seq, amount in self.parts)

    def accounts(self) -> Iterable[Account]:
        return ()

    def apply(self, transaction: Transaction, fold: Fold) -> tuple[Sequence[Leg], State]:
        found: Original | None = fold.states.get((REVERSALS, self.of)) or _of_this_batch(fold, self.of)
        if found is None:
            raise UnknownTransaction(self.of)
        found.check()
        lines = {line.seq: line for line in found.lines}
        parts = self.parts or tuple((s, line.amount - line.reversed) for s, line in lines.items())
        if not self.parts and not any(amount for _, amount in parts):
            raise ReversalExceeded(self.of, None, 0, 0)
        legs = []
        for seq, amount in parts:
            line = lines.get(seq)
            left = line.amount - line.reversed if line else 0
            if line is None or amount > left:
                raise ReversalExceeded(self.of, seq, left, amount)
            if amount or self.parts:  # an entry of which nothing is left is passed over where all that is left is asked
                legs.append(Leg(line.account, "c" if line.direction == "d" else "d", amount))
            lines[seq] = line._replace(reversed=line.reversed + amount)
        return (*legs, *transaction.legs), found._replace(lines=tuple(lines.values()))


def reversal(id: str, kind: str, reference: str, *, of: str, amount: int | None = None) -> Transaction:
    """Undoes all that is left of a transaction, or `amount` of one that has two entries."""
    return reversal_of_parts(id, kind, reference, of=of, parts=() if amount is None else ((0, amount), (1, amount)))


def reversal_of_parts(
    id: str, kind: str, reference: str, *, of: str, parts: tuple[tuple[int, int], ...]
) -> Transaction:
    """Undoes parts of a transaction: amounts by the numbers of its entries, balanced."""
    return Transaction(id, kind, reference, (), Reverse(of, parts))


def captured_from(lines: Iterable[Line], source: Account) -> tuple[Line, ...]:
    """A capture's entries as a reversal undoes them: the first, out of the pending account, towards the hold's source."""
    return tuple(line._replace(account=source) if line.seq == 0 else line for line in lines)


def _of_this_batch(fold: Fold, transaction_id: str) -> Original | None:
    for original in fold.transactions:
        if original.id == transaction_id:
            break
    else:
        return None
    accounts = {account.id: account for account in fold.touched}
    lines = tuple(
        Line(seq, accounts[account_id], direction, amount)
        for account_id, _, of, seq, direction, amount, _, _ in fold.entries
        if of == transaction_id
    )
    marks = original.operation.marks(original.id) if original.operation else Marks()
    if marks.hold_step == "capture":
        hold: Hold = fold.states[HOLDS, marks.hold_id or ""]
        lines = captured_from(lines, hold.source)
    return Original(transaction_id, lines, marks, stored=False)
