"""What benchmarks run on: a broker and a server of their own, durable as in production, and one fresh place per run."""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import asyncpg
from aiokafka.admin import AIOKafkaAdminClient

from ledger.migrate import upgrade
from stablerail.dev.fetch import Tools, fetch
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from stablerail.dev.processes import Child, scratch_directory, tail
from stablerail.topics_admin import admin, create_missing
from tests.benchmarks.workload import insert_wallets
from topics.catalog import DEPOSITS_CREDITED, TOPICS, TRANSACTIONS_BROADCAST

SCHEMA = "stablerail"
TEMPLATE = "benchmark_template"
POSTGRES_SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "4GB",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "15min",
}
"""As docs/operations.md says that a server is set up; everything else is PostgreSQL's default."""
SHOWN_SETTINGS = (
    "fsync", "synchronous_commit", "full_page_writes", "wal_level", "wal_compression", "wal_sync_method",
    "shared_buffers", "huge_pages_status", "max_wal_size", "checkpoint_timeout", "autovacuum", "max_connections",
)  # fmt: skip
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
HUGE_PAGES_NEEDED = 2_200
"""Of 2 MB: what `postgres -C shared_memory_size_in_huge_pages` says of these settings, and a little more."""
# The broker's own time of an append says when a message was in Kafka, without anybody polling for it.
STAMPED = tuple(
    replace(topic, config={**topic.config, "message.timestamp.type": "LogAppendTime"})
    if topic in (DEPOSITS_CREDITED, TRANSACTIONS_BROADCAST)
    else topic
    for topic in TOPICS
)


@dataclass(frozen=True)
class Parts:
    kafka: Kafka
    postgres: Postgres
    directory: Path

    async def prepare(self, addresses: Sequence[str]) -> None:
        """The database that each run gets a copy of: migrated, with the wallets."""
        self.postgres.drop_database(TEMPLATE)
        dsn = self.postgres.create_database(TEMPLATE)
        await upgrade(dsn, SCHEMA)
        await insert_wallets(dsn, SCHEMA, addresses)


@contextmanager
def own_parts(*, kafka: bool) -> Iterator[Parts]:
    """For the time of the benchmarks. The broker with both compilers, since throughput is the question; it is started only
    where it is needed."""
    tools: Tools = fetch()
    with scratch_directory("stablerail-bench-") as directory, ExitStack() as stack:
        stack.enter_context(_huge_pages())
        broker = Kafka(directory / "kafka", tools, heap="512m", jvm=())
        if kafka:
            stack.enter_context(broker)
        postgres = stack.enter_context(Postgres(directory / "postgres", tools, POSTGRES_SETTINGS))
        yield Parts(broker, postgres, directory)


@contextmanager
def _huge_pages() -> Iterator[None]:
    """For PostgreSQL, which takes them by itself, as long as it runs. Without the right to reserve any (root's) it goes on without;
    the records say which it was."""
    try:
        before = HUGE_PAGES.read_text()
        # not so many more: one that was killed has left its own
        HUGE_PAGES.write_text(str(max(int(before), HUGE_PAGES_NEEDED)))
    except OSError:
        yield
        return
    try:
        yield
    finally:
        HUGE_PAGES.write_text(before)


@dataclass
class Place:
    """Topics, database and processes of one run; gone afterwards."""

    parts: Parts
    prefix: str
    database: str
    admin: AIOKafkaAdminClient
    children: list[Child] = field(default_factory=list)

    @property
    def bootstrap(self) -> str:
        return self.parts.kafka.bootstrap

    @property
    def dsn(self) -> str:
        return self.parts.postgres.dsn_of(self.database)

    def environment(self, settings: dict[str, str]) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if not name.startswith("STABLERAIL_")}
        return {
            **mine,
            "STABLERAIL_KAFKA_BOOTSTRAP": self.bootstrap,
            "STABLERAIL_TOPIC_PREFIX": self.prefix,
            "STABLERAIL_DATABASE_URL": self.dsn,
            "STABLERAIL_DATABASE_SCHEMA": SCHEMA,
            "STABLERAIL_DATADIR": str(self.parts.directory / "data"),
            "STABLERAIL_LOG_FORMAT": "json",
            # a side is frozen while its events are loaded, and must stay in its group
            "STABLERAIL_KAFKA_SESSION_TIMEOUT_S": "50",
            **settings,
        }

    def start(self, arguments: Sequence[str], settings: dict[str, str]) -> Child:
        log = self.parts.directory / f"{self.database}-{len(self.children)}.log"
        child = Child([sys.executable, *arguments], log=log, env=self.environment(settings))
        self.children.append(child)
        return child

    def check_running(self) -> None:
        """Raises RuntimeError with the log's end when a process has ended."""
        for child in self.children:
            if child.returncode is not None:
                raise RuntimeError(f"a measured process ended with {child.returncode}: {tail(child.log)}")


@asynccontextmanager
async def place(parts: Parts, kept: str = "") -> AsyncIterator[Place]:
    """Everything in it starts from the same state: empty topics, a copy of the template, a checkpoint just made. `kept`: a
    database that stays and is used as it is, and between two checkpoints; making a database or dropping one is a third."""
    unique = f"bench_{uuid.uuid4().hex[:12]}"
    name = kept or unique
    if not kept:
        parts.postgres.create_database(name, template=TEMPLATE)
        parts.postgres.execute("CHECKPOINT")
    async with admin(parts.kafka.bootstrap) as client:
        prefix = f"{unique}."
        await create_missing(client, prefix, 1, STAMPED)
        await _until_led(client, [topic.named(prefix) for topic in STAMPED])
        here = Place(parts, prefix, name, client)
        try:
            yield here
        finally:
            for child in here.children:
                child.kill()  # all it did is checked; a graceful end would only take time
            await client.delete_topics([topic.named(prefix) for topic in STAMPED])
            if not kept:
                parts.postgres.drop_database(name)


async def _until_led(client: AIOKafkaAdminClient, topics: Sequence[str]) -> None:
    """A topic is made before its partitions have leaders; until then producers meet errors and wait."""
    while True:
        described = await client.describe_topics(list(topics))
        partitions = [partition for topic in described for partition in topic["partitions"]]
        if len(described) == len(topics) and all(p["error_code"] == 0 and p["leader"] >= 0 for p in partitions):
            return
        await asyncio.sleep(0.05)


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of processes and of their children so far."""
    family = {str(pid) for pid in pids}
    ticks = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if entry.name in family or fields[1] in family:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def describe(parts: Parts) -> dict[str, Any]:
    """What a figure depends on: versions, settings, machine, date."""
    connection = await asyncpg.connect(parts.postgres.dsn)
    try:
        postgres = await connection.fetchval("SHOW server_version")
        settings = {name: await connection.fetchval(f"SHOW {name}") for name in SHOWN_SETTINGS}
    finally:
        await connection.close()
    jar = next((jar.name for jar in fetch().jars if jar.name.startswith("kafka_2.13-")), "")
    packages = {"faust": "faust-streaming", "aiokafka": "aiokafka", "asyncpg": "asyncpg", "pydantic": "pydantic"}
    return {
        "versions": {
            "python": sys.version.split()[0],
            "kafka": jar.removeprefix("kafka_2.13-").removesuffix(".jar"),
            "postgres": postgres,
            **{name: version(package) for name, package in packages.items()},
        },
        "postgres_settings": settings,
        "cpus": os.cpu_count(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
