"""What may be said: amounts, the envelope, the catalog. Whatever bytes come, the answer is an event or a refusal."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

import pytest
from aiokafka.partitioner import DefaultPartitioner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from topics import catalog, events
from topics.catalog import DEPOSITS_NOTIFIED, INPUT_BYTES_MAX, INPUTS, TOPICS, Topic, by_name
from topics.envelope import ATTEMPT_MAX, event_uid, headers_of, read, value_of
from topics.errors import EventCode, EventRefused
from topics.events import Chain, DepositNotified, Event, Evidence
from topics.money import AMOUNT_MAX, format_amount, parse_amount
from topics.partitioner import partition_of

AT = datetime(2026, 7, 1, 12, 30, 15, 123456, UTC)
HASH = "0x" + "ab" * 32

EXAMPLES: dict[type[Event], dict[str, Any]] = {
    events.KycApproved: {
        "user_id": "ada", "vendor": "sumsub", "applicant_id": "a1", "vendor_event_id": "e1", "approved_at": "now",
    },
    events.KycRejected: {
        "user_id": "ada", "vendor": "sumsub", "applicant_id": "a1", "vendor_event_id": "e1", "rejected_at": "now",
        "final": True,
    },
    events.WalletsFrozen: {"user_id": "ada", "frozen": True, "reason": "kyc_rejected", "vendor_event_id": "e1"},
    events.WalletsRequested: {"user_id": "ada", "chains": ["ETH", "MATIC"]},
    events.WalletsProvisioned: {
        "user_id": "ada", "wallets": [{"chain": "ETH", "address": "0x" + "1" * 40, "wallet_id": "w1"}],
    },
    events.DepositNotified: {
        "source": "circle", "transfer_id": "t1", "chain": "MATIC", "tx_hash": HASH, "to": "0x" + "1" * 40,
        "asset": "USDC", "amount": "25.00", "evidence": "seen",
    },
    events.DepositCredited: {
        "deposit_id": "d1", "user_id": "ada", "chain": "MATIC", "tx_hash": HASH, "to": "0x" + "1" * 40,
        "asset": "USDC", "amount": "25.00", "transaction_id": "x1",
    },
    events.DepositFinalized: {
        "deposit_id": "d1", "user_id": "ada", "chain": "MATIC", "tx_hash": HASH, "asset": "USDC", "amount": "25.00",
        "outcome": "reversed", "transaction_id": "x1",
    },
    events.DepositParked: {
        "deposit_id": "d1", "chain": "MATIC", "tx_hash": HASH, "to": "0x" + "1" * 40, "asset": "USDC", "amount": "0.50",
        "reason": "unknown_owner", "transaction_id": "x1",
    },
    events.HeadSeen: {"chain": "MATIC", "chain_id": 137, "number": 7, "block_hash": HASH, "timestamp_s": 1_780_000_000},
    events.BufferLevel: {
        "account": "system.system_buffer_usdc[3]:USDC", "account_type": "system_buffer_usdc", "asset": "USDC", "shard": "3",
        "balance": "-12.50", "account_version": 7,
    },
    events.WithdrawalRequested: {
        "user_id": "ada", "idempotency_key": "k1", "chain": "MATIC", "asset": "USDC", "amount": "25.00", "to": "0x" + "1" * 40,
    },
    events.WithdrawalAccepted: {
        "withdrawal_id": "w1", "user_id": "ada", "rail": "chain", "chain": "MATIC", "asset": "USDC", "amount": "25.00",
        "to": "0x" + "1" * 40,
    },
    events.TransferNotified: {
        "source": "circle", "transfer_id": "t1", "reference": "ab" * 16, "state": "COMPLETE", "chain": "MATIC",
        "to": "0x" + "1" * 40, "amount": "25.00", "tx_hash": HASH, "block_number": 7,
    },
    events.TransactionSigned: {
        "chain": "MATIC", "signer": "0x" + "2" * 40, "nonce": 7, "n": 1, "tx_hash": HASH, "withdrawal_id": "w1",
    },
    events.TransactionBroadcast: {
        "chain": "MATIC", "signer": "0x" + "2" * 40, "nonce": 7, "n": 1, "tx_hash": HASH, "withdrawal_id": "w1",
    },
    events.TransactionConfirmed: {
        "chain": "MATIC", "signer": "0x" + "2" * 40, "nonce": 7, "tx_hash": HASH, "withdrawal_id": "w1",
        "block_hash": HASH, "block_number": 7, "outcome": "confirmed",
    },
    events.WithdrawalSettled: {
        "withdrawal_id": "w1", "user_id": "ada", "rail": "chain", "chain": "MATIC", "asset": "USDC", "amount": "25.00",
        "to": "0x" + "1" * 40, "outcome": "completed", "tx_hash": HASH,
    },
    events.OrderPlaced: {"order_id": "o1", "user_id": "ada", "amount": "100.00"},
    events.OrderReserved: {"order_id": "o1", "user_id": "ada", "amount": "100.00"},
    events.OrderRejected: {"order_id": "o1", "user_id": "ada", "amount": "100.00", "code": "insufficient_funds"},
    events.OrderFilled: {"order_id": "o1", "fill_id": "f1", "amount": "97.50", "filled_total": "97.50"},
    events.OrderCancelled: {"order_id": "o1", "filled_total": "0"},
    events.OrderExpired: {"order_id": "o1"},
    events.OrderSettled: {
        "order_id": "o1", "user_id": "ada", "outcome": "filled", "filled": "97.50", "released": "2.50",
    },
    events.BrokerFunded: {"funding_id": "wire 1", "amount": "50000.00"},
    events.PaymentUpdated: {
        "source": "circle_mint", "payment_id": "p1", "kind": "payment", "status": "paid", "amount": "3.14",
        "currency": "USD", "tx_hash": HASH, "updated_at": "2026-11-21T02:00:00.000Z",
    },
    events.CircleWalletUpdated: {
        "wallet_id": "w1", "kind": "addressBookRecipients", "status": "active", "chain": "ETH",
        "address": "0x" + "1" * 40, "updated_at": "2026-11-21T02:00:00.000Z",
    },
}  # fmt: skip


def example(model: type[Event]) -> Event:
    return model.model_validate_json(json.dumps(EXAMPLES[model]))


def topic_of(model: type[Event]) -> Topic:
    return next(topic for topic in TOPICS if model in topic.models)


# -- money ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, AMOUNT_MAX))
def test_an_amount_survives_being_written_and_read(amount: int) -> None:
    text = format_amount(amount)
    assert parse_amount(text) == amount
    assert Fraction(text) * 10**6 == amount
    assert format_amount(-amount) == (f"-{text}" if amount else text)


@given(st.one_of(st.text(max_size=40), st.floats(), st.booleans(), st.none(), st.binary(), st.decimals()))
def test_whatever_is_no_amount_is_a_value_error_and_nothing_else(text: Any) -> None:
    try:
        amount = parse_amount(text)
    except ValueError:
        return
    assert type(text) is str
    assert Fraction(text) * 10**6 == amount


@pytest.mark.parametrize(
    "text", ["", "1.", ".5", "+1", "-1", "1e3", "1,000", " 1", "01", "1.0000001", "٣", "NaN", 1.0, True, "9" * 30, -1]
)
def test_these_are_no_amounts(text: Any) -> None:
    with pytest.raises(ValueError):
        parse_amount(text)


@pytest.mark.parametrize("amount", ["0", "0.000000", 25, 25.0])
def test_an_events_amount_is_a_decimal_string_above_zero(amount: Any) -> None:
    with pytest.raises(EventRefused) as refused:
        read(DEPOSITS_NOTIFIED, json.dumps({**EXAMPLES[DepositNotified], "amount": amount}).encode(), [])
    assert refused.value.code == EventCode.WRONG_SCHEMA


# -- envelope ---------------------------------------------------------------------------------------------------------

header_names = st.sampled_from(
    ["ce_id", "ce_type", "ce_source", "ce_specversion", "ce_time", "traceparent", "attempt", "content-type", "x"]
)
header_values = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([b"1.0", b"1", b"2000000000", b"\xc2\xb2", b"", b"\0"]),
    st.sampled_from([model.ce_type().encode() for model in events.EVENTS]),
    st.none(),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10), st.just("25.00")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes | None:
    """No bytes, any bytes, any JSON, and events with a field that is missing or something else."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(st.one_of(st.none(), st.binary(max_size=200)))
    if kind == 1:
        return json.dumps(draw(json_values)).encode()
    body = dict(EXAMPLES[draw(st.sampled_from(events.EVENTS))])
    if kind == 2:
        name = draw(st.sampled_from([*body, "version"]))
        if draw(st.booleans()):
            body.pop(name, None)
        else:
            body[name] = draw(json_values)
    return json.dumps(body).encode()


