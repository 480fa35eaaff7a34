"""The journal topic as a database: what `stablerail rebuild` does.

The topic is read from its beginning to the end that it has when the command starts; nothing may write meanwhile, so that is
checked: no process of ours may be connected to the database, and a second rebuild waits for nothing and says so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition

from agents import lenient_records
from agents.emitter import Emitter
from ledger.assembly import JUMP, Assembly, RestoreScan
from ledger.errors import DatabaseBusy, JournalBroken, NoRecord, SchemaOutdated
from ledger.journal import is_copy
from ledger.migrate import is_newest
from ledger.rebuild import TELL_AGAIN, Restored, rebuild
from ledger.rebuild_batch import Before, Journaled
from ledger.rows import Connection
from stablerail.config import Settings
from topics.catalog import JOURNAL

FETCH_BYTES: Final = 32 * 1024 * 1024
PROGRAM: Final = "stablerail"
"""The application_name of every connection of ours that may write."""

AT_AN_END: Final = 100
"""So many messages of the journal are looked at where it begins, and where it ends."""
LEAVING_S_MAX: Final = 1.0
PUBLISH_S_MAX: Final = 60.0
"""A record of many parts takes seconds; a broker that is away is told."""

Progress = Callable[[int, int, int, int], None]
"""Is told the offsets read, how many there are, the records and the rows so far."""
After = Callable[[Connection, Restored], Awaitable[None]]
"""What closes a rebuild, under its lock: on its connection."""
More = Callable[[AsyncIterator[Journaled]], AsyncIterator[Journaled]]


async def rebuild_database(settings: Settings, progress: Progress, after: After | None = None) -> Restored:
    """Brings the database to the journal's end. Without `after`, what had to be brought forward is a copy then, equal to the one
    that was lost and unable to tell anybody anything (its relay row is gone); one that lacked nothing may be the deployment's own
    and stays as it is. With `after` it takes over. Raises LedgerError: JournalBroken, HistoriesDiffer, DatabaseAhead,
    DatabaseBusy, SchemaOutdated."""
    async with _alone(settings) as connection, _reader(settings) as reader:
        # first: half of a database is never taken for the deployment's
        restored = await rebuild_from(connection, reader, progress, before=_becomes_a_copy)
        await connection.execute("SET synchronous_commit = on")  # what follows is told
        if settings.legacy_url is not None and (after is not None or restored.applied):
            # a backup's marks do not say what that table was given since
            await connection.execute("DELETE FROM shadow_marks; DELETE FROM shadow_outbox")
        if after is not None:
            async with connection.transaction():  # its own, closed: both or neither
                await connection.execute("INSERT INTO relay VALUES (1) ON CONFLICT DO NOTHING")
                await after(connection, restored)
        return replace(restored, is_copy=await is_copy(connection))


async def _becomes_a_copy(connection: Connection) -> None:
    await connection.execute("DELETE FROM relay")


async def publish_waiting(settings: Settings) -> None:
    """Takes to the journal what the database has and the journal lacks, a copy's too: as its relay would, of which a copy has none. The
    next rebuild marks it. Raises KafkaError, TimeoutError, and what `rebuild_database` does of who is beside."""
    emitter = Emitter(settings.kafka_bootstrap, settings.topic_prefix)
    async with _alone(settings) as connection:
        await emitter.start()
        try:
            untold = await connection.fetchval("SELECT min(seq) FROM outbox")
            for (seq,) in await connection.fetch("SELECT seq FROM outbox WHERE NOT journaled ORDER BY seq"):
                record = await connection.fetchval("SELECT record FROM outbox WHERE seq = $1", seq)
                async with asyncio.timeout(PUBLISH_S_MAX):
                    await emitter.journal([(seq, record)], untold)
        finally:
            await emitter.stop()


async def rebuild_from(
    connection: Connection,
    reader: JournalReader,
    progress: Progress,
    more: More = lambda records: records,
    before: Before | None = None,
) -> Restored:
    """As `rebuild_database`, of what is open already; `more` may add records after the journal's. `before`: as of `rebuild`."""
    scan = RestoreScan()
    if await reader.may_tell_of_restores():
        async for one in reader.records():
            scan.take(one)
    tell_from = None if reader.at_last is None else reader.at_last - TELL_AGAIN

    def told(offset: int, records: int, rows: int) -> None:
        progress(offset + 1 - reader.begin, reader.end - reader.begin, records, rows)

    restored = await rebuild(
        connection,
        more(reader.records()),
        restores=scan.found,
        tell_from=tell_from,
        progress=told,
        before=before,
    )
    return replace(restored, foreign=len(reader.foreign))


