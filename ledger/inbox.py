"""Which events a stage has settled: (stage, event id) -> attempt, fingerprint, outcome.

Claimed first with ON CONFLICT, never pre-read with `= ANY` (facts: a cached plan fell to a tenth). A row with outcome
`retry` is claimed again by a higher attempt with the same fingerprint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from ledger.rows import Connection
from ledger.sql import load

_sql = load("ledger", "sql/inbox.sql")

InboxOutcome = Literal["done", "rejected", "retry"]


@dataclass(frozen=True, slots=True)
class Claim:
    """An event as the inbox knows it."""

    event_id: str
    """32 hex digits."""
    attempt: int
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class Claimed:
    fresh: frozenset[str]
    """Ours to settle for the first time."""
    again: frozenset[str]
    """Ours to settle: a repeat that we scheduled."""
    reused: frozenset[str]
    """Settled before with other contents: an error of the producer."""


async def claim(connection: Connection, stage: str, claims: Sequence[Claim], at: datetime) -> Claimed:
    """Claims events with distinct ids; what is in no set of the result is a repeat with nothing to do."""
    ids = [c.event_id for c in claims]
    rows = await connection.fetch(
        _sql.claim, stage, ids, [c.attempt for c in claims], [c.fingerprint for c in claims], at
    )
    again = frozenset(event_id for event_id, updated in rows if updated)
    fresh = frozenset(event_id for event_id, updated in rows if not updated)
    if len(rows) == len(claims):
        return Claimed(fresh, again, frozenset())
    missing = [c for c in claims if c.event_id not in fresh and c.event_id not in again]
    known = {
        event_id: fingerprint
        for event_id, fingerprint, _ in await connection.fetch(_sql.known, stage, [c.event_id for c in missing])
    }
    reused = frozenset(c.event_id for c in missing if known.get(c.event_id) != c.fingerprint)
    return Claimed(fresh, again, reused)


async def settle(connection: Connection, stage: str, outcomes: dict[str, InboxOutcome]) -> None:
    """Marks claimed events whose outcome is not `done`."""
    if outcomes:
        await connection.execute(_sql.settle, stage, list(outcomes), list(outcomes.values()))
