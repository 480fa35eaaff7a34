"""Stages in the test's own process on real PostgreSQL and Kafka, without Faust: what comes from the topic is offered to
`Delivery` as the transport would. A second `Process` is another worker as far as the database and the broker can tell.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import asyncpg
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from agents.crash import Stop
from agents.delivery import Delivery
from agents.emitter import Emitter
from agents.intake import Delivered
from agents.outcome import Stage
from agents.services import Services
from agents.transport import runs
from ledger.journal import Relay
from ledger.roles import ROLE
from ledger.rows import Connection
from stablerail.metrics import Metrics
from stablerail.topics_admin import admin, create_missing
from tests.support import migrated
from topics.catalog import BUFFERS_LEVELS, JOURNAL, Topic

SCHEMA = migrated.SCHEMA
NEVER_S = 10.0**8
"""Kafka rebalances nobody here: who was replaced by a second process waits for no word of it."""


@dataclass
class Clock:
    """The wall's time, moved by the test."""

    offset: timedelta = timedelta(0)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.offset

    def forward(self, seconds: float) -> None:
        self.offset += timedelta(seconds=seconds)

    def to_noon(self) -> None:
        """Forward to noon in UTC: no day ends while the test goes on."""
        now = self()
        self.offset += (now.replace(hour=12, minute=0, second=0, microsecond=0) - now) % timedelta(days=1)


@dataclass
class Ground:
    """What the processes of a test share."""

    dsn: str
    bootstrap: str
    prefix: str
    observer: Connection
    """A connection for the test's own questions."""
    producer: Any
    clock: Clock = field(default_factory=Clock)

    async def connect(self, **settings: str) -> Connection:
        given = {
            "search_path": SCHEMA,
            "role": ROLE,
            "timezone": "UTC",
            "jit": "off",
            "lock_timeout": "10s",
            **settings,
        }
        connection: Connection = await asyncpg.connect(self.dsn, server_settings=given)
        return connection

    @asynccontextmanager
    async def process(self) -> AsyncIterator[Services]:
        """Services as one worker process has them."""
        opened: list[Connection] = []

        async def connect() -> Connection:
            opened.append(await self.connect())
            return opened[-1]

        emitter = Emitter(self.bootstrap, self.prefix)
        await emitter.start()
        relay = Relay(lambda: self.connect(synchronous_commit="off"), emitter.journal)
        services = Services(
            connect=connect,
            relay=relay,
            emitter=emitter,
            observer=Metrics(),
            stop=Stop(ends=False),
            fenced_s_max=NEVER_S,
            clock=self.clock,
        )
        try:
            yield services
        finally:
            await relay.close()
            await emitter.stop()
            for connection in opened:  # a process's end closes them
                await connection.close()

    async def journaled(self) -> None:
        """Everything that was committed is in the journal, also what a worker that ended had no time for. Nobody else may be at
        work: whoever claims a partition or asks once more commits that, whenever it likes."""
        others = (  # a process that was killed may still commit what it had sent
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_xid IS NOT NULL"
        )
        await until(lambda: self._none(others), "nobody is at a commit")
        async with self.process() as services:
            await services.relay.journal()

    async def _none(self, count: str) -> bool:
        return not await self.observer.fetchval(count)

    async def send(
        self, topic: Topic, key: bytes, value: bytes, headers: Sequence[tuple[str, bytes]] = (), partition: int = 0
    ) -> None:
        await self.producer.send_and_wait(
            topic.named(self.prefix), value, key=key, headers=list(headers), partition=partition
        )

    async def told(self, topic: Topic) -> list[Any]:
        """Every record of the topic so far."""
        return await read_topic(self.bootstrap, topic, self.prefix)


@asynccontextmanager
async def ground(
    dsn: str, bootstrap: str, prefix: str, topics: Sequence[Topic], plain: Sequence[Topic] = ()
) -> AsyncIterator[Ground]:
    """A migrated database, and these topics with their dead letters, `plain` ones without, and a journal."""
    await migrated.migrate(dsn)
    async with admin(bootstrap) as client:
        await create_missing(
            client, prefix, 1, [*topics, *(topic.dlq for topic in topics), *plain, JOURNAL, BUFFERS_LEVELS]
        )
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all")
    observer = await asyncpg.connect(dsn, server_settings={"search_path": SCHEMA, "timezone": "UTC"})
    await producer.start()
    try:
        yield Ground(dsn, bootstrap, prefix, observer, producer)
    finally:
        await producer.stop()
        await observer.close()


@asynccontextmanager
async def running(
    stage: Stage[Any], services: Services, at: Ground, partitions: Sequence[int] | None = None
) -> AsyncIterator[Delivery]:
    """The stage at work on its topic (some partitions, or all), from the first record: a new one sees everything again."""
    topic = stage.source.named(at.prefix)
    keys = {(topic, partition) for partition in partitions or range(stage.source.partitions)}
    consumer = AIOKafkaConsumer(bootstrap_servers=at.bootstrap, auto_offset_reset="earliest", group_id=None)
    async with fed(stage, services, consumer, dict.fromkeys(keys, 0)) as delivery:
        yield delivery
        assert services.stop.reason is None, services.stop.reason
        await delivery.drained()


@asynccontextmanager
async def fed(
    stage: Stage[Any],
    services: Services,
    consumer: AIOKafkaConsumer,
    offsets: Mapping[tuple[str, int], int],
    ack: Callable[[Any], None] = lambda run: None,
) -> AsyncIterator[Delivery]:
    """The stage at work on these partitions from these offsets on; `ack` is told of each run that is done."""
    delivery = Delivery(stage, services)
    await consumer.start()
    consumer.assign([TopicPartition(*key) for key in offsets])
    for key, offset in offsets.items():
        consumer.seek(TopicPartition(*key), offset)

    async def feed() -> None:
        while True:
            for records in (await consumer.getmany(timeout_ms=100)).values():
                run: Any
                for run in runs(records):
                    await delivery.offer(Delivered(run, partial(ack, run)))

    tasks = [asyncio.create_task(delivery.work()), asyncio.create_task(feed())]
    delivery.assigned({*offsets})
    try:
        yield delivery
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await consumer.stop()


async def read_topic(bootstrap: str, topic: Topic, prefix: str) -> list[Any]:
    """What the topic holds now, each partition in its order."""
    partitions = [TopicPartition(topic.named(prefix), number) for number in range(topic.partitions)]
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest", group_id=None)
    await consumer.start()
    try:
        consumer.assign(partitions)
        found: list[Any] = []
        for partition, end in (await consumer.end_offsets(partitions)).items():
            while await consumer.position(partition) < end:
                found += (await consumer.getmany(partition, timeout_ms=200)).get(partition, [])
        return found
    finally:
        await consumer.stop()


async def until(condition: Callable[[], Awaitable[Any]], what: str, timeout_s: float = 100) -> Any:
    """Waits for a true answer, and returns it."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = await condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        await asyncio.sleep(0.03)
