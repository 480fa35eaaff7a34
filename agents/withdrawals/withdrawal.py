"""What a withdrawal is: its identity, its row, its history, the transactions signed for it, and the money it moves (docs/adr/0015). Pure.

```
 pending ─▶ signing ─▶ broadcasting ◀─▶ confirming ─▶ completed | failed | cancelled (a cancel was mined)
    └──────────┴─▶ cancelled (before a signature)  │
    └─▶ failed (refused)                           └─▶ manual_review: a person must look
```

`pending` is asked for and not decided; `signing` is accepted, held, and waits for a lane with room. From the first signature on
the withdrawal ends only by what the chain says at finality; where that says nothing to a program, by two people (ended_by_people.py).
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from enum import StrEnum
from typing import Final, NamedTuple

from agents.outcome import Emit
from agents.withdrawals.limits import taken_back
from ledger.accounts import WORLD, buffer, custody, pending_withdrawal, spendable
from ledger.counters import Count
from ledger.holds import capture, hold, void
from ledger.posting import Transaction, credit, debit
from ledger.rows import Row, Table
from ledger.tables import ATTEMPTS, LANES, WITHDRAWAL_HISTORY, WITHDRAWALS
from topics.catalog import WITHDRAWALS_SETTLED
from topics.events import WithdrawalRequested, WithdrawalSettled
from topics.money import format_amount, parse_amount


class Status(StrEnum):
    PENDING = "pending"
    SIGNING = "signing"
    BROADCASTING = "broadcasting"
    CONFIRMING = "confirming"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    MANUAL_REVIEW = "manual_review"


ENDED: Final = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})
NOT_SIGNED: Final = frozenset({Status.PENDING, Status.SIGNING})
"""It may still be cancelled: nothing of it can be on its way."""

NEXT: Final[dict[Status, frozenset[Status]]] = {
    Status.PENDING: frozenset({Status.SIGNING, Status.FAILED, Status.CANCELLED}),
    Status.SIGNING: frozenset({Status.BROADCASTING, Status.CANCELLED}),
    Status.BROADCASTING: frozenset({Status.CONFIRMING, *ENDED, Status.MANUAL_REVIEW}),
    Status.CONFIRMING: frozenset({Status.BROADCASTING, *ENDED, Status.MANUAL_REVIEW}),
    # with another code: what is known by now
    Status.MANUAL_REVIEW: frozenset({Status.BROADCASTING, Status.CONFIRMING, *ENDED, Status.MANUAL_REVIEW}),
    Status.COMPLETED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}


NONCE_TAKEN: Final = "nonce_taken"
"""Of a review: something that is none of ours was mined with the withdrawal's nonce."""
UNEXPECTED_TRANSFERS: Final = "unexpected_transfers"
"""Of a review: its payment succeeded and did not move what it was signed for."""
STUCK: Final = "stuck"
"""Of a review: it is the next of its lane and was in no block for too long. It goes on by itself when it is mined."""


class Withdrawal(NamedTuple):
    """A row of `withdrawals`."""

    id: str
    user_id: str
    idempotency_key: str
    fingerprint: str
    """Over what was asked: the same key with another address is refused."""
    rail: str
    chain: str
    asset: str
    amount: int
    """0 where what was asked for is no amount (the withdrawal failed)."""
    recipient: str
    """Canonical from `signing` on; as it was written where it was refused."""
    status: str
    code: str | None
    hold_id: str | None
    requested_at: datetime
    updated_at: datetime
    settled_at: datetime | None
    version: int


TOP_UP: Final = "top_up"
"""The kind of an attempt that gives coins to a lane (top_ups.py); it belongs to no withdrawal."""


class AttemptStatus(StrEnum):
    SIGNED = "signed"
    BROADCAST = "broadcast"
    MINED = "mined"
    CONFIRMED = "confirmed"
    """Final, and it did what it was signed for."""
    REVERTED = "reverted"
    """Final, and it paid nothing."""
    REPLACED = "replaced"
    """Another attempt of its nonce is final."""


class Attempt(NamedTuple):
    """A row of `attempts`: a transaction that was signed."""

    chain: str
    tx_hash: str
    signer: str
    nonce: int
    n: int
    """Which of its nonce's attempts, from 1."""
    kind: str
    """`payment`, `cancel` or, of the gas account, `top_up`"""
    withdrawal_id: str | None
    raw: bytes
    gas_limit: int
    max_fee: int
    """Wei per gas, as priority_fee."""
    priority_fee: int
    status: str
    error: str | None
    block_hash: str | None
    block_number: int | None
    signed_at: datetime
    broadcast_at: datetime | None
    updated_at: datetime
    version: int


RESTORED: Final = "restored"
"""Why a lane is paused after the database was restored; `restored: …` where it was paused before, and why."""


class Lane(NamedTuple):
    """A row of `lanes`: a signer of ours on a chain, and the next nonce it may use."""

    chain: str
    signer: str
    """Lower case."""
    next_nonce: int
    chain_nonce: int
    """The chain's own count when it was last looked at: a floor for ours."""
    status: str
    """`open` or `paused`"""
    reason: str
    """Why it is paused."""
    version: int
    updated_at: datetime

    @property
    def key(self) -> str:
        """Of its messages."""
        return f"{self.chain}:{self.signer}"

    @property
    def is_restored(self) -> bool:
        """Nothing is signed or sent for it until it was compared with its chain (agents/recovery)."""
        return self.reason == RESTORED or self.reason.startswith(f"{RESTORED}: ")


