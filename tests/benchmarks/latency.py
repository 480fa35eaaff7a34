"""deposits.latency: from a deposit sent to Kafka until its balance can be read, at a load that leaves the machine idle.

50 deposits a second into four partitions, each to another wallet. A reader asks PostgreSQL for that wallet's account again
and again from the moment of sending (one round trip is about a fifth of a millisecond: the resolution, and each figure
is late by at most that); a consumer waits for `deposits.credited`. Sender, reader and consumer are one process with one
clock. PostgreSQL's own commit time would be too early: it is taken before the commit is flushed.

The baseline is measured in the same way: a bare consumer makes one INSERT in a transaction of its own for each message, and
the reader asks for that row.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from ledger.accounts import spendable
from tests.benchmarks import sides
from tests.benchmarks.parts import Parts, Place, place
from tests.benchmarks.sides import HOP_AND_COMMIT, Side
from tests.benchmarks.workload import PARTITIONS, Deposit, Workload, preload
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_NOTIFIED

RATE_PER_S = 50
READERS = 4
"""Connections that ask: a deposit sent while another is awaited has its own."""
POLL_S = 0.1
SETTLING_SHARE = 8
"""The first eighth is sent and not counted: small batches have statements of their own to prepare."""

OUR_BALANCE = "SELECT 1 FROM stablerail.accounts WHERE id = $1::uuid AND version >= 2"
BARE_ROW = "SELECT 1 FROM bare.credited WHERE transfer_id = $1::text"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of each event from sending until …"""

    readable_ms: list[float]
    credited_ms: list[float]
    """… its message was received by a bare consumer of `deposits.credited`; empty for the baseline, which sends none."""


def quantile(values: Sequence[float], share: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


async def run(parts: Parts, side: Side, load: Workload, limit_s: float) -> Latency:
    """Raises TimeoutError when a balance or a message does not come, RuntimeError when a process ended."""
    async with asyncio.timeout(limit_s), place(parts) as here:
        await sides.start(here, side)
        topic = DEPOSITS_NOTIFIED.named(here.prefix)
        await preload(here.bootstrap, topic, load.warm_up)
        connections = [await asyncpg.connect(here.dsn) for _ in range(READERS)]
        producer = AIOKafkaProducer(bootstrap_servers=here.bootstrap, acks="all", enable_idempotence=True, linger_ms=0)
        consumer = AIOKafkaConsumer(bootstrap_servers=here.bootstrap, auto_offset_reset="earliest")
        await producer.start()
        await consumer.start()
        try:
            sending = _Sending(here, side, load.deposits, connections, producer, consumer)
            while not await sending.is_warm(connections[0], len(load.warm_up)):
                here.check_running()
                await asyncio.sleep(POLL_S)
            await connections[0].execute("ANALYZE")
            gc.collect()
            return await sending.run()
        finally:
            await producer.stop()
            await consumer.stop()
            for connection in connections:
                await connection.close()


class _Sending:
    def __init__(
        self,
        here: Place,
        side: Side,
        deposits: Sequence[Deposit],
        connections: Sequence[asyncpg.Connection],
        producer: AIOKafkaProducer,
        consumer: AIOKafkaConsumer,
    ) -> None:
        self._ours = side is not HOP_AND_COMMIT
        self._count = side.count
        self._topic = DEPOSITS_NOTIFIED.named(here.prefix)
        self._partitions = [TopicPartition(DEPOSITS_CREDITED.named(here.prefix), n) for n in range(PARTITIONS)]
        self._deposits = deposits
        self._connections: asyncio.Queue[asyncpg.Connection] = asyncio.Queue()
        for connection in connections:
            self._connections.put_nowait(connection)
        self._producer = producer
        self._consumer = consumer
        self._sent: dict[bytes, float] = {}
        self._readable: list[float] = []
        self._credited: list[float] = []

    async def is_warm(self, connection: asyncpg.Connection, expected: int) -> bool:
        """Whether all that was loaded is through, told included."""
        if self._ours:
            return bool(sum((await self._consumer.end_offsets(self._partitions)).values()) == expected)
        try:
            return bool(await connection.fetchval(self._count) == expected)
        except asyncpg.UndefinedTableError:  # the baseline makes its own
            return False

    async def run(self) -> Latency:
        async with asyncio.TaskGroup() as group:
            if self._ours:
                ends = await self._consumer.end_offsets(self._partitions)
                self._consumer.assign(self._partitions)
                for tp, end in ends.items():
                    self._consumer.seek(tp, end)
                group.create_task(self._receive())
            started = time.perf_counter()
            for number, deposit in enumerate(self._deposits):
                await asyncio.sleep(started + number / RATE_PER_S - time.perf_counter())
                group.create_task(self._one(deposit))
        settling = len(self._deposits) // SETTLING_SHARE
        return Latency(self._readable[settling:], self._credited[settling:])

    async def _one(self, deposit: Deposit) -> None:
        connection = await self._connections.get()
        asked, key = (OUR_BALANCE, spendable(deposit.user_id).id) if self._ours else (BARE_ROW, deposit.event_id)
        ask = await connection.prepare(asked)
        sent = self._sent[deposit.key] = time.perf_counter()
        acked = await self._producer.send(
            self._topic, deposit.value, key=deposit.key, partition=deposit.partition, headers=deposit.headers
        )
        while await ask.fetchval(key) is None:
            pass
        self._readable.append((time.perf_counter() - sent) * 1000)
        await acked
        self._connections.put_nowait(connection)

    async def _receive(self) -> None:
        while len(self._credited) < len(self._deposits):
            for records in (await self._consumer.getmany(timeout_ms=1000)).values():
                now = time.perf_counter()
                self._credited += [(now - self._sent[record.key]) * 1000 for record in records]
