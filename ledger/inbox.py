"""Which events a stage has settled: (stage, event id) -> attempt, fingerprint, outcome.

Claimed first with ON CONFLICT, never pre-read with `= ANY` (facts: a cached plan fell to a tenth). A row with outcome
`retry` is claimed again by a higher attempt with the same fingerprint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

from ledger.rows import Connection, uuids
from ledger.sql import load

_sql = load("ledger", "sql/inbox.sql")

InboxOutcome = Literal["done", "rejected", "retry"]


class Claim(NamedTuple):
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
    known: dict[str, bytes]
    """Fingerprints of what was settled before: a message with the same one is a repeat, with another one an error of
    the producer."""


async def claim(connection: Connection, stage: str, claims: Sequence[Claim], at: datetime) -> Claimed:
    """Claims events with distinct ids."""
    ids, attempts, fingerprints = zip(*claims, strict=True)
    rows = await connection.fetch(
        _sql.claim,
        stage,
        uuids(ids),
        "{" + ",".join(map(str, attempts)) + "}",
        "{" + ",".join([fingerprint.hex() for fingerprint in fingerprints]) + "}",
        at,
    )
    if len(rows) == len(claims) and not any(again for _, again in rows):
        return Claimed(frozenset(ids), frozenset(), {})
    again = frozenset(event_id.hex for event_id, again in rows if again)
    fresh = frozenset(event_id.hex for event_id, again in rows if not again)
    missing = [c.event_id for c in claims if c.event_id not in fresh and c.event_id not in again]
    known = {event_id.hex: fingerprint for event_id, fingerprint in await connection.fetch(_sql.known, stage, missing)}
    return Claimed(fresh, again, known)


async def settle(connection: Connection, stage: str, outcomes: dict[str, InboxOutcome]) -> None:
    """Marks claimed events whose outcome is not `done`."""
    if outcomes:
        await connection.execute(_sql.settle, stage, list(outcomes), list(outcomes.values()))
