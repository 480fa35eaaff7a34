"""What a transaction may cost: EIP-1559 fees of what the last blocks paid, and the gas of a transfer. Pure; wei per gas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, Final, NamedTuple

from chain.assets import USDC
from chain.wire import amount, items, mapping
from topics.events import Chain

GWEI: Final = 10**9

HISTORY_BLOCKS: Final = 10
HISTORY_PERCENTILE: Final = 60
"""Of the tips of a block's transactions, by gas: a little above the middle, so that we are in the next blocks and not first."""
BASE_FEE_HEADROOM: Final = 2
"""The base fee rises by an eighth per full block at most: doubling takes six full blocks. What is not needed is not paid."""

TRANSFER_GAS: Final[Mapping[str, int]] = {USDC: 100_000}
"""Gas limit of a transfer by token, fixed. A transfer of USDC to an address that never held any uses 61,955; the rest is
margin for an upgrade of the token's code and is not paid unless used. `eth_estimateGas` is not asked: it fails where the
transfer would revert (a recipient on the token's blacklist), and whether a withdrawal reverts is the chain's to say, at
finality; it would also cost a request for each withdrawal."""


NOTHING_GAS: Final = 21_000
"""Of a transaction that calls nothing."""


@dataclass(frozen=True, slots=True)
class FeePolicy:
    """The bounds of one network."""

    priority_floor: int
    """Nodes and validators ignore less."""
    max_fee_cap: int
    """We never offer more; above it signing waits."""


POLICIES: Final[Mapping[Chain, FeePolicy]] = {
    # bor keeps nothing in its pool that tips less than 25 gwei
    Chain.MATIC: FeePolicy(priority_floor=25 * GWEI, max_fee_cap=2_000 * GWEI),
    Chain.ETH: FeePolicy(priority_floor=GWEI // 20, max_fee_cap=300 * GWEI),
}


RAISE: Final = (9, 8)
"""Of the fees of a nonce's next attempt. Nodes take nothing in a transaction's place that offers less than a tenth more, on both
fees; some ask an eighth."""


class FeeHistory(NamedTuple):
    base_fee: int
    """Of the next block."""
    tips: tuple[int, ...]
    """What each of the last blocks paid at HISTORY_PERCENTILE; empty blocks left out."""

    @property
    def tip(self) -> int:
        """In the middle; nothing where all blocks were empty."""
        return median_low(self.tips) if self.tips else 0


class Fees(NamedTuple):
    max_fee: int
    priority_fee: int


def fees(history: FeeHistory, policy: FeePolicy) -> Fees | None:
    """What to offer now; None when the chain costs more than the cap."""
    if history.base_fee + policy.priority_floor > policy.max_fee_cap:
        return None
    tip = max(history.tip, policy.priority_floor)
    tip = min(tip, policy.max_fee_cap - history.base_fee)
    return Fees(min(BASE_FEE_HEADROOM * history.base_fee + tip, policy.max_fee_cap), tip)


def middle(histories: Sequence[FeeHistory]) -> FeeHistory:
    """Of what several endpoints say: the base fee in the middle, and apart from it the tip in the middle; of two the lesser. One
    that is honest about the one may lie about the other."""
    base_fee = median_low(history.base_fee for history in histories)
    return FeeHistory(base_fee, (median_low(history.tip for history in histories),))


def raised(before: Fees, market: Fees | None, policy: FeePolicy) -> Fees | None:
    """What the next attempt of a nonce offers: an eighth more than the newest on both fees, and what the market (`fees`) asks.
    None where either is over the cap."""
    more, of = RAISE
    most, tip = (-(-fee * more // of) for fee in before)
    if market is None or most > policy.max_fee_cap:
        return None
    return Fees(max(most, market.max_fee), max(tip, market.priority_fee))


def read_history(raw: Any) -> FeeHistory:
    """The answer of `eth_feeHistory` asked with one percentile. Raises ValueError, KeyError."""
    answer = mapping(raw)
    base_fees = items(answer["baseFeePerGas"])
    rewards = items(answer.get("reward") or [])
    used = items(answer.get("gasUsedRatio") or [])
    if not base_fees:
        raise ValueError("a fee history without a base fee")
    tips = [amount(items(block)[0]) for block, share in zip(rewards, used, strict=False) if items(block) and share]
    return FeeHistory(amount(base_fees[-1]), tuple(tips))
