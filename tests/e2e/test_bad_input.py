"""Whatever bytes reach a topic or an endpoint: a dead letter or a problem with a stable code, and the next is served."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import base58
import pytest
from aiohttp import web
from aiokafka.errors import MessageSizeTooLargeError
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr
from yarl import URL

from connectors.circle.sandbox.config import TEST_API_KEY
from connectors.kyc.sumsub import ALGORITHM_HEADER, sign
from tests.support.hostile import NotUtf8, send_raw
from tests.support.story import Letter, Sent, Story, message, report, until
from topics.catalog import (
    CHAIN_HEADS,
    DEPOSITS_NOTIFIED,
    INPUT_BYTES_MAX,
    KYC_APPROVED,
    WALLETS_REQUESTED,
    WEBHOOKS_DLQ,
    Topic,
)
from topics.events import Chain

pytestmark = pytest.mark.timeout(240)

STAGES = {
    KYC_APPROVED: "request_wallets",
    WALLETS_REQUESTED: "provision_wallets",
    DEPOSITS_NOTIFIED: "credit_deposits",
    CHAIN_HEADS: "finalize_deposits",
}
"""Every topic that a stage reads."""


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
    return {"chain": "ETH", "chain_id": 1, "number": 1, "block_hash": f"0x{unique * 2}", "timestamp_s": 1}


def numeric_field(topic: Topic) -> str:
    return {KYC_APPROVED: "vendor", WALLETS_REQUESTED: "user_id", DEPOSITS_NOTIFIED: "block_number"}.get(
        topic, "number"
    )


@dataclass(frozen=True)
class Case:
    """A bad message and the code of its dead letter."""

    name: str
    code: str
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    key: bytes | None = b"some key"
    timestamp_ms: int | None = None


def of_any_topic(topic: Topic) -> list[Case]:
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
        Case("a number of 5,000 digits", "not_json", with_raw(numeric_field(topic), "9" * 5_000)),
        Case("NaN", "wrong_schema", with_raw(numeric_field(topic), "NaN")),
        Case("infinity", "wrong_schema", with_raw(numeric_field(topic), "1e999")),
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


def of_deposits() -> list[Case]:
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


OF_OTHERS: dict[Topic, Callable[[], list[Case]]] = {
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
    DEPOSITS_NOTIFIED: of_deposits,
    CHAIN_HEADS: lambda: [
        Case("a negative number", "wrong_schema", json.dumps(good(CHAIN_HEADS) | {"number": -1}).encode()),
        Case("a number over 63 bits", "wrong_schema", json.dumps(good(CHAIN_HEADS) | {"number": 2**63}).encode()),
        Case("a chain that is none", "wrong_schema", json.dumps(good(CHAIN_HEADS) | {"chain": "DOGE"}).encode()),
    ],
}


@pytest.mark.parametrize("topic", STAGES, ids=lambda topic: topic.name)
async def test_every_bad_message_is_one_dead_letter_as_it_came_and_the_next_is_served(
    story: Story, topic: Topic
) -> None:
    cases = [*of_any_topic(topic), *OF_OTHERS[topic]()]
    sent = []
    async with story.producer(max_request_size=2**21) as producer:
        for case in cases:
            at = await producer.send_and_wait(
                topic.named(story.prefix),
                case.value,
                case.key,
                headers=list(case.headers),
                timestamp_ms=case.timestamp_ms,
            )
            sent.append(Sent(at.partition, at.offset))
    letters = await story.letters(topic, sent)
    wrong = [
        (case.name, [letter.ours("code") for letter in found], [letter.ours("reason") for letter in found])
        for case, found in zip(cases, letters, strict=True)
        if [letter.ours("code") for letter in found] != [case.code] or not _as_it_came(found[0], case)
    ]
    assert wrong == []
    assert {letter.ours("stage") for (letter,) in letters} == {STAGES[topic]}
    await _is_served(story, topic)


def _as_it_came(letter: Letter, case: Case) -> bool:
    theirs = [(name, value) for name, value in case.headers if not name.startswith("dlq_")]
    return (letter.value, letter.key, letter.theirs) == (case.value, case.key, theirs)


@pytest.mark.parametrize("topic", STAGES, ids=lambda topic: topic.name)
async def test_a_header_name_that_is_no_text_does_not_stop_its_partition(story: Story, topic: Topic) -> None:
    bad = (b"some key", b"{", [(NotUtf8(), b"\xff"), ("x", None)])
    async with story.producer() as producer:
        offset = await send_raw(producer, topic.named(story.prefix), 0, [bad, bad])
    ((first,), (second,)) = await story.letters(topic, [Sent(0, offset), Sent(0, offset + 1)])
    assert first.ours("code") == second.ours("code") == "not_json"
    assert first.theirs == [("ce\\xff\\xfe", b"\xff"), ("x", None)]
    await _is_served(story, topic)


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_compressed_batches_are_read(story: Story, codec: str) -> None:
    events = [report("0x" + "34" * 20, note="n" * 1_000) for _ in range(20)]
    sent = await story.produce(
        DEPOSITS_NOTIFIED, *[message(event["to"], event) for event in events], compression_type=codec, linger_ms=50
    )
    letters = await story.letters(DEPOSITS_NOTIFIED, sent)
    assert [letter.ours("code") for (letter,) in letters] == ["unknown_wallet"] * 20


async def test_what_unpacks_to_more_than_the_limit_is_refused_by_the_broker(story: Story) -> None:
    for topic in STAGES:
        with pytest.raises(MessageSizeTooLargeError):
            await story.produce(topic, {"key": b"k", "value": b" " * 5_000_000}, max_request_size=2**24)
        for codec in ("gzip", "zstd"):
            bomb = {"key": b"k", "value": b" " * 30_000_000}
            with pytest.raises(MessageSizeTooLargeError):
                await story.produce(topic, bomb, max_request_size=2**26, max_batch_size=2**26, compression_type=codec)


async def test_odd_but_readable_messages_are_served(story: Story) -> None:
    """Extra fields, headers of others, a trace that is none, another key than ours: no reason to refuse money."""
    user, wallets = await story.customer()
    contents = [
        report(wallets["SOL"], chain="SOL", tx_hash=_signature(), note={"deep": [1, 2, {"x": "\u0000"}]})
        for _ in range(4)
    ]
    headers: list[list[tuple[str, bytes | None]]] = [
        [("traceparent", b"\0")],
        [("traceparent", b"x" * 90_000), ("other", os.urandom(90_000))],
        [("ce_id", b"\xc3\xa9"), ("ce_source", "/ü".encode()), ("ce_time", b"\xff"), ("content-type", b"\xff")],
        [("ce_id", uuid.uuid4().bytes.hex().encode()), ("ce_id", uuid.uuid4().bytes.hex().encode()), ("x", None)],
    ]
    keys = [b"k", os.urandom(10_000), b"\xff", wallets["SOL"].encode()]
    messages = [
        {"key": key, "value": json.dumps(content).encode(), "headers": some}
        for key, content, some in zip(keys, contents, headers, strict=True)
    ]
    await story.produce(DEPOSITS_NOTIFIED, *messages)

    async def all_credited() -> bool:
        return await story.balance(user) == 4 * 25_000_000

    await until(all_credited, "four credits")
    direct = f"direct-{uuid.uuid4().hex}"
    request = {"user_id": direct, "chains": ["SOL", "SOL", "ETH"]}
    await story.produce(WALLETS_REQUESTED, message(direct, request, traceparent="\0", ce_id=direct * 5))

    async def provisioned() -> bool:
        return await story.rows("SELECT chain FROM wallets WHERE user_id = $1 ORDER BY 1", direct) == [
            ("ETH",),
            ("SOL",),
        ]

    await until(provisioned, "two wallets")


async def _is_served(story: Story, topic: Topic) -> None:
    """A good event to each partition of the topic has its effect, or is at least settled without a dead letter."""
    async with story.producer() as producer:
        sent = []
        for partition in range(topic.partitions):
            event = good(topic)
            at = await producer.send_and_wait(
                topic.named(story.prefix), json.dumps(event).encode(), b"good", partition=partition
            )
            sent.append(Sent(at.partition, at.offset))
    codes = [[letter.ours("code") for letter in letters] for letters in await story.letters(topic, sent)]
    assert codes == ([["unknown_wallet"]] if topic is DEPOSITS_NOTIFIED else [[]]) * topic.partitions


def _signature() -> str:
    return base58.b58encode(os.urandom(64)).decode()


async def test_no_bad_input_was_taken_for_a_bug(story: Story) -> None:
    """Runs after the others of this file: no crash was counted, no worker was restarted."""
    assert await story.rows("SELECT stage, topic, count FROM crashes") == []
    for name in ("onboarding", "deposits", "chains", "bridge", "api"):
        assert story.stack.children[name].returncode is None


# -- endpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def _code(answer: aiohttp.ClientResponse) -> tuple[int, str]:
    assert answer.headers["content-type"].startswith("application/problem+json"), await answer.text()
    return answer.status, (await answer.json(content_type=None))["code"]


async def _post(http: aiohttp.ClientSession, url: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
    async with http.post(url, data=body, headers=headers) as answer:
        return (answer.status, "") if answer.status == 200 else await _code(answer)


async def test_the_bridge_takes_from_sumsub_only_what_sumsub_signed(story: Story, http: aiohttp.ClientSession) -> None:
    url = f"{story.stack.url('bridge')}/webhooks/kyc/sumsub"
    secret = SecretStr(story.stack.environment["STABLERAIL_SUMSUB_WEBHOOK_SECRET"])
    user = f"user-{uuid.uuid4().hex}"
    body = json.dumps({"type": "applicantReviewed", "externalUserId": user}).encode()
    signed = sign(body, secret)
    assert await _post(http, url, bytes([body[0] ^ 1]) + body[1:], signed) == (401, "bad_signature")
    assert await _post(http, url, body, sign(body, SecretStr("another secret"))) == (401, "bad_signature")
    assert await _post(http, url, body, {}) == (401, "missing_signature")
    assert await _post(http, url, body, signed | {ALGORITHM_HEADER: "HMAC_MD5_HEX"}) == (400, "unsupported_algorithm")
    async with http.get(url) as answer:
        assert await _code(answer) == (405, "method_not_allowed")
    # signed, but not understood: kept, and the vendor need not send it again
    for odd in (b"{not json", b"\xff", b'{"type": 7}'):
        assert await _post(http, url, odd, sign(odd, secret)) == (200, "")
        assert odd in [record.value for record in await story.records(WEBHOOKS_DLQ)]
    await story.stack.approve(user)

    async def approved() -> bool:
        return bool(await story.rows("SELECT 1 FROM wallet_requests WHERE user_id = $1", user))

    await until(approved, "the next webhook is served")


async def test_the_bridge_takes_from_circle_only_what_circle_signed(story: Story, http: aiohttp.ClientSession) -> None:
    url = f"{story.stack.url('bridge')}/webhooks/circle"
    user, wallets = await story.customer()
    body, headers = await _overheard(story, http, wallets["SOL"])
    flipped = bytes([body[0] ^ 1]) + body[1:]
    assert await _post(http, url, flipped, headers) == (401, "bad_signature")
    for name in headers:
        assert await _post(http, url, body, {k: v for k, v in headers.items() if k != name}) == (
            401,
            "missing_signature",
        )
    mine = ec.generate_private_key(ec.SECP256R1())
    forged = headers | {"x-circle-signature": b64encode(mine.sign(body, ec.ECDSA(hashes.SHA256()))).decode()}
    assert await _post(http, url, body, forged) == (401, "bad_signature")
    assert await _post(http, url, body, forged | {"x-circle-key-id": str(uuid.uuid4())}) == (401, "unknown_key")
    assert await _post(http, url, body, headers | {"x-circle-signature": "%%%"}) == (401, "bad_signature")
    async with http.put(url, data=body, headers=headers) as answer:
        assert await _code(answer) == (405, "method_not_allowed")
    # again, and under its alias: genuine, and no second credit
    for path in ("", "/transfers", "/wallets", "/payments"):
        assert await _post(http, url + path, body, headers) == (200, "")

    async def credited() -> bool:
        return await story.deposits(wallets["SOL"]) == [("finalized", 7_000_000, 0, 1)]

    await until(credited, "one credit")
    assert await story.balance(user) == 7_000_000


async def test_the_bridge_reads_no_more_of_a_body_than_a_webhook_may_have(story: Story) -> None:
    """A raw request, because clients give up when the answer comes before their body is out."""
    port = story.stack.ports["bridge"]
    for path in ("/webhooks/circle", "/webhooks/kyc/sumsub"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: bridge\r\nContent-Length: 5000000\r\n\r\n".encode() + b" " * 10_000
        )
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b'"body_too_large"' in answer
        writer.close()
        await writer.wait_closed()


async def _overheard(story: Story, http: aiohttp.ClientSession, address: str) -> tuple[bytes, dict[str, str]]:
    """A genuine notification of a transfer of 7 USDC: the test subscribes beside the bridge."""
    heard: asyncio.Queue[tuple[bytes, dict[str, str]]] = asyncio.Queue()

    async def hear(request: web.Request) -> web.Response:
        if request.method == "POST":
            wanted = {
                name.lower(): value for name, value in request.headers.items() if name.lower().startswith("x-circle")
            }
            heard.put_nowait((await request.read(), wanted))
        return web.Response()

    app = web.Application()
    app.router.add_route("*", "/", hear)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0]
        body = {"endpoint": f"http://{host}:{port}/", "notificationTypes": ["transactions.*"]}
        subscriptions = f"{story.stack.url('circle')}/v2/notifications/subscriptions"
        authorization = {"Authorization": f"Bearer {TEST_API_KEY}"}
        async with http.post(subscriptions, json=body, headers=authorization) as answer:
            subscription = (await answer.json())["data"]["id"]
        await story.inject(Chain.SOL, address, "7", "COMPLETE")
        async with asyncio.timeout(30):
            while True:
                content, headers = await heard.get()
                if address.encode() in content:
                    break
        await http.delete(f"{subscriptions}/{subscription}", headers=authorization)
    finally:
        await runner.cleanup()
    return content, headers


async def test_the_api_answers_what_it_does_not_serve_with_problems(story: Story, http: aiohttp.ClientSession) -> None:
    base = f"{story.stack.url('api')}/v1"
    user, _ = await story.customer()
    key = await story.api_key("read")

    async def ask(path: str, token: str | None = key, method: str = "GET") -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        async with http.request(method, URL(base + path, encoded=True), headers=headers) as answer:
            return (200, "") if answer.status == 200 else await _code(answer)

    good = f"/users/{user}/balances"
    assert await ask(good) == (200, "")
    assert await ask(good, None) == (401, "missing_key")
    assert await ask(good, key[:-1] + ("a" if key[-1] != "a" else "b")) == (401, "invalid_key")
    assert await ask(good, "nonsense") == (401, "invalid_key")
    assert await ask("/users/nobody/balances") == (404, "unknown_user")
    for bad in ("/users/a%00b/balances", f"/users/{'u' * 300}/balances", "/users/%FF/balances", "/deposits/not-an-id"):
        assert await ask(bad) == (422, "invalid_request"), bad
    assert await ask(f"/deposits/{uuid.uuid4()}") == (404, "unknown_deposit")
    for cursor in ("zz", "%FF%00zz", "9" * 100, "2026-01-01T00:00:00"):
        assert await ask(f"/users/{user}/deposits?after={cursor}") == (400, "bad_cursor"), cursor
    assert await ask(f"/users/{user}/deposits?limit=0") == (422, "invalid_request")
    assert await ask(good, key, "DELETE") == (405, "method_not_allowed")
    assert await ask("/nothing") == (404, "not_found")
    assert await ask(good) == (200, "")
