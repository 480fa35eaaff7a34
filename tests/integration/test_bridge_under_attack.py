"""The bridge as a process, attacked: its memory stays bounded, and a vendor's webhooks are answered while it goes on."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import resource
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.keys import NotificationKey
from connectors.circle.sandbox.tokens import usdc_token_id
from connectors.webhooks.bridge import Limits
from connectors.webhooks.guard import GRACE_S, HEAD_S
from stablerail.dev.kafka import Kafka
from stablerail.dev.processes import Child, free_port, tail
from stablerail.topics_admin import admin, create_missing
from tests.support.in_process import read_topic, until
from tests.support.patience import PATIENCE_S
from topics.catalog import DEPOSITS_NOTIFIED, WEBHOOKS_DLQ

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/webhooks/circle"
GROWTH_BYTES_MAX = 250_000_000
"""Generous: 500 connections with what each may hold, and 32 large bodies. Unbounded, the attacks below take gigabytes."""
GOOD_DURING_ATTACK = 30
ANSWER_S_MAX = PATIENCE_S
"""Of a busy machine; a vendor waits 5 s."""
LOG_BYTES_MAX, LOG_BYTES_PER_S_MAX = 100_000, 2_000
"""A line a second of each kind of refusal."""


@dataclass
class Bridge:
    process: Child
    port: int
    key: NotificationKey
    kafka: Kafka
    prefix: str
    http: aiohttp.ClientSession
    idle_bytes: int = 0
    """Before any attack."""
    sent: list[str] = field(default_factory=list)

    async def good(self, **headers: str) -> None:
        """A genuine webhook that is taken, each try on a connection of its own as vendors' often are. One that is quick is taken at
        once; a try that took so long that the bridge was right to end it is repeated, as vendors do, and so is one whose
        broker stood still."""
        transfer, ends = str(uuid.uuid4()), time.monotonic() + PATIENCE_S
        body = inbound(transfer)
        while True:
            begun = time.monotonic()
            status, said = await self._post(body, headers)
            if status == 200:
                self.sent.append(transfer)
                return
            now = time.monotonic()
            assert now - begun >= GRACE_S or "broker_unavailable" in said, (status, said)
            assert now < ends, (status, said)
            await asyncio.sleep(0.1)

    async def _post(self, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
        """The answer; 0 where the bridge has ended the connection."""
        signed = {"X-Circle-Key-Id": self.key.id, "X-Circle-Signature": self.key.sign(body), "Connection": "close"}
        url = f"http://127.0.0.1:{self.port}{PATH}"
        try:
            async with self.http.post(
                url, data=body, headers={"Content-Type": "application/json"} | signed | headers
            ) as answer:
                return answer.status, await answer.text()
        except (aiohttp.ClientConnectionError, OSError) as error:
            return 0, repr(error)

    def rss(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def log_bytes(self) -> int:
        return self.process.log.stat().st_size

    async def raw(self) -> Raw:
        begun = time.monotonic()
        return Raw(*await asyncio.open_connection("127.0.0.1", self.port), begun, begun)

    async def talked(self, talk: Callable[[Raw], Awaitable[None]]) -> None:
        """On a connection; on another where a request came so late that the bridge was right to end the first."""
        ends = time.monotonic() + PATIENCE_S
        while True:
            raw = await self.raw()
            try:
                await talk(raw)
                return
            except (AssertionError, OSError, EOFError):
                if not raw.since + HEAD_S <= time.monotonic() < ends:
                    raise
            finally:
                raw.close()


@dataclass
class Raw:
    """A connection without manners."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    since: float
    """Not after the moment from which the bridge waits for a request."""
    asked: float

    async def send(self, data: bytes) -> bool:
        """False when the bridge has ended the connection."""
        self.asked = time.monotonic()
        try:
            self.writer.write(data)
            await self.writer.drain()
        except OSError:
            return False
        return not self.reader.at_eof()

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        """Status, headers, JSON."""
        async with asyncio.timeout(ANSWER_S_MAX):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        status = int(head[0].split()[1])
        if status != 408:  # what was late is the request before
            self.since = self.asked
        return status, headers, json.loads(body) if body else None

    async def ended(self) -> None:
        async with asyncio.timeout(ANSWER_S_MAX):
            with suppress(OSError):
                while await self.reader.read(65_536):
                    pass

    def close(self) -> None:
        self.writer.transport.abort()


