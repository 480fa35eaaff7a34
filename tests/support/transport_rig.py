"""Topic, producer, worker processes and their journal, for tests of the batched transport on a real broker."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import GroupCoordinatorNotAvailableError

ROOT = Path(__file__).parents[2]
PARTITIONS = 4


@dataclass
class Rig:
    bootstrap: str
    topic: str
    directory: Path
    admin: Any
    producer: Any
    workers: list[asyncio.subprocess.Process] = field(default_factory=list)
    produced: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    @property
    def journal(self) -> Path:
        return self.directory / "journal"

    async def worker(self, **job: Any) -> asyncio.subprocess.Process:
        """A worker process, started; it need not be assigned anything yet."""
        job = {"bootstrap": self.bootstrap, "topic": self.topic, "journal": str(self.journal), **job}
        with (self.directory / f"worker-{len(self.workers)}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.support.transport_worker", json.dumps(job)),
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(self.directory)},  # a worker that is killed leaves its files there
                stderr=log,
            )
        self.workers.append(process)
        return process

    async def produce(self, count: int, value: bytes = b"x", partition: int | None = None) -> None:
        acks = [
            await self.producer.send(self.topic, value, partition=i % PARTITIONS if partition is None else partition)
            for i in range(count)
        ]
        for meta in await asyncio.gather(*acks):
            self.produced[meta.partition].append(meta.offset)

    def lines(self, kind: str) -> list[list[str]]:
        text = self.journal.read_text() if self.journal.exists() else ""
        text = text[: text.rfind("\n") + 1]  # a worker may be in the middle of a line
        return [line.split() for line in text.splitlines() if line.startswith(kind)]

    def processed(self) -> dict[int, list[int]]:
        """Offsets by partition as they were first processed, by whichever worker."""
        first: dict[int, dict[int, None]] = defaultdict(dict)
        for _, _, partition, offset, *_ in self.lines("R"):
            first[int(partition)][int(offset)] = None
        return {partition: list(offsets) for partition, offsets in first.items()}

    def assigned(self, worker: asyncio.subprocess.Process) -> list[str] | None:
        """The partitions of this worker's latest assignment; None before its first."""
        return next((words[2:] for words in reversed(self.lines("A")) if words[1] == str(worker.pid)), None)

    async def committed(self) -> dict[int, int]:
        try:
            offsets = await self.admin.list_consumer_group_offsets(self.topic)
        except GroupCoordinatorNotAvailableError:  # the broker's first group: its offsets topic is being made
            return {}
        return {tp.partition: meta.offset for tp, meta in offsets.items()}

    async def check_commits(self) -> dict[int, int]:
        """What is committed now, after checking that all of it was processed: read the commits first, then the journal."""
        committed = await self.committed()
        processed = self.processed()
        for partition, offset in committed.items():
            due = {o for o in self.produced[partition] if o < offset}
            assert due <= set(processed.get(partition, ())), (
                f"partition {partition} is committed at {offset}, past its processed records: of {len(due)} are missing "
                f"{sorted(due - set(processed.get(partition, ())))[:20]}\n{self.lines('A')}\n{self.logs()}"
            )
        return committed

    async def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 100) -> None:
        """Wait for the condition, checking all the while that no commit runs ahead of the work."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s\n{self.logs()}"
            await self.check_commits()
            await asyncio.sleep(0.02)

    async def until_all_processed(self) -> None:
        """Nothing lost, everything in order, and the commit reaches the last record of each partition."""
        count = sum(map(len, self.produced.values()))
        await self.until(lambda: sum(map(len, self.processed().values())) >= count, f"{count} records processed")
        assert self.processed() == self.produced
        last = {partition: offsets[-1] + 1 for partition, offsets in self.produced.items()}
        deadline = time.monotonic() + 100
        while await self.check_commits() != last:
            assert time.monotonic() < deadline, f"committed {await self.committed()}, expected {last}\n{self.logs()}"
            await asyncio.sleep(0.05)

    def repeats(self) -> int:
        return len(self.lines("R")) - sum(map(len, self.processed().values()))

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.directory.glob("worker-*.log")))

    async def end(self, process: asyncio.subprocess.Process, sig: signal.Signals = signal.SIGTERM) -> int:
        if process.returncode is None:
            process.send_signal(sig)
        return await asyncio.wait_for(process.wait(), 100)


async def _is_led(admin: AIOKafkaAdminClient, topic: str) -> bool:
    (described,) = await admin.describe_topics([topic])
    partitions = described["partitions"]
    return len(partitions) == PARTITIONS and all(each["error_code"] == 0 and each["leader"] >= 0 for each in partitions)


@asynccontextmanager
async def rig(bootstrap: str, topic: str, directory: Path, **producer: Any) -> AsyncIterator[Rig]:
    """A fresh topic and everything on it; the workers end with the block."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    sender = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, **producer)
    await admin.start()
    await sender.start()
    it = Rig(bootstrap, topic, directory, admin, sender)
    try:
        # the table's too, which Faust would make and at once look for in what it knows of the cluster
        names = (topic, f"{topic}-{topic}-seen-changelog")
        await admin.create_topics([NewTopic(name, PARTITIONS, 1) for name in names])
        async with asyncio.timeout(100):  # a worker that starts before everybody sees it finds no partitions, for good
            while not await _is_led(admin, topic):
                await asyncio.sleep(0.05)
        yield it
    finally:
        for process in it.workers:
            if process.returncode is None:
                process.kill()
                await process.wait()
        await sender.stop()
        await admin.close()
