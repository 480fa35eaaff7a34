"""Kafka behind one call that returns when the broker has the message.

Unavailable   the broker did not acknowledge in time; whether it has the message is not known, so it must be sent again
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Protocol

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    KafkaError,
    MessageSizeTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)

from connectors.webhooks.batches import TopicBatches, Waiting
from topics.catalog import RECORD_BYTES_MAX, Topic

log = structlog.get_logger()


class Unavailable(Exception):
    """Not acknowledged; send again later."""


class Publisher(Protocol):
    """What the bridge needs of a broker."""

    @property
    def connected(self) -> bool:
        """Whether a publish now has a chance."""

    async def publish(self, topic: Topic, key: bytes, value: bytes, headers: Sequence[tuple[str, bytes]]) -> None:
        """Returns when every in-sync replica has the message; raises Unavailable otherwise."""


_ABOUT_THE_MESSAGE: Final = (
    MessageSizeTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
"""Errors of one message or topic: they do not condemn the connection."""


class KafkaPublisher:
    """An idempotent acks=all producer that survives its broker.

    `start` returns at once and never fails for the broker's sake: a background task connects, asks for metadata every
    `probe_s`, and replaces the producer after a failed publish. Replacing it drops what was queued, as an idempotent
    aiokafka producer never gives up a batch: answered 503, a message would otherwise stay in memory for the whole outage.
    """

    def __init__(self, bootstrap: str, *, prefix: str = "", timeout_s: float = 4.0, probe_s: float = 2.0) -> None:
        """`timeout_s` bounds a publish: below the 5 s after which vendors give up on an answer."""
        self._bootstrap = bootstrap
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._probe_s = probe_s
        self._producer: AIOKafkaProducer | None = None
        self._batches: dict[str, TopicBatches] = {}
        """Of the present producer, by topic."""
        self._failed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        return self._producer is not None and not self._failed.is_set()

    async def start(self) -> None:
        self._keeper = asyncio.create_task(self._keep(), name="webhook publisher")

    async def stop(self) -> None:
        """Waits `timeout_s` for what is in flight; a broker that hangs can delay the end to a few times that."""
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        await asyncio.gather(*self._closing)

    async def publish(self, topic: Topic, key: bytes, value: bytes, headers: Sequence[tuple[str, bytes]]) -> None:
        producer = self._producer
        if producer is None or self._failed.is_set():
            raise Unavailable("not connected to Kafka")
        batches = self._batches.get(topic.name)
        if batches is None:
            batches = self._batches[topic.name] = TopicBatches(
                producer, topic, self._prefix, metadata_s=self._timeout_s / 4
            )
        message = Waiting(key, value, headers)
        batches.add(message)
        try:
            async with asyncio.timeout(self._timeout_s):
                error = await message.acked
        except TimeoutError as late:
            error = late
        if error is None:
            return
        name = topic.named(self._prefix)
        if isinstance(error, _ABOUT_THE_MESSAGE):
            log.error("publish_refused", topic=name, error=type(error).__name__)
            raise Unavailable(f"Kafka does not take it: {type(error).__name__}") from error
        log.warning("publish_failed", topic=name, error=type(error).__name__)
        if producer is self._producer:
            self._failed.set()
        raise Unavailable(f"Kafka did not acknowledge: {type(error).__name__}") from error

    async def _keep(self) -> None:
        while True:
            try:
                await self._tend()
            except Exception:
                log.exception("publisher_bug")  # without its keeper the publisher would stay as it is for good
                await asyncio.sleep(self._probe_s)

    async def _tend(self) -> None:
        """Connect, then watch until the broker is lost."""
        self._producer = await self._connect()
        if self._producer is None:
            await asyncio.sleep(self._probe_s)
            return
        self._failed.clear()
        log.info("kafka_connected", bootstrap=self._bootstrap)
        try:
            while not self._failed.is_set() and await self._answers(self._producer):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._failed.wait(), self._probe_s)
            self._failed.set()
            log.warning("kafka_lost", bootstrap=self._bootstrap)
        finally:
            producer, self._producer = self._producer, None
            batches, self._batches = self._batches, {}
            # Cancelled: the publisher stops, and what is in flight gets its time.
            await self._close(producer, grace_s=0 if self._failed.is_set() else self._timeout_s)
            await asyncio.gather(*(each.ended() for each in batches.values()))

    async def _connect(self) -> AIOKafkaProducer | None:
        producer = AIOKafkaProducer(
            bootstrap_servers=self._bootstrap,
            acks="all",
            enable_idempotence=True,
            max_batch_size=RECORD_BYTES_MAX,  # cut by ourselves, topic by topic
            max_request_size=RECORD_BYTES_MAX + 100_000,
            request_timeout_ms=int(self._timeout_s * 750),  # ends before a publish's own limit, with the better error
        )
        starting = asyncio.create_task(producer.start())
        started = False
        try:
            # A broker that starts up answers metadata before it gives out producer ids: aiokafka waits for one without end.
            async with asyncio.timeout(2 * self._timeout_s):
                await asyncio.shield(starting)
            started = True
        except (KafkaError, OSError, TimeoutError) as error:
            log.warning("kafka_unreachable", bootstrap=self._bootstrap, error=type(error).__name__)
        finally:
            if not started:
                await self._close(producer, grace_s=0, starting=starting)
        return producer if started else None

    async def _answers(self, producer: AIOKafkaProducer) -> bool:
        try:
            async with asyncio.timeout(self._timeout_s):
                await producer.client.fetch_all_metadata()
        except (KafkaError, OSError, TimeoutError):
            return False
        return True

    async def _close(
        self, producer: AIOKafkaProducer, *, grace_s: float, starting: asyncio.Task[None] | None = None
    ) -> None:
        """In a task of its own, so that `stop` during it leaves nothing open."""
        task = asyncio.create_task(_closed(producer, starting, grace_s, self._timeout_s))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        await asyncio.shield(task)


async def _closed(
    producer: AIOKafkaProducer, starting: asyncio.Task[None] | None, grace_s: float, timeout_s: float
) -> None:
    """Stop, and after `grace_s` without what is still queued: aiokafka's own stop waits for it without end."""
    if starting is not None and not starting.done():
        # aiokafka leaves its first connection open when it is cancelled there; it gives up by itself within this time.
        await asyncio.wait({starting}, timeout=2.5 * timeout_s)
        starting.cancel()
        await asyncio.wait({starting})
    stopping = asyncio.create_task(producer.stop())
    _, pending = await asyncio.wait({stopping}, timeout=grace_s)
    if pending:
        producer._message_accumulator.fail_all(KafkaError("the producer is being closed"))
        _, pending = await asyncio.wait({stopping}, timeout=2 * timeout_s)
    if pending:
        stopping.cancel()
        await asyncio.wait({stopping})
    if stopping.cancelled() or stopping.exception() is not None:
        # A request in flight wanted to queue its failed batch again (KeyError), or waits for a broker that hangs.
        await producer.client.close()
