"""CloudEvents 1.0 in Kafka binary mode: attributes in `ce_` headers, the event's JSON as the value, our key as the key.

Producers outside the project may send the JSON alone: the id is then the payload's own identity, the source `external`.
Other headers: `traceparent` (W3C), `attempt` (a repeat of ours, from the schedule; absent = 1).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import Any, Final, NamedTuple, TypeVar

from pydantic import ValidationError
from pydantic_core import to_json

from topics.catalog import INPUT_BYTES_MAX, Topic
from topics.errors import EventCode, EventRefused
from topics.events import Event

Headers = Sequence[tuple[str, bytes | None]]
"""As Kafka has them: a value may be absent, a name may come twice."""

CONTENT_TYPE: Final = b"application/json"
EXTERNAL_SOURCE: Final = "external"
ID_LENGTH_MAX: Final = 512
ATTEMPT_MAX: Final = 1_999_999_999
"""What waits is looked at every few seconds, for as long as it takes: nothing may ever come to the end of it."""

V = TypeVar("V")


class Received(NamedTuple):
    """A message that could be read."""

    id: str
    source: str
    event: Event
    attempt: int
    traceparent: str | None

    @property
    def uid(self) -> str:
        """(source, id) as 32 hex digits: the inbox's key."""
        return event_uid(self.source, self.id)


def event_uid(source: str, event_id: str) -> str:
    """CloudEvents says that source and id together are unique; the inbox stores their digest, 32 hex digits."""
    return hashlib.blake2b(f"{source}\0{event_id}".encode(), digest_size=16).hexdigest()


def headers_of(
    event_type: str, *, event_id: str, source: str, time: datetime, traceparent: str | None = None
) -> list[tuple[str, bytes]]:
    """The headers of a message of ours. `event_type` is `Event.ce_type()`; `time` is aware."""
    headers = [("ce_id", event_id.encode()), *_shared_headers(event_type, source, time)]
    if traceparent is not None:
        headers.append(("traceparent", traceparent.encode()))
    return headers


@lru_cache(maxsize=100)
def _shared_headers(event_type: str, source: str, time: datetime) -> tuple[tuple[str, bytes], ...]:
    """What all messages of a commit have alike."""
    return (
        ("ce_specversion", b"1.0"),
        ("ce_type", event_type.encode()),
        ("ce_source", source.encode()),
        ("ce_time", time.isoformat().encode()),
        ("content-type", CONTENT_TYPE),
    )


def with_attempt(headers: Sequence[tuple[str, V]], attempt: int) -> list[tuple[str, V | bytes]]:
    """The headers of a message that is sent once more."""
    kept = [(name, value) for name, value in headers if name != "attempt"]
    return [*kept, ("attempt", str(attempt).encode())]


def value_of(event: Event) -> bytes:
    """The event's JSON."""
    return to_json(event)


def read(topic: Topic, value: bytes | None, headers: Headers) -> Received:
    """A message of `topic` as an event. Raises EventRefused; no bytes make it raise anything else."""
    if value is None:
        raise EventRefused(EventCode.NOT_JSON, "the message has no value")
    if len(value) > INPUT_BYTES_MAX:
        raise EventRefused(EventCode.TOO_LARGE, f"{len(value)} bytes; at most {INPUT_BYTES_MAX}")
    attributes = {name: text for name, text in headers if text is not None}
    model = _model(topic, attributes)
    raw_id, raw_source = attributes.get("ce_id"), attributes.get("ce_source")
    event_id = _name("ce_id", raw_id) if raw_id is not None else None
    source = _source(raw_source) if raw_source is not None else EXTERNAL_SOURCE
    attempt = _attempt(attributes["attempt"]) if "attempt" in attributes else 1
    traceparent = _traceparent(attributes["traceparent"]) if "traceparent" in attributes else None
    try:
        # what model_validate_json calls, two checks later
        event: Event = model.__pydantic_validator__.validate_json(value)
    except ValidationError as error:
        raise _refusal(error) from None
    return Received(event_id if event_id is not None else event.identity(), source, event, attempt, traceparent)


_TRACEPARENT = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def _name(header: str, raw: bytes) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise EventRefused(EventCode.BAD_ENVELOPE, f"{header} is not UTF-8") from None
    if not 0 < len(text) <= ID_LENGTH_MAX or "\0" in text:
        raise EventRefused(EventCode.BAD_ENVELOPE, f"{header} is empty, too long or has a NUL")
    return text


@lru_cache(maxsize=1_000)
def _source(raw: bytes) -> str:
    return _name("ce_source", raw)


def _traceparent(raw: bytes) -> str | None:
    """W3C: one that is malformed is as none. It goes into every message and row that the event causes."""
    return raw.decode() if _TRACEPARENT.fullmatch(raw) else None


def _attempt(raw: bytes) -> int:
    if not (raw.isdigit() and 0 < len(raw) <= 10 and 0 < int(raw) <= ATTEMPT_MAX):
        raise EventRefused(EventCode.BAD_ENVELOPE, f"attempt is not a number from 1 to {ATTEMPT_MAX}")
    return int(raw)


@cache
def _models(topic: Topic) -> dict[bytes | None, type[Event]]:
    return {None: topic.models[0], **{model.ce_type().encode(): model for model in topic.models}}


def _model(topic: Topic, attributes: Mapping[str, bytes]) -> type[Event]:
    if attributes.get("ce_specversion", b"1.0") != b"1.0":
        raise EventRefused(EventCode.BAD_ENVELOPE, "ce_specversion is not 1.0")
    raw = attributes.get("ce_type")
    model = _models(topic).get(raw)
    if model is not None:
        return model
    ce_type = (raw or b"").decode(errors="replace")
    known = ", ".join(model.ce_type() for model in topic.models)
    code = EventCode.WRONG_SCHEMA
    if any(ce_type.rpartition(".")[0] == model.ce_type().rpartition(".")[0] for model in topic.models):
        code = EventCode.UNSUPPORTED_VERSION
    raise EventRefused(code, f"ce_type {ce_type[:200]!r} is not read here; known: {known}")


def _refusal(error: ValidationError) -> EventRefused:
    first: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))[:200]
    if first["type"] == "json_invalid":
        return EventRefused(EventCode.NOT_JSON, first["msg"][:200])
    if where == "version":
        return EventRefused(EventCode.UNSUPPORTED_VERSION, first["msg"][:200])
    return EventRefused(EventCode.WRONG_SCHEMA, f"{where}: {first['msg'][:200]}")


def trace_id(traceparent: str | None) -> str | None:
    """The 32 hex digits that all lines and spans of one trace share; None without a trace."""
    return traceparent.split("-")[1] if traceparent is not None else None
