"""`bridge.webhooks`: signed webhooks of Circle's a second, from a real bridge process to the broker's acknowledgement.

Every webhook is made and signed before its side starts. CONNECTIONS senders post one after the other over a connection each, and
only an answer of 200 counts; what Kafka has in the end is counted too. The sender is as plain as it can be, because it shares the
machine with what it measures.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, cast

import aiohttp
from aiokafka import AIOKafkaConsumer, TopicPartition

from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.keys import NotificationKey
from connectors.circle.sandbox.tokens import usdc_token_id
from stablerail.dev.processes import free_port
from tests.benchmarks.parts import Parts, Place, cpu_seconds, place
from tests.benchmarks.records import Comparison, Record, Spread
from topics.catalog import DEPOSITS_NOTIFIED

CONNECTIONS: Final = 256
START_S_MAX: Final = 100
PATH: Final = "/webhooks/circle/transfers"


@dataclass(frozen=True)
class Side:
    name: str
    arguments: tuple[str, ...]
    publishes: bool


OURS = Side("bridge", ("-m", "stablerail.cli", "bridge"), publishes=True)
VERIFY_ONLY = Side("verify only", ("-m", "tests.benchmarks.baselines.verify_only"), publishes=False)


@dataclass(frozen=True)
class Run:
    rate: float
    """Webhooks per second that were answered 200."""
    cpu_us: float
    """Of the bridge process, per webhook."""


def webhook(key: NotificationKey) -> bytes:
    """A whole HTTP request: an inbound transaction to an address of its own, as Circle sends it."""
    tx, to = uuid.uuid4().hex * 2, uuid.uuid4().hex + "0" * 8
    body = json.dumps(
        {
            "subscriptionId": str(uuid.uuid4()), "notificationId": str(uuid.uuid4()),
            "notificationType": "transactions.inbound", "timestamp": "2026-11-21T02:00:00Z", "version": 2,
            "notification": {
                "id": str(uuid.uuid4()), "blockchain": "MATIC-AMOY", "tokenId": usdc_token_id("MATIC-AMOY"),
                "walletId": str(uuid.uuid4()), "sourceAddress": f"0x{to[::-1]}", "destinationAddress": f"0x{to}",
                "transactionType": "INBOUND", "custodyType": "DEVELOPER", "state": "CONFIRMED", "amounts": ["25.5"],
                "nfts": None, "txHash": f"0x{tx}", "blockHash": f"0x{tx[::-1]}", "blockHeight": 41_100_000,
                "networkFee": "0.0703", "firstConfirmDate": "2026-11-21T02:00:00Z", "operation": "TRANSFER",
                "createDate": "2026-11-21T02:00:00Z", "updateDate": "2026-11-21T02:00:00Z",
            },
        }
    ).encode()  # fmt: skip
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: bridge\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"X-Circle-Key-Id: {key.id}\r\nX-Circle-Signature: {key.sign(body)}\r\n\r\n"
    )
    return head.encode() + body


async def webhooks(parts: Parts, events: int, repeats: int, run_s_max: float, told: Callable[[str], None]) -> Record:
    found: dict[str, list[Run]] = {OURS.name: [], VERIFY_ONLY.name: []}
    async with CircleSandbox(SandboxConfig(rsa_bits=2048, rate_limits=False)) as circle:
        key = circle.sandbox.state.notification_key
        await parts.prepare([])
        for _ in range(repeats):
            for side in (OURS, VERIFY_ONLY):
                one = await run(parts, side, circle.base_url, [webhook(key) for _ in range(events)], run_s_max)
                found[side.name].append(one)
                told(f"{side.name}: {one.rate:,.0f} webhooks/s")
    ours, bare = found[OURS.name], found[VERIFY_ONLY.name]
    return Record(
        "bridge.webhooks",
        Comparison.of(
            "the bridge, to the broker's acknowledgement, against the same app that only verifies the signature",
            *("webhooks/s", [one.rate for one in ours], [one.rate for one in bare], 0.5),
        ),
        {
            "cpu_us_per_webhook": Spread.of([one.cpu_us for one in ours], 1),
            "cpu_us_per_webhook_verify_only": Spread.of([one.cpu_us for one in bare], 1),
            "webhooks": events,
            "connections": CONNECTIONS,
        },
        "all are signed before; each connection posts the next when it has its answer; only 200 counts",
    )


async def run(parts: Parts, side: Side, circle_url: str, requests: Sequence[bytes], run_s_max: float) -> Run:
    async with place(parts) as here:
        port = free_port()
        settings = {
            "STABLERAIL_CIRCLE_API_URL": circle_url,
            "STABLERAIL_CIRCLE_API_KEY": TEST_API_KEY,
            "STABLERAIL_CIRCLE_ENTITY_SECRET": TEST_ENTITY_SECRET,
            "STABLERAIL_CIRCLE_USDC_TOKEN_IDS": json.dumps({"MATIC": usdc_token_id("MATIC-AMOY")}),
            "STABLERAIL_SUMSUB_WEBHOOK_SECRET": "benchmark-secret",
            "STABLERAIL_BRIDGE_PORT": str(port),
        }
        process = here.start(list(side.arguments), settings)
        await _ready(here, port)
        warm_up, measured = requests[: len(requests) // 10], requests[len(requests) // 10 :]
        await _post_all(port, warm_up)
        here.check_running()
        cpu, begun = cpu_seconds([process.pid]), time.perf_counter()
        async with asyncio.timeout(run_s_max):
            await _post_all(port, measured)
        seconds = time.perf_counter() - begun
        used = cpu_seconds([process.pid]) - cpu
        published = await _published(here)
        if published != (len(requests) if side.publishes else 0):
            raise RuntimeError(f"{side.name}: {published} of {len(requests)} webhooks are in Kafka")
        return Run(len(measured) / seconds, used / len(measured) * 1e6)


async def _ready(here: Place, port: int) -> None:
    deadline = time.monotonic() + START_S_MAX
    async with aiohttp.ClientSession() as session:
        while True:
            here.check_running()
            try:
                async with session.get(f"http://127.0.0.1:{port}/readyz") as answer:
                    if answer.status == 200:
                        return
            except (aiohttp.ClientError, OSError):
                pass
            if time.monotonic() > deadline:
                raise TimeoutError(f"the bridge was not ready within {START_S_MAX} s")
            await asyncio.sleep(0.1)


async def _post_all(port: int, requests: Sequence[bytes]) -> None:
    coming = iter(requests)
    senders = [Sender(coming) for _ in range(min(CONNECTIONS, len(requests)))]
    loop = asyncio.get_running_loop()
    await asyncio.gather(*(loop.create_connection(lambda s=sender: s, "127.0.0.1", port) for sender in senders))  # type: ignore[misc]
    await asyncio.gather(*(sender.done for sender in senders))


class Sender(asyncio.Protocol):
    """One connection that posts the next request when the last was answered."""

    def __init__(self, coming: Iterator[bytes]) -> None:
        self._coming = coming
        self._received = b""
        self._transport: asyncio.Transport | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._next()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if b"\r\n\r\n" not in self._received:
            return  # our answers of 200 have no body
        answer, self._received = self._received, b""
        if answer.startswith(b"HTTP/1.1 200"):
            self._next()
        else:
            self._fail(f"answered {answer[:200]!r}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection was lost: {exc}")

    def _next(self) -> None:
        assert self._transport is not None
        request = next(self._coming, None)
        if request is not None:
            self._transport.write(request)
        elif not self.done.done():
            self.done.set_result(None)
            self._transport.close()

    def _fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(why))


async def _published(here: Place) -> int:
    consumer = AIOKafkaConsumer(bootstrap_servers=here.bootstrap)
    await consumer.start()
    try:
        name = DEPOSITS_NOTIFIED.named(here.prefix)
        ends = await consumer.end_offsets([TopicPartition(name, n) for n in range(DEPOSITS_NOTIFIED.partitions)])
        return sum(ends.values())
    finally:
        await consumer.stop()
