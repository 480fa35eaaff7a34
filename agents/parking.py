"""Keys of an ordered stage that have an event in the schedule: later events of the key wait behind it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from agents.item import Item
from agents.outcome import Stage
from ledger.rows import Connection

PARKED: Final = "parked"
"""Schedule code of an event that waits behind another of its key."""
SENT: Final = "sent"
"""Schedule code of an event that was sent again and not settled since."""
PARKED_STEP_S: Final = 0.001
"""Between parked events of a key, so that they are due in their order."""


@dataclass(frozen=True, slots=True)
class Parked:
    """A key that has events in the schedule."""

    after_s: float
    """Until the last is due."""
    head: bool
    """One waits for its own sake, not only behind another."""
    rows: bool
    """Some wait."""
    sent: frozenset[str]
    """Those that are on their way again: newcomers may not overtake them."""

    @property
    def waits(self) -> bool:
        return self.rows or bool(self.sent)


async def parked_keys(
    connection: Connection, stage: Stage[Any], items: Iterable[Item], at: datetime
) -> dict[bytes, Parked]:
    if not stage.ordered:
        return {}
    keys = list({item.key for item in items if item.key is not None})
    rows = await connection.fetch(
        "SELECT key, max(available_at) FILTER (WHERE code <> $4), coalesce(bool_or(code NOT IN ($3, $4)), false),"
        " array_agg(replace(event_id::text, '-', '')) FILTER (WHERE code = $4)"
        " FROM schedule WHERE stage = $1 AND key = ANY($2::bytea[]) GROUP BY key",
        stage.name,
        keys,
        PARKED,
        SENT,
    )
    return {
        key: Parked(max((due - at).total_seconds(), 0.0) if due else 0.0, head, due is not None, frozenset(sent or ()))
        for key, due, head, sent in rows
    }
