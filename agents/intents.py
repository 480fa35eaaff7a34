"""What is wanted of a partner, and the calls made of it: each with one idempotency key for life.

    decide ─▶ Member (waiting) ─▶ StoredCall of one or several members ─▶ concluded | failed | split into other calls

A call's id and key are derived from (stage, generation, members), so that even an intent lost with its database repeats the
same key to the partner. A call is repeated as it was stored; only one that the partner refused is split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import orjson

from agents.outcome import Call, Done, Rejected, Stage
from connectors.errors import Refused
from ledger.rows import Changes, Row
from ledger.tables import CALL_MEMBERS

if TYPE_CHECKING:
    from agents.item import Item

KEY_TRUSTED: Final = timedelta(hours=24)
"""How long partners remember an idempotency key is not published. An older call is looked for before it is made again."""
SURELY_NEW: Final = timedelta(minutes=1)
"""An older call may have been made before the database was restored: how often it was taken is not in the journal."""

OPEN = "open"
CONCLUDED = "concluded"
SPLIT = "split"
FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Member:
    """What one event wants."""

    event_id: str
    item: str
    request: dict[str, Any]
    context: dict[str, Any]
    """What `conclude` needs to know of the event."""
    event: dict[str, Any]
    """The event as JSON."""
    traceparent: str | None
    queued_at: datetime

    def row(self, stage: str, call: str | None) -> Row:
        context = {**self.context, "event": self.event, "traceparent": self.traceparent}
        return (stage, self.event_id, self.item, call, context, self.request, self.queued_at)


@dataclass(frozen=True, slots=True)
class StoredCall:
    """A call as it was intended."""

    id: str
    idempotency_key: UUID
    request: dict[str, Any]
    members: tuple[Member, ...]
    created_at: datetime
    generation: int = 1
    attempts: int = 0
    """That ended without an answer and were counted."""
    takes: int = 1
    """How often a performer took it: above one, the partner may have heard of it."""
    parent_id: str | None = None
    error: str | None = None
    """Why the last attempt was none."""

    def may_be_known(self, now: datetime) -> bool:
        """Whether the partner may have heard of it before this attempt."""
        return self.takes > 1 or self.attempts > 0 or now - self.created_at > SURELY_NEW

    def outlived_its_key(self, now: datetime) -> bool:
        """Whether the partner may have forgotten that it has heard of it."""
        return now - self.created_at > KEY_TRUSTED

    def row(self, stage: Stage[Any], state: str, at: datetime | None, due: datetime | None, error: str | None) -> Row:
        """`at`: when it ended."""
        fingerprint = hashlib.blake2b(orjson.dumps(self.request, option=orjson.OPT_SORT_KEYS), digest_size=16).digest()
        return (
            self.id, stage.name, stage.partner, stage.operation, self.idempotency_key.hex, self.request, fingerprint,
            state, self.created_at, at, self.generation, self.attempts, due, error, self.parent_id,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """Members of a call that go on as a call of their own."""

    members: tuple[Member, ...]
    attempts: int = 0
    """Counted already, where the part has failed before."""
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Conclusion:
    """The end of a call: what became of its members. Each is in `done`, has a letter, or is in a part."""

    done: Done = field(default_factory=Done)
    letters: tuple[tuple[Member, Rejected], ...] = ()
    parts: tuple[Part, ...] = ()
    traces: Mapping[str, str | None] = field(default_factory=dict)
    """Of what `done` emits: event id -> traceparent."""
    failed: bool = False
    """The partner gave no answer until the attempts were used up: the call may be opened again, with its key."""

    @property
    def state(self) -> str:
        return SPLIT if self.parts else FAILED if self.failed else CONCLUDED


@dataclass(frozen=True, slots=True)
class Again:
    """No answer, or none that is the end: the same call later. Without `counted` it is no attempt."""

    code: str
    after_s: float | None = None
    """When, where the partner says so."""
    counted: bool = True


@dataclass(frozen=True, slots=True)
class Ended:
    """A call that came back."""

    call: StoredCall
    answer: dict[str, Any] | Refused | Again


def call_id(stage: str, members: Sequence[tuple[str, str]], generation: int = 1) -> str:
    """Of members as (event id, item). 32 hex digits."""
    name = "\0".join((stage, str(generation), *(part for member in sorted(members) for part in member)))
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"call").hexdigest()


def idempotency_key(call: str) -> UUID:
    """The call's key in the form of a random UUID (version 4), as partners demand."""
    return UUID(bytes=hashlib.blake2b(call.encode(), digest_size=16, person=b"key").digest(), version=4)


def form(
    stage: str, members: Sequence[Member], request: dict[str, Any], at: datetime, parent: StoredCall | None = None
) -> StoredCall:
    """A new call of these members."""
    generation = parent.generation + 1 if parent else 1
    key = call_id(stage, [(member.event_id, member.item) for member in members], generation)
    return StoredCall(
        key, idempotency_key(key), request, tuple(members), at, generation, parent_id=parent.id if parent else None
    )


def intent_rows(changes: Changes, stage: Stage[Any], item: Item, calls: Sequence[Call], at: datetime) -> None:
    """Adds what one event wants; a performer makes calls of it."""
    assert item.received is not None
    event = item.received.event.model_dump(mode="json")
    for call in calls:
        member = Member(item.uid, call.item, call.request, call.context, event, item.received.traceparent, at)
        changes.insert(CALL_MEMBERS, member.row(stage.name, None))
