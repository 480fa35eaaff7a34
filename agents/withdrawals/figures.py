"""What became of the withdrawals of a committed batch, for the metrics: how they ended, and how long that took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from agents.item import Item
from agents.outcome import Done, Outcome
from agents.services import Observer
from agents.withdrawals.withdrawal import ENDED, Withdrawal

REFUSED: Final = "refused"
"""Failed before anything was held: the request was wrong, not we."""


def count_ends(observer: Observer, _items: Sequence[Item], outcomes: Sequence[Outcome]) -> None:
    """For the stages that end withdrawals."""
    for outcome in outcomes:
        for _, row in (*outcome.inserts, *outcome.upserts, *outcome.updates) if isinstance(outcome, Done) else ():
            if isinstance(row, Withdrawal) and row.status in ENDED:
                assert row.settled_at is not None
                ended = row.status if row.hold_id is not None else REFUSED
                observer.withdrawal_ended(ended, (row.settled_at - row.requested_at).total_seconds())