class JournalReader:
    """The journal from its beginning to the end that it had when this was opened; may be read more than once."""

    def __init__(self, consumer: Any, partition: TopicPartition, begin: int, end: int) -> None:
        self._consumer, self._partition = consumer, partition
        self.begin, self.end = begin, end
        self.at_last: datetime | None = None
        """When the last message came to the broker."""
        self.foreign: set[int] = set()
        """Offsets of messages that are no records of ours."""

    async def to_end(self) -> None:
        """From now on it ends where the topic does."""
        self.end = (await self._consumer.end_offsets([self._partition]))[self._partition]

    async def may_tell_of_restores(self) -> bool:
        """A number at its end is further from the first than any journal's without a rebuild could be. Also finds `at_last`. Foreign
        messages may be the first and the last, and late ones of a database that was lost the last."""
        first = [one.key async for one in self._messages(self.begin, self.begin + AT_AN_END)]
        last: list[bytes | None] = []
        async for one in self._messages(max(self.begin, self.end - AT_AN_END)):
            self.at_last = datetime.fromtimestamp(one.timestamp / 1000, UTC)
            last.append(one.key)
        low, high = ([int.from_bytes(key, "big") for key in keys if key and len(key) == 8] for keys in (first, last))
        return bool(last) and (not low or not high or max(high) >= min(low) + JUMP)

    async def records(self) -> AsyncIterator[Journaled]:
        """Raises JournalBroken. What is no record of ours is passed over: no chain lacks it."""
        assembly = Assembly()
        async for message in self._messages(self.begin):
            try:
                one = assembly.take(message.offset, message.key, message.value, message.headers)
            except NoRecord:
                self.foreign.add(message.offset)
                continue
            if one is not None:
                yield one
        assembly.check_end()

    async def _messages(self, begin: int, end: int | None = None) -> AsyncIterator[Any]:
        end = self.end if end is None else min(end, self.end)
        self._consumer.seek(self._partition, begin)
        offset = begin
        while offset < end:
            for messages in (await self._consumer.getmany(self._partition, timeout_ms=1_000)).values():
                for message in messages:
                    if message.offset >= end:
                        return
                    yield message
            offset = await self._consumer.position(self._partition)


@asynccontextmanager
async def _reader(settings: Settings) -> AsyncIterator[JournalReader]:
    async with open_journal(settings.kafka_bootstrap, settings.topic_prefix) as reader:
        yield reader


@asynccontextmanager
async def open_journal(bootstrap: str, prefix: str) -> AsyncIterator[JournalReader]:
    """Raises KafkaError when no broker answers, JournalBroken when there is no journal whose beginning is there."""
    lenient_records.install()
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap.replace(";", ","),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="none",
        max_partition_fetch_bytes=FETCH_BYTES,
        fetch_max_bytes=FETCH_BYTES,
    )
    partition = TopicPartition(JOURNAL.named(prefix), 0)
    try:
        await consumer.start()
        if partition.topic not in await consumer.topics():
            raise JournalBroken(f"there is no topic {partition.topic}")
        consumer.assign([partition])
        begin = (await consumer.beginning_offsets([partition]))[partition]
        end = (await consumer.end_offsets([partition]))[partition]
        if begin > 0:
            raise JournalBroken(f"{partition.topic} begins at offset {begin}: what was before is missing")
        yield JournalReader(consumer, partition, begin, end)
    finally:
        await consumer.stop()


@asynccontextmanager
async def _alone(settings: Settings) -> AsyncIterator[Connection]:
    async with alone_in(settings.secret("database_url"), settings.database_schema) as connection:
        yield connection


@asynccontextmanager
async def alone_in(dsn: str, schema: str) -> AsyncIterator[Connection]:
    """As the tables' owner, and nobody of ours beside. Raises DatabaseBusy, SchemaOutdated."""
    connection: Connection = await asyncpg.connect(
        dsn,
        timeout=10,
        server_settings={
            "application_name": f"{PROGRAM} rebuild",
            "search_path": schema,
            "timezone": "UTC",
            "jit": "off",
            "plan_cache_mode": "force_generic_plan",
            "synchronous_commit": "off",  # the last transaction flushes them all
            "work_mem": "64MB",
        },
    )
    try:
        if not await connection.fetchval("SELECT pg_try_advisory_lock(hashtext($1))", f"rebuild {schema}"):
            raise DatabaseBusy("another rebuild works in this database; wait for it, or end it and call this again")
        await check_alone(connection)
        if not await is_newest(connection):
            raise SchemaOutdated("the database's schema is not this program's; run: stablerail migrate")
        yield connection
    except (asyncpg.InternalClientError, asyncpg.InterfaceError) as error:  # how the driver says it, now and then
        raise ConnectionResetError(
            "the connection to the database was lost; what is applied stays, call it again"
        ) from error
    finally:
        await connection.close()


async def check_alone(connection: Connection) -> None:
    """Raises DatabaseBusy with who is connected. Whoever has just closed its connection may be seen for a moment longer."""
    deadline = time.monotonic() + LEAVING_S_MAX
    while rows := await connection.fetch(
        "SELECT pid, coalesce(host(client_addr), 'local'), usename::text, backend_start FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = $1 AND pid <> pg_backend_pid() ORDER BY pid",
        PROGRAM,
    ):
        if time.monotonic() > deadline:
            who = "; ".join(
                f"{user} from {host}, process {pid}, since {since:%Y-%m-%d %H:%M:%S}" for pid, host, user, since in rows
            )
            raise DatabaseBusy(
                f"processes of ours are connected; stop workers, API and bridge first, or make a copy in another database: {who}"
            )
        await asyncio.sleep(0.05)
