"""Counters: what several workers share and must not exceed, a customer's withdrawals of a day or credit that is not final. Pure.

A counter is a row, locked before the accounts; a transaction counts towards it when it posts, and an excess is a refusal like
an overdraft. Its name says what is counted, and of which day where it is a day's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from ledger.errors import LimitExceeded

COUNTERS: Final = "counters"

StateKey = tuple[str, str]
"""(table, id) of a state row."""


class Count(NamedTuple):
    """What a transaction adds to a counter."""

    counter: str
    change: int
    """Below zero: what was counted before counts no more."""
    limit: int | None = None
    """The most that the counter may then hold; None: as much as it likes. Never looked at when `change` is below zero."""

    @property
    def key(self) -> StateKey:
        return COUNTERS, self.counter


class Counter(NamedTuple):
    """A row of `counters`."""

    name: str
    value: int = 0
    version: int = 0
    stored: bool = False

    @property
    def key(self) -> StateKey:
        return COUNTERS, self.name

    def accounts(self) -> tuple[()]:
        return ()


def counted(counts: Iterable[Count], states: Mapping[StateKey, Any]) -> dict[StateKey, Counter]:
    """The counters after these counts, nothing changed yet. Raises LimitExceeded."""
    after: dict[StateKey, Counter] = {}
    for count in counts:
        key = count.key
        before: Counter = after.get(key) or states.get(key) or Counter(count.counter)
        value = before.value + count.change
        if count.limit is not None and count.change > 0 and value > count.limit:
            raise LimitExceeded(count.counter, before.value, count.change, count.limit)
        after[key] = before._replace(value=value, version=before.version + 1)
    return after
