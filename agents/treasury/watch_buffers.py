"""buffers.levels -> the table of levels (a Faust table) -> /buffers, stablerail_buffer_level

Decides:  whether a level is newer than the one that the table has.
Key:      the account; the topic has one partition, so one worker has all levels.
Repeats:  harmless, and so is any order: the highest version wins.
Refuses:  what cannot be read, with a line in the log: the next level of the account replaces it.

A view for people and alerts; what may be spent is decided on the locked account.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import structlog

from ledger.accounts import AccountType
from topics.catalog import BUFFERS_LEVELS
from topics.envelope import read
from topics.errors import EventRefused
from topics.events import BufferLevel
from topics.money import format_amount

_log = structlog.get_logger()

Row = dict[str, Any]
"""One account in the table: what its change log keeps as JSON."""


@dataclass(frozen=True, slots=True)
class Level:
    """What a buffer holds: one account, or the sum of its shards."""

    account: str
    """Of a sum: the account's type."""
    type: str
    asset: str
    balance: int
    """Base units."""
    version: int | None
    """Of a sum there is none."""
    threshold: int | None
    """None: nobody said when this one is low."""

    @property
    def low(self) -> bool:
        return self.threshold is not None and self.balance < self.threshold

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        threshold = None if self.threshold is None else format_amount(self.threshold)
        return {
            "account": self.account,
            "asset": self.asset,
            "balance": format_amount(self.balance),
            "version": self.version,
            "threshold": threshold,
            "low": self.low,
        }


def take(table: MutableMapping[str, Row], value: bytes | None, headers: Iterable[tuple[str, bytes | None]]) -> None:
    """One message into the table. No bytes make it raise: a view stops for nothing."""
    try:
        event = read(BUFFERS_LEVELS, value, list(headers)).event
    except EventRefused as refused:
        _log.warning("buffers.unreadable", code=refused.code, reason=str(refused))
        return
    assert isinstance(event, BufferLevel)
    known = table.get(event.account)
    if known is None or known["version"] < event.account_version:
        table[event.account] = {
            "type": event.account_type,
            "asset": event.asset,
            "balance": str(event.balance),  # JSON's numbers end at 53 bits elsewhere
            "version": event.account_version,
        }


def levels(table: Mapping[str, Row], thresholds: Mapping[str, int]) -> list[Level]:
    """Each buffer as a whole, against its threshold, and behind it its accounts where it has several."""
    accounts: dict[tuple[str, str], list[Level]] = defaultdict(list)
    for account, row in sorted(table.items()):
        level = Level(account, row["type"], row["asset"], int(row["balance"]), row["version"], None)
        accounts[level.type, level.asset].append(level)
    found: list[Level] = []
    for (type, asset), parts in sorted(accounts.items()):
        version = parts[0].version if len(parts) == 1 else None
        name = parts[0].account if len(parts) == 1 else type
        found.append(Level(name, type, asset, sum(part.balance for part in parts), version, thresholds.get(type)))
        found += parts if len(parts) > 1 else []
    return found


def totals(found: Iterable[Level]) -> list[Level]:
    """Of `levels`, those of whole buffers."""
    seen: dict[str, Level] = {}
    for level in found:
        seen.setdefault(level.type, level)
    return list(seen.values())


def thresholds_of(usdc: int) -> dict[str, int]:
    return {AccountType.SYSTEM_BUFFER_USDC.value: usdc}
