"""The programs that are measured: how each is started, and when it is ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

from stablerail.dev.processes import free_port
from tests.benchmarks.parts import Place

START_S_MAX = 100


@dataclass(frozen=True)
class Side:
    """`group`: its consumer group without the prefix; `workers` > 0: that many real worker processes."""

    name: str
    group: str
    module: str = ""
    workers: int = 0
    settings: dict[str, str] = field(default_factory=dict)
    count: str = ""
    """How many deposits its database holds, in SQL."""

    def group_name(self, prefix: str) -> str:
        return f"stablerail-{prefix}{self.group}" if self.workers else f"{prefix}{self.group}"


OUR_COUNT = "SELECT count(*) FROM stablerail.transactions WHERE kind = 'deposit'"
WORKER = Side("worker", "deposits", workers=1, count=OUR_COUNT)
TWO_WORKERS = Side("two workers", "deposits", workers=2, settings={"STABLERAIL_BUFFER_SHARDS": "4"}, count=OUR_COUNT)
BARE = Side("bare", "baseline", "tests.benchmarks.baselines.bare_delivery", count=OUR_COUNT)
PLAIN = Side(
    "plain", "baseline", "tests.benchmarks.baselines.plain_loop", count="SELECT count(*) FROM plain.transactions"
)
LAB = Side("lab", "baseline", "tests.benchmarks.baselines.lab_loop", count="SELECT count(*) FROM plain.transactions")
HOP_AND_COMMIT = Side(
    "hop and commit",
    "baseline",
    "tests.benchmarks.baselines.hop_and_commit",
    count="SELECT count(*) FROM bare.credited",
)


async def start(here: Place, side: Side) -> None:
    """Starts the side's processes. Workers are waited for until each has its share of the partitions: a rebalance later
    would be measured too."""
    if not side.workers:
        here.start(["-m", side.module], side.settings)
        return
    ports = [free_port() for _ in range(side.workers)]
    for port in ports:
        here.start(["-m", "stablerail.cli", "worker", "deposits", "--port", str(port)], side.settings)
    deadline = time.monotonic() + START_S_MAX
    async with aiohttp.ClientSession() as session:
        while await _partitions(session, ports) != [4 // side.workers] * side.workers:
            here.check_running()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{side.name}: the workers did not share the partitions within {START_S_MAX} s")
            await asyncio.sleep(0.1)


async def _partitions(session: aiohttp.ClientSession, ports: Sequence[int]) -> list[int]:
    """Of deposits.notified, by worker."""
    found = []
    for port in ports:
        try:
            url = f"http://127.0.0.1:{port}/flow"
            async with session.get(url, headers={"accept": "application/json"}) as answer:
                figures = await answer.json(content_type=None)
                found += [f["partitions"] for f in figures if f["stage"] == "credit_deposits"]
        except (aiohttp.ClientError, OSError):
            found.append(0)
    return found
