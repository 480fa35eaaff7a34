"""The bridge as it is served, on a real broker that goes away and comes back."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import uvicorn
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from connectors.kyc.sandbox import SumsubSandbox
from connectors.kyc.sumsub import SumsubSource, sign
from connectors.webhooks.bridge import SUMSUB_PATHS, Mount
from connectors.webhooks.publisher import KafkaPublisher, Unavailable
from connectors.webhooks.serve import kafka_bridge
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.processes import free_port
from topics.catalog import KYC_APPROVED, KYC_REJECTED, WEBHOOKS_DLQ, Topic
from topics.envelope import Received, read
from topics.events import KycApproved

SECRET = SecretStr("integration-secret")
TIMEOUT_S = 3.0
"""Of a publish, where the broker goes away."""
PATIENT_S = 60.0
"""Of one where it stays: a quarter of it is for finding out that the broker knows the topic."""
BOUND_S = 30.0
"""By when an answer is there on a busy machine too; by itself aiokafka waits for the broker for ever."""


async def create_topics(bootstrap: str, prefix: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics(
            [
                NewTopic(t.named(prefix), t.partitions, 1, topic_configs=t.broker_config())
                for t in (KYC_APPROVED, KYC_REJECTED, WEBHOOKS_DLQ)
            ]
        )
    finally:
        await admin.close()


async def messages(bootstrap: str, topic: Topic, prefix: str) -> list[tuple[bytes, bytes, dict[str, bytes]]]:
    """Everything on the topic now: key, value, headers."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        partitions = [TopicPartition(topic.named(prefix), number) for number in range(topic.partitions)]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        found = []
        while any([await consumer.position(p) < ends[p] for p in partitions]):
            for records in (await consumer.getmany(timeout_ms=200)).values():
                found += [(r.key, r.value, dict(r.headers)) for r in records]
        return found
    finally:
        await consumer.stop()


async def approvals(bootstrap: str, prefix: str) -> list[tuple[bytes, Received]]:
    found = await messages(bootstrap, KYC_APPROVED, prefix)
    return [(key, read(KYC_APPROVED, value, list(headers.items()))) for key, value, headers in found]


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 100) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.05)


class Served:
    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.hook = url + SUMSUB_PATHS[0]
        self.http = http

    async def ready(self) -> bool:
        async with self.http.get(self.url + "/readyz") as answer:
            return answer.status == 200

    async def unready(self) -> bool:
        return not await self.ready()

    async def deliver(self, body: bytes) -> None:
        """As a vendor does: again until it is taken. A busy machine may need longer than `TIMEOUT_S`."""

        async def taken() -> bool:
            status, code, _ = await self.post(body)
            assert (status, code) in ((200, None), (503, "broker_unavailable"))
            return status == 200

        await until(taken)

    async def post(self, body: bytes) -> tuple[int, str | None, float]:
        """Status, problem code and seconds."""
        begun = time.monotonic()
        async with self.http.post(self.hook, data=body, headers=sign(body, SECRET)) as answer:
            problem = await answer.json(content_type=None) if answer.status != 200 else {}
            return answer.status, problem.get("code"), time.monotonic() - begun


@asynccontextmanager
async def served(bootstrap: str, prefix: str, timeout_s: float = PATIENT_S) -> AsyncIterator[Served]:
    app = kafka_bridge(
        [Mount(SumsubSource(SECRET), SUMSUB_PATHS)],
        bootstrap=bootstrap,
        prefix=prefix,
        registry=CollectorRegistry(),
        publish_timeout_s=timeout_s,
        probe_s=0.1,
    )
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", lifespan="on"))
    serving = asyncio.create_task(server.serve())
    async with aiohttp.ClientSession() as http:
        try:
            await until(lambda: _started(server, serving))
            yield Served(f"http://127.0.0.1:{port}", http)
        finally:
            server.should_exit = True
            await serving


async def _started(server: uvicorn.Server, serving: asyncio.Task[None]) -> bool:
    assert not serving.done(), "the server stopped while it started"
    return server.started


def approval(user: str) -> bytes:
    body = {
        "type": "applicantReviewed",
        "applicantId": "5cb5",
        "externalUserId": user,
        "correlationId": f"req-{user}",
        "createdAtMs": "2026-11-21 02:00:00.704",
        "reviewStatus": "completed",
        "reviewResult": {"reviewAnswer": "GREEN"},
    }
    return json.dumps(body).encode()


async def test_an_approval_that_the_sandbox_sends_twice_is_one_event_on_the_topic(
    kafka: Kafka, topic_prefix: str
) -> None:
    await create_topics(kafka.bootstrap, topic_prefix)
    async with served(kafka.bootstrap, topic_prefix) as bridge, SumsubSandbox(bridge.hook, SECRET) as sumsub:
        await until(bridge.ready)
        await sumsub.review("user_42", copies=2)
        await sumsub.review("user_43", "RED")
        await sumsub.settle()
        assert [delivery.statuses for delivery in sumsub.deliveries] == [[200, 200], [200]]
    found = await approvals(kafka.bootstrap, topic_prefix)
    assert [key for key, _ in found] == [b"user_42", b"user_42"]
    assert len({received.uid for _, received in found}) == 1
    assert isinstance(found[0][1].event, KycApproved)


