"""Bad messages for every topic that a stage reads, each with the code of the dead letter it has to become."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support.story import report
from topics.catalog import (
    BROKER_FUNDED,
    CHAIN_HEADS,
    DEPOSITS_NOTIFIED,
    INPUT_BYTES_MAX,
    KYC_APPROVED,
    KYC_REJECTED,
    ORDERS_CANCELLED,
    ORDERS_EXPIRED,
    ORDERS_FILLED,
    ORDERS_PLACED,
    TRANSACTIONS_CONFIRMED,
    TRANSACTIONS_SIGNED,
    TRANSFERS_NOTIFIED,
    WALLETS_REQUESTED,
    WITHDRAWALS_ACCEPTED,
    WITHDRAWALS_REQUESTED,
    Topic,
)

STAGES: dict[Topic, tuple[str, ...]] = {
    KYC_APPROVED: ("request_wallets",),
    KYC_REJECTED: ("freeze_wallets",),
    WALLETS_REQUESTED: ("provision_wallets",),
    DEPOSITS_NOTIFIED: ("credit_deposits",),
    CHAIN_HEADS: ("finalize_deposits", "raise_fees", "sign_waiting", "top_up_lanes", "track_confirmations"),
    WITHDRAWALS_REQUESTED: ("accept_withdrawals",),
    WITHDRAWALS_ACCEPTED: ("sign_transactions", "transfer_by_custodian"),
    TRANSFERS_NOTIFIED: ("settle_transfers",),
    TRANSACTIONS_SIGNED: ("broadcast_transactions",),
    TRANSACTIONS_CONFIRMED: ("settle_withdrawals",),
    ORDERS_PLACED: ("reserve_orders",),
    ORDERS_FILLED: ("settle_fills",),
    ORDERS_CANCELLED: ("release_cancelled_orders",),
    ORDERS_EXPIRED: ("release_expired_orders",),
    BROKER_FUNDED: ("fund_broker",),
}
"""Every topic that stages read. Each of several refuses a bad message by itself."""
SAID_OF_GOOD = {
    DEPOSITS_NOTIFIED: ["unknown_wallet"],
    TRANSACTIONS_SIGNED: ["unknown_transaction"],
    TRANSACTIONS_CONFIRMED: ["unknown_withdrawal"],
}
"""Codes of the dead letters of a good event; of the other topics' there are none."""


def good(topic: Topic) -> dict[str, Any]:
    """An event of the topic that has no effect on others."""
    unique = uuid.uuid4().hex
    if topic is KYC_APPROVED:
        return {
            "user_id": f"kyc-{unique}", "vendor": "sumsub", "applicant_id": "a", "vendor_event_id": unique,
            "approved_at": "now",
        }  # fmt: skip
    if topic is WALLETS_REQUESTED:
        return {"user_id": f"direct-{unique}", "chains": ["SOL", "SOL"]}
    if topic is DEPOSITS_NOTIFIED:
        return report("0x" + "34" * 20)
    if topic is WITHDRAWALS_REQUESTED:
        return {
            "user_id": f"nobody-{unique}", "idempotency_key": unique, "chain": "MATIC", "asset": "USDC", "amount": "5",
            "to": "0x" + "34" * 20,
        }  # fmt: skip
    if topic is KYC_REJECTED:
        return {
            "user_id": f"kyc-{unique}", "vendor": "sumsub", "applicant_id": "a", "vendor_event_id": unique,
            "rejected_at": "now", "final": False,
        }  # fmt: skip
    if topic in (ORDERS_CANCELLED, ORDERS_EXPIRED):
        return {"order_id": unique}
    if topic is ORDERS_PLACED:
        return {"order_id": unique, "user_id": f"nobody-{unique}", "amount": "5"}
    if topic is ORDERS_FILLED:
        return {"order_id": unique, "fill_id": unique, "amount": "5"}
    if topic is BROKER_FUNDED:
        return {"funding_id": unique, "amount": "5"}
    lane = {
        "withdrawal_id": unique,
        "chain": "MATIC",
        "signer": "0x" + "34" * 20,
        "nonce": 7,
        "tx_hash": "0x" + unique * 2,
    }
    if topic is TRANSACTIONS_SIGNED:
        return lane | {"n": 1}
    if topic is TRANSACTIONS_CONFIRMED:
        return lane | {"block_hash": "0x" + unique * 2, "block_number": 7, "outcome": "confirmed"}
    if topic is TRANSFERS_NOTIFIED:
        return {
            "source": "circle",
            "transfer_id": unique,
            "state": "SENT",
            "chain": "MATIC",
            "tx_hash": "0x" + unique * 2,
        }
    if topic is WITHDRAWALS_ACCEPTED:
        return {
            "withdrawal_id": unique, "user_id": "nobody", "rail": "chain", "chain": "MATIC", "asset": "USDC",
            "amount": "5", "to": "0x" + "34" * 20,
        }  # fmt: skip
    return {"chain": "ETH", "chain_id": 1, "number": 1, "block_hash": f"0x{unique * 2}", "timestamp_s": 1}


