"""A database rebuilt from the journal topic, against COPY of the same rows into the same tables.

The history: the deposits of workload.py, credited by the product's own delivery into a database whose journal is a real topic.
Ours reads that topic as `stablerail rebuild` does, checks and writes it; the baseline copies the rows that this gives, table by
table in PostgreSQL's binary form, over one connection and in one transaction. Both into a migrated, empty database.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from types import SimpleNamespace
from typing import Any, Final

import asyncpg

from agents.crash import Stop
from agents.delivery import Delivery
from agents.deposits import credit_deposits
from agents.intake import Delivered
from ledger.diff import diff, opened
from ledger.migrate import upgrade
from ledger.rebuild import Restored
from ledger.tables import JOURNALED, WALLETS
from stablerail.config import load_settings
from stablerail.metrics import Metrics
from stablerail.policies import deposit_policy
from stablerail.rebuild import alone_in, open_journal, rebuild_from
from stablerail.wiring import services
from tests.benchmarks import workload
from tests.benchmarks.parts import SCHEMA, Parts, Place, place
from tests.benchmarks.records import Comparison, Record

EMPTY: Final = "benchmark_rebuild_empty"
TARGET: Final = "benchmark_rebuild"
TABLES: Final = [table.name for table in JOURNALED if table is not WALLETS]
"""The wallets are there before the history begins."""
RUN: Final = 500
HISTORY_S_MAX: Final = 300
Told = Callable[[str], None]


@dataclass(frozen=True)
class History:
    here: Place
    rows: int
    copies: dict[str, bytes]
    """Table -> its rows, in binary COPY."""


async def speed(parts: Parts, events: int, wallets: int, repeats: int, told: Told) -> Record:
    load = workload.make(events, wallets)
    await parts.prepare(load.addresses)
    await upgrade(parts.postgres.create_database(EMPTY), SCHEMA)
    ours: list[float] = []
    copied: list[float] = []
    restored = None
    try:
        async with place(parts) as here:
            history = await _history(here, load)
            for _ in range(repeats):
                took_s, restored = await _rebuild(parts, history)
                ours.append(history.rows / took_s)
                told(f"rebuild: {ours[-1]:,.0f} rows/s")
                copied.append(history.rows / await _copy(parts, history))
                told(f"COPY: {copied[-1]:,.0f} rows/s")
    finally:
        parts.postgres.drop_database(EMPTY)
    assert restored is not None
    return Record(
        "rebuild.speed",
        Comparison.of(
            "a rebuild from the journal topic against binary COPY of the same rows into the same tables",
            *("rows/s", ours, copied, 0.2),
        ),
        {
            "aim": 0.5,
            "events": events,
            "records": restored.records,
            "rows": history.rows,
            "rows_written_by_commits": restored.rows,
        },
        "from the first read of the topic to the last commit, every record checked; COPY: from BEGIN to COMMIT, rows in memory",
    )


async def _history(here: Place, load: workload.Workload) -> History:
    """Credits all deposits, journals every commit, and keeps the rows."""
    settings = load_settings(
        env_file=None,
        database_url=here.dsn,
        database_schema=SCHEMA,
        kafka_bootstrap=here.bootstrap,
        topic_prefix=here.prefix,
    )
    shared = services(settings, Metrics(), Stop(ends=False))
    delivery = Delivery(credit_deposits.stage(deposit_policy(settings)), shared)
    topic = delivery.stage.source.named(here.prefix)
    await shared.emitter.start()
    task = asyncio.create_task(delivery.work())
    runs = _runs(topic, [*load.warm_up, *load.deposits])
    acked: asyncio.Queue[None] = asyncio.Queue()
    try:
        delivery.assigned({(topic, partition) for partition in range(workload.PARTITIONS)})
        for run in runs:
            await delivery.offer(Delivered(run, lambda: acked.put_nowait(None)))
        async with asyncio.timeout(HISTORY_S_MAX):
            for _ in runs:
                await acked.get()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await shared.relay.close()
        await shared.emitter.stop()
    connection = await asyncpg.connect(here.dsn)
    try:
        rows, copies = 0, {}
        for name in TABLES:
            kept = BytesIO()
            status = await connection.copy_from_table(name, schema_name=SCHEMA, output=kept, format="binary")
            rows += int(status.split()[-1])
            copies[name] = kept.getvalue()
        return History(here, rows, copies)
    finally:
        await connection.close()


def _runs(topic: str, deposits: Sequence[workload.Deposit]) -> list[Any]:
    """As the transport would cut them."""
    queues: dict[int, list[Any]] = {partition: [] for partition in range(workload.PARTITIONS)}
    for deposit in deposits:
        queue = queues[deposit.partition]
        queue.append(
            SimpleNamespace(
                topic=topic, partition=deposit.partition, offset=len(queue), timestamp=1_800_000_000_000,
                key=deposit.key, value=deposit.value, headers=deposit.headers,
            )
        )  # fmt: skip
    return [
        SimpleNamespace(topic=topic, partition=partition, records=queue[first : first + RUN])
        for first in range(0, max(map(len, queues.values())), RUN)
        for partition, queue in queues.items()
        if first < len(queue)
    ]


async def _rebuild(parts: Parts, history: History) -> tuple[float, Restored]:
    async with _empty(parts) as dsn:
        started = time.perf_counter()
        async with (
            alone_in(dsn, SCHEMA) as connection,
            open_journal(history.here.bootstrap, history.here.prefix) as reader,
        ):
            restored = await rebuild_from(connection, reader, lambda *_: None)
        took_s = time.perf_counter() - started
        async with opened(history.here.dsn, SCHEMA) as a, opened(dsn, SCHEMA) as b:
            wrong = [one for one in await diff(a, b) if not one.equal and one.table != WALLETS.name]
        if wrong:
            raise RuntimeError(f"the rebuilt database is another: {wrong}")
        return took_s, restored


async def _copy(parts: Parts, history: History) -> float:
    async with _empty(parts) as dsn:
        connection = await asyncpg.connect(dsn)
        try:
            started = time.perf_counter()
            async with connection.transaction():
                for name, rows in history.copies.items():
                    await connection.copy_to_table(name, schema_name=SCHEMA, source=BytesIO(rows), format="binary")
            return time.perf_counter() - started
        finally:
            await connection.close()


@asynccontextmanager
async def _empty(parts: Parts) -> AsyncIterator[str]:
    dsn = parts.postgres.create_database(TARGET, template=EMPTY)
    parts.postgres.execute("CHECKPOINT")
    try:
        yield dsn
    finally:
        parts.postgres.drop_database(TARGET)