@given(st.sampled_from(INPUTS), bodies(), st.lists(st.tuples(header_names, header_values), max_size=5))
def test_any_bytes_are_an_event_or_a_refusal(topic: Topic, value: bytes | None, headers: Any) -> None:
    answer: Any
    try:
        answer = read(topic, value, headers)
    except EventRefused as refused:
        answer = refused
    if isinstance(answer, EventRefused):
        assert answer.code in EventCode
        assert answer.reason
        return
    received = answer
    assert isinstance(received.event, topic.models)
    assert received.id
    assert received.source
    assert 1 <= received.attempt <= ATTEMPT_MAX
    assert value is not None
    assert read(topic, value_of(received.event), headers).event == received.event, "what we read we can say again"


@pytest.mark.parametrize("model", events.EVENTS)
def test_written_headers_read_back(model: type[Event]) -> None:
    event = example(model)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = headers_of(event.ce_type(), event_id="id 1", source="/stablerail/x", time=AT, traceparent=trace)
    received = read(topic_of(model), value_of(event), [*headers, ("attempt", b"7")])
    assert (received.id, received.source, received.attempt, received.traceparent) == ("id 1", "/stablerail/x", 7, trace)
    assert received.event == event
    assert received.uid == event_uid("/stablerail/x", "id 1")
    assert dict(headers)["ce_time"] == b"2026-07-01T12:30:15.123456+00:00"