async def test_what_is_not_understood_is_on_the_dead_letter_topic_byte_for_byte(
    kafka: Kafka, topic_prefix: str
) -> None:
    await create_topics(kafka.bootstrap, topic_prefix)
    largest = b"\x00\xff" * 500_000
    async with served(kafka.bootstrap, topic_prefix) as bridge:
        await until(bridge.ready)
        for body in (b"", largest):
            assert (await bridge.post(body))[0] == 200
    found = await messages(kafka.bootstrap, WEBHOOKS_DLQ, topic_prefix)
    assert [(key, value) for key, value, _ in found] == [(b"sumsub", b""), (b"sumsub", largest)]
    assert {headers["code"] for _, _, headers in found} == {b"not_json"}


async def test_five_megabytes_are_refused_on_a_real_connection(kafka: Kafka, topic_prefix: str) -> None:
    async with served(kafka.bootstrap, topic_prefix) as bridge:
        answer = await bridge.http.post(bridge.hook, data=io.BytesIO(b"x" * 5_000_000))
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert (await answer.json(content_type=None))["code"] == "body_too_large"


async def test_a_topic_that_is_missing_does_not_stop_the_others(kafka: Kafka, topic_prefix: str) -> None:
    await create_topics(kafka.bootstrap, topic_prefix)
    publisher = KafkaPublisher(kafka.bootstrap, prefix=topic_prefix, timeout_s=4 * TIMEOUT_S, probe_s=0.1)
    await publisher.start()
    try:
        await until(lambda: _connected(publisher))
        with pytest.raises(Unavailable, match="UnknownTopicOrPartitionError"):
            await publisher.publish(Topic("missing", key="none"), b"k", b"v", [])
        assert publisher.connected
        await publisher.publish(KYC_APPROVED, b"k", b"v", [])
    finally:
        await publisher.stop()


async def _connected(publisher: KafkaPublisher) -> bool:
    return publisher.connected


async def test_without_kafka_the_vendor_is_told_to_repeat_and_nothing_is_lost(
    tmp_path: Path, tools: Tools, topic_prefix: str
) -> None:
    broker = Kafka(tmp_path, tools)
    try:
        async with served(broker.bootstrap, topic_prefix, TIMEOUT_S) as bridge:
            # The bridge starts before its broker.
            assert (await bridge.post(approval("early")))[:2] == (503, "broker_unavailable")
            broker.start()
            await create_topics(broker.bootstrap, topic_prefix)
            await until(bridge.ready)
            await bridge.deliver(approval("first"))

            # The broker is gone: the first webhook may have to find out, the others are told at once.
            broker.kill()
            status, code, seconds = await bridge.post(approval("second"))
            assert (status, code) == (503, "broker_unavailable")
            assert seconds < BOUND_S
            await until(bridge.unready)
            assert (await bridge.post(approval("third")))[:2] == (503, "broker_unavailable")

            broker.start()
            await until(bridge.ready)
            for user in ("second", "third"):
                await bridge.deliver(approval(user))
        found = [key for key, _ in await approvals(broker.bootstrap, topic_prefix)]
        assert set(found) == {b"first", b"second", b"third"}
    finally:
        broker.kill()


async def test_a_broker_that_hangs_is_a_broker_that_is_away(tmp_path: Path, tools: Tools, topic_prefix: str) -> None:
    with Kafka(tmp_path, tools) as broker:
        await create_topics(broker.bootstrap, topic_prefix)
        async with served(broker.bootstrap, topic_prefix, TIMEOUT_S) as bridge:
            await until(bridge.ready)
            await bridge.deliver(approval("first"))
            os.kill(broker.pid(), signal.SIGSTOP)
            answers = await asyncio.gather(*(bridge.post(approval(f"user_{n}")) for n in range(20)))
            assert {(status, code) for status, code, _ in answers} == {(503, "broker_unavailable")}
            assert max(seconds for _, _, seconds in answers) < BOUND_S
            os.kill(broker.pid(), signal.SIGCONT)
            await until(bridge.ready)
            await bridge.deliver(approval("last"))
            os.kill(broker.pid(), signal.SIGSTOP)
            begun = time.monotonic()
        # The bridge stops in bounded time though the broker hangs.
        assert time.monotonic() - begun < 2 * BOUND_S
        os.kill(broker.pid(), signal.SIGCONT)
        found = {key for key, _ in await approvals(broker.bootstrap, topic_prefix)}
        assert {b"first", b"last"} <= found


async def test_what_is_published_at_once_goes_together_and_stays_below_the_topics_limit(
    kafka: Kafka, topic_prefix: str
) -> None:
    await create_topics(kafka.bootstrap, topic_prefix)
    publisher = KafkaPublisher(kafka.bootstrap, prefix=topic_prefix, timeout_s=PATIENT_S, probe_s=0.1)
    await publisher.start()
    try:
        await until(lambda: _connected(publisher))
        sent = [(b"k%d" % (number % 7), b"%d" % number) for number in range(500)]
        sent += [(b"k1", b"x" * 950_000 + b"%d" % number) for number in range(5)]
        headers = [("ce_id", b"some id")]
        await asyncio.gather(*(publisher.publish(KYC_APPROVED, key, value, headers) for key, value in sent))
    finally:
        await publisher.stop()
    found = await messages(kafka.bootstrap, KYC_APPROVED, topic_prefix)
    assert sorted((key, value) for key, value, _ in found) == sorted(sent)
    for wanted in {key for key, _ in sent}:
        assert [value for key, value, _ in found if key == wanted] == [value for key, value in sent if key == wanted]
    assert all(each == {"ce_id": b"some id"} for _, _, each in found)
