"""deposits.end_to_end: how many deposits a second go from `deposits.notified` to `deposits.credited`.

A run, the same for every side:

| phase | what | why |
| --- | --- | --- |
| place | empty topics, a copy of the migrated database with the wallets, a checkpoint | every run starts from the same state |
| start | the processes; until their partitions are shared | start-up is not what is asked |
| warm up | one deposit to each wallet, until acknowledged; ANALYZE | accounts exist, caches are filled, statements are prepared and planned |
| freeze | SIGSTOP to the processes; all events into Kafka | everything waits in Kafka before the clock runs |
| run | SIGCONT is the start; the broker's own time of the last message in `deposits.credited` the end | one clock, nothing of ours in the process |
| check | offsets acknowledged to the end; messages, ids and rows counted | a side that lost or repeated one has no figure |
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import GroupCoordinatorNotAvailableError

from tests.benchmarks import sides
from tests.benchmarks.parts import Parts, Place, cpu_seconds, place
from tests.benchmarks.sides import Side
from tests.benchmarks.workload import PARTITIONS, Workload, preload
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_NOTIFIED, JOURNAL

POLL_S = 0.1
FREEZE_S_MAX = 45.0
"""Below the session time-out (parts.py): a frozen side must still be in its group. A backlog takes longer to load, and its side
sets a longer time-out."""


@dataclass(frozen=True)
class Run:
    """One run of one side."""

    events: int
    seconds: float
    acked_s: float
    """Until all offsets were acknowledged, seen every tenth of a second; both commit them on a timer."""
    wal_bytes: int
    journal_bytes: int
    cpu_side_s: float
    cpu_postgres_s: float
    cpu_kafka_s: float

    @property
    def rate(self) -> float:
        return self.events / self.seconds


async def run(
    parts: Parts, side: Side, load: Workload, limit_s: float, *, kept: str = "", freeze_s_max: float = FREEZE_S_MAX
) -> Run:
    """Raises TimeoutError, RuntimeError when a process ended, AssertionError when anything was lost or repeated. `kept`: the
    database to run in, left as it then is."""
    async with asyncio.timeout(limit_s), place(parts, kept) as here:
        await sides.start(here, side)
        reader = AIOKafkaConsumer(bootstrap_servers=here.bootstrap, auto_offset_reset="earliest", fetch_max_wait_ms=50)
        await reader.start()
        database = await asyncpg.connect(here.dsn)
        try:
            return await _Measured(here, side, load, reader, database, freeze_s_max, bool(kept)).run()
        finally:
            await reader.stop()
            await database.close()


class _Measured:
    def __init__(
        self, here: Place, side: Side, load: Workload, reader: AIOKafkaConsumer, database: asyncpg.Connection,
        freeze_s_max: float, kept: bool,
    ) -> None:  # fmt: skip
        self._here = here
        self._side = side
        self._load = load
        self._reader = reader
        self._database = database
        self._freeze_s_max = freeze_s_max
        self._kept = kept
        self._notified = DEPOSITS_NOTIFIED.named(here.prefix)
        self._credited = DEPOSITS_CREDITED.named(here.prefix)
        self._journal = JOURNAL.named(here.prefix)

    async def run(self) -> Run:
        here, load = self._here, self._load
        there = await self._database.fetchval(self._side.count) if self._kept else 0
        await preload(here.bootstrap, self._notified, load.warm_up)
        await self._until(self._acked_all)
        assert await self._emitted() == len(load.warm_up)
        await self._database.execute("ANALYZE")
        before = await self._ends(self._credited)
        journaled = await self._ends(self._journal)
        waiting = [*load.parts()]  # making them takes longer than loading them
        frozen = time.monotonic()
        for child in here.children:
            child.send_signal(signal.SIGSTOP)
        for deposits in waiting:
            await preload(here.bootstrap, self._notified, deposits)
        wal, cpu = await self._wal(), self._cpu()
        assert time.monotonic() - frozen < self._freeze_s_max, (
            "loading took so long that the side may have left its group"
        )
        started = time.time()
        for child in here.children:
            child.send_signal(signal.SIGCONT)
        expected = len(load.warm_up) + load.events

        async def emitted_all() -> bool:
            return await self._emitted() >= expected

        await self._until(emitted_all)
        await self._until(self._acked_all)
        acked = time.time()
        used = [now - then for now, then in zip(self._cpu(), cpu, strict=True)]
        written = await self._wal() - wal
        ended, ids, messages = await self._read(before)
        count = await self._database.fetchval(self._side.count) - there
        assert (messages, ids, count) == (load.events, load.events, expected), "lost or repeated"
        return Run(
            events=load.events,
            seconds=ended - started,
            acked_s=acked - started,
            wal_bytes=written,
            journal_bytes=await self._journal_bytes(journaled),
            cpu_side_s=used[0],
            cpu_postgres_s=used[1],
            cpu_kafka_s=used[2],
        )

    async def _until(self, reached: Callable[[], Awaitable[bool]]) -> None:
        while not await reached():
            self._here.check_running()
            await asyncio.sleep(POLL_S)

    async def _ends(self, topic: str) -> dict[TopicPartition, int]:
        partitions = JOURNAL.partitions if topic == self._journal else PARTITIONS
        ends: dict[TopicPartition, int] = await self._reader.end_offsets(
            [TopicPartition(topic, partition) for partition in range(partitions)]
        )
        return ends

    async def _emitted(self) -> int:
        return sum((await self._ends(self._credited)).values())

    async def _acked_all(self) -> bool:
        group = self._side.group_name(self._here.prefix)
        try:
            acked = await self._here.admin.list_consumer_group_offsets(group)
        except GroupCoordinatorNotAvailableError:  # the broker's first group: its offsets topic is being made
            return False
        ends = await self._ends(self._notified)
        return all(end == 0 or (tp in acked and acked[tp].offset == end) for tp, end in ends.items())

    async def _wal(self) -> int:
        return int(await self._database.fetchval("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn"))

    def _cpu(self) -> tuple[float, float, float]:
        parts = self._here.parts
        side = [child.pid for child in self._here.children]
        return cpu_seconds(side), cpu_seconds([parts.postgres.pid]), cpu_seconds([parts.kafka.pid()])

    async def _read(self, begin: dict[TopicPartition, int]) -> tuple[float, int, int]:
        """Broker time of the last message, distinct values, messages."""
        last_ms, values, messages = 0, set(), 0
        async for record in self._records(begin):
            last_ms = max(last_ms, record.timestamp)
            values.add(hash(record.value))  # half a million values would take a quarter of a gigabyte
            messages += 1
        return last_ms / 1000, len(values), messages

    async def _journal_bytes(self, begin: dict[TopicPartition, int]) -> int:
        return sum([len(record.value) async for record in self._records(begin)])

    async def _records(self, begin: dict[TopicPartition, int]) -> AsyncIterator[Any]:
        ends = await self._reader.end_offsets(list(begin))
        left = {tp for tp in begin if begin[tp] < ends[tp]}
        if not left:
            return
        self._reader.assign(list(begin))
        for tp, offset in begin.items():
            self._reader.seek(tp, offset)
        while left:
            for tp, records in (await self._reader.getmany(timeout_ms=200)).items():
                for record in records:
                    yield record
                if records and records[-1].offset + 1 >= ends[tp]:
                    left.discard(tp)
