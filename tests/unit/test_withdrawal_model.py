"""A withdrawal under any order of events: signed, sped up by rule and by wish, cancelled, mined, reorganised, dropped; replies lost, messages
repeated, endpoints behind or away, the worker gone between any two steps. Nothing pays twice, nothing strands a hold, and
the checker finds the windows in which others pay twice.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from agents.withdrawals.look import RESEND_S
from agents.withdrawals.withdrawal import ENDED, Attempt, AttemptStatus, Status, Withdrawal, settled
from tests.support.chain_model import Net
from tests.support.withdrawal_model import DEPTH, FEE, Desk
from topics.catalog import TRANSACTIONS_CONFIRMED, TRANSACTIONS_SIGNED

SIGNED, CONFIRMED = TRANSACTIONS_SIGNED.name, TRANSACTIONS_CONFIRMED.name
IN_FLIGHT = (Status.BROADCASTING, Status.CONFIRMING)
REQUESTS_MAX = 3
ATTEMPTS_MAX = 4

places = st.integers(0, 7)


class Withdrawals(RuleBasedStateMachine):
    desk_type: type[Desk] = Desk

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()

    @initialize(blocked=st.sampled_from((0, 0, 2)))
    def start(self, blocked: int) -> None:
        self.desk = self.desk_type(Net(frozenset({f"0x{blocked:040x}"})), self.runner)
        for _ in range(2):
            self.desk.request()
        self.desk.sign(1)

    @precondition(lambda self: len(self.desk.withdrawals) < REQUESTS_MAX)
    @rule()
    def a_customer_asks(self) -> None:
        self.desk.request()

    @precondition(lambda self: self.desk.in_state(Status.SIGNING))
    @rule(room=st.integers(1, 3))
    def the_signer_signs(self, room: int) -> None:
        self.desk.sign(room)

    @precondition(lambda self: self._open())
    @rule(place=places, kind=st.sampled_from(("speed_up", "speed_up", "cancel")))
    def another_attempt_is_signed(self, place: int, kind: str) -> None:
        some = self._open()
        self.desk.again(some[place % len(some)], kind)

    def _open(self) -> list[Withdrawal]:
        return [w for w in self.desk.in_state(*IN_FLIGHT, Status.MANUAL_REVIEW) if len(self.desk.of(w)) < ATTEMPTS_MAX]

    @rule()
    def a_head_raises_what_is_stuck(self) -> None:
        self.desk.raise_fees()

    @rule(blocks=st.integers(1, DEPTH))
    def blocks_pass_without_ours(self, blocks: int) -> None:
        for _ in range(blocks):
            self.desk.net.mine(0)
            self.desk.raise_fees()

    @precondition(lambda self: self.desk.waiting(SIGNED))
    @rule(place=places, reply=st.sampled_from(("heard", "heard", "lost", "none", "died")))
    def a_transaction_is_sent(self, place: int, reply: str) -> None:
        self.desk.broadcast(place, reply)

    @rule(room=st.integers(0, 3))
    def a_block_is_mined(self, room: int) -> None:
        self.desk.net.mine(room)

    @precondition(lambda self: any(block.txs for block in self.desk.net.blocks[-DEPTH:]))
    @rule(depth=st.integers(1, DEPTH - 1), then=st.sampled_from(("back", "gone", "other")))
    def the_chain_is_reorganised(self, depth: int, then: str) -> None:
        self.desk.net.reorganise(min(depth, self.desk.net.head), then)

    @precondition(lambda self: self.desk.in_state(Status.CONFIRMING))
    @rule(then=st.sampled_from(("back", "gone", "other")))
    def what_was_seen_is_taken_back(self, then: str) -> None:
        self.desk.net.reorganise(min(DEPTH - 1, self.desk.net.head), then)
        self.desk.look()

    @precondition(lambda self: self.desk.net.mempool)
    @rule(place=places)
    def a_node_forgets_a_transaction(self, place: int) -> None:
        some = sorted(self.desk.net.mempool)
        del self.desk.net.mempool[some[place % len(some)]]

    @rule(which=st.integers(0, 1), lag=st.integers(0, 2), down=st.booleans())
    def an_endpoint_falls_behind_or_fails(self, which: int, lag: int, down: bool) -> None:
        node = self.desk.nodes[which]
        node.lag, node.down = lag, down and lag == 2

    @rule(seconds=st.sampled_from((1, int(RESEND_S) + 1)))
    def time_passes(self, seconds: int) -> None:
        self.desk.now += timedelta(seconds=seconds)

    @rule(mined=st.booleans())
    def a_head_is_read(self, mined: bool) -> None:
        if mined:
            self.desk.net.mine(3)
        self.desk.look()

    @precondition(lambda self: self.desk.news is not None)
    @rule(crash=st.booleans())
    def and_decided_on(self, crash: bool) -> None:
        if crash:
            self.desk.news = None
        else:
            self.desk.decide()

    @rule(blocks=st.integers(1, DEPTH))
    def heads_pass(self, blocks: int) -> None:
        for _ in range(blocks):
            self.desk.net.mine(3)
            self.desk.look()
            self.desk.decide()

    @precondition(lambda self: self.desk.waiting(CONFIRMED))
    @rule(place=places)
    def an_outcome_is_settled(self, place: int) -> None:
        self.desk.settle(place)

    @rule(topic=st.sampled_from((SIGNED, CONFIRMED)))
    def everything_is_told_again(self, topic: str) -> None:
        self.desk.repeat(topic)

    @invariant()
    def nobody_is_paid_twice(self) -> None:
        if hasattr(self, "desk"):
            self.desk.check()

    def teardown(self) -> None:
        try:
            if hasattr(self, "desk"):
                self.desk.drain()
        finally:
            self.runner.close()


def check(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_no_order_of_events_pays_twice_or_strands_a_hold() -> None:
    check(Withdrawals, 150, 60)


# -- what others do ----------------------------------------------------------------------------------------------------


class BumpSentBeforeItIsStored(Desk):
    """The process dies between the two: what is mined then is a transaction that nobody knows."""

    def again(self, withdrawal: Withdrawal, kind: str) -> None:
        newest = max(self.of(withdrawal), key=lambda attempt: attempt.n)
        kind = "cancel" if "cancel" in (kind, newest.kind) else "payment"
        bump = self.signed(withdrawal, newest.nonce, newest.n + 1, kind, newest.max_fee * 9 // 8 + 1)
        self.net.receive(self.net.signed[bump.tx_hash])


class OnlyTheNewestHashIsLookedAt(Desk):
    """The nonce is used, the newest attempt has no receipt: it is paid again with a fresh nonce."""

    def decide(self) -> None:
        for withdrawal in self.in_state(*IN_FLIGHT):
            newest = max(self.of(withdrawal), key=lambda attempt: attempt.n)
            used = newest.nonce < self.net.count(newest.signer, self.nodes[0].head)
            if (
                used
                and newest.status in (AttemptStatus.SIGNED, AttemptStatus.BROADCAST)
                and newest.n > 1
                and not self._seen(newest)
            ):
                self.attempt(withdrawal, self.take_nonce(), newest.n + 1, "payment", FEE)
        super().decide()

    def _seen(self, attempt: Attempt) -> bool:
        return self.nodes[0].eth_getTransactionReceipt(attempt.tx_hash) is not None


class ALostReplyTakesANewNonce(Desk):
    """Whoever heard nothing believes that nothing happened."""

    def unheard(self, attempt: Attempt) -> None:
        withdrawal = self.withdrawals[attempt.withdrawal_id or ""]
        if len(self.of(withdrawal)) < ATTEMPTS_MAX and withdrawal.status in IN_FLIGHT:
            self.attempt(withdrawal, self.take_nonce(), attempt.n + 1, "payment", FEE)


class AMissingReceiptTakesANewNonce(Desk):
    """What an endpoint has no receipt of is sent again as another transaction."""

    def decide(self) -> None:
        for withdrawal in self.in_state(*IN_FLIGHT):
            newest = self.of(withdrawal)[-1]
            sent = newest.status in (AttemptStatus.BROADCAST, AttemptStatus.MINED)
            missing = self.nodes[0].eth_getTransactionReceipt(newest.tx_hash) is None
            if sent and missing and len(self.of(withdrawal)) < ATTEMPTS_MAX:
                self.attempt(withdrawal, self.take_nonce(), newest.n + 1, "payment", FEE)
        super().decide()


class ARevertedOrMissingOneIsReleasedAtOnce(Desk):
    """The hold goes back as soon as the transaction is in no block."""

    def decide(self) -> None:
        super().decide()
        for withdrawal in self.in_state(Status.BROADCASTING):
            if any(a.version > 2 for a in self.of(withdrawal)):
                self.holds[withdrawal.id] = "released"
                self.withdrawals[withdrawal.id] = withdrawal._replace(status=Status.FAILED.value)


class ACancelReleasesWhenItIsSigned(Desk):
    """As if it could not lose."""

    def again(self, withdrawal: Withdrawal, kind: str) -> None:
        super().again(withdrawal, kind)
        if kind == "cancel" and self.withdrawals[withdrawal.id].status not in ENDED:
            self.holds[withdrawal.id] = "released"
            self.withdrawals[withdrawal.id] = withdrawal._replace(status=Status.CANCELLED.value)
            self.tell(settled(self.withdrawals[withdrawal.id]))


PAID_TWICE = r"is paid [2-4] times|released and paid"
MUTATIONS: dict[str, tuple[type[Desk], str]] = {
    "a bump that is sent before it is stored": (BumpSentBeforeItIsStored, "stranded|completed and not paid"),
    "only the newest hash is looked at": (OnlyTheNewestHashIsLookedAt, PAID_TWICE),
    "a lost reply takes a new nonce": (ALostReplyTakesANewNonce, PAID_TWICE),
    "a missing receipt takes a new nonce": (AMissingReceiptTakesANewNonce, PAID_TWICE),
    "a cancel that releases when it is signed": (ACancelReleasesWhenItIsSigned, "released and paid"),
    "a release before finality": (ARevertedOrMissingOneIsReleasedAtOnce, "released and paid"),
}


@pytest.mark.parametrize(("desk", "found"), MUTATIONS.values(), ids=[name.replace(" ", "_") for name in MUTATIONS])
def test_the_checker_finds(desk: type[Desk], found: str) -> None:
    machine: Any = type(desk.__name__, (Withdrawals,), {"desk_type": desk})
    with pytest.raises(AssertionError, match=found):
        check(machine, 300, 60)