def _numeric_field(topic: Topic) -> str:
    fields = {
        KYC_APPROVED: "vendor", KYC_REJECTED: "vendor", WALLETS_REQUESTED: "user_id", DEPOSITS_NOTIFIED: "block_number",
        WITHDRAWALS_REQUESTED: "amount", WITHDRAWALS_ACCEPTED: "amount", TRANSACTIONS_SIGNED: "nonce",
        TRANSACTIONS_CONFIRMED: "nonce", TRANSFERS_NOTIFIED: "block_number", ORDERS_PLACED: "amount", ORDERS_FILLED: "amount",
        ORDERS_CANCELLED: "filled_total", ORDERS_EXPIRED: "filled_total", BROKER_FUNDED: "amount",
    }  # fmt: skip
    return fields.get(topic, "number")


@dataclass(frozen=True)
class Case:
    """A bad message and the code of its dead letter."""

    name: str
    code: str
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    key: bytes | None = b"some key"
    timestamp_ms: int | None = None


def _of_any_topic(topic: Topic) -> list[Case]:
    event = good(topic)
    text = json.dumps(event)
    whole = text.encode()
    field = next(name for name in event if name != "version")
    ce_type = topic.models[0].ce_type().encode()

    def changed(**fields: Any) -> bytes:
        return json.dumps(event | fields).encode()

    def with_raw(name: str, raw: str) -> bytes:
        return (json.dumps({k: v for k, v in event.items() if k != name})[:-1] + f', "{name}": {raw}}}').encode()

    return [
        Case("not JSON", "not_json", b"{not json"),
        Case("bytes that are no text", "not_json", b"\xff\xfe\x00\x9f" * 10),
        Case("no value", "not_json", None),
        Case("an empty value", "not_json", b""),
        Case("a half", "not_json", whole[: len(whole) // 2]),
        Case("two", "not_json", whole + whole),
        Case("UTF-16", "not_json", text.encode("utf-16")),
        Case("100,000 brackets", "not_json", b"[" * 100_000),
        Case("100,000 objects", "not_json", b'{"a":' * 100_000),
        Case("100,000 brackets in a field", "not_json", with_raw("extra", "[" * 100_000 + "]" * 100_000)),
        Case("a lone surrogate", "not_json", with_raw(field, '"\\ud800"')),
        Case("a list", "wrong_schema", b"[]"),
        Case("null", "wrong_schema", b"null"),
        Case("a string", "wrong_schema", b'"deposit"'),
        Case("a field is missing", "wrong_schema", json.dumps({k: v for k, v in event.items() if k != field}).encode()),
        Case("a field is null", "wrong_schema", changed(**{field: None})),
        Case("a NUL in a string", "wrong_schema", changed(**{field: "a\0b"})),
        Case("a line break in a string", "wrong_schema", changed(**{field: "a\n"})),
        Case("a number of 5,000 digits", "not_json", with_raw(_numeric_field(topic), "9" * 5_000)),
        Case("NaN", "wrong_schema", with_raw(_numeric_field(topic), "NaN")),
        Case("infinity", "wrong_schema", with_raw(_numeric_field(topic), "1e999")),
        Case("version 2 in the value", "unsupported_version", changed(version=2)),
        Case("version 1 as a text", "unsupported_version", changed(version="1")),
        Case("version 2 in the header", "unsupported_version", whole, (("ce_type", ce_type[:-1] + b"2"),)),
        Case("another event's type", "wrong_schema", whole, (("ce_type", b"io.stablerail.something.else.v1"),)),
        Case("a header that is not UTF-8", "bad_envelope", whole, (("ce_id", b"\xff\xfe"),)),
        Case("an id of 10 kB", "bad_envelope", whole, (("ce_id", b"x" * 10_000),)),
        Case("an id with a NUL", "bad_envelope", whole, (("ce_id", b"a\0b"),)),
        Case("an attempt of an unknown kind", "bad_envelope", whole, (("attempt", b"-1"),)),
        Case("an envelope of the future", "bad_envelope", whole, (("ce_specversion", b"2.0"),)),
        Case("headers twice", "bad_envelope", whole, (("ce_id", b"a"), ("ce_id", b"b"), ("ce_source", b""))),
        Case("a header without a value", "not_json", b"{", (("x", None), ("dlq_code", b"forged"), ("", b"no name"))),
        Case("no key", "missing_key", whole, key=None),
        Case("an empty key", "missing_key", whole, key=b""),
        Case("a key of 100 kB", "not_json", b"{", key=os.urandom(100_000)),
        Case("a time before all calendars", "not_json", b"{", timestamp_ms=-(2**62)),
        Case("no time", "not_json", b"{", timestamp_ms=-1),
        Case("just under the topic's limit", "too_large", b" " * (INPUT_BYTES_MAX + 90_000)),
        Case("just under the input's limit", "not_json", b"{" + b" " * (INPUT_BYTES_MAX - 1)),
    ]


def _of_deposits() -> list[Case]:
    def changed(**fields: Any) -> bytes:
        return json.dumps(good(DEPOSITS_NOTIFIED) | fields).encode()

    amounts = {
        "negative": "-5.00", "zero": "0", "seven decimals": "5.0000001", "over 2^96": "79228162514264337593543.950337",
        "scientific": "1e3", "a number": 25, "a fraction": 25.0, "30 digits and more": "9" * 400,
    }  # fmt: skip
    return [
        *(Case(name, "wrong_schema", changed(amount=amount)) for name, amount in amounts.items()),
        Case("checksum", "bad_address", changed(to="0xA" + "a" * 39)),
        Case("an address of another chain", "bad_address", changed(to="0x" + "34" * 19)),
        Case("a hash of another chain", "bad_tx_hash", changed(tx_hash="5" * 88)),
        Case("unknown chain", "unknown_chain", changed(chain="DOGE")),
        Case("chain in lower case", "unknown_chain", changed(chain="matic")),
        Case("another token", "unsupported_token", changed(asset="USDT")),
        Case("nobody's wallet", "unknown_wallet", changed()),
        Case("a log index over 31 bits", "wrong_schema", changed(log_index=2**31)),
        Case("a block number over 63 bits", "wrong_schema", changed(block_number=2**63)),
    ]


def _of_withdrawals() -> list[Case]:
    """What is no request at all; a request that may not be is an answer, and no dead letter."""

    def changed(**fields: Any) -> bytes:
        return json.dumps(good(WITHDRAWALS_REQUESTED) | fields).encode()

    return [
        Case("the company's own name", "reserved_user", changed(user_id="system")),
        Case("an amount that is a number", "wrong_schema", changed(amount=25)),
        Case("an amount of 400 digits", "wrong_schema", changed(amount="9" * 400)),
        Case("a NUL in the address", "wrong_schema", changed(to="0x\0")),
        Case("a NUL in the chain", "wrong_schema", changed(chain="\0")),
        Case("a line break in the token", "wrong_schema", changed(asset="USDC\n")),
        Case("an empty rail", "wrong_schema", changed(rail="")),
        Case("a key of 201 characters", "wrong_schema", changed(idempotency_key="k" * 201)),
        Case("a key that is not printable", "wrong_schema", changed(idempotency_key="\u00e9")),
        Case("no address", "wrong_schema", changed(to=None)),
    ]


_OF_OTHERS: dict[Topic, Callable[[], list[Case]]] = {
    KYC_APPROVED: lambda: [
        Case("the company's own name", "reserved_user", json.dumps(good(KYC_APPROVED) | {"user_id": "system"}).encode())
    ],
    WALLETS_REQUESTED: lambda: [
        Case("a chain that is none", "wrong_schema", b'{"user_id": "u", "chains": ["DOGE"]}'),
        Case("no chain", "wrong_schema", b'{"user_id": "u", "chains": []}'),
        Case(
            "200,000 chains that are none",
            "wrong_schema",
            b'{"user_id": "u", "chains": [' + b",".join([b'""'] * 200_000) + b"]}",
        ),
    ],
    DEPOSITS_NOTIFIED: _of_deposits,
    WITHDRAWALS_REQUESTED: _of_withdrawals,
    WITHDRAWALS_ACCEPTED: lambda: [
        Case("no amount", "wrong_schema", json.dumps(good(WITHDRAWALS_ACCEPTED) | {"amount": "0"}).encode()),
        Case("a rail that is none", "wrong_schema", json.dumps(good(WITHDRAWALS_ACCEPTED) | {"rail": "mail"}).encode()),
        Case(
            "a chain that is none", "wrong_schema", json.dumps(good(WITHDRAWALS_ACCEPTED) | {"chain": "DOGE"}).encode()
        ),
    ],
    TRANSFERS_NOTIFIED: lambda: [
        Case("an amount of nothing", "wrong_schema", json.dumps(good(TRANSFERS_NOTIFIED) | {"amount": "0"}).encode()),
        Case("no state", "wrong_schema", json.dumps(good(TRANSFERS_NOTIFIED) | {"state": ""}).encode()),
        Case(
            "a withdrawal that there is not",
            "unknown_withdrawal",
            json.dumps(good(TRANSFERS_NOTIFIED) | {"reference": "ab" * 16}).encode(),
        ),
    ],
    TRANSACTIONS_SIGNED: lambda: [
        Case("a negative nonce", "wrong_schema", json.dumps(good(TRANSACTIONS_SIGNED) | {"nonce": -1}).encode()),
        Case("no attempt", "wrong_schema", json.dumps(good(TRANSACTIONS_SIGNED) | {"n": 0}).encode()),
    ],
    TRANSACTIONS_CONFIRMED: lambda: [
        Case(
            "an end that is none",
            "wrong_schema",
            json.dumps(good(TRANSACTIONS_CONFIRMED) | {"outcome": "lost"}).encode(),
        ),
        Case("no block", "wrong_schema", json.dumps(good(TRANSACTIONS_CONFIRMED) | {"block_hash": "0x"}).encode()),
    ],
    CHAIN_HEADS: lambda: [
        Case("a negative number", "wrong_schema", json.dumps(good(CHAIN_HEADS) | {"number": -1}).encode()),
        Case("a number over 63 bits", "wrong_schema", json.dumps(good(CHAIN_HEADS) | {"number": 2**63}).encode()),
        Case("a chain that is none", "wrong_schema", json.dumps(good(CHAIN_HEADS) | {"chain": "DOGE"}).encode()),
    ],
}


def cases_of(topic: Topic) -> list[Case]:
    """Bad messages for one topic."""
    return [*_of_any_topic(topic), *_OF_OTHERS.get(topic, list)()]
