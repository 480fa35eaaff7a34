"""CloudEvents 1.0 in Kafka binary mode: attributes in `ce_` headers, the event's JSON as the value, our key as the key.

Producers outside the project may send the JSON alone: the id is then the payload's own identity, the source `external`.
Other headers: `traceparent` (W3C), `attempt` (a repeat of ours, from the schedule; absent = 1).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from topics.catalog import INPUT_BYTES_MAX, Topic
from topics.errors import EventCode, EventRefused
from topics.events import Event

Headers = Sequence[tuple[str, bytes | None]]
"""As Kafka has them: a value may be absent, a name may come twice."""

CONTENT_TYPE: Final = b"application/json"
EXTERNAL_SOURCE: Final = "external"
ID_LENGTH_MAX: Final = 512


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
    headers = [
        ("ce_specversion", b"1.0"),
        ("ce_id", event_id.encode()),
        ("ce_type", event_type.encode()),
        ("ce_source", source.encode()),
        ("ce_time", time.isoformat().encode()),
        ("content-type", CONTENT_TYPE),
    ]
    if traceparent is not None:
        headers.append(("traceparent", traceparent.encode()))
    return headers


def value_of(event: Event) -> bytes:
    """The event's JSON."""
    return event.model_dump_json().encode()


def read(topic: Topic, value: bytes | None, headers: Headers) -> Received:
    """A message of `topic` as an event. Raises EventRefused; no bytes make it raise anything else."""
    if value is None:
        raise EventRefused(EventCode.NOT_JSON, "the message has no value")
    if len(value) > INPUT_BYTES_MAX:
        raise EventRefused(EventCode.TOO_LARGE, f"{len(value)} bytes; at most {INPUT_BYTES_MAX}")
    attributes = _attributes(headers)
    model = _model(topic, attributes.get("ce_type"))
    try:
        event = model.model_validate_json(value)
    except ValidationError as error:
        raise _refusal(error) from None
    source = attributes.get("ce_source", EXTERNAL_SOURCE)
    event_id = attributes.get("ce_id") or event.identity()
    return Received(event_id, source, event, _attempt(attributes), _traceparent(attributes))


_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
_READ = frozenset({"ce_id", "ce_type", "ce_source", "ce_specversion", "traceparent", "attempt"})


def _attributes(headers: Headers) -> dict[str, str]:
    try:
        found = {name: value.decode() for name, value in headers if name in _READ and value is not None}
    except UnicodeDecodeError:
        raise EventRefused(EventCode.BAD_ENVELOPE, "a CloudEvents header is not UTF-8") from None
    if found.get("ce_specversion", "1.0") != "1.0":
        raise EventRefused(EventCode.BAD_ENVELOPE, "ce_specversion is not 1.0")
    for name in ("ce_id", "ce_source"):
        text = found.get(name)
        if text is not None and not (0 < len(text) <= ID_LENGTH_MAX and "\0" not in text):
            raise EventRefused(EventCode.BAD_ENVELOPE, f"{name} is empty, too long or has a NUL")
    return found


def _traceparent(attributes: dict[str, str]) -> str | None:
    """W3C: one that is malformed is as none. It goes into every message and row that the event causes."""
    text = attributes.get("traceparent", "")
    return text if _TRACEPARENT.fullmatch(text) else None


def _attempt(attributes: dict[str, str]) -> int:
    text = attributes.get("attempt", "1")
    if not (text.isascii() and text.isdigit() and 0 < int(text[:6]) < 32_000 and len(text) <= 5):
        raise EventRefused(EventCode.BAD_ENVELOPE, "attempt is not a number from 1 to 31999")
    return int(text)


def _model(topic: Topic, ce_type: str | None) -> type[Event]:
    if ce_type is None or (len(topic.models) == 1 and ce_type == topic.models[0].ce_type()):
        return topic.models[0]
    for model in topic.models:
        if model.ce_type() == ce_type:
            return model
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
