"""Why a message could not be read.

EventRefused (code, reason)
 ├── not_json             the value is not JSON
 ├── wrong_schema         the JSON is not this event: a field is missing, of another type or out of range
 ├── unsupported_version  the event is of a version this program does not know
 ├── bad_envelope         a CloudEvents header is not what the binary mode says
 ├── missing_key          the message has no key; every topic has one (topics/catalog.py)
 └── too_large            the value is over the limit of an input
"""

from __future__ import annotations

from enum import StrEnum


class EventCode(StrEnum):
    """Stable codes: dead-letter header, problem `code` and metric label alike."""

    NOT_JSON = "not_json"
    WRONG_SCHEMA = "wrong_schema"
    UNSUPPORTED_VERSION = "unsupported_version"
    BAD_ENVELOPE = "bad_envelope"
    MISSING_KEY = "missing_key"
    TOO_LARGE = "too_large"


class EventRefused(Exception):
    """The message can never be read; it goes to the dead letters with this code and reason."""

    def __init__(self, code: EventCode, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason
