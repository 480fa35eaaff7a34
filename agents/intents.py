"""Rows of an intended call: what is asked, of whom, with one idempotency key for life.

Id and key are derived from (stage, event, item, generation), so that even an intent lost with its database repeats the
same key to the partner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import orjson

from agents.outcome import Call, Stage
from ledger.rows import Changes
from ledger.tables import CALL_MEMBERS, CALLS

if TYPE_CHECKING:
    from agents.item import Item

OPEN = "open"
CONCLUDED = "concluded"


def call_id(stage: str, event_uid: str, item: str, generation: int = 1) -> str:
    """32 hex digits."""
    name = "\0".join((stage, event_uid, item, str(generation)))
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"call").hexdigest()


def idempotency_key(call: str) -> UUID:
    """The call's key in the form of a random UUID (version 4), as partners demand."""
    return UUID(bytes=hashlib.blake2b(call.encode(), digest_size=16, person=b"key").digest(), version=4)


def intent_rows(
    changes: Changes, stage: Stage[Any], item: Item, event_uid: str, calls: Sequence[Call], at: datetime
) -> None:
    """Adds the calls of one event and its membership in them."""
    assert item.received is not None
    event = item.received.event.model_dump(mode="json")
    trace = item.received.traceparent
    for call in calls:
        key = call_id(stage.name, event_uid, call.item)
        fingerprint = hashlib.blake2b(orjson.dumps(call.request, option=orjson.OPT_SORT_KEYS), digest_size=16).digest()
        changes.insert(
            CALLS,
            (
                key,
                stage.name,
                stage.partner,
                stage.operation,
                idempotency_key(key).hex,
                call.request,
                fingerprint,
                OPEN,
                at,
                None,
            ),
        )
        context = {**call.context, "event": event, "traceparent": trace}
        changes.insert(CALL_MEMBERS, (stage.name, event_uid, call.item, key, context))
