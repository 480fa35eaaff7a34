"""What a transaction offers for its gas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chain.fees import GWEI, POLICIES, FeeHistory, FeePolicy, Fees, fees, raised, read_history
from topics.events import Chain

POLICY = FeePolicy(priority_floor=25 * GWEI, max_fee_cap=500 * GWEI)
wei = st.integers(0, 10**12)


def test_the_tip_is_what_the_last_blocks_paid_and_the_fee_has_room_for_a_base_fee_that_doubles() -> None:
    history = FeeHistory(100 * GWEI, tuple(tip * GWEI for tip in (40, 30, 90)))
    assert fees(history, POLICY) == (240 * GWEI, 40 * GWEI)


def test_a_quiet_chain_is_paid_the_floor() -> None:
    assert fees(FeeHistory(15, ()), POLICY) == (25 * GWEI + 30, 25 * GWEI)


def test_a_dear_chain_is_paid_the_cap_and_a_dearer_one_nothing() -> None:
    assert fees(FeeHistory(470 * GWEI, (90 * GWEI,)), POLICY) == (500 * GWEI, 30 * GWEI)
    assert fees(FeeHistory(475 * GWEI, ()), POLICY) == (500 * GWEI, 25 * GWEI)
    assert fees(FeeHistory(475 * GWEI + 1, ()), POLICY) is None


@given(base_fee=wei, tips=st.lists(wei, max_size=10))
def test_an_offer_always_pays_for_the_next_block_and_never_passes_the_cap(base_fee: int, tips: list[int]) -> None:
    offer = fees(FeeHistory(base_fee, tuple(tips)), POLICY)
    if offer is None:
        assert base_fee + POLICY.priority_floor > POLICY.max_fee_cap
        return
    assert POLICY.priority_floor <= offer.priority_fee <= offer.max_fee <= POLICY.max_fee_cap
    assert base_fee + offer.priority_fee <= offer.max_fee


@given(tip=st.integers(0, 500 * GWEI), more=wei, base_fee=wei, tips=st.lists(wei, max_size=10))
def test_the_next_attempt_offers_an_eighth_more_on_both_fees_and_what_the_market_asks_within_the_cap(
    tip: int, more: int, base_fee: int, tips: list[int]
) -> None:
    before = Fees(min(tip + more, POLICY.max_fee_cap), tip)
    market = fees(FeeHistory(base_fee, tuple(tips)), POLICY)
    offer = raised(before, market, POLICY)
    if offer is None:
        assert market is None or before.max_fee * 9 > POLICY.max_fee_cap * 8
        return
    assert market is not None
    assert offer.max_fee * 8 >= before.max_fee * 9
    assert offer.priority_fee * 8 >= before.priority_fee * 9
    assert market.max_fee <= offer.max_fee <= POLICY.max_fee_cap
    assert market.priority_fee <= offer.priority_fee <= offer.max_fee


def test_each_chain_that_we_pay_on_has_bounds() -> None:
    assert set(POLICIES) == {Chain.MATIC, Chain.ETH}
    for policy in POLICIES.values():
        assert 0 < policy.priority_floor < policy.max_fee_cap


def test_a_fee_history_is_read_without_its_empty_blocks() -> None:
    answer = {
        "oldestBlock": "0x1",
        "baseFeePerGas": ["0x7", "0x8", "0x9", "0xa"],
        "gasUsedRatio": [0.5, 0, 0.1],
        "reward": [["0x3"], ["0x0"], ["0x5"]],
    }
    assert read_history(answer) == FeeHistory(10, (3, 5))
    assert read_history({"baseFeePerGas": ["0x7"], "gasUsedRatio": None, "reward": None}) == FeeHistory(7, ())


@pytest.mark.parametrize(
    "answer", [None, {}, {"baseFeePerGas": []}, {"baseFeePerGas": [7]}, {"baseFeePerGas": ["0x1"], "reward": "0x"}]
)
def test_what_is_no_fee_history_is_an_error(answer: object) -> None:
    with pytest.raises((ValueError, KeyError)):
        read_history(answer)
