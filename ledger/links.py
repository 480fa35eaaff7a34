"""What a commit record says it made of its owner rows: the places in the hash chains that a rebuild checks."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, NamedTuple

from ledger.commit import Seals, link
from ledger.errors import JournalBroken
from ledger.folding import rows_of
from ledger.record import CommitRecord, Proof
from ledger.rows import Row, Table
from ledger.tables import AUDIT, OWNERS

Key = tuple[str, str, int]
"""An owner row: stage, topic, partition."""


class Place(NamedTuple):
    """Where a chain stands."""

    epoch: int
    position: int
    head: bytes


BEGINNING: Final = Place(0, 0, b"")


class Link(NamedTuple):
    """A record's place in one chain."""

    owner: Key
    place: Place
    digest: bytes
    at: datetime
    actor: str
    summary: Any
    seals: Seals

    def head_after(self, head: bytes) -> bytes:
        """What the head must be when it was `head` before."""
        return link(head, self.digest, self.at, self.actor, self.summary, self.seals)


class Placed(NamedTuple):
    """A record of the journal by its places alone."""

    seq: int
    at: datetime
    links: list[Link]


def links_of(record: CommitRecord | Proof) -> list[Link]:
    """One per owner, at least one. Raises JournalBroken when the record's two halves do not agree."""
    try:
        audit, owners = _rows(record, AUDIT), _rows(record, OWNERS)
    except (ValueError, TypeError, IndexError) as error:
        raise JournalBroken(f"its proof cannot be read: {error}") from error
    places = {row[:3]: Place(*row[3:]) for row in owners}
    links = []
    for row in audit:
        stage, topic, partition, position, at, actor, summary, digest, head, *seals = row
        place = places.pop((stage, topic, partition), None)
        if place is None or (place.position, place.head) != (position, head):
            raise JournalBroken(f"audit and owner row of {name((stage, topic, partition))} do not agree")
        if digest != record.digest:
            raise JournalBroken(f"its contents are not those that {name((stage, topic, partition))} sealed")
        links.append(Link((stage, topic, partition), place, digest, at, actor, summary, (*seals,)))
    if places or not links:
        raise JournalBroken("its owners and its audit do not agree")
    return links


def name(owner: Key) -> str:
    """For messages."""
    stage, topic, partition = owner
    return f"{stage} {topic}[{partition}]"


def _rows(record: CommitRecord | Proof, table: Table) -> list[Row]:
    return [row for block in record.proof if block.table is table for row in rows_of(block)]