def paid_for(attempt: Attempt) -> str:
    """What its events name: its withdrawal, or the top-up, `top_up:<nonce>` of its lane."""
    return attempt.withdrawal_id or f"{TOP_UP}:{attempt.nonce}"


def withdrawal_id(user_id: str, idempotency_key: str) -> str:
    """32 hex digits, unique for ever: one withdrawal for each key of a customer, however it is asked for."""
    name = f"{user_id}\0{idempotency_key}"
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"withdrawal").hexdigest()


def asked(event: WithdrawalRequested, at: datetime) -> Withdrawal:
    """What a customer asks for, not decided yet."""
    try:
        amount = parse_amount(event.amount)
    except ValueError:
        amount = 0
    return Withdrawal(
        withdrawal_id(event.user_id, event.idempotency_key), event.user_id, event.idempotency_key,
        fingerprint(event.rail, event.chain, event.asset, event.amount, event.to),
        event.rail, event.chain, event.asset, amount, event.to,
        Status.PENDING.value, None, None, at, at, None, 1,
    )  # fmt: skip


def fingerprint(rail: str, chain: str, asset: str, amount: str, to: str) -> str:
    """32 hex digits over what was asked, as it was written."""
    name = "\0".join((rail, chain, asset, amount, to))
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"asked").hexdigest()


def moved(
    withdrawal: Withdrawal, status: Status, at: datetime, actor: str, code: str | None = None
) -> tuple[Withdrawal, tuple[tuple[Table, Row], tuple[Table, Row]]]:
    """The withdrawal in its next state, and its rows: `withdrawals` to be upserted, `withdrawal_history` to be inserted.

    AssertionError where no such step exists: the caller looked at the state under the row's lock.
    """
    assert status in NEXT[Status(withdrawal.status)], f"{withdrawal.id}: {withdrawal.status} to {status}"
    # cheaper than _replace, for every step of every withdrawal
    *asked, _, before, hold_id, requested_at, _, _, version = withdrawal
    settled_at = at if status in ENDED else None
    code = before if code is None else code
    after = Withdrawal._make((*asked, status.value, code, hold_id, requested_at, at, settled_at, version + 1))
    return after, rows_of(after, actor)


def rows_of(withdrawal: Withdrawal, actor: str) -> tuple[tuple[Table, Row], tuple[Table, Row]]:
    """Its row, and the line of its history that tells of this version."""
    line = (
        withdrawal.id, withdrawal.version, withdrawal.status, withdrawal.code, actor, withdrawal.updated_at,
    )  # fmt: skip
    return (WITHDRAWALS, withdrawal), (WITHDRAWAL_HISTORY, line)


def attempt_row(attempt: Attempt) -> tuple[Table, Row]:
    return ATTEMPTS, attempt


def lane_row(lane: Lane) -> tuple[Table, Row]:
    return LANES, lane


def _transaction_id(withdrawal_id: str, movement: str) -> str:
    name = f"{withdrawal_id}\0{movement}"
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"transaction").hexdigest()


def transaction_ids(withdrawal_id: str) -> list[str]:
    """Every ledger transaction that a withdrawal may have."""
    return [_transaction_id(withdrawal_id, movement) for movement in ("hold", "pay", "release")]


def held(withdrawal: Withdrawal, counts: tuple[Count, ...] = ()) -> Transaction:
    """Debit pending_withdrawal, credit the customer's balance. Its id is the hold's."""
    return hold(
        _transaction_id(withdrawal.id, "hold"),
        "withdrawal_hold",
        withdrawal.id,
        source=spendable(withdrawal.user_id),
        pending=pending_withdrawal(withdrawal.user_id),
        amount=withdrawal.amount,
    )._replace(counts=counts)


def paid(withdrawal: Withdrawal, buffer_shard: str = "") -> Transaction:
    """At finality: the hold is captured into the buffer, and the custody mirror follows the chain."""
    assert withdrawal.hold_id is not None
    return capture(
        _transaction_id(withdrawal.id, "pay"),
        "withdrawal",
        withdrawal.id,
        hold_id=withdrawal.hold_id,
        amount=withdrawal.amount,
        legs=(
            debit(buffer(buffer_shard), withdrawal.amount),
            debit(WORLD, withdrawal.amount),
            credit(custody(withdrawal.chain), withdrawal.amount),
        ),
    )


def released(withdrawal: Withdrawal) -> Transaction:
    """What was held goes back to the customer, and counts towards the day's limits no more."""
    assert withdrawal.hold_id is not None
    return void(
        _transaction_id(withdrawal.id, "release"), "withdrawal_release", withdrawal.id, hold_id=withdrawal.hold_id
    )._replace(counts=taken_back(withdrawal.user_id, withdrawal.chain, withdrawal.amount, withdrawal.requested_at))


def settled(withdrawal: Withdrawal, tx_hash: str | None = None, *, amount: str | None = None) -> Emit:
    """Tells the end of a withdrawal. `amount`: as it was written, where it is no amount."""
    event = WithdrawalSettled.model_validate(
        {
            "withdrawal_id": withdrawal.id,
            "user_id": withdrawal.user_id,
            "rail": withdrawal.rail,
            "chain": withdrawal.chain,
            "asset": withdrawal.asset,
            "amount": amount or format_amount(withdrawal.amount),
            "to": withdrawal.recipient,
            "outcome": withdrawal.status,
            "code": withdrawal.code,
            "tx_hash": tx_hash,
        }
    )
    return Emit(WITHDRAWALS_SETTLED, withdrawal.user_id, event, withdrawal.id)
