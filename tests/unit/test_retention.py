"""How long what guards against a repeat is kept."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from agents.recovery.retention import FOR_EVER, MARGIN_DAYS_MIN, Kept, kept, longest
from topics import catalog
from topics.catalog import DAY_MS, DEPOSITS_NOTIFIED, INPUTS

NOW = datetime(2026, 7, 1, tzinfo=UTC)
DAY = timedelta(days=1)
MARGIN = 14 * DAY


def only(stage: str, topic: str, retentions: dict[str, int] | None = None) -> Kept | None:
    found = kept([(stage, topic)], retentions or {}, MARGIN, NOW)
    return found[0] if found else None


@pytest.mark.parametrize("topic", INPUTS, ids=lambda topic: topic.name)
def test_an_inbox_row_outlives_its_event_in_kafka_and_its_dead_letter(topic: catalog.Topic) -> None:
    """A record lives up to a segment's week longer than its topic says."""
    found = only("some_stage", topic.name)
    assert found is not None
    week = timedelta(days=7)
    assert NOW - found.plain > timedelta(milliseconds=topic.retention_ms) + week
    assert NOW - found.other > timedelta(milliseconds=topic.dlq.retention_ms) + week
    assert found.other <= found.plain
    assert timedelta(days=MARGIN_DAYS_MIN) > week


def test_what_the_broker_keeps_longer_than_declared_is_guarded_as_long() -> None:
    name = DEPOSITS_NOTIFIED.name
    declared = Kept("s", NOW - 21 * DAY, NOW - 104 * DAY)
    assert only("s", name) == declared
    assert only("s", name, {name: DAY_MS}) == declared, "a broker that keeps less does not shorten it"
    assert only("s", name, {name: 30 * DAY_MS}) == declared._replace(plain=NOW - 44 * DAY)
    assert only("s", name, {f"{name}.dlq": 365 * DAY_MS}) == declared._replace(other=NOW - 379 * DAY)
    assert only("s", name, {name: 200 * DAY_MS}) == Kept("s", NOW - 214 * DAY, NOW - 214 * DAY)
    assert only("s", name, {name: -1}) is None, "for ever"


def test_what_nobody_declares_or_nothing_else_guards_is_never_forgotten() -> None:
    assert only("s", "a.topic.of.the.past") is None
    for stage in FOR_EVER:
        assert only(stage, DEPOSITS_NOTIFIED.name) is None
    two = [("s", DEPOSITS_NOTIFIED.name), ("s", "chain.heads")]
    assert kept(two, {}, MARGIN, NOW) == [Kept("s", NOW - 21 * DAY, NOW - 104 * DAY)], "the longer of two topics"
    assert kept([*two, ("s", "unknown")], {}, MARGIN, NOW) == []
    assert only("store", "chain.heads.dlq") == Kept("store", NOW - 104 * DAY, NOW - 104 * DAY)
    assert longest({}, MARGIN, NOW) == NOW - 104 * DAY