def inbound(transfer: str) -> bytes:
    notification = {
        "id": transfer, "blockchain": "MATIC-AMOY", "tokenId": usdc_token_id("MATIC-AMOY"), "state": "CONFIRMED",
        "destinationAddress": "0x" + "ab" * 20, "txHash": "0x" + "cd" * 32, "amounts": ["1"],
    }  # fmt: skip
    envelope = {"notificationId": transfer, "notificationType": "transactions.inbound", "version": 2}
    return json.dumps({**envelope, "notification": notification}).encode()


def head(length: int | None, **headers: str) -> bytes:
    sized = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"POST {PATH} HTTP/1.1\r\nHost: bridge\r\n{sized}\r\n{more}\r\n".encode()


@pytest.fixture(scope="module")
def descriptors() -> None:
    """A thousand connections are a thousand descriptors of ours."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8_192)), hard))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bridge(kafka: Kafka, scratch: Path, descriptors: None) -> AsyncIterator[Bridge]:
    """One for all: what an attack leaves behind, the next test would meet."""
    topic_prefix = f"t{uuid.uuid4().hex[:10]}."
    async with admin(kafka.bootstrap) as client:
        await create_missing(client, topic_prefix, 1, [DEPOSITS_NOTIFIED, WEBHOOKS_DLQ])
    async with CircleSandbox(SandboxConfig(rsa_bits=2048, rate_limits=False)) as circle:
        port = free_port()
        settings = {
            "STABLERAIL_KAFKA_BOOTSTRAP": kafka.bootstrap,
            "STABLERAIL_TOPIC_PREFIX": topic_prefix,
            "STABLERAIL_CIRCLE_API_URL": circle.base_url,
            "STABLERAIL_CIRCLE_API_KEY": TEST_API_KEY,
            "STABLERAIL_CIRCLE_ENTITY_SECRET": TEST_ENTITY_SECRET,
            "STABLERAIL_CIRCLE_USDC_TOKEN_IDS": json.dumps({"MATIC": usdc_token_id("MATIC-AMOY")}),
            "STABLERAIL_SUMSUB_WEBHOOK_SECRET": "attacked-secret",
            "STABLERAIL_BRIDGE_PORT": str(port),
            "STABLERAIL_LOG_FORMAT": "json",
        }
        log = scratch / "attacked_bridge.log"
        command = [sys.executable, "-m", "stablerail.cli", "bridge"]
        process = Child(command, log=log, env={**os.environ, **settings})
        timeout = aiohttp.ClientTimeout(total=ANSWER_S_MAX)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as http:
                key = circle.sandbox.state.notification_key
                found = Bridge(process, port, key, kafka, topic_prefix, http)
                await until(lambda: _ready(found), "the bridge is ready")
                await found.good()
                found.idle_bytes = found.rss()
                yield found
                assert process.returncode is None, tail(log)
        finally:
            process.kill()


async def _ready(bridge: Bridge) -> bool:
    assert bridge.process.returncode is None, tail(bridge.process.log)
    with suppress(aiohttp.ClientError, OSError):
        async with bridge.http.get(f"http://127.0.0.1:{bridge.port}/readyz") as answer:
            return answer.status == 200
    return False


@asynccontextmanager
async def many(bridge: Bridge, number: int) -> AsyncIterator[list[Raw]]:
    """That many connections at once; the bridge may end them."""
    opened: list[Raw] = []

    async def one() -> None:
        with suppress(OSError):
            opened.append(await bridge.raw())

    try:
        await asyncio.gather(*(one() for _ in range(number)))
        yield opened
    finally:
        for connection in opened:
            connection.close()


async def silent(bridge: Bridge, under_way: asyncio.Event, over: asyncio.Event) -> None:
    """A thousand connections that say nothing; then another thousand, and so on."""
    while not over.is_set():
        async with many(bridge, 1_000):
            under_way.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), 0.3)


async def slow_heads(bridge: Bridge, under_way: asyncio.Event, over: asyncio.Event) -> None:
    async with many(bridge, 1_000) as connections:
        under_way.set()
        await dribble(connections, head(1_000)[:-2], over)


async def slow_bodies(bridge: Bridge, under_way: asyncio.Event, over: asyncio.Event) -> None:
    """Each promises a body as large as may be, and sends most of it at once."""
    async with many(bridge, 600) as connections:
        under_way.set()
        await asyncio.gather(*(each.send(head(900_000) + b"x" * 200_000) for each in connections))
        await dribble(connections, b"x" * 1_000, over)


async def dribble(connections: list[Raw], data: bytes, over: asyncio.Event) -> None:
    """A byte of the data each, again and again."""
    for position in range(len(data)):
        await asyncio.gather(*(each.send(data[position : position + 1]) for each in connections))
        if over.is_set():
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), 0.2)
    await over.wait()


async def large_bodies(bridge: Bridge, under_way: asyncio.Event, over: asyncio.Event) -> None:
    """Five megabytes, promised or in chunks, from fifty at once."""
    chunk = b"10000\r\n" + b"x" * 65_536 + b"\r\n"

    async def one(number: int) -> None:
        while not over.is_set():
            with suppress(OSError):
                raw = await bridge.raw()
                try:
                    await raw.send(head(5_000_000 if number % 2 else None))
                    for _ in range(80):
                        if not await raw.send(b"x" * 65_536 if number % 2 else chunk):
                            under_way.set()
                            break
                finally:
                    raw.close()

    await asyncio.gather(*(one(number) for number in range(50)))


async def bad_signatures(bridge: Bridge, under_way: asyncio.Event, over: asyncio.Event) -> None:
    """With our key's id and with invented ones, without an end on each of thirty connections."""

    async def one(number: int) -> None:
        body = inbound("forged")
        signature = base64.b64encode(os.urandom(70)).decode() if number % 3 else bridge.key.sign(body + b" ")

        async def talk(raw: Raw) -> None:
            for _ in range(50):
                key_id = str(uuid.uuid4()) if number % 2 else bridge.key.id
                request = head(len(body), X_Circle_Key_Id=key_id, X_Circle_Signature=signature) + body
                assert await raw.send(request)
                status, _, problem = await raw.answer()
                assert (status, problem["code"]) in (
                    (401, "bad_signature"), (401, "unknown_key"), (503, "key_unavailable"),
                )  # fmt: skip
                under_way.set()
                if over.is_set():
                    break

        while not over.is_set():
            await bridge.talked(talk)

    await asyncio.gather(*(one(number) for number in range(30)))


