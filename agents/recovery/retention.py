"""How long what guards against a repeat is kept. Pure; docs/adr/0018 has the reasons.

An inbox row stays as long as Kafka may bring its event again: the retention of the stage's topic, and a margin. Kafka deletes
whole segments and writes to one for up to a week, so a record lives up to a week longer than its topic says. What was refused,
or done only at a further attempt, may come again out of a dead letter: it stays as long as those do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from topics import catalog

FOR_EVER: Final = frozenset({"request_wallets", "freeze_wallets"})
"""Where the vendor's times cannot be read, the order of arrival decides who may withdraw (kyc_standing.py): no row but the inbox's
says that an approval was there before the rejection. One row for each word of a vendor about a customer."""
MARGIN_DAYS_MIN: Final = 8
"""A segment's week, and a day for clocks, for the broker's own pace and for ours."""


class Kept(NamedTuple):
    """Until when a stage's rows may go that are older."""

    stage: str
    plain: datetime
    """Of what was done at once."""
    other: datetime
    """Of all else that has ended."""


def kept(
    stages: Iterable[tuple[str, str]], retentions: Mapping[str, int], margin: timedelta, now: datetime
) -> list[Kept]:
    """`stages`: (name, its topic without prefix); `retentions`: topic -> milliseconds as the broker has them, below zero for
    ever. A stage is left out where nothing may go, or nobody knows."""
    found: dict[str, Kept] = {}
    unknown: set[str] = set(FOR_EVER)
    for stage, name in stages:
        plain = _lasts(name, retentions)
        other = _lasts(f"{name}.dlq", retentions) if not name.endswith(".dlq") else plain
        if plain is None or other is None:
            unknown.add(stage)
            continue
        one = Kept(stage, now - margin - plain, now - margin - max(plain, other))
        known = found.get(stage, one)  # one that read another topic before: the longer
        found[stage] = Kept(stage, min(known.plain, one.plain), min(known.other, one.other))
    return [one for stage, one in sorted(found.items()) if stage not in unknown]


def longest(retentions: Mapping[str, int], margin: timedelta, now: datetime) -> datetime:
    """Before which nothing that Kafka may still bring was written."""
    lasting = [_lasts(topic.name, retentions) for topic in catalog.TOPICS if not topic.compacted]
    return now - margin - max(one for one in lasting if one is not None)


def _lasts(name: str, retentions: Mapping[str, int]) -> timedelta | None:
    """The longer of what is declared and what the broker has; None: for ever, or not declared."""
    try:
        declared = catalog.by_name(name).retention_ms
    except KeyError:
        return None
    given = retentions.get(name, declared)
    return None if declared < 0 or given < 0 else timedelta(milliseconds=max(declared, given))
