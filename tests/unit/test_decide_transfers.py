"""What each word of Circle's makes of a withdrawal, and that no order of them ends it otherwise, or twice."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.intents import KEY_TRUSTED, Again, StoredCall
from agents.outcome import Done, Outcome, Rejected, Retry, Stage
from agents.withdrawals import transfer_by_custodian, transfer_calls
from agents.withdrawals.custodian import ASKED, Source, Transfer
from agents.withdrawals.settle_transfers import ABSENT_S, Facts, decide, fold
from agents.withdrawals.transfer_calls import CircleTransfers, TransferDeeds
from agents.withdrawals.transfer_looks import Look, TransferLooker
from agents.withdrawals.withdrawal import Withdrawal
from connectors.circle.client import CircleClient
from connectors.circle.sandbox.tokens import USDC_TOKENS, usdc_token_id
from connectors.circle.transactions import transferred
from connectors.errors import Refused, Unknown
from connectors.webhooks.source import NotUnderstood
from ledger.rows import Connection
from stablerail import verify_kafka
from stablerail.docs import asyncapi
from topics.envelope import Received
from topics.events import Chain, Rail, TransferNotified, WithdrawalAccepted, WithdrawalSettled
from topics.money import SCALE

NOW = datetime(2026, 7, 1, tzinfo=UTC)
ID = "ab" * 16
TO = "0x" + "5b" * 20
HASH, OTHER = "0x" + "a" * 64, "0x" + "b" * 64
PATH = ("INITIATED", "CLEARED", "QUEUED", "SENT", "CONFIRMED")


def facts(
    status: str = "broadcasting", look: Look | None = None, *, read: bool = False, code: str | None = None, **known: Any
) -> Facts:
    withdrawal = Withdrawal(
        ID, "ada", "k", "00" * 16, "circle", "MATIC", "USDC", 25 * SCALE, TO, status, code, "cd" * 16, NOW, NOW, None, 3
    )
    transfer = Transfer(ID, "circle", "w1", None, ASKED, "", None, None, NOW, NOW, 1)._replace(**known)
    looks = {} if look is None else {ID: look}
    made = Facts(NOW, looks, frozenset({"MATIC"} if read else ()), 1, {ID: withdrawal}, {ID: transfer})
    if transfer.transfer_id is not None:
        made.owners[transfer.transfer_id] = ID
    return made


async def nobody() -> Connection:
    raise AssertionError


def said(state: str, **fields: Any) -> TransferNotified:
    about = {"reference": ID, "chain": "MATIC", "to": TO, "amount": "25.00", "transfer_id": "t1", **fields}
    return TransferNotified.model_validate({"source": "circle", "state": state, **about})


def tell(known: Facts, event: TransferNotified, attempt: int = 1) -> Outcome:
    outcome = decide(Received(event.identity(), "circle", event, attempt, None), known)
    if isinstance(outcome, Done):
        fold(known, outcome)
    return outcome


def kinds(outcome: Outcome) -> list[str]:
    return [posting.kind for posting in outcome.postings] if isinstance(outcome, Done) else []


ENDS = {
    "COMPLETE": ("completed", None, "withdrawal"),
    "FAILED": ("failed", "custodian_failed", "withdrawal_release"),
    "DENIED": ("failed", "custodian_denied", "withdrawal_release"),
    "CANCELLED": ("cancelled", None, "withdrawal_release"),
}


@pytest.mark.parametrize("end", ENDS)
@given(data=st.data())
def test_whatever_the_order_and_however_often_it_is_told_a_withdrawal_ends_once(end: str, data: st.DataObject) -> None:
    words = data.draw(st.permutations([*PATH, end] * 2))
    known = facts()
    outcomes = [tell(known, said(word, tx_hash=HASH if word in PATH[3:] else None)) for word in words]
    assert [kind for outcome in outcomes for kind in kinds(outcome)] == [ENDS[end][2]]
    assert (known.withdrawals[ID].status, known.withdrawals[ID].code) == ENDS[end][:2]
    told = [emit.event for outcome in outcomes if isinstance(outcome, Done) for emit in outcome.emits]
    assert [type(event) for event in told] == [WithdrawalSettled]


@pytest.mark.parametrize(
    ("word", "look", "attempt", "expected"),
    [
        ("COMPLETE", Look(frozenset({HASH}), HASH), 1, "completed"),
        ("COMPLETE", Look(frozenset({HASH})), 1, "later"),
        ("COMPLETE", Look(frozenset()), 50, "later"),
        ("COMPLETE", None, 50, "later"),
        ("COMPLETE", Look(frozenset({HASH}), absent=True), 1, "later"),
        ("COMPLETE", Look(frozenset({HASH}), None, True, ABSENT_S), 1, "manual_review"),
        ("FAILED", Look(frozenset({HASH}), HASH), 1, "completed"),
        ("FAILED", Look(frozenset({HASH})), 50, "later"),
        ("FAILED", None, 50, "later"),
        ("FAILED", Look(frozenset({OTHER}), None, True, ABSENT_S), 50, "later"),
        ("FAILED", Look(frozenset({HASH}), None, True, ABSENT_S - 1), 50, "later"),
        ("FAILED", Look(frozenset({HASH}), None, True, ABSENT_S), 1, "failed"),
        ("CANCELLED", Look(frozenset({HASH}), HASH), 1, "completed"),
    ],
)
def test_where_the_chain_can_be_read_it_has_the_last_word(
    word: str, look: Look | None, attempt: int, expected: str
) -> None:
    known = facts(look=look, read=True, state="SENT", tx_hashes=HASH, transfer_id="t1")
    outcome = tell(known, said(word), attempt)
    if expected == "later":
        assert isinstance(outcome, Retry)
        return
    assert isinstance(outcome, Done)
    assert known.withdrawals[ID].status == expected
    contradicted = (word, expected) in {("FAILED", "completed"), ("CANCELLED", "completed")}
    assert ("custodian_contradicted" in [alert.code for alert in outcome.alerts]) == contradicted


def test_every_hash_that_was_ever_told_is_looked_for() -> None:
    known = facts(look=Look(frozenset({OTHER}), None, True, ABSENT_S), read=True)
    tell(known, said("SENT", tx_hash=HASH))
    tell(known, said("SENT", tx_hash=OTHER))
    assert known.transfers[ID].hashes == (HASH, OTHER)
    assert isinstance(tell(known, said("FAILED", tx_hash=OTHER)), Retry)


def test_an_end_without_any_hash_needs_no_chain() -> None:
    assert kinds(tell(facts(read=True), said("FAILED", reason="INSUFFICIENT_TOKEN"))) == ["withdrawal_release"]


def test_what_tells_of_other_money_ends_nothing() -> None:
    for odd in ({"amount": "24.99"}, {"to": "0x" + "5c" * 20}, {"chain": "ETH"}):
        known = facts()
        outcome = tell(known, said("COMPLETE", **odd))
        assert (kinds(outcome), known.withdrawals[ID].code) == ([], "unexpected_transfers")
        assert kinds(tell(known, said("FAILED"))) == [], "only a person gives back what may have been paid"


def test_a_refusal_after_all_that_circle_has_is_no_end() -> None:
    event = said("REFUSED", transfer_id="refused:1", amount=None, to=None)
    assert kinds(tell(facts(transfer_id="t1", state="SENT"), event)) == []
    known = facts()
    assert kinds(tell(known, event)) == ["withdrawal_release"]
    assert known.withdrawals[ID].code == "custodian_refused"


def test_a_transfer_that_is_another_withdrawals_is_refused_and_one_of_nobody_is_left_alone() -> None:
    known = facts(transfer_id="t1")
    assert tell(known, said("COMPLETE", reference="ef" * 16)) == Rejected(
        "transfer_changed", f"t1 is the transfer of {ID}"
    )
    for event in (
        said("COMPLETE", transfer_id="t9", reference=None),
        said("COMPLETE", transfer_id="t9", reference="sweep"),
    ):
        assert tell(known, event) == Done()
    assert isinstance(tell(known, said("COMPLETE", transfer_id="t9", reference="ef" * 16)), Rejected)


def test_a_word_against_the_end_that_was_settled_is_told_and_moves_nothing() -> None:
    for status, word in (("completed", "FAILED"), ("failed", "COMPLETE")):
        outcome = tell(facts(status, transfer_id="t1", tx_hashes=HASH), said(word))
        assert isinstance(outcome, Done)
        assert ([alert.code for alert in outcome.alerts], outcome.postings) == (["custodian_contradicted"], ())


def test_a_payment_beside_the_one_that_people_knew_of_is_told() -> None:
    known = facts("completed", transfer_id="t1", tx_hashes=HASH)
    assert tell(known, said("COMPLETE", tx_hash=HASH)) == tell(known, said("COMPLETE")) == Done()
    outcome = tell(known, said("COMPLETE", tx_hash=OTHER))
    assert isinstance(outcome, Done)
    assert [alert.code for alert in outcome.alerts] == ["custodian_contradicted"]
    ended_without = facts("completed", transfer_id="t1", tx_hashes="")
    assert tell(ended_without, said("COMPLETE", tx_hash=HASH)) == Done(), "its first word named none"


@pytest.mark.parametrize("code", ["transfer_not_shown", "custodian_silent"])
def test_any_word_ends_a_review_for_want_of_one_and_no_other_review(code: str) -> None:
    for state, after in (("SENT", "broadcasting"), ("CONFIRMED", "confirming")):
        known = facts("manual_review", code=code, state=state, transfer_id="t1")
        tell(known, said(state))
        assert (known.withdrawals[ID].status, known.withdrawals[ID].code) == (after, None)
    known = facts("manual_review", code="second_transfer", state="SENT", transfer_id="t1")
    assert tell(known, said("SENT")) == Done()


def test_an_unanswered_call_of_what_circle_has_told_of_is_no_business_of_people() -> None:
    deeds, call = TransferDeeds(None, 1), older(timedelta(hours=2))
    for transfer_id, status in ((None, "manual_review"), ("t1", "broadcasting")):
        known = facts(transfer_id=transfer_id)
        asked = transfer_calls.Facts(NOW, known.withdrawals, known.transfers)
        deeds.fold(asked, deeds.put_off(call, Again("partner_unavailable"), NOW, asked))
        assert asked.withdrawals[ID].status == status


@given(st.text(max_size=12).filter(str.isprintable), st.sampled_from(["broadcasting", "confirming", "manual_review"]))
def test_a_word_that_we_do_not_know_leaves_the_transfer_on_its_way(word: str, status: str) -> None:
    word = "".join(letter for letter in word if letter.isascii()).strip() or "WAITING"
    outcome = tell(facts(status, state="CONFIRMED", transfer_id="t1"), said(word))
    assert kinds(outcome) == [] or word in ENDS


# -- asking ---------------------------------------------------------------------------------------------------------------


def accepted(rail: Rail) -> WithdrawalAccepted:
    return WithdrawalAccepted(
        withdrawal_id=ID, user_id="ada", rail=rail, chain=Chain.MATIC, asset="USDC", amount=25 * SCALE, to=TO
    )


def accept(known: transfer_by_custodian.Facts) -> Outcome:
    outcome = transfer_by_custodian.decide(Received(ID, "test", accepted(Rail.CIRCLE), 1, None), known)
    if isinstance(outcome, Done):
        transfer_by_custodian.fold(known, outcome)
    return outcome


def test_a_withdrawal_is_asked_for_once_with_what_was_accepted() -> None:
    rows = facts("signing").withdrawals
    known = transfer_by_custodian.Facts(NOW, {"MATIC": Source("w1", "token", "HIGH")}, rows)
    first = accept(known)
    assert isinstance(first, Done)
    (call,) = first.calls
    assert call.request == {
        "withdrawal_id": ID, "chain": "MATIC", "wallet_id": "w1", "token_id": "token", "to": TO, "amount": "25.000000",
        "fee_level": "HIGH",
    }  # fmt: skip
    assert known.withdrawals[ID].status == "broadcasting"
    assert accept(known) == Done()


def test_what_is_not_ours_to_ask_is_left_alone_and_without_a_wallet_it_waits() -> None:
    source = {"MATIC": Source("w1", "token", "LOW")}
    assert accept(transfer_by_custodian.Facts(NOW, source, facts("cancelled").withdrawals)) == Done()
    assert isinstance(accept(transfer_by_custodian.Facts(NOW, source)), Rejected)
    assert isinstance(accept(transfer_by_custodian.Facts(NOW, {}, facts("signing").withdrawals)), Retry)


async def test_each_rail_has_a_stage_of_its_own_and_verify_knows_which() -> None:
    """An event without an outcome in a stage that takes it is a lost one; of a stage that does not, it is none."""
    taking: dict[Rail, set[str]] = {
        rail: {name for name, takes in verify_kafka.TAKES.items() if takes(accepted(rail))} for rail in Rail
    }
    assert taking == {Rail.CHAIN: {"sign_transactions"}, Rail.CIRCLE: {"transfer_by_custodian"}}
    stages, _ = await asyncapi.wired(asyncapi.everything())
    everything = Stage.__dataclass_fields__["takes"].default
    assert {stage.name: stage.takes for _, stage in stages if stage.takes is not everything} == verify_kafka.TAKES


# -- Circle's words -------------------------------------------------------------------------------------------------------

OUTBOUND = {
    "id": "t1", "state": "CANCELED", "transactionType": "OUTBOUND", "operation": "TRANSFER", "blockchain": "MATIC-AMOY",
    "tokenId": usdc_token_id("MATIC-AMOY"), "amounts": ["25"], "destinationAddress": TO.upper().replace("0X", "0x"),
    "txHash": HASH.upper().replace("0X", "0x"), "blockHeight": 7, "refId": ID, "errorReason": "INSUFFICIENT_TOKEN",
}  # fmt: skip


def test_an_outbound_transaction_is_read_whoever_tells_of_it() -> None:
    event = transferred(OUTBOUND, "testnet", USDC_TOKENS)
    assert event == said("CANCELLED", amount="25", tx_hash=HASH, block_number=7, reason="INSUFFICIENT_TOKEN")
    bare = {"id": "t1", "state": "INITIATED", "blockchain": "MATIC-AMOY", "txHash": ""}
    event = transferred(bare, "testnet", USDC_TOKENS)
    assert isinstance(event, TransferNotified)
    assert (event.reference, event.tx_hash, event.amount) == (None, None, None)


def test_what_is_no_transfer_of_usdc_of_this_network_is_nobodys() -> None:
    for other in ({"blockchain": "MATIC"}, {"tokenId": "other"}, {"operation": "CONTRACT_EXECUTION"}):
        assert transferred({**OUTBOUND, **other}, "testnet", USDC_TOKENS) is None


@given(st.dictionaries(st.sampled_from(sorted(OUTBOUND)), st.none() | st.integers() | st.text() | st.lists(st.text())))
def test_whatever_the_fields_of_an_outbound_transaction_reading_does_not_raise(changes: dict[str, Any]) -> None:
    event = transferred({**OUTBOUND, **changes}, "testnet", USDC_TOKENS)
    assert event is None or isinstance(event, TransferNotified | NotUnderstood)


def test_what_a_customer_asked_for_who_was_rejected_since_waits_and_is_not_asked_of_circle() -> None:
    withdrawal = facts("signing").withdrawals[ID]
    sources = {"MATIC": Source("w1", "t", "MEDIUM")}
    event = WithdrawalAccepted(
        withdrawal_id=ID, user_id="ada", rail=Rail.CIRCLE, chain=Chain.MATIC, asset="USDC", amount=25 * SCALE, to=TO
    )
    received = Received(event.identity(), "test", event, 1, None)
    known = transfer_by_custodian.Facts(NOW, sources, {ID: withdrawal}, frozenset({"ada"}))
    assert transfer_by_custodian.decide(received, known) == Retry("frozen_customer", 60.0)
    known.frozen = frozenset({"bob"})
    assert isinstance(transfer_by_custodian.decide(received, known), Done)


def test_what_is_nowhere_must_be_so_all_the_time_for_the_same_hashes() -> None:
    now = NOW
    looker = TransferLooker({}, nobody, lambda: now)
    both, one = frozenset({HASH, OTHER}), frozenset({HASH})

    def looked(look: Look, after_s: float) -> float:
        nonlocal now
        now += timedelta(seconds=after_s)
        return looker._timed(ID, look).absent_s

    nowhere = Look(one, absent=True)
    assert [looked(nowhere, 60.0) for _ in range(3)] == [0.0, 60.0, 120.0]
    assert looked(Look(one), 60.0) == 0.0, "an endpoint does not answer, or has it"
    assert [looked(nowhere, 60.0) for _ in range(2)] == [0.0, 60.0]
    assert [looked(nowhere, 600.0), looked(nowhere, 60.0)] == [0.0, 60.0], "nobody looked meanwhile"
    assert [looked(Look(both, absent=True), 60.0) for _ in range(2)] == [0.0, 60.0], "one more was told of"


class Lists(CircleClient):
    """Lists one transfer with our reference, refuses every new one, and counts those."""

    def __init__(self, id: Any, status: int = 400) -> None:
        self._id = id
        self._status = status
        self.asked = 0

    async def outbound_page(self, **_: Any) -> list[dict[str, Any]]:
        return [{"id": "another", "refId": "another"}, {"id": self._id, "refId": ID, "state": "SENT"}]

    async def create_transfer(self, *_: Any, **__: Any) -> dict[str, Any]:
        self.asked += 1
        raise Refused(self._status, "2", "no")


class NoLists(Lists):
    async def outbound_page(self, **_: Any) -> list[dict[str, Any]]:
        raise Refused(self._status, "2", "no such filter")


def older(by: timedelta) -> StoredCall:
    wanted = {"withdrawal_id": ID, "wallet_id": "w", "token_id": "t", "to": TO, "amount": "1", "fee_level": "LOW"}
    return StoredCall("cd" * 16, UUID(int=1), wanted, (), NOW - by)


@pytest.mark.parametrize("age", [timedelta(hours=1), 2 * KEY_TRUSTED])
async def test_a_transfer_that_circle_lists_is_neither_made_anew_nor_refused_whatever_its_id(age: timedelta) -> None:
    for odd in ("", "a\0b", None):
        client = Lists(odd)
        with pytest.raises(Unknown):
            await CircleTransfers(client, lambda: NOW).perform(older(age))
        assert client.asked == (age < KEY_TRUSTED)
    assert await CircleTransfers(Lists("t1"), lambda: NOW).perform(older(age)) == {"id": "t1", "state": "SENT"}


@pytest.mark.parametrize("age", [timedelta(hours=1), 2 * KEY_TRUSTED])
async def test_a_look_that_is_refused_is_no_refusal_of_what_is_looked_for(age: timedelta) -> None:
    """Circle may have made the transfer, and only the look says no: nothing may be given back."""
    with pytest.raises(Unknown):
        await CircleTransfers(NoLists("t1"), lambda: NOW).perform(older(age))
    with pytest.raises(Refused) as refused:
        await CircleTransfers(NoLists("t1", 403), lambda: NOW).perform(older(age))
    assert refused.value.ours


async def test_a_key_that_circle_knows_is_never_a_refusal_where_it_lists_nothing() -> None:
    class Nothing(Lists):
        async def outbound_page(self, **_: Any) -> list[dict[str, Any]]:
            return []

    for age in (timedelta(0), timedelta(hours=1)):
        with pytest.raises(Unknown):
            await CircleTransfers(Nothing("t1", 409), lambda: NOW).perform(older(age))
    assert await CircleTransfers(Lists("t1", 409), lambda: NOW).perform(older(timedelta(0))) == {
        "id": "t1",
        "state": "SENT",
    }
