"""Messages to Kafka: acks=all, idempotent, in order, awaited. One producer per process.

Messages of a batch go as whole record batches per partition (`send_batch`): five hundred sends that each await a future
cost four times as much as one request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from ledger.record import Message
from topics.catalog import JOURNAL, RECORD_BYTES_MAX, bytes_max, bytes_of
from topics.partitioner import partition_of
from topics.trace import Span, Spans, child, is_sampled

_log = structlog.get_logger()

BATCH_BYTES_MAX = RECORD_BYTES_MAX
"""Below what the largest topics take: several commit records must not share a batch that the broker refuses."""
PART_BYTES_MAX = RECORD_BYTES_MAX - 100_000
"""A commit record over it goes to the journal in parts, headers `part` and `parts`."""
SLICE = 100
"""Messages that are packed without letting others run: a third of a millisecond."""
RETRY_WAIT_S_MAX = 5.0
ENVELOPE_BYTES = 320
"""What the headers of an event of ours take, its id apart."""


class Emitter:
    """`emit` and `journal` return when the broker has everything; while it is away they wait and try again."""

    def __init__(
        self, bootstrap: str, prefix: str, *, request_timeout_s: float = 15.0, spans: Spans | None = None
    ) -> None:
        """`spans`: told of each message that belongs to a sampled trace, once the broker has it."""
        self._bootstrap = bootstrap
        self._spans = spans
        self._prefix = prefix
        self._timeout_ms = int(request_timeout_s * 1000)
        self._producer: AIOKafkaProducer | None = None
        self._partitions: dict[str, int] = {}
        self._renewing = asyncio.Lock()

    async def start(self) -> None:
        """Connects. Raises KafkaError when no broker answers."""
        producer = AIOKafkaProducer(
            bootstrap_servers=self._bootstrap.replace(";", ","),
            acks="all",
            enable_idempotence=True,
            linger_ms=0,
            max_batch_size=BATCH_BYTES_MAX,
            max_request_size=BATCH_BYTES_MAX + 500_000,
            request_timeout_ms=self._timeout_ms,
        )
        try:
            await producer.start()
        except BaseException:
            await producer.stop()
            raise
        self._producer = producer

    async def stop(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.stop()

    async def emit(self, messages: Sequence[Message], source: str, at: datetime) -> None:
        """Sends messages in order per partition."""
        if not messages:
            return
        spans = self._spans
        traced = [(m, _published(m)) for m in messages if spans and m.traceparent and is_sampled(m.traceparent)]
        if traced:
            contexts = {id(message): context for message, context in traced}
            messages = [m._replace(traceparent=contexts.get(id(m), m.traceparent)) for m in messages]
        await self._until_acked(lambda: self._send(messages, source, at))
        ended_ns = time.time_ns()
        for message, context in traced:
            assert spans is not None
            started_ns = min(int(at.timestamp() * 1e9), ended_ns)  # the writer's clock may be another machine's
            about = {"messaging.system": "kafka", "messaging.destination.name": message.topic}
            about["messaging.message.id"] = message.id
            spans(
                Span(f"{source} {message.topic}", "producer", context, message.traceparent, started_ns, ended_ns, about)
            )

    async def journal(self, records: Sequence[tuple[int, bytes]], untold: int) -> None:
        """Sends commit records to the journal's one partition, in sequence. `untold`: the lowest number whose messages may not
        have left; header `open` of each."""
        await self._until_acked(lambda: self._send_records(records, untold))

    async def _until_acked(self, send: Any) -> None:
        wait_s = 0.1
        while True:
            used = self._producer
            try:
                await send()
                return
            except KafkaError as error:
                _log.warning("emit.retry", error=type(error).__name__)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, RETRY_WAIT_S_MAX)
                await self._renew(used)

    async def _renew(self, used: AIOKafkaProducer | None) -> None:
        """A producer that lost its idempotent sequence (a long outage) must be made anew, by the first who notices."""
        async with self._renewing:
            if self._producer is used:
                try:
                    await self.stop()
                    await self.start()
                except KafkaError as error:
                    _log.warning("emit.reconnect", error=type(error).__name__)

    def _live(self) -> AIOKafkaProducer:
        if self._producer is None:
            raise KafkaError("not connected")
        return self._producer

    async def _send(self, messages: Sequence[Message], source: str, at: datetime) -> None:
        producer = self._live()
        queues: dict[tuple[str, int], list[Message]] = {}
        for message in messages:
            count = self._partitions.get(message.topic) or await self._count(message.topic)
            partition = partition_of(message.key, count)
            queues.setdefault((message.topic, partition), []).append(message)
        acks: list[asyncio.Future[Any]] = []
        for (topic, partition), queue in queues.items():
            name = self._prefix + topic
            limit = bytes_max(topic)  # the broker's limit is on a batch, not on a message
            batch, size = producer.create_batch(), 0
            for number, message in enumerate(queue, 1):
                if number % SLICE == 0:
                    await asyncio.sleep(0)  # the next batch is being settled on this loop
                headers = message.kafka_headers(source, at)
                size += _size(message)
                full = size > limit and batch.record_count()
                if full or batch.append(timestamp=None, key=message.key, value=message.value, headers=headers) is None:
                    acks.append(await producer.send_batch(batch, name, partition=partition))
                    batch, size = producer.create_batch(), _size(message)
                    if batch.append(timestamp=None, key=message.key, value=message.value, headers=headers) is None:
                        raise ValueError(f"a message for {name} is larger than a request may be")
            acks.append(await producer.send_batch(batch, name, partition=partition))
        await asyncio.gather(*acks)

    async def _send_records(self, records: Sequence[tuple[int, bytes]], untold: int) -> None:
        producer = self._live()
        name = JOURNAL.named(self._prefix)
        open = ("open", str(untold).encode())
        acks = []
        for seq, record in records:
            key = seq.to_bytes(8, "big")
            parts = [record[i : i + PART_BYTES_MAX] for i in range(0, len(record), PART_BYTES_MAX)]
            for number, part in enumerate(parts):
                headers = [open]
                if len(parts) > 1:
                    headers += [("part", str(number).encode()), ("parts", str(len(parts)).encode())]
                acks.append(await producer.send(name, key=key, value=part, partition=0, headers=headers))
        await asyncio.gather(*acks)

    async def _count(self, topic: str) -> int:
        found = len(await self._live().partitions_for(self._prefix + topic))
        self._partitions[topic] = found
        return found


def _published(message: Message) -> str:
    """The context of the step that makes and publishes the message: what its reader goes on from."""
    assert message.traceparent is not None
    return child(message.traceparent, f"{message.topic}\0{message.id}")


def _size(message: Message) -> int:
    """At least what the message takes in a batch, give or take the framing that the broker's limit leaves room for."""
    if message.headers is not None:
        return bytes_of(message.key, message.value, message.headers) + ENVELOPE_BYTES
    return len(message.key or b"") + len(message.value or b"") + len(message.id) + ENVELOPE_BYTES
