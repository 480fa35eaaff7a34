"""A refused message as a dead letter: its bytes, key and headers as they came, and why, in headers of ours."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from agents.outcome import Rejected, Stage
from ledger.record import Message

if TYPE_CHECKING:
    from agents.item import Item

PREFIX: Final = "dlq_"
LETTER: Final = "dlq_letter"
"""Of a message that was redriven: which dead letter it was, so that it is the same one if it is refused again."""
REASON_LENGTH_MAX: Final = 500


def dead_letter(stage: Stage[Any], item: Item, rejected: Rejected, at: datetime) -> Message:
    """The message for `<topic>.dlq`. First time = when the broker got the message; last time = now."""
    ours = {
        "stage": stage.name,
        "event": item.uid,
        "code": rejected.code,
        "reason": rejected.reason[:REASON_LENGTH_MAX],
        "topic": stage.source.name,
        "partition": str(item.partition),
        "offset": str(item.offset),
        "attempts": str(item.attempt),
        "code_version": _code_version(),
        "first_at": _time(item.record.timestamp, at),
        "last_at": at.isoformat(),
    }
    theirs = [(name, value) for name, value in item.record.headers if name == LETTER or not name.startswith(PREFIX)]
    headers = [*theirs, *((PREFIX + name, text.encode()) for name, text in ours.items())]
    return Message(stage.source.dlq.name, item.key, item.record.value, headers=headers)


@cache
def _code_version() -> str:
    """Never raises: a dead letter that could not be written would be a bug that stops its partition."""
    try:
        return version("stablerail")
    except PackageNotFoundError:
        return "not installed"


def _time(timestamp_ms: int, at: datetime) -> str:
    """A producer may have chosen the time, and Kafka takes any in the past, also before every calendar."""
    try:
        return datetime.fromtimestamp(timestamp_ms / 1000, tz=at.tzinfo).isoformat()
    except (OverflowError, ValueError, OSError):
        return f"{timestamp_ms} ms"