Attack = Callable[[Bridge, asyncio.Event, asyncio.Event], Awaitable[None]]
"""Sets the first event when it is under way, and ends after the second."""


@pytest.mark.parametrize("attack", [silent, slow_heads, slow_bodies, large_bodies, bad_signatures])
async def test_a_vendors_webhooks_are_answered_and_memory_is_bounded_while_it_goes_on(
    bridge: Bridge, attack: Attack
) -> None:
    logged, begun, under_way, over = bridge.log_bytes(), time.monotonic(), asyncio.Event(), asyncio.Event()
    attacking = asyncio.ensure_future(attack(bridge, under_way, over))
    peak = 0
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            await asyncio.wait({attacking, asyncio.ensure_future(under_way.wait())}, return_when="FIRST_COMPLETED")
        for _ in range(GOOD_DURING_ATTACK):
            assert not attacking.done(), "the attack ended"
            await bridge.good()
            peak = max(peak, bridge.rss())
    finally:
        over.set()
        await attacking
    assert peak - bridge.idle_bytes < GROWTH_BYTES_MAX
    told = await read_topic(bridge.kafka.bootstrap, DEPOSITS_NOTIFIED, bridge.prefix)
    assert {dict(record.headers)["ce_id"].decode() for record in told} == set(bridge.sent)
    assert await read_topic(bridge.kafka.bootstrap, WEBHOOKS_DLQ, bridge.prefix) == []
    may_log = LOG_BYTES_MAX + LOG_BYTES_PER_S_MAX * (time.monotonic() - begun)
    assert bridge.log_bytes() - logged < may_log, "an attacker does not write our log"


