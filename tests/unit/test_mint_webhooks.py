"""What Circle Mint's notifications say: incoming transfers are deposits, payments and wallets events of their own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.circle.mint_webhooks import IGNORED_TYPES, notified, translate
from connectors.webhooks.source import Ignored, NotUnderstood, Publish
from topics.catalog import CIRCLE_WALLETS_UPDATED, DEPOSITS_NOTIFIED, PAYMENTS_UPDATED
from topics.events import CircleWalletUpdated, DepositNotified, Evidence, PaymentUpdated

HASH = "0x4CEBf8f90c9243a23c77e4ae20df691469e4b933b295a73376292843968f7a63"
TO = "0x8381470ED67C3802402dbbFa0058E8871F017A6F"


def notification(kind: str, version: int = 1, **resource: Any) -> str:
    return json.dumps(
        {"clientId": "c", "notificationType": kind, "version": version, "customAttributes": {}, **resource}
    )


def transfer(**changes: Any) -> str:
    body = {
        "id": "b8627ae8-732b-4d25-b947-1df8f4007a29",
        "source": {"type": "blockchain", "chain": "POLY", "identities": []},
        "destination": {"type": "wallet", "id": "12345", "address": TO},
        "amount": {"amount": "3.14", "currency": "USD"},
        "transactionHash": HASH, "status": "complete", "createDate": "2026-11-21T02:00:00.000Z",
    }  # fmt: skip
    return notification("transfers", transfer=body | changes)


def test_an_incoming_transfer_is_a_deposit_once_it_is_complete() -> None:
    said = translate(transfer(), "testnet")
    assert isinstance(said, Publish)
    assert (said.topic, said.key, said.source) == (DEPOSITS_NOTIFIED, TO.lower().encode(), "circle_mint")
    assert said.event == DepositNotified(
        source="circle_mint", transfer_id="b8627ae8-732b-4d25-b947-1df8f4007a29", chain="MATIC", tx_hash=HASH.lower(),
        to=TO.lower(), asset="USDC", amount=3_140_000, evidence=Evidence.COMPLETE,
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"status": "running"}, {"status": "odd"}, {"id": None}, {"source": None}])
def test_the_list_says_of_a_transfer_what_its_notification_says(changes: dict[str, Any]) -> None:
    told = transfer(**changes)
    assert notified(json.loads(told)["transfer"]) == translate(told, "testnet")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"status": "pending"}, "transfers.unfinished"),
        ({"status": "running"}, "transfers.unfinished"),
        ({"status": "failed"}, "transfers.failed"),
        ({"source": {"type": "wallet", "id": "1"}}, "transfers.not_incoming"),
        ({"destination": {"type": "blockchain", "address": TO, "chain": "ETH"}}, "transfers.not_incoming"),
    ],
)
def test_what_is_not_or_not_yet_ours_is_no_deposit(changes: dict[str, Any], code: str) -> None:
    assert translate(transfer(**changes), "testnet") == Ignored(code)


@pytest.mark.parametrize(
    "message",
    [
        transfer(status="finished"),
        transfer(transactionHash=None),
        transfer(destination={"type": "wallet", "id": "1"}),
        transfer(amount={"amount": "0", "currency": "USD"}),
        transfer(amount={"amount": 3.14, "currency": "USD"}),
        transfer(amount={"amount": "3.1400001", "currency": "USD"}),
        transfer(source={"type": "blockchain"}),
        notification("transfers"),
        notification("transfers", version=2, transfer={}),
        notification("payments", payment={"id": "p"}),
        notification("unheardOf"),
        "{}", "[]", "", "\x00",
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_kept(message: str) -> None:
    assert isinstance(translate(message, "testnet"), NotUnderstood)


def test_a_currency_or_a_chain_that_is_not_ours_is_never_taken_for_ours() -> None:
    said = translate(transfer(amount={"amount": "3.14", "currency": "EUR"}), "testnet")
    assert isinstance(said, Publish)
    assert isinstance(said.event, DepositNotified)
    assert said.event.asset == "circle:EUR"
    said = translate(transfer(source={"type": "blockchain", "chain": "XLM"}), "testnet")
    assert isinstance(said, Publish)
    assert isinstance(said.event, DepositNotified)
    assert said.event.chain == "circle:XLM"


def test_a_payment_is_an_event_of_its_own_for_each_status() -> None:
    def payment(status: str, **more: Any) -> Publish:
        body = {
            "id": "p1", "type": "payment", "merchantId": "m", "amount": {"amount": "3.14", "currency": "USD"},
            "status": status, "updateDate": "2026-11-21T02:00:00.000Z", **more,
        }  # fmt: skip
        said = translate(notification("payments", payment=body), "testnet")
        assert isinstance(said, Publish)
        return said

    paid = payment("paid")
    assert (paid.topic, paid.key) == (PAYMENTS_UPDATED, b"p1")
    assert paid.event == PaymentUpdated(
        source="circle_mint", payment_id="p1", kind="payment", status="paid", amount=3_140_000, currency="USD",
        updated_at="2026-11-21T02:00:00.000Z",
    )  # fmt: skip
    assert paid == payment("paid", unknown="field"), "the other region's copy is the same event"
    assert payment("pending").event_id != paid.event_id


def test_wallets_and_recipients_are_events_of_their_own() -> None:
    recipient = {
        "id": "r1",
        "chain": "ETH",
        "address": TO,
        "status": "active",
        "updateDate": "2026-11-21T02:00:00.000Z",
    }
    said = translate(notification("addressBookRecipients", addressBookRecipient=recipient), "testnet")
    assert isinstance(said, Publish)
    assert (said.topic, said.key) == (CIRCLE_WALLETS_UPDATED, b"r1")
    assert said.event == CircleWalletUpdated(
        wallet_id="r1", kind="addressBookRecipients", status="active", chain="ETH", address=TO,
        updated_at="2026-11-21T02:00:00.000Z",
    )  # fmt: skip
    said = translate(notification("wallets", wallet={"walletId": "12345", "type": "merchant"}), "testnet")
    assert isinstance(said, Publish)
    assert said.event == CircleWalletUpdated(wallet_id="12345", kind="wallets")


@pytest.mark.parametrize("kind", sorted(IGNORED_TYPES))
def test_what_is_of_no_interest_is_ignored_by_name(kind: str) -> None:
    assert translate(notification(kind), "testnet") == Ignored(kind)


@given(st.binary() | st.text() | st.dictionaries(st.text(), st.text()).map(json.dumps))
def test_nothing_makes_it_raise(message: str | bytes) -> None:
    assert not isinstance(translate(message, "testnet"), Publish)
