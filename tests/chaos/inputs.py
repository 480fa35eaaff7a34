"""What went in, and what was broken, in order: the oracle judges by the first, the history of a difference shows both."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Input:
    """One thing that was asked or told.

    kind    approve | deposit | inject | ghost | report | withdraw | cancel | order | malformed | fund
    user    "" where it is nobody's
    key     the one name by which it is found again: transaction hash, idempotency key, order id …
    about   the rest, by kind (load.py)
    """

    kind: str
    user: str
    key: str
    about: dict[str, Any] = field(default_factory=dict)
    at_s: float = field(default_factory=time.time)
    is_done: bool = False


@dataclass
class Fault:
    """`in_flight`: events that were asked for and had not come to their end when it hit."""

    kind: str
    target: str
    in_flight: int
    at_s: float = field(default_factory=time.time)
    until_s: float = 0.0


@dataclass
class History:
    """Everything of one run."""

    seed: int
    started_s: float = field(default_factory=time.time)
    inputs: list[Input] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def add(self, kind: str, user: str, key: str, **about: Any) -> Input:
        made = Input(kind, user, key, about)
        self.inputs.append(made)
        return made

    def of(self, *kinds: str) -> list[Input]:
        return [one for one in self.inputs if one.kind in kinds]

    @property
    def in_flight(self) -> int:
        return sum(not one.is_done for one in self.inputs)

    def hits(self) -> dict[str, list[int]]:
        """By kind of fault: how many events were in flight at each."""
        found: defaultdict[str, list[int]] = defaultdict(list)
        for fault in self.faults:
            found[fault.kind].append(fault.in_flight)
        return dict(found)

    def counts(self) -> Counter[str]:
        return Counter(one.kind for one in self.inputs)

    def lines(self, keys: set[str], user: str = "") -> list[str]:
        """The smallest history of these: their inputs, in order, and the faults from the first of them on."""
        mine = [one for one in self.inputs if one.key in keys] or [
            one for one in self.inputs if user and one.user == user
        ]
        if not mine:
            return ["no input of it: it came from nowhere"]
        first, last = mine[0].at_s, mine[-1].at_s + 60
        told = [(one.at_s, f"{one.kind} {one.user} {one.key} {one.about}") for one in mine]
        told += [
            (one.at_s, f"    fault {one.kind} of {one.target}, {one.in_flight} in flight, until {self._s(one.until_s)}")
            for one in self.faults
            if first - 10 <= one.at_s <= last
        ]
        return [f"{self._s(at)} {text}" for at, text in sorted(told)]

    def _s(self, at_s: float) -> str:
        return f"{at_s - self.started_s:7.2f}s" if at_s else "the end"
