"""What waits for one topic goes to the broker together: while one request is under way, the next messages gather.

A message sent alone costs the process several times what it costs in a batch, and the broker as well. Nothing waits for the sake
of a batch: alone, a message leaves at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError

from topics.catalog import Topic, bytes_of
from topics.partitioner import partition_of

FRAMING_BYTES = 100
"""Of a message in a batch, at most; the broker's limit leaves room for what is above it."""

Headers = Sequence[tuple[str, bytes]]


@dataclass(slots=True, eq=False)
class Waiting:
    """A message on its way. `acked` gets None, or why the broker does not have it; never an exception that nobody collects."""

    key: bytes
    value: bytes
    headers: Headers
    acked: asyncio.Future[Exception | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def settle(self, error: Exception | None) -> None:
        if not self.acked.done():
            self.acked.set_result(error)

    @property
    def size(self) -> int:
        return bytes_of(self.key, self.value, self.headers) + FRAMING_BYTES


class TopicBatches:
    """One topic through one producer. A topic that is slow or missing keeps no other one waiting."""

    def __init__(self, producer: AIOKafkaProducer, topic: Topic, prefix: str, metadata_s: float) -> None:
        """`metadata_s`: a topic that the broker does not name within it is missing."""
        self._producer = producer
        self._metadata_s = metadata_s
        self._limit = topic.bytes_max
        self._name = topic.named(prefix)
        self._queue: list[Waiting] = []
        self._sending: asyncio.Task[None] | None = None

    def add(self, message: Waiting) -> None:
        self._queue.append(message)
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send())

    async def ended(self) -> None:
        """Returns when nothing is under way; at once, when the producer is closed."""
        if self._sending is not None:
            await self._sending

    async def _send(self) -> None:
        await asyncio.sleep(0)  # whoever is ready in this turn of the loop comes along
        while self._queue:
            taken, self._queue = self._queue, []
            try:
                await self._send_all(taken)
            except Exception as error:
                for message in taken:
                    message.settle(error)
                if not isinstance(error, KafkaError):
                    raise

    async def _send_all(self, taken: Sequence[Waiting]) -> None:
        try:
            # aiokafka asks for as long as a request may take, and for ever once its client is closed
            async with asyncio.timeout(self._metadata_s):
                count = len(await self._producer.partitions_for(self._name))
        except TimeoutError:
            raise UnknownTopicOrPartitionError from None
        queues: dict[int, list[Waiting]] = {}
        for message in taken:
            queues.setdefault(partition_of(message.key, count), []).append(message)
        batches = [(number, batch) for number, queue in queues.items() for batch in self._cut(queue)]
        await asyncio.gather(*(self._send_one(number, batch) for number, batch in batches))

    def _cut(self, queue: Sequence[Waiting]) -> list[list[Waiting]]:
        """The broker's limit of a topic is on a batch, not on a message."""
        batches: list[list[Waiting]] = []
        size = self._limit
        for message in queue:
            size += message.size
            if size > self._limit:
                batches.append([])
                size = message.size
            batches[-1].append(message)
        return batches

    async def _send_one(self, partition: int, messages: Sequence[Waiting]) -> None:
        batch = self._producer.create_batch()
        for message in messages:
            batch.append(key=message.key, value=message.value, timestamp=None, headers=list(message.headers))
        error: Exception | None = None
        try:
            await (await self._producer.send_batch(batch, self._name, partition=partition))
        except KafkaError as refused:
            error = refused
        for message in messages:
            message.settle(error)
