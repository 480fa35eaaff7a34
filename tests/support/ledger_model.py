"""The ledger's rules a second time, as plainly as they can be said: what tests compare the real one with."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import Random

from ledger.accounts import SYSTEM, Account, AccountType, spendable
from ledger.holds import Capture, Open, Release, capture, expire, hold, void
from ledger.posting import Transaction, credit, debit
from ledger.reversals import Reverse, reversal

Move = tuple[Account, int]
"""An account and what its balance changes by."""


@dataclass
class Held:
    source: Account
    pending: Account
    remaining: int
    captured: int
    expires_at: datetime | None
    state: str = "open"


@dataclass
class Model:
    """One transaction after another. `post` answers "" or the code of the refusal."""

    balances: Counter[Account] = field(default_factory=Counter)
    holds: dict[str, Held] = field(default_factory=dict)
    moves: dict[str, list[Move]] = field(default_factory=dict)
    """Of each posted transaction, as a reversal of it sees them."""
    undone: dict[str, Counter[int]] = field(default_factory=dict)
    posted: dict[str, Transaction] = field(default_factory=dict)

    def post_all(self, group: Iterable[Transaction], now: datetime) -> list[str]:
        """All or none."""
        before = self._copy()
        answers = []
        for transaction in group:
            answers.append(self.post(transaction, now))
            if answers[-1]:
                self.__dict__.update(before.__dict__)
                break
        return answers

    def post(self, transaction: Transaction, now: datetime) -> str:
        known = self.posted.get(transaction.id)
        if known is not None:
            return "" if known == transaction else "transaction_reused"
        moves: list[Move] = []
        held: dict[str, Held] = {}
        undone: dict[str, Counter[int]] = {}
        refusal = ""
        match transaction.operation:
            case Open(source, pending, amount, expires_at):
                moves = [(pending, amount), (source, -amount)]
                held = {transaction.id: Held(source, pending, amount, 0, expires_at)}
            case Capture(hold_id, amount):
                refusal = self._ended(hold_id)
                if not refusal:
                    hold = replace(self.holds[hold_id])
                    if hold.expires_at is not None and hold.expires_at <= now:
                        refusal = "hold_ended"
                    elif amount > hold.remaining:
                        refusal = "hold_exceeded"
                    moves = [(hold.pending, -amount)]
                    hold.remaining -= amount
                    hold.captured += amount
                    hold.state = "open" if hold.remaining else "posted"
                    held = {hold_id: hold}
            case Release(hold_id, step):
                refusal = self._ended(hold_id)
                if not refusal:
                    hold = replace(self.holds[hold_id])
                    if step == "expire" and (hold.expires_at is None or now < hold.expires_at):
                        refusal = "hold_not_due"
                    moves = [(hold.source, hold.remaining), (hold.pending, -hold.remaining)]
                    hold.remaining = 0
                    hold.state = "expired" if step == "expire" else "posted" if hold.captured else "voided"
                    held = {hold_id: hold}
            case Reverse(of, parts):
                undone = {of: Counter(self.undone.get(of, Counter()))}
                refusal, moves = self._reverse(of, parts, undone[of])
        moves += [(leg.account, leg.amount if leg.direction == "d" else -leg.amount) for leg in transaction.legs]
        after = Counter(self.balances)
        for account, change in moves:
            after[account] += change
        if refusal:
            return refusal
        if any(change == 0 for _, change in moves):
            return "amount_out_of_range"
        if sum(change for _, change in moves):
            return "unbalanced"
        if any(after[account] < 0 for account, _ in moves if account.owner != SYSTEM):
            return "insufficient_funds"
        self.balances = after
        self.holds |= held
        self.undone |= undone
        self.posted[transaction.id] = transaction
        self.moves[transaction.id] = moves
        if isinstance(transaction.operation, Capture):  # a refund goes back to where the hold took it from
            hold = self.holds[transaction.operation.hold_id]
            self.moves[transaction.id] = [(hold.source, moves[0][1]), *moves[1:]]
        return ""

    def _ended(self, hold_id: str) -> str:
        hold = self.holds.get(hold_id)
        return "unknown_hold" if hold is None else "" if hold.state == "open" else "hold_ended"

    def _reverse(self, of: str, parts: tuple[tuple[int, int], ...], undone: Counter[int]) -> tuple[str, list[Move]]:
        if of not in self.posted:
            return "unknown_transaction", []
        if isinstance(self.posted[of].operation, Open | Release | Reverse):
            return "not_reversible", []
        original = self.moves[of]
        left = {seq: abs(change) - undone[seq] for seq, (_, change) in enumerate(original)}
        wanted = parts or tuple((seq, amount) for seq, amount in left.items() if amount)
        moves = []
        for seq, amount in wanted:
            if amount > left.get(seq, 0):
                return "reversal_exceeded", []
            left[seq] -= amount
            undone[seq] += amount
            account, change = original[seq]
            moves.append((account, -amount if change > 0 else amount))
        return ("", moves) if moves else ("reversal_exceeded", [])

    def _copy(self) -> Model:
        return Model(self.balances, dict(self.holds), dict(self.moves), dict(self.undone), dict(self.posted))


@dataclass
class Wishes:
    """Transactions that somebody may wish for: sensible ones, and such as must be refused."""

    rng: Random
    users: list[str]
    buffers: list[Account]
    name: str = ""
    """Tells the ids of several wishers apart."""
    amount_max: int = 50
    now: datetime = datetime(2026, 7, 1, 12, tzinfo=UTC)
    holds: list[str] = field(default_factory=list)
    posted: list[Transaction] = field(default_factory=list)
    count: int = 0

    def next(self) -> Transaction:
        self.count += 1
        rng = self.rng
        id = hashlib.blake2b(f"{self.name} {self.count}".encode(), digest_size=16).hexdigest()
        amount = rng.randint(1, self.amount_max)
        user, buffer = rng.choice(self.users), rng.choice(self.buffers)
        hold_id = rng.choice(self.holds[-30:]) if self.holds else "0" * 32
        kind = rng.choices(
            ("deposit", "transfer", "hold", "capture", "void", "expire", "reverse", "part", "repeat", "reuse"),
            (5, 4, 6, 6, 2, 2, 3, 3, 2, 1),
        )[0]
        if kind in ("repeat", "reuse", "reverse", "part") and not self.posted:
            kind = "deposit"
        match kind:
            case "deposit":
                return Transaction(id, "top_up", "", (debit(spendable(user), amount), credit(buffer, amount)))
            case "transfer":
                other = rng.choice([name for name in self.users if name != user])
                return Transaction(id, kind, "", (debit(spendable(other), amount), credit(spendable(user), amount)))
            case "hold":
                until = rng.choice((None, self.now, self.now + timedelta(hours=rng.randint(1, 9))))
                pending = Account(user, AccountType.PENDING_WITHDRAWAL)
                return hold(
                    id, kind, "", source=spendable(user), pending=pending, amount=amount, expires_at=until
                )  # fmt: skip
            case "capture":
                return capture(id, kind, "", hold_id=hold_id, amount=amount, legs=(debit(buffer, amount),))
            case "void":
                return void(id, kind, "", hold_id=hold_id)
            case "expire":
                return expire(hold_id, kind, "")
            case "reverse":
                return reversal(id, kind, "", of=rng.choice(self.posted[-60:]).id)
            case "part":
                return reversal(id, kind, "", of=rng.choice(self.posted[-60:]).id, amount=amount)
            case "repeat":
                return rng.choice(self.posted[-60:])
        return rng.choice(self.posted[-60:])._replace(reference="something else")

    def learn(self, transaction: Transaction) -> None:
        """It was posted."""
        self.posted.append(transaction)
        if isinstance(transaction.operation, Open):
            self.holds.append(transaction.id)
