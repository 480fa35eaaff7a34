"""Circle's notifications: only what Circle signed is believed, and whatever it says is translated without an exception."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
from typing import Any
from uuid import uuid4

import orjson
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from connectors import errors
from connectors.circle.chains import from_circle, to_circle
from connectors.circle.webhooks import KEYS_MAX, CircleWebhooks, translate
from connectors.webhooks.source import Ignored, NotUnderstood, Publish, RefusalCode, Refused
from topics.events import Chain, DepositNotified, Evidence

KEY_ID = "879dc113-5ca4-4ff7-a6b7-54652083fcf8"

# A vector of the contract notes: private scalar 0x11 repeated 32 times, RFC 6979.
NOTES_KEY = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEAhfmF/C2RDkoJ4+WmZ5pojpPLBUr321s32bluAKC1O0ZSn3ry5dxLS3aPKhaqHZaVvRfx1hZllLyiXxlMG5XlA=="
NOTES_BODY = (
    b'{"subscriptionId":"3f0c1d52-0a55-4d0b-9b4a-0d1f6c1f1a01","notificationId":"8a1b7c60-52d3-4f0e-9a55-6f1f2c3d4e05",'
    b'"notificationType":"transactions.inbound","notification":{"id":"6b6f2a3e-3a0e-4f9e-8a3e-2f9a7d1c0b11",'
    b'"state":"COMPLETE"},"timestamp":"2026-11-21T02:00:00Z","version":2}'
)
NOTES_SIGNATURE = "MEQCIDBXLH/gw+kmhaIaC91TxNwbQOpw2sqSkWPWBKj8Ep+FAiAKK1+7dFcWGsmwhX1ubAiclGMO2U7KYgCzQR4a7TSoPA=="

# openssl ecparam -name prime256v1 -genkey | openssl dgst -sha256 -sign; openssl ec -pubout -outform DER | base64
OPENSSL_KEY = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEECI5r3Ukmu616/cOoicd/F1NLSNG2pTgzzUpJoEALkgtsFNswHXvW5HFDPsdMvNNN4rtebBl2rZ5sqv2T3UZ5Q=="
OPENSSL_BODY = (
    b'{"subscriptionId":"5d0c7c0e-4b0a-4c39-9f63-0b8f6f0f5a10","notificationId":"f3a1f7d2-6a52-4b6e-8c39-6f4f6b7c8d90",'
    b'"notificationType":"webhooks.test","notification":{"hello":"world"},"timestamp":"2026-11-21T10:00:00Z","version":2}'
)
OPENSSL_SIGNATURE = "MEUCIQCG48jk5kgHZJhC3FL+479+D2TuZ0ueWK4nS1CQOG7zOAIgC+SMzETbpZjY1tu7YCf6X2tsL8aR2qq0NmRXfOpQ+vM="
VECTORS = [
    pytest.param(NOTES_KEY, NOTES_BODY, NOTES_SIGNATURE, id="notes"),
    pytest.param(OPENSSL_KEY, OPENSSL_BODY, OPENSSL_SIGNATURE, id="openssl"),
]

USDC_ID = "36b6931a-873a-56a8-8a27-b706b17104ee"
TOKENS = {USDC_ID: "USDC"}
INBOUND: dict[str, Any] = {
    "subscriptionId": "3f0c1d52-0a55-4d0b-9b4a-0d1f6c1f1a01",
    "notificationId": "8a1b7c60-52d3-4f0e-9a55-6f1f2c3d4e05",
    "notificationType": "transactions.inbound",
    "notification": {
        "id": "6b6f2a3e-3a0e-4f9e-8a3e-2f9a7d1c0b11",
        "blockchain": "MATIC-AMOY",
        "tokenId": USDC_ID,
        "walletId": "01899cf2-d415-7052-a207-f9862157e546",
        "sourceAddress": "0x7b777eb80e82f73f118378b15509cb48cd2c2ac3",
        "destinationAddress": "0x6E5eAf34c73D1CD0be4e24f923b97CF38e10d1f3",
        "transactionType": "INBOUND",
        "custodyType": "DEVELOPER",
        "state": "COMPLETE",
        "amounts": ["25.01"],
        "nfts": None,
        "txHash": "0x535ff5A3f2d8e0bE3f8a4b0c5d3a3bc1ee9a0c6fb2a2a1d5f1a0b8a2f7e4c3d2",
        "blockHash": "0xA4c5" + "0" * 60,
        "blockHeight": 41100000,
        "networkFee": "0.0703",
        "operation": "TRANSFER",
    },
    "timestamp": "2026-11-21T02:00:00Z",
    "version": 2,
}


class Circle:
    """The key end point, as it is seen through the client: keys by id, and how often it was asked."""

    def __init__(self, keys: dict[str, bytes] | None = None) -> None:
        self.keys = keys or {}
        self.asked = 0
        self.error: Exception | None = None

    async def fetch_key(self, key_id: str) -> bytes:
        self.asked += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if key_id not in self.keys:
            raise errors.Refused(404, "404", "public key not found")
        return self.keys[key_id]


def webhooks(circle: Circle, **options: Any) -> CircleWebhooks:
    return CircleWebhooks(circle.fetch_key, "testnet", TOKENS, **options)


def headers(signature: str, key_id: str = KEY_ID) -> dict[str, str]:
    return {"X-Circle-Signature": signature, "X-Circle-Key-Id": key_id}


async def refusal(source: CircleWebhooks, given: dict[str, str], body: bytes) -> RefusalCode:
    with pytest.raises(Refused) as refused:
        await source.verify(given, body)
    return refused.value.code


@pytest.mark.parametrize(("key", "body", "signature"), VECTORS)
async def test_a_signature_we_did_not_make_is_accepted_over_its_bytes_only(
    key: str, body: bytes, signature: str
) -> None:
    circle = Circle({KEY_ID: base64.b64decode(key)})
    source = webhooks(circle)
    await source.verify(headers(signature), body)
    await source.verify({"x-circle-signature": signature, "x-circle-key-id": KEY_ID.upper()}, body)
    flipped = bytes([body[0] ^ 1]) + body[1:]
    assert await refusal(source, headers(signature), flipped) is RefusalCode.BAD_SIGNATURE
    assert await refusal(source, headers(signature), body + b" ") is RefusalCode.BAD_SIGNATURE
    assert circle.asked == 1


async def test_another_keys_signature_is_refused() -> None:
    source = webhooks(Circle({KEY_ID: base64.b64decode(OPENSSL_KEY)}))
    assert await refusal(source, headers(NOTES_SIGNATURE), NOTES_BODY) is RefusalCode.BAD_SIGNATURE


@pytest.mark.parametrize("missing", ["X-Circle-Signature", "X-Circle-Key-Id"])
async def test_a_missing_header_is_refused_without_asking_circle(missing: str) -> None:
    circle = Circle()
    given = headers(NOTES_SIGNATURE)
    for absent in ({k: v for k, v in given.items() if k != missing}, {**given, missing: ""}):
        assert await refusal(webhooks(circle), absent, NOTES_BODY) is RefusalCode.MISSING_SIGNATURE
    assert circle.asked == 0


@pytest.mark.parametrize("signature", ["§", "no base64", "AAAA", base64.b64encode(b"x" * 5000).decode()])
async def test_bytes_that_are_no_signature_are_refused(signature: str) -> None:
    source = webhooks(Circle({KEY_ID: base64.b64decode(NOTES_KEY)}))
    assert await refusal(source, headers(signature), NOTES_BODY) is RefusalCode.BAD_SIGNATURE


@pytest.mark.parametrize(
    "key_id", ["1", "../../etc/passwd", KEY_ID + "0", KEY_ID.replace("-", ""), "{" + KEY_ID[1:-1] + "}"]
)
async def test_a_key_id_that_is_no_uuid_is_never_asked_for(key_id: str) -> None:
    circle = Circle()
    assert await refusal(webhooks(circle), headers(NOTES_SIGNATURE, key_id), NOTES_BODY) is RefusalCode.UNKNOWN_KEY
    assert circle.asked == 0


async def test_random_key_ids_do_not_make_us_hammer_circle_and_known_keys_still_serve() -> None:
    now = 1000.0
    circle = Circle({KEY_ID: base64.b64decode(NOTES_KEY)})
    source = webhooks(circle, lookups_per_min=3, clock=lambda: now)
    await source.verify(headers(NOTES_SIGNATURE), NOTES_BODY)
    codes = [await refusal(source, headers(NOTES_SIGNATURE, str(uuid4())), NOTES_BODY) for _ in range(20)]
    assert codes == [RefusalCode.UNKNOWN_KEY] * 2 + [RefusalCode.KEY_UNAVAILABLE] * 18
    assert circle.asked == 3
    await source.verify(headers(NOTES_SIGNATURE), NOTES_BODY)
    now += 60.0
    assert await refusal(source, headers(NOTES_SIGNATURE, str(uuid4())), NOTES_BODY) is RefusalCode.UNKNOWN_KEY


async def test_many_at_once_with_one_new_key_ask_circle_once() -> None:
    circle = Circle({KEY_ID: base64.b64decode(NOTES_KEY)})
    source = webhooks(circle, lookups_per_min=1)
    await asyncio.gather(*(source.verify(headers(NOTES_SIGNATURE), NOTES_BODY) for _ in range(50)))
    assert circle.asked == 1


async def test_one_caller_who_gives_up_does_not_fail_the_others() -> None:
    circle = Circle({KEY_ID: base64.b64decode(NOTES_KEY)})
    source = webhooks(circle, lookups_per_min=1)
    first = asyncio.create_task(source.verify(headers(NOTES_SIGNATURE), NOTES_BODY))
    second = asyncio.create_task(source.verify(headers(NOTES_SIGNATURE), NOTES_BODY))
    await asyncio.sleep(0)
    first.cancel()
    await second


@pytest.mark.parametrize(
    "error",
    [
        errors.Unavailable("down", sent=False),
        errors.Unknown("lost"),
        errors.RateLimited(),
        errors.Refused(401, "1", "malformed authorization"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_key_that_cannot_be_fetched_now_is_asked_for_again_later(error: Exception) -> None:
    circle = Circle({KEY_ID: base64.b64decode(NOTES_KEY)})
    circle.error = error
    source = webhooks(circle)
    assert await refusal(source, headers(NOTES_SIGNATURE), NOTES_BODY) is RefusalCode.KEY_UNAVAILABLE
    circle.error = None
    await source.verify(headers(NOTES_SIGNATURE), NOTES_BODY)


async def test_the_cache_of_keys_has_a_cap() -> None:
    ids = [str(uuid4()) for _ in range(KEYS_MAX + 1)]
    circle = Circle(dict.fromkeys(ids, base64.b64decode(NOTES_KEY)))
    source = webhooks(circle, lookups_per_min=1000)
    for key_id in [*ids, ids[-1], ids[0]]:
        await source.verify(headers(NOTES_SIGNATURE, key_id), NOTES_BODY)
    assert circle.asked == KEYS_MAX + 2


async def test_a_key_of_another_kind_is_refused() -> None:
    info = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    other_curve = ec.generate_private_key(ec.SECP256K1())
    signature = base64.b64encode(other_curve.sign(NOTES_BODY, ec.ECDSA(hashes.SHA256()))).decode()
    keys = [
        other_curve.public_key().public_bytes(*info),
        ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(*info),
        b"no key",
    ]
    for der in keys:
        code = await refusal(webhooks(Circle({KEY_ID: der})), headers(signature), NOTES_BODY)
        assert code is RefusalCode.UNSUPPORTED_ALGORITHM


def body(**changes: Any) -> dict[str, Any]:
    """INBOUND with fields of its transaction changed; `...` removes one."""
    changed = copy.deepcopy(INBOUND)
    for name, value in changes.items():
        if value is ...:
            del changed["notification"][name]
        else:
            changed["notification"][name] = value
    return changed


def notified(content: dict[str, Any]) -> DepositNotified:
    said = translate(json.dumps(content).encode(), "testnet", TOKENS)
    assert isinstance(said, Publish), said
    assert isinstance(said.event, DepositNotified)
    assert said.key == said.event.to.encode()
    return said.event


def test_an_inbound_transfer_becomes_a_reported_deposit() -> None:
    said = translate(json.dumps(INBOUND).encode(), "testnet", TOKENS)
    assert isinstance(said, Publish)
    assert (said.topic.name, said.source, said.event_id) == ("deposits.notified", "circle", INBOUND["notificationId"])
    assert said.key == b"0x6e5eaf34c73d1cd0be4e24f923b97cf38e10d1f3"
    assert said.event == DepositNotified(
        source="circle",
        transfer_id="6b6f2a3e-3a0e-4f9e-8a3e-2f9a7d1c0b11",
        chain="MATIC",
        tx_hash=INBOUND["notification"]["txHash"].lower(),
        to="0x6e5eaf34c73d1cd0be4e24f923b97cf38e10d1f3",
        asset="USDC",
        amount=25_010_000,
        evidence=Evidence.COMPLETE,
        block_hash="0xa4c5" + "0" * 60,
        block_number=41_100_000,
        sender="0x7b777eb80e82f73f118378b15509cb48cd2c2ac3",
    )
    assert notified(body(state="CONFIRMED")).evidence is Evidence.CONFIRMED
    for end in ("FAILED", "DENIED", "CANCELLED", "CANCELED"):
        assert notified(body(state=end)).evidence is Evidence.FAILED
    for sender in (None, "", 7, "a b", "0" * 129, ["0x1"]):
        assert notified(body(sourceAddress=sender)).sender is None, "the money came all the same"


def test_a_solana_address_keeps_its_case_and_its_block_hash_is_left_out() -> None:
    address = "9WzDXwBbmkg8ZTbNMqUxvQRAyrZzDsGYdLVL9zYtAWWM"
    event = notified(
        body(blockchain="SOL-DEVNET", destinationAddress=address, txHash="5VERv8NMvz", blockHash="4uQeVj5t")
    )
    assert (event.chain, event.to, event.tx_hash, event.block_hash) == ("SOL", address, "5VERv8NMvz", None)


@pytest.mark.parametrize("token_id", ["979869da-9115-5f7d-917d-12d434e56ae7", "USDC", "usdc"])
def test_another_token_is_never_taken_for_usdc(token_id: str) -> None:
    assert notified(body(tokenId=token_id)).asset == f"circle:{token_id}"


@pytest.mark.parametrize("blockchain", ["MATIC", "ETH", "BASE-SEPOLIA", "NEW-CHAIN"])
def test_a_chain_of_another_network_is_never_taken_for_ours(blockchain: str) -> None:
    assert notified(body(blockchain=blockchain)).chain == f"circle:{blockchain}"


@pytest.mark.parametrize("blockchain", ["ETH-SEPOLIA", "SOL-DEVNET", "APTOS-TESTNET", "MATIC-AMOY", "AVAX-FUJI"])
def test_chain_names_go_both_ways_and_belong_to_one_network(blockchain: str) -> None:
    chain = from_circle(blockchain, "testnet")
    assert chain is not None
    assert to_circle(chain, "testnet") == blockchain
    assert from_circle(blockchain, "mainnet") is None
    assert from_circle(to_circle(chain, "mainnet"), "mainnet") is chain
    assert {from_circle(to_circle(c, "testnet"), "testnet") for c in Chain} == set(Chain)


@pytest.mark.parametrize(
    "amount", ["0.0000001", "1.1234567", "-1", "0", "0.000000", "1e3", "NaN", "", " 1", "1,5", "9" * 40, 25, 2.5]
)
def test_an_amount_that_cannot_be_meant_is_not_understood(amount: Any) -> None:
    said = translate(json.dumps(body(amounts=[amount])).encode(), "testnet", TOKENS)
    assert isinstance(said, NotUnderstood)
    assert said.code == "wrong_schema"


@pytest.mark.parametrize(
    "changes",
    [
        {"amounts": []},
        {"amounts": ["1", "2"]},
        {"amounts": None},
        {"amounts": ...},
        {"id": ...},
        {"id": ""},
        {"tokenId": None},
        {"destinationAddress": "0x12 34"},
        {"txHash": None},
        {"blockchain": "é"},
        {"transactionType": "OUTBOUND"},
    ],
)
def test_a_transaction_with_a_wrong_or_missing_field_is_not_understood(changes: dict[str, Any]) -> None:
    said = translate(json.dumps(body(**changes)).encode(), "testnet", TOKENS)
    assert isinstance(said, NotUnderstood)
    assert said.code == "wrong_schema"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "not_json"),
        (b"\xff\xfe", "not_json"),
        (b"[" * 100_000, "not_json"),
        (b"null", "wrong_schema"),
        (b'[{"notificationId": "x"}]', "wrong_schema"),
        (orjson.dumps({**INBOUND, "notification": None}), "wrong_schema"),
        (orjson.dumps({**INBOUND, "notificationId": "x" * 201}), "wrong_schema"),
        (orjson.dumps({**INBOUND, "version": 3}), "unsupported_version"),
        (orjson.dumps({**INBOUND, "notificationType": "transactions.sideways"}), "unknown_type"),
        (orjson.dumps(body(state="WAITING")), "unknown_state"),
        (orjson.dumps({"Type": "Notification", "Message": "{}"}), "wrong_schema"),
    ],
)
def test_a_body_of_another_shape_is_not_understood_with_a_stable_code(content: bytes, code: str) -> None:
    said = translate(content, "testnet", TOKENS)
    assert isinstance(said, NotUnderstood)
    assert said.code == code


@pytest.mark.parametrize("kind", ["webhooks.test", "challenges.createWallet"])
def test_a_known_type_that_is_not_ours_is_ignored(kind: str) -> None:
    assert translate(orjson.dumps({**INBOUND, "notificationType": kind}), "testnet", TOKENS) == Ignored(kind)


def test_an_odd_block_number_or_hash_is_left_out_rather_than_losing_the_deposit() -> None:
    for odd in (-1, True, 2**63, "12", 1.5, None, {}):
        event = notified(body(blockHeight=odd, blockHash=odd))
        assert (event.block_number, event.block_hash) == (None, None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*INBOUND["notification"], *INBOUND])


@given(st.binary(max_size=300))
def test_whatever_the_bytes_translation_does_not_raise(content: bytes) -> None:
    assert isinstance(translate(content, "testnet", TOKENS), NotUnderstood)


@given(st.dictionaries(FIELDS, JSON, max_size=4), st.booleans())
def test_whatever_the_fields_translation_does_not_raise(changes: dict[str, Any], as_bytes: bool) -> None:
    content = copy.deepcopy(INBOUND)
    for name, value in changes.items():
        (content["notification"] if name in INBOUND["notification"] else content)[name] = value
        if not isinstance(content["notification"], dict):
            break
    given_content: Any = json.dumps(content).encode() if as_bytes else content
    assert isinstance(translate(given_content, "testnet", TOKENS), Publish | Ignored | NotUnderstood)


async def test_a_flood_of_random_key_ids_does_not_keep_circles_own_key_out() -> None:
    """Before we know any key: the flood has spent every look-up of the minute."""
    circle = Circle({KEY_ID: base64.b64decode(NOTES_KEY)})
    source = webhooks(circle, lookups_per_min=3, clock=lambda: 0.0)
    for _ in range(100):
        await refusal(source, headers(NOTES_SIGNATURE, str(uuid4())), NOTES_BODY)
    assert circle.asked == 3
    assert await refusal(source, headers(NOTES_SIGNATURE), NOTES_BODY) is RefusalCode.KEY_UNAVAILABLE
    for _ in range(100):
        await refusal(source, headers(NOTES_SIGNATURE, str(uuid4())), NOTES_BODY)
    await source.verify(headers(NOTES_SIGNATURE), NOTES_BODY)
    assert circle.asked == 4
