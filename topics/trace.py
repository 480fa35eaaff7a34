"""W3C trace context as messages carry it, and what is told of one step of a trace. Pure.

A trace survives a crash because nothing of it is kept in a process: the commit record holds each message's traceparent, and
the id of the span that publishes it is made from the message itself. Whoever publishes, once or twice, says the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

_IDS_AND_FLAGS = r"(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_TRACEPARENT = re.compile(rf"00-({_IDS_AND_FLAGS})|(?!00|ff)[0-9a-f]{{2}}-({_IDS_AND_FLAGS})(?:-.*)?", re.ASCII)


class Span(NamedTuple):
    """One step, when it is over. Both contexts are W3C traceparents of one trace."""

    name: str
    kind: Literal["server", "producer"]
    traceparent: str
    """Its own."""
    parent: str | None
    started_ns: int
    ended_ns: int
    attributes: Mapping[str, str]


Spans = Callable[[Span], None]
"""Where spans go. Cheap, and never raises for a collector's sake."""


def read_traceparent(header: str | None) -> str | None:
    """A caller's traceparent as version 00; None when it is none. Of a later version what 00 has is read, as W3C asks."""
    match = None if header is None else _TRACEPARENT.fullmatch(header)
    return None if match is None else f"00-{match[1] or match[2]}"


def is_sampled(traceparent: str) -> bool:
    return bool(int(traceparent[-2:], 16) & 1)


def child(traceparent: str, cause: str) -> str:
    """A span of the same trace, the same for the same cause."""
    version, trace_id, _, flags = traceparent.split("-")
    span_id = hashlib.blake2b(f"{trace_id}\0{cause}".encode(), digest_size=8, person=b"span").hexdigest()
    return f"{version}-{trace_id}-{span_id}-{flags}"
