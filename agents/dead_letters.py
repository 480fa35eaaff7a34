"""A refused message as a dead letter: its bytes, key and headers as they came, and why, in headers of ours."""

from __future__ import annotations

from datetime import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from agents.outcome import Rejected, Stage
from ledger.record import Message

if TYPE_CHECKING:
    from agents.stage import Item

PREFIX: Final = "dlq_"
REASON_LENGTH_MAX: Final = 500


def dead_letter(stage: Stage[Any], item: Item, rejected: Rejected, at: datetime) -> Message:
    """The message for `<topic>.dlq`. First time = when the broker got the message; last time = now."""
    first = datetime.fromtimestamp(item.timestamp_ms / 1000, tz=at.tzinfo)
    ours = {
        "stage": stage.name,
        "code": rejected.code,
        "reason": rejected.reason[:REASON_LENGTH_MAX],
        "topic": stage.source.name,
        "partition": str(item.partition),
        "offset": str(item.offset),
        "attempts": str(item.attempt),
        "code_version": version("stablerail"),
        "first_at": first.isoformat(),
        "last_at": at.isoformat(),
    }
    theirs = [(name, value) for name, value in item.headers if not name.startswith(PREFIX)]
    headers = [*theirs, *((PREFIX + name, text.encode()) for name, text in ours.items())]
    return Message(stage.source.dlq.name, item.key, item.value, headers=headers)
