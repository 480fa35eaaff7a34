"""Limits of withdrawals: their names, what holds where nobody set one, and what is counted of a day. Pure.

| name | what it limits |
| --- | --- |
| withdrawal.min.<chain> | the least that a withdrawal on that chain may be |
| withdrawal.max.<chain> | the most |
| withdrawal.user_day | what one customer may withdraw in a day (UTC), on all chains |
| withdrawal.network_day.<chain> | what all customers may withdraw on that chain in a day (UTC) |

People set them while the system runs (rows of `limits`); a day's use is a counter, exact whoever counts at once. What counts
is what was asked for that day and not taken back: a withdrawal that ends without being paid counts no more. The day is that of the
withdrawal's row, however much later the request is decided, as a dead letter that is redriven; a day's counters stay as long as a row
of that day, or of one before, is open (agents/recovery/maintain.py). A request that comes by Kafka has no row before it is decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from ledger.counters import Count

USER_DAY: Final = "withdrawal.user_day"
DAY_COUNTER: Final = "withdrawn"
"""The first word of a day's counters, before the day."""


def minimum(chain: str) -> str:
    return f"withdrawal.min.{chain}"


def maximum(chain: str) -> str:
    return f"withdrawal.max.{chain}"


def network_day(chain: str) -> str:
    return f"withdrawal.network_day.{chain}"


@dataclass(frozen=True)
class WithdrawalPolicy:
    """What the deployment's settings say. Amounts in base units."""

    tokens: Mapping[str, str]
    """Chains that withdrawals may leave by, and USDC's canonical contract on each."""
    minimum: int
    maximum: int
    user_day: int
    network_day: int
    custodian: Mapping[str, str | None] = field(default_factory=dict)
    """Chains that withdrawals may leave by through the custodian, and USDC's canonical contract there where we know it."""

    @property
    def chains(self) -> frozenset[str]:
        """By whatever rail."""
        return frozenset({*self.tokens, *self.custodian})

    def limits(self, chains: Iterable[str]) -> dict[str, int]:
        """Every limit there is for these chains, with what holds where nobody set another."""
        found = {USER_DAY: self.user_day}
        for chain in chains:
            found |= {
                minimum(chain): self.minimum,
                maximum(chain): self.maximum,
                network_day(chain): self.network_day,
            }
        return found


def _user_counter(user_id: str, day: str) -> str:
    return f"{DAY_COUNTER} {day} user {user_id}"


def _network_counter(chain: str, day: str) -> str:
    return f"{DAY_COUNTER} {day} network {chain}"


def counted(
    user_id: str, chain: str, amount: int, requested_at: datetime, limits: Mapping[str, int]
) -> tuple[Count, Count]:
    """What an accepted withdrawal counts towards, on the day that it was asked for."""
    day = _day(requested_at)
    return (
        Count(_user_counter(user_id, day), amount, limits[USER_DAY]),
        Count(_network_counter(chain, day), amount, limits[network_day(chain)]),
    )


def taken_back(user_id: str, chain: str, amount: int, requested_at: datetime) -> tuple[Count, Count]:
    """The same withdrawal, not paid: it counts no more."""
    day = _day(requested_at)
    return Count(_user_counter(user_id, day), -amount), Count(_network_counter(chain, day), -amount)


def exceeded(counter: str) -> str:
    """The stable code of the limit that a counter refused by."""
    return "network_day_limit" if counter.split(" ")[2] == "network" else "user_day_limit"


def _day(at: datetime) -> str:
    return at.astimezone(UTC).date().isoformat()
