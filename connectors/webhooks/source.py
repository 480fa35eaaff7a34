"""What the bridge asks of a vendor's part: is this request theirs, and what does it say?

Refused (code, status)     the request is not taken; the vendor gets a problem answer
 ├── missing_signature     401  a header that the scheme needs is absent or empty
 ├── bad_signature         401  the signature is not one, or not over these bytes, or not with this key
 ├── stale_signature       401  the time that the vendor signed is too far from ours: a replay
 ├── unknown_key           401  the vendor knows no such key
 ├── unknown_topic         401  signed, if at all, for somebody else's subscription
 ├── unsupported_algorithm 400  an algorithm we do not accept
 └── key_unavailable       503  the key could not be looked up now; the vendor should send again
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from topics.catalog import Topic
from topics.events import Event


class RefusalCode(StrEnum):
    """Stable codes: problem `code` and metric label alike."""

    MISSING_SIGNATURE = "missing_signature"
    BAD_SIGNATURE = "bad_signature"
    STALE_SIGNATURE = "stale_signature"
    UNKNOWN_KEY = "unknown_key"
    UNKNOWN_TOPIC = "unknown_topic"
    UNSUPPORTED_ALGORITHM = "unsupported_algorithm"
    KEY_UNAVAILABLE = "key_unavailable"


_STATUS = {RefusalCode.UNSUPPORTED_ALGORITHM: 400, RefusalCode.KEY_UNAVAILABLE: 503}


class Refused(Exception):
    """The request is not taken. `reason` goes to the sender and the log: never a secret, never a computed signature."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason

    @property
    def status(self) -> int:
        return _STATUS.get(self.code, 401)


@dataclass(frozen=True, slots=True)
class Publish:
    """This event is to be said on `topic`. (`source`, `event_id`) name the vendor's fact, the same for every repeat."""

    topic: Topic
    key: bytes
    event: Event
    event_id: str
    source: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """Understood, and nothing of it is ours to say."""

    code: str
    """From a fixed set (a metric label), never from the body."""
    reason: str = ""
    """Free text for the log."""


NOT_UNDERSTOOD: Final = ("not_json", "wrong_schema", "unsupported_version", "unknown_type", "unknown_state")
"""The codes that a vendor's novelty has."""


@dataclass(frozen=True, slots=True)
class NotUnderstood:
    """Genuine, but we cannot read it: the bytes go to `webhooks.dlq`."""

    code: str
    """From a fixed set (a metric label and a header), never from the body."""
    reason: str


@dataclass(frozen=True, slots=True)
class Act:
    """Genuine, and asks for something other than a message: it is done before the answer. When it raises `NotNow`, the vendor
    is asked to send again."""

    code: str
    """As Ignored.code."""
    act: Callable[[], Awaitable[None]]


class NotNow(Exception):
    """What a webhook asks for could not be done now. The text goes to the log."""


Translation = Publish | Ignored | NotUnderstood | Act


class WebhookSource(Protocol):
    """One vendor's webhooks."""

    @property
    def vendor(self) -> str:
        """`circle`, `sumsub`: a metric label, and the key of its dead letters."""

    async def verify(self, headers: Mapping[str, str], body: bytes) -> None:
        """Returns when the vendor signed exactly these bytes; raises Refused otherwise. Header names: any case."""

    def translate(self, body: bytes) -> tuple[Translation, ...]:
        """What verified bytes say. Pure and total: no bytes make it raise."""


def header(headers: Mapping[str, str], name: str) -> str | None:
    """A header's value, its name in any case; None when absent or empty."""
    wanted = name.lower()
    return next((value for key, value in headers.items() if key.lower() == wanted and value), None)
