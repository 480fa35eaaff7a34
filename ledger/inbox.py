"""Which events a stage has settled: (stage, event id) -> attempt, fingerprint, outcome.

Claimed first with ON CONFLICT, never pre-read with `= ANY` (facts: a cached plan fell to a tenth). A row with outcome
`retry` or `rejected` is claimed again by a higher attempt with the same fingerprint: a repeat that we scheduled, or a dead
letter that is redriven. What is done is never claimed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, NamedTuple, Protocol

from ledger.commit import Owner, held
from ledger.rows import Connection, numbers, uuids
from ledger.sql import load

_sql = load("ledger", "sql/inbox.sql")

InboxOutcome = Literal["done", "rejected", "retry"]


class Claim(NamedTuple):
    """An event as the inbox knows it."""

    uid: str
    """32 hex digits."""
    attempt: int
    fingerprint: str
    """Of its contents; 32 hex digits."""


class Claimable(Protocol):
    """What is claimed: a `Claim`, or whatever has its fields."""

    @property
    def uid(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Claimed:
    all_fresh: bool
    fresh: frozenset[str]
    """Ours to settle for the first time."""
    again: frozenset[str] = frozenset()
    """Ours to settle: a repeat that we scheduled, or redrove."""
    known: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of what was settled before: a message with the same one is a repeat, with another one an error of
    the producer."""


async def own_and_claim(
    connection: Connection, stage: str, epochs: dict[tuple[str, int], int], claims: Sequence[Claimable], at: datetime
) -> tuple[list[Owner], Claimed]:
    """Locks the owner rows of (topic, partition) -> our epoch, sorted, and claims events with distinct ids: one round trip.
    Raises Fenced when a row is another's; nothing is claimed then."""
    ids = [c.uid for c in claims]
    keys = sorted(epochs)
    rows = await connection.fetch(
        _sql.own_and_claim,
        stage,
        [topic for topic, _ in keys],
        [partition for _, partition in keys],
        [epochs[key] for key in keys],
        uuids(ids),
        numbers([c.attempt for c in claims]),
        uuids([c.fingerprint for c in claims]),
        at,
        len(claims),
    )
    owners = held([Owner(*row[:6]) for row in rows], stage, epochs)
    fresh, again = rows[0][6:]
    if fresh is None:
        return owners, Claimed(True, frozenset(ids))
    ours = frozenset(uid.hex for uid in fresh)
    repeats = frozenset(uid.hex for uid in again)
    missing = [uid for uid in ids if uid not in ours and uid not in repeats]
    return owners, Claimed(False, ours, repeats, await known(connection, stage, missing))


async def known(connection: Connection, stage: str, ids: Sequence[str]) -> dict[str, str]:
    """Fingerprints of those that were settled."""
    return {uid.hex: fingerprint.hex for uid, fingerprint in await connection.fetch(_sql.known, stage, ids)}


async def settle(connection: Connection, stage: str, outcomes: dict[str, InboxOutcome]) -> None:
    """Marks claimed events whose outcome is not `done`."""
    if outcomes:
        await connection.execute(_sql.settle, stage, list(outcomes), list(outcomes.values()))