async def test_bodies_that_came_while_the_bridge_was_frozen_are_read(bridge: Bridge) -> None:
    body, begun = b"x" * 60_000, time.monotonic()
    async with many(bridge, 50) as senders:
        for sender in senders:
            await sender.send(head(len(body), Expect="100-continue"))
        for sender in senders:  # it has begun to wait for the body
            assert b"100 Continue" in await sender.reader.readuntil(b"\r\n\r\n")
        bridge.process.send_signal(signal.SIGSTOP)
        assert time.monotonic() - begun < Limits().read_s, "frozen in time"
        for sender in senders:
            sender.writer.write(body)  # a part of it fits between us
        await asyncio.sleep(Limits().read_s + 1)
        bridge.process.send_signal(signal.SIGCONT)
        answers = await asyncio.gather(*(sender.answer() for sender in senders))
    assert Counter(problem["code"] for _, _, problem in answers) == {"missing_signature": 50}
    await bridge.good()


async def test_who_is_refused_is_told_why_in_one_form(bridge: Bridge) -> None:
    """RFC 9457, also where the app has not seen the request."""
    cases: list[tuple[bytes, int, str]] = [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "bad_request"),
        (b"not HTTP at all\r\n\r\n", 400, "bad_request"),
        (b"POST / HTTP/1.1\r\nHost: b\r\nX: " + b"x" * 100_000, 400, "bad_request"),
        (head(5_000_000), 413, "body_too_large"),
        (head(100), 408, "body_too_slow"),
        (b"POST /webhooks/circle HTTP/1.1\r\nHost", 408, "headers_too_slow"),
        (head(2) + b"{}", 401, "missing_signature"),
        (b"GET /webhooks/circle HTTP/1.1\r\nHost: b\r\n\r\n", 405, "method_not_allowed"),
        (b"POST /nowhere HTTP/1.1\r\nHost: b\r\nContent-Length: 0\r\n\r\n", 404, "not_found"),
    ]

    async def one(data: bytes, status: int, code: str) -> None:
        async def talk(raw: Raw) -> None:
            await raw.send(data)
            answered, headers, problem = await raw.answer()
            assert (answered, problem["status"], problem["code"]) == (status, status, code)
            assert headers["content-type"] == "application/problem+json"
            if status in (400, 408, 413):
                await raw.ended()

        await bridge.talked(talk)

    await asyncio.gather(*(one(*case) for case in cases))
    await bridge.good()


@pytest.mark.parametrize(
    "content_type",
    ["text/plain; charset=UTF-8", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "{}"],
)
async def test_what_a_body_calls_itself_is_of_no_matter_when_it_is_signed(bridge: Bridge, content_type: str) -> None:
    await bridge.good(**{"Content-Type": content_type})
    body = inbound("forged")

    async def talk(raw: Raw) -> None:
        await raw.send(head(len(body), Content_Type=content_type, Content_Encoding="gzip") + body)
        assert (await raw.answer())[0] == 401
        # a connection that was kept serves the next request
        await raw.send(head(len(body)) + body)
        assert (await raw.answer())[0] == 401

    await bridge.talked(talk)
