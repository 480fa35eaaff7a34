"""What became of the deposits of a committed batch, for the metrics: by who reported them, and how long the webhooks took.

One look per event and one call per figure: a batch may hold thousands. Outcomes: credited, finalized, reversed, orphaned,
moved, pending, vanished, known (said before, or no news), rejected, retry.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from agents.deposits.deposit import SCANNER, Deposit, Status
from agents.item import Item
from agents.outcome import Done, Outcome, Rejected
from agents.services import Observer
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_FINALIZED
from topics.events import DepositFinalized

CIRCLE: Final = "circle"
OTHER: Final = "other"
CHAIN: Final = "chain"
"""The source of what finality says."""
SOURCES: Final = (CIRCLE, SCANNER, OTHER)
"""Label values; an outside producer may call itself anything."""


def count_credits(observer: Observer, items: Sequence[Item], outcomes: Sequence[Outcome]) -> None:
    """For `credit_deposits`. A webhook's time runs from the bridge's publishing it."""
    credited: list[str] = []
    published_ms: list[int] = []
    others: list[tuple[str, str]] = []
    for item, outcome in zip(items, outcomes, strict=True):
        source: str = item.received.event.source if item.received is not None else OTHER  # type: ignore[attr-defined]
        if not isinstance(outcome, Done):
            others.append((source, "rejected" if isinstance(outcome, Rejected) else "retry"))
        elif len(outcome.emits) == 1 and outcome.emits[0][0] is DEPOSITS_CREDITED:  # nearly all
            credited.append(source)
            if source == CIRCLE:
                published_ms.append(item.record.timestamp)
        else:
            others += [(source, became) for became in _became(outcome)]
    counts = Counter(others)
    counts.update({(source, "credited"): events for source, events in Counter(credited).items()})
    _tell(observer, counts)
    if published_ms:
        now_ms = time.time() * 1000
        waits = {max(now_ms - at_ms, 0.0) / 1000: events for at_ms, events in Counter(published_ms).items()}
        observer.webhooks_in_ledger(waits)


def count_ends(observer: Observer, _items: Sequence[Item], outcomes: Sequence[Outcome]) -> None:
    """For `finalize_deposits`: one head may settle many deposits."""
    counts: Counter[tuple[str, str]] = Counter()
    for outcome in outcomes:
        if isinstance(outcome, Done):
            for _, row in outcome.upserts:
                if isinstance(row, Deposit):
                    counts[CHAIN, "moved" if row.status == Status.CREDITED else str(row.status)] += 1
    _tell(observer, counts)


def _became(done: Done) -> Iterator[str]:
    if not done.emits:
        status = next((row.status for _, row in (*done.inserts, *done.upserts) if isinstance(row, Deposit)), None)
        yield str(status) if status in (Status.PENDING, Status.VANISHED) else "known"
    for topic, _, event, _ in done.emits:
        if topic is DEPOSITS_CREDITED:
            yield "credited"
        elif topic is DEPOSITS_FINALIZED:
            assert isinstance(event, DepositFinalized)
            yield event.outcome


def _tell(observer: Observer, counts: Counter[tuple[str, str]]) -> None:
    for (source, outcome), events in counts.items():
        observer.deposits(source if source in SOURCES or source == CHAIN else OTHER, outcome, events)
