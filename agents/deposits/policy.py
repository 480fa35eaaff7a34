"""When a deposit is credited: at once, at finality, or never. Pure.

| of a transfer to a wallet of ours | credited |
| --- | --- |
| within the limits of its chain | when it is notified |
| above the instant limit, above what its customer may have outstanding, or on a chain of `at_finality` | at finality |
| from a denied address, below the minimum, to a wallet without a known owner, to a closed account | nobody: parked at finality |

Outstanding is what is credited and not final. It is counted per customer, over all chains, in a counter of the ledger; only
deposits of chains with a bound are counted, and each row says what of it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property


class Held(StrEnum):
    """Why a deposit was not credited at once."""

    UNPROVEN = "unproven"
    """An n-th equal transfer that only a vendor's count speaks for."""
    AT_FINALITY = "at_finality"
    ABOVE_INSTANT_LIMIT = "above_instant_limit"
    ABOVE_OUTSTANDING_LIMIT = "above_outstanding_limit"
    DENIED = "denied"
    BELOW_MINIMUM = "below_minimum"
    UNKNOWN_OWNER = "unknown_owner"
    ACCOUNT_CLOSED = "account_closed"


@dataclass(frozen=True)
class DepositPolicy:
    minimum: int
    """Base units, as all amounts here."""
    chains_read: frozenset[str]
    """Chains whose finality we judge ourselves."""
    buffer_shards: int = 1
    at_finality: frozenset[str] = frozenset()
    """Chains on which nothing is credited before it is final."""
    instant_max: Mapping[str, int] = field(default_factory=dict)
    """By chain: a larger deposit is credited at finality."""
    outstanding_max: Mapping[str, int] = field(default_factory=dict)
    """By chain: what its customer may have outstanding, this deposit included, for it to be credited at once."""

    @cached_property
    def limited(self) -> bool:
        """Whether anything of it makes a deposit wait that would be credited otherwise."""
        return bool(self.at_finality or self.instant_max or self.outstanding_max)

    def parks(self, amount: int, user_id: str | None, *, denied: bool, closed: bool) -> Held | None:
        """Why nobody would be credited, were it final now."""
        if denied:
            return Held.DENIED
        if amount < self.minimum:
            return Held.BELOW_MINIMUM
        if user_id is None:
            return Held.UNKNOWN_OWNER
        return Held.ACCOUNT_CLOSED if closed else None

    def waits(self, chain: str, amount: int, outstanding: int) -> Held | None:
        """Why it is not credited at once, when it will be at finality."""
        if chain in self.at_finality:
            return Held.AT_FINALITY
        instant = self.instant_max.get(chain)
        if instant is not None and amount > instant:
            return Held.ABOVE_INSTANT_LIMIT
        bound = self.outstanding_max.get(chain)
        if bound is not None and outstanding + amount > bound:
            return Held.ABOVE_OUTSTANDING_LIMIT
        return None


def outstanding_of(user_id: str) -> str:
    """The name of a customer's counter."""
    return f"deposits.outstanding:{user_id}"
