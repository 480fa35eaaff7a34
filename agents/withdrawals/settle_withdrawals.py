"""transactions.confirmed -> ledger: hold captured and mirror posted, or hold released -> withdrawals.settled

Decides:  how a withdrawal ends, by the transaction of its nonce that is final: a payment completes it, a revert fails it, a
          cancel cancels it.
Key:      the lane.
Repeats:  harmless; a withdrawal that has ended is left alone.
Refuses:  unknown_withdrawal, unknown_transaction, not_final  ->  transactions.confirmed.dlq

The rows are the truth: the event only names the transaction. What it was and how it ended is what its attempt says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from agents.outcome import Done, Outcome, Rejected, Stage
from agents.withdrawals import stored
from agents.withdrawals.attempts import read_attempts
from agents.withdrawals.figures import count_ends
from agents.withdrawals.track_confirmations import BLACKLISTED
from agents.withdrawals.withdrawal import (
    ENDED,
    NEXT,
    Attempt,
    AttemptStatus,
    Status,
    Withdrawal,
    moved,
    paid,
    released,
    settled,
)
from ledger.accounts import shard_of
from ledger.rows import Connection
from ledger.tables import WITHDRAWALS
from topics.catalog import TRANSACTIONS_CONFIRMED, WITHDRAWALS_SETTLED
from topics.envelope import Received
from topics.events import TransactionConfirmed

NAME: Final = "settle_withdrawals"
REVERTED: Final = "reverted"
"""The transaction was mined and did nothing."""


@dataclass
class Facts:
    now: datetime
    buffer_shards: int = 1
    withdrawals: dict[str, Withdrawal] = field(default_factory=dict)
    """Locked, by id."""
    attempts: dict[tuple[str, str], Attempt] = field(default_factory=dict)
    """By (chain, hash)."""


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, TransactionConfirmed)
    withdrawal = facts.withdrawals.get(event.withdrawal_id)
    if withdrawal is None:
        return Rejected("unknown_withdrawal", event.withdrawal_id)
    attempt = facts.attempts.get((event.chain, event.tx_hash))
    if attempt is None or attempt.withdrawal_id != withdrawal.id:
        return Rejected("unknown_transaction", event.tx_hash)
    if withdrawal.status in ENDED:
        return Done()
    final = attempt.status in (AttemptStatus.CONFIRMED, AttemptStatus.REVERTED)
    if not final or Status.COMPLETED not in NEXT[Status(withdrawal.status)]:
        return Rejected("not_final", f"{attempt.tx_hash} is {attempt.status}")
    status, code = _end(attempt, event)
    after, (row, line) = moved(withdrawal._replace(code=None), status, facts.now, NAME, code)
    completed = status is Status.COMPLETED
    shard = shard_of(withdrawal.user_id, facts.buffer_shards)
    return Done(
        postings=(paid(withdrawal, shard) if completed else released(withdrawal),),
        inserts=(line,),
        upserts=(row,),
        emits=(settled(after, attempt.tx_hash),),
    )


def _end(attempt: Attempt, event: TransactionConfirmed) -> tuple[Status, str | None]:
    if attempt.status == AttemptStatus.REVERTED:
        return Status.FAILED, BLACKLISTED if event.reason == BLACKLISTED else REVERTED
    return (Status.COMPLETED, None) if attempt.kind == "payment" else (Status.CANCELLED, None)


def fold(facts: Facts, done: Done) -> None:
    for table, row in done.upserts:
        if table is WITHDRAWALS:
            facts.withdrawals[row[0]] = Withdrawal(*row)


def stage(buffer_shards: int) -> Stage[Facts]:
    async def load(connection: Connection, events: Sequence[Received], _prepared: Any, at: datetime) -> Facts:
        named = [received.event for received in events if isinstance(received.event, TransactionConfirmed)]
        ids = {event.withdrawal_id for event in named if _is_id(event.withdrawal_id)}
        withdrawals = await stored.lock(connection, ids)
        attempts = await read_attempts(connection, {(event.chain.value, event.tx_hash) for event in named})
        return Facts(at, buffer_shards, withdrawals, attempts)

    return Stage(
        name=NAME,
        source=TRANSACTIONS_CONFIRMED,
        load=load,
        decide=decide,
        fold=fold,
        emits=(WITHDRAWALS_SETTLED,),
        figures=count_ends,
    )


def _is_id(text: str) -> bool:
    return len(text) == 32 and all(digit in "0123456789abcdef" for digit in text)
