"""A message on its way through a stage: its bytes, and what could be read of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from agents.outcome import Rejected, Stage
from topics.envelope import Headers, Received, event_uid, read
from topics.errors import EventCode, EventRefused


@dataclass(slots=True)
class Item:
    """One message on its way through a stage."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    received: Received | None
    refusal: Rejected | None
    uid: str
    fingerprint: bytes
    attempt: int

    @property
    def position_uid(self) -> str:
        """An id for a message that has none of its own: where it stands."""
        return event_uid("kafka", f"{self.topic}/{self.partition}/{self.offset}")


def read_item(stage: Stage[Any], record: Any) -> Item:
    """A raw Kafka record as an item; total: what cannot be read becomes a refusal."""
    value: bytes | None = record.value
    headers: Headers = list(record.headers)
    received: Received | None = None
    refusal: Rejected | None = None
    try:
        received = read(stage.source, value, headers)
        if not record.key:
            # without it the partition is chance, and order of a key means nothing
            refusal = Rejected(EventCode.MISSING_KEY, f"the key is the {stage.source.key}")
            received = None
    except EventRefused as error:
        refusal = Rejected(error.code, error.reason)
    item = Item(
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        timestamp_ms=record.timestamp,
        key=record.key,
        value=value,
        headers=headers,
        received=received,
        refusal=refusal,
        uid="",
        fingerprint=hashlib.blake2b(value or b"", digest_size=16).digest(),
        attempt=received.attempt if received else 1,
    )
    item.uid = received.uid if received else item.position_uid
    return item
