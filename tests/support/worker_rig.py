"""What the rigs of crash tests have alike: workers of one movement behind proxies, and clients of the test's own, which go past them.

The workers are real processes, the broker and the server are real.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import asyncpg
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from stablerail.dev.processes import free_port, tail
from stablerail.dev.stack import Stack
from tests.support.invariants import end_database
from tests.support.proxies import Hold, KafkaProxy, PostgresProxy
from tests.support.warm import WarmChild
from topics.catalog import Topic

PATIENCE_S = 100.0
"""Until a condition must hold on a machine that others load; a quiet one needs a tenth."""
R = TypeVar("R", bound="WorkerRig")


class WorkerRig:
    """`worker` is the one that runs now; `postgres` and `kafka` are the proxies that every worker goes through."""

    movement: ClassVar[str]

    def __init__(self, stack: Stack, prefix: str, postgres: PostgresProxy, kafka: KafkaProxy) -> None:
        self.prefix = prefix
        self.postgres, self.kafka = postgres, kafka
        self.group = f"stablerail-{prefix}{self.movement}"
        self.workers: list[WarmChild] = []
        self.port = 0
        """Of the newest worker's web."""
        self.holds: list[Hold] = []
        self.is_quiet = True
        """False while a test runs and after one that failed: then nobody knows what state this is in."""
        self._stack = stack
        self.database: asyncpg.Connection[asyncpg.Record]
        self._producer: AIOKafkaProducer
        self._consumer: AIOKafkaConsumer

    @property
    def dsn(self) -> str:
        return self._stack.environment["STABLERAIL_DATABASE_URL"]

    @property
    def bootstrap(self) -> str:
        return self._stack.environment["STABLERAIL_KAFKA_BOOTSTRAP"]

    @property
    def worker(self) -> WarmChild:
        return self.workers[-1]

    def topic(self, name: str) -> str:
        return self.prefix + name

    # -- workers -----------------------------------------------------------------------------------------------------

    def start_worker(self, **settings: str) -> WarmChild:
        """One more worker of the group, with settings of its own; does not wait."""
        self.port = free_port()
        arguments = ["worker", self.movement, "--port", str(self.port)]
        log = self._stack.directory / f"worker-{len(self.workers) + 1}.log"
        self.workers.append(WarmChild(arguments, log=log, env={**self.worker_environment(), **settings}))
        return self.worker

    def worker_environment(self) -> dict[str, str]:
        head, _, database = self.dsn.rpartition("/")
        return {
            **os.environ,
            **self._stack.environment,
            "STABLERAIL_DATABASE_URL": f"{head.rpartition('@')[0]}@{self.postgres.address}/{database}",
            "STABLERAIL_KAFKA_BOOTSTRAP": self.kafka.address,
        }

    # -- looking -----------------------------------------------------------------------------------------------------

    async def is_idle(self) -> bool:
        """Whether every commit so far has reached the journal."""
        return not await self.database.fetchval("SELECT count(*) FROM outbox WHERE NOT journaled")

    async def news(self) -> list[Any]:
        """What was told since the last look, repeats too: records of the topics that `start_clients` was given."""
        partitions = self._consumer.assignment()
        ends = await self._consumer.end_offsets(partitions)
        self._consumer.resume(*partitions)
        found: list[Any] = []
        while [tp for tp, end in ends.items() if await self._consumer.position(tp) < end]:
            for records in (await self._consumer.getmany(timeout_ms=500)).values():
                found += records
        self._consumer.pause(*partitions)  # or it asks the broker fifty times a second for what nobody waits for
        return found

    async def until(
        self, condition: Callable[[], Awaitable[Any]], what: str, timeout_s: float = PATIENCE_S, pause_s: float = 0.05
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not await condition():
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s\n{self.logs()}"
            await asyncio.sleep(pause_s)

    def logs(self) -> str:
        return "\n".join(f"{w.log.name} ({w.returncode}): {tail(w.log, 15)}" for w in self.workers[-3:])

    # -- life --------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Schema, topics, what the test works on, and its clients."""
        raise NotImplementedError

    async def first_worker(self) -> None:
        """A worker, and something through it, so that every topic has a leader before anything is held."""
        raise NotImplementedError

    async def check(self) -> None:
        """All that was ever said came to what it must, once; ends quiet."""
        raise NotImplementedError

    async def connect(self) -> None:
        """The test's own connection, to the database that there is now."""
        self.database = await asyncpg.connect(self.dsn, server_settings={"search_path": "stablerail"})

    async def start_clients(self, *told: Topic) -> None:
        """Of Kafka: one that sends, one that reads these topics from their beginning."""
        self._producer = AIOKafkaProducer(bootstrap_servers=self.bootstrap, acks="all", enable_idempotence=True)
        self._consumer = AIOKafkaConsumer(bootstrap_servers=self.bootstrap, fetch_max_wait_ms=20)
        for client in (self._producer, self._consumer):
            await client.start()
        self._consumer.assign(
            [TopicPartition(topic.named(self.prefix), n) for topic in told for n in range(topic.partitions)]
        )
        await self._consumer.seek_to_beginning()

    async def close(self) -> None:
        for worker in self.workers:
            if worker.returncode is None:
                worker.kill()
        await self._consumer.stop()
        await self._producer.stop()
        await self.database.close()


@asynccontextmanager
async def opened(rig: R) -> AsyncIterator[R]:
    """With a worker that is idle and owns everything."""
    await rig.open()
    try:
        await rig.first_worker()
        yield rig
    finally:
        await rig.close()


@asynccontextmanager
async def worker_rig(
    kind: type[R], directory: Path, server: Postgres, broker: Kafka, settings: Mapping[str, str]
) -> AsyncIterator[R]:
    """A rig on a database and topics of its own, which reads no chain."""
    name, prefix = f"test_{uuid.uuid4().hex[:12]}", f"t{uuid.uuid4().hex[:10]}."
    parts = {
        "STABLERAIL_DATABASE_URL": server.create_database(name),
        "STABLERAIL_KAFKA_BOOTSTRAP": broker.bootstrap,
        "STABLERAIL_RPC_URLS": "{}",
        "STABLERAIL_TOPIC_PREFIX": prefix,
    }
    host, port = broker.bootstrap.split(":")
    try:
        with PostgresProxy("127.0.0.1", server.port) as postgres, KafkaProxy(host, int(port)) as kafka:
            async with opened(kind(Stack(directory / name, parts, settings=settings), prefix, postgres, kafka)) as rig:
                yield rig
    finally:
        end_database(server, name)