@pytest.mark.parametrize("model", events.EVENTS)
def test_a_producer_without_an_envelope_gets_the_payloads_own_id(model: type[Event]) -> None:
    event = example(model)
    received = read(topic_of(model), value_of(event), [])
    assert (received.id, received.source, received.attempt) == (event.identity(), "external", 1)


@pytest.mark.parametrize(
    ("value", "headers", "code"),
    [
        (None, [], EventCode.NOT_JSON),
        (b"{", [], EventCode.NOT_JSON),
        (b"[]", [], EventCode.WRONG_SCHEMA),
        (b"{}", [], EventCode.WRONG_SCHEMA),
        (b"x" * (INPUT_BYTES_MAX + 1), [], EventCode.TOO_LARGE),
        (b"{}", [("ce_specversion", b"0.3")], EventCode.BAD_ENVELOPE),
        (b"{}", [("ce_id", b"\xff")], EventCode.BAD_ENVELOPE),
        (b"{}", [("ce_id", b"")], EventCode.BAD_ENVELOPE),
        (b"{}", [("ce_source", b"x" * 513)], EventCode.BAD_ENVELOPE),
        (b"{}", [("ce_type", b"io.stablerail.deposits.notified.v2")], EventCode.UNSUPPORTED_VERSION),
        (b"{}", [("ce_type", b"io.stablerail.chain.heads.v1")], EventCode.WRONG_SCHEMA),
        (json.dumps({**EXAMPLES[DepositNotified], "version": 2}).encode(), [], EventCode.UNSUPPORTED_VERSION),
        (json.dumps(EXAMPLES[DepositNotified]).encode(), [("attempt", b"0")], EventCode.BAD_ENVELOPE),
        (json.dumps(EXAMPLES[DepositNotified]).encode(), [("attempt", b"2000000000")], EventCode.BAD_ENVELOPE),
        (json.dumps(EXAMPLES[DepositNotified]).encode(), [("attempt", "²".encode())], EventCode.BAD_ENVELOPE),
    ],
)  # fmt: skip
def test_each_refusal_has_its_code(value: bytes | None, headers: Any, code: EventCode) -> None:
    with pytest.raises(EventRefused) as refused:
        read(DEPOSITS_NOTIFIED, value, headers)
    assert refused.value.code == code


def test_a_refusal_does_not_repeat_what_was_said() -> None:
    secret = "4111111111111111"
    with pytest.raises(EventRefused) as refused:
        read(DEPOSITS_NOTIFIED, json.dumps({**EXAMPLES[DepositNotified], "evidence": secret}).encode(), [])
    assert secret not in str(refused.value)


def test_ids_of_two_sources_do_not_meet() -> None:
    assert event_uid("a", "b c") != event_uid("a b", "c")


def test_events_are_frozen_and_ignore_what_they_do_not_know() -> None:
    event = DepositNotified.model_validate({**EXAMPLES[DepositNotified], "since_v1_5": True})
    assert event.evidence is Evidence.SEEN
    with pytest.raises(ValidationError):
        event.amount = 1


# -- partitions -------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=60), st.integers(1, 64))
def test_a_key_goes_where_kafkas_default_partitioner_sends_it(key: bytes, count: int) -> None:
    partitions = list(range(count))
    assert partition_of(key, count) == DefaultPartitioner()(key, partitions, partitions)


def test_a_message_without_a_key_goes_to_the_first_partition() -> None:
    assert partition_of(None, 9) == 0


# -- catalog ----------------------------------------------------------------------------------------------------------


def test_the_catalog_fits_together() -> None:
    names = [topic.name for topic in TOPICS]
    assert len(set(names)) == len(names)
    assert {model for topic in TOPICS for model in topic.models} == set(events.EVENTS)
    for topic in TOPICS:
        assert by_name(topic.name) is topic or by_name(topic.name) == topic
        assert topic.named("p.") == f"p.{topic.name}"
        assert topic.partitions > 0
        assert topic.key
        assert int(topic.broker_config()["max.message.bytes"]) > topic.bytes_max
    for topic in INPUTS:
        assert topic.dlq in TOPICS
        assert topic.dlq.bytes_max > 2 * topic.bytes_max, "a dead letter is its message and what we add"
        assert topic.dlq.retention_ms > topic.retention_ms
        assert [model.type for model in topic.models] == [topic.name]
    assert catalog.JOURNAL.partitions == 1
    assert catalog.JOURNAL.retention_ms == -1
    assert catalog.CHAIN_HEADS.broker_config()["cleanup.policy"] == "delete"


def test_every_chain_is_one_that_is_written_in_capitals() -> None:
    assert [chain.value for chain in Chain] == ["ETH", "SOL", "APTOS", "MATIC", "AVAX"]
