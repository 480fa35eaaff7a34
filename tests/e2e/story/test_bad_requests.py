"""Whatever reaches an endpoint: a problem with a stable code or a signed vendor's 200, and the next request is served."""

from __future__ import annotations

import asyncio
import json
import uuid
from base64 import b64encode
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr
from yarl import URL

from connectors.circle.sandbox.config import TEST_API_KEY
from connectors.kyc.sumsub import ALGORITHM_HEADER, sign
from tests.support.story import Story, until
from topics.catalog import WEBHOOKS_DLQ
from topics.events import Chain


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
        async with asyncio.timeout(100):
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
