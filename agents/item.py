"""A message on its way through a stage: its bytes, and what could be read of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from agents.outcome import Rejected, Stage
from agents.transport import Record
from topics.envelope import Received, event_uid, read
from topics.errors import EventCode, EventRefused


@dataclass(slots=True)
class Item:
    """One message on its way through a stage."""

    record: Record
    received: Received | None
    refusal: Rejected | None
    uid: str
    """By which the inbox knows it; 32 hex digits."""
    fingerprint: str
    """Of its bytes; 32 hex digits."""
    attempt: int
    again: bool = False
    """Its inbox row exists: it is a repeat that we scheduled."""

    @property
    def topic(self) -> str:
        return self.record.topic

    @property
    def partition(self) -> int:
        return self.record.partition

    @property
    def offset(self) -> int:
        return self.record.offset

    @property
    def key(self) -> bytes | None:
        return self.record.key

    @property
    def position_uid(self) -> str:
        """An id for a message that has none of its own."""
        return position_uid(self.record)

    @property
    def former_uid(self) -> str:
        return former_uid(self.record)


def is_for(stage: Stage[Any], item: Item) -> bool:
    """Whether the stage settles it. What cannot be read is everybody's."""
    return item.received is None or stage.takes(item.received.event)


def position_uid(record: Record) -> str:
    """Where the record stands, and its bytes: a topic that was made anew, or lost its end, has other records where these stood."""
    event_id, source = _position(record)
    return event_uid(source, event_id)


def former_uid(record: Record) -> str:
    """What `position_uid` was before it knew of the bytes: inbox rows of that time have it."""
    return event_uid(_SOURCE, _place(record))


_SOURCE: Final = "kafka"


def _place(record: Record) -> str:
    return f"{record.topic}/{record.partition}/{record.offset}"


def _position(record: Record) -> tuple[str, str]:
    """As id and source."""
    headers = ((name.encode(errors="surrogateescape"), value) for name, value in record.headers)
    digest = hashlib.blake2b(digest_size=16)
    for part in (record.key, record.value, *chain.from_iterable(headers)):
        digest.update(b"-" if part is None else b"%d:%b" % (len(part), part))
    return f"{_place(record)}/{digest.hexdigest()}", _SOURCE


def read_item(stage: Stage[Any], record: Record) -> Item:
    """A raw Kafka record as an item; total: what cannot be read becomes a refusal."""
    value = record.value
    fingerprint = hashlib.blake2b(value or b"", digest_size=16).hexdigest()
    if stage.reads is not None:
        received = Received(*_position(record), stage.reads(record), 1, None)
        return Item(record, received, None, received.uid, fingerprint, 1)
    try:
        received = read(stage.source, value, record.headers)
    except EventRefused as error:
        return Item(record, None, Rejected(error.code, error.reason), position_uid(record), fingerprint, 1)
    if not record.key:
        # without it the partition is chance, and order of a key means nothing
        refusal = Rejected(EventCode.MISSING_KEY, f"the key is the {stage.source.key}")
        return Item(record, None, refusal, position_uid(record), fingerprint, 1)
    stage.ahead(received)
    return Item(record, received, None, received.uid, fingerprint, received.attempt)
