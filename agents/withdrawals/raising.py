"""When the next attempt of a nonce is signed, and what it offers. Pure; raise_fees carries it out, `tx show` explains it.

| why not | what it means |
| --- | --- |
| not_signed | it has no nonce yet |
| ended | the withdrawal is completed, failed or cancelled |
| in_a_block | one of its attempts is mined: the chain decides |
| nonce_taken, unexpected_transfers | another attempt cannot help; a person looks |
| review | it is in review for another reason than being stuck; only a person's wish signs |
| not_sent | no node is known to have it; sending it again is broadcast_transactions' business |
| cancelling | asked for a cancel, and its newest attempt is one |
| attempts_max | so many attempts were signed already |
| fees_over_cap | an eighth more, or what the market asks, is over the network's cap |
| low_gas | the signer's coins do not cover it |
| lane_paused | a person, a restore or a foreign nonce paused the lane: nothing is signed for it |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from agents.withdrawals.sign_transactions import CANCEL, CLEARS_ITSELF, FEES_OVER_CAP, GAS, LOW_GAS, PAUSED
from agents.withdrawals.withdrawal import (
    ENDED,
    NONCE_TAKEN,
    NOT_SIGNED,
    STUCK,
    UNEXPECTED_TRANSFERS,
    Attempt,
    AttemptStatus,
    Lane,
    Status,
    Withdrawal,
)
from chain.fees import FeePolicy, Fees, raised

ATTEMPTS_MAX: Final = 20
"""Of one nonce, also where a person insists."""
IN_FLIGHT: Final = frozenset({Status.BROADCASTING, Status.CONFIRMING})
ENDS_NONCE: Final = frozenset({AttemptStatus.MINED, AttemptStatus.CONFIRMED, AttemptStatus.REVERTED})

NOT_SIGNED_YET: Final = "not_signed"
HAS_ENDED: Final = "ended"
IN_A_BLOCK: Final = "in_a_block"
IN_REVIEW: Final = "review"
NOT_SENT: Final = "not_sent"
CANCELLING: Final = "cancelling"
ATTEMPTS_USED: Final = "attempts_max"
LANE_PAUSED: Final = "lane_paused"


@dataclass(frozen=True)
class RaisePolicy:
    """The rule, for a chain."""

    blocks: int = 20
    """Without the lane's next transaction, since it was next and since its newest attempt."""
    attempts_max: int = 6
    """The first included."""
    stuck_s: float = 1_800
    """Next of its lane for so long and in no block: a person must look."""


class Waiting(NamedTuple):
    """What is remembered of a nonce that the chain could take and does not."""

    n: int
    """Its newest attempt."""
    block: int
    """The head when that was first seen waiting."""
    at: datetime
    """When the nonce was first seen waiting."""
    told: str = ""
    """Why nothing more is signed, as a person was told."""

    def plain(self) -> dict[str, Any]:
        return {"n": self.n, "block": self.block, "at": self.at.isoformat(), "told": self.told}

    @classmethod
    def of_plain(cls, raw: dict[str, Any]) -> Waiting:
        return cls(raw["n"], raw["block"], datetime.fromisoformat(raw["at"]), raw["told"])


def hopeless(withdrawal: Withdrawal | None, group: Sequence[Attempt]) -> str:
    """Why no other attempt of the nonce can help, whoever wants one; "" where it can. `group`: all its attempts."""
    if withdrawal is None or not group or withdrawal.status in NOT_SIGNED:
        return NOT_SIGNED_YET
    if withdrawal.status in ENDED:
        return HAS_ENDED
    if any(attempt.status in ENDS_NONCE for attempt in group):
        return IN_A_BLOCK
    if withdrawal.status == Status.MANUAL_REVIEW and withdrawal.code in (NONCE_TAKEN, UNEXPECTED_TRANSFERS):
        return withdrawal.code or ""
    return ""


def not_by_rule(withdrawal: Withdrawal, newest: Attempt, base_fee: int) -> str:
    """Why the rule leaves it alone, whatever it would cost."""
    if withdrawal.status == Status.MANUAL_REVIEW and withdrawal.code != STUCK:
        return IN_REVIEW
    return NOT_SENT if is_unsent(newest, base_fee) else ""


def is_unsent(newest: Attempt, base_fee: int) -> bool:
    """No node is known to have it. Below the base fee one may have refused it, or thrown it out: then its silence is explained."""
    return newest.status == AttemptStatus.SIGNED and newest.max_fee >= base_fee


def offer(
    group: Sequence[Attempt], kind: str, attempts_max: int, market: Fees | None, policy: FeePolicy, wei: int
) -> Fees | str:
    """What the next attempt offers, or why there is none. `market`: what the chain asks now, None over the cap; `wei`: the
    signer's coins less what is in flight, this nonce's dearest attempt included."""
    newest = group[-1]
    if len(group) >= min(attempts_max, ATTEMPTS_MAX):
        return ATTEMPTS_USED
    fees = raised(Fees(newest.max_fee, newest.priority_fee), market, policy)
    if fees is None:
        return FEES_OVER_CAP
    return fees if dearer(group, GAS[kind] * fees.max_fee) <= wei else LOW_GAS


def dearer(group: Sequence[Attempt], cost: int) -> int:
    """What an attempt that may cost so much adds to what the nonce may cost at most."""
    return max(cost - max(attempt.gas_limit * attempt.max_fee for attempt in group), 0)


def next_kind(group: Sequence[Attempt], wish: str | None) -> str:
    """Of the next attempt: a cancel once a cancel was signed, so that the rule does not take back what a person asked for."""
    return CANCEL if wish == CANCEL else group[-1].kind


def is_shut(lane: Lane | None) -> bool:
    """Whether nothing is signed for the lane until somebody opens it."""
    return lane is None or (lane.status == PAUSED and lane.reason not in CLEARS_ITSELF)
