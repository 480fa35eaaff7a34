"""What became of deposits, as the metrics have it: whoever reported them, whatever the decision was."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from agents.deposits import figures
from agents.deposits.credit_deposits import DepositPolicy, Facts, decide, fold
from agents.deposits.figures import count_credits, count_ends
from agents.item import Item
from agents.outcome import Done, Outcome, Retry
from ledger.tables import DEPOSITS
from stablerail.metrics import Metrics
from topics.envelope import Received
from topics.events import DepositNotified, Evidence

AT = datetime(2026, 7, 1, tzinfo=UTC)
WALLET = "0x" + "1" * 40
SOLANA = "9xQeWvG816bUx9EPjHmaT23yvVM2ZWbrrpZb9PusVFin"
AGO_MS = 40
NOW_S = 1_780_000_000.0


def item(source: str, transfer_id: str, number: int, **fields: Any) -> Item:
    event = DepositNotified(**{
        "source": source, "transfer_id": transfer_id, "chain": "MATIC", "tx_hash": f"0x{number:064x}", "to": WALLET,
        "asset": "USDC", "amount": 5_000_000, "evidence": Evidence.CONFIRMED, **fields,
    })  # fmt: skip
    received = Received(transfer_id, "test", event, 1, None)
    record: Any = SimpleNamespace(timestamp=int(NOW_S * 1000) - AGO_MS)
    return Item(record, received, None, "", "", 1)


def test_reports_are_counted_by_source_and_outcome_and_circles_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "time", SimpleNamespace(time=lambda: NOW_S))
    facts = Facts(AT, DepositPolicy(minimum=1_000_000, chains_read=frozenset({"MATIC"})), {("MATIC", WALLET): "ada"})
    items = [
        item("circle", "a", 1),
        item("circle", "b", 2),
        item("circle", "b2", 2),  # a second equal one, that only Circle counts
        item("scanner", "c", 1),  # the first, from the chain
        item("bank of somewhere", "d", 3),
        item("circle", "e", 4, chain="DOGE"),
    ]
    outcomes: list[Outcome] = []
    for one in items:
        assert one.received is not None
        outcomes.append(decide(one.received, facts))
        if isinstance(outcomes[-1], Done):
            fold(facts, outcomes[-1])
    items.append(Item(items[0].record, None, None, "", "", 1))
    outcomes.append(Retry("later", 1))
    metrics = Metrics()
    count_credits(metrics, items, outcomes)

    def count(source: str, outcome: str) -> float | None:
        return metrics.registry.get_sample_value("stablerail_deposits_total", {"source": source, "outcome": outcome})

    assert (count("circle", "credited"), count("circle", "pending"), count("circle", "rejected")) == (2, 1, 1)
    assert (count("scanner", "known"), count("scanner", "credited")) == (1, None)
    assert (count("other", "credited"), count("other", "retry"), count("other", "rejected")) == (1, 1, 0)
    value = metrics.registry.get_sample_value
    assert value("stablerail_webhook_to_ledger_seconds_count") == 2
    assert value("stablerail_webhook_to_ledger_seconds_sum") == 2 * AGO_MS / 1000

    deposit = next(iter(facts.deposits.values()))
    ends = Done(upserts=tuple((DEPOSITS, deposit._replace(status=s)) for s in ("finalized", "reversed", "credited")))
    count_ends(metrics, [], [ends])
    assert [count("chain", outcome) for outcome in ("finalized", "reversed", "moved")] == [1, 1, 1]
