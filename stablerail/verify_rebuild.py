"""`stablerail verify --rebuild`: a database made from the journal equals this one. Invariant 12, while the deployment works.

| step | what | why there |
| --- | --- | --- |
| moment | with the relay locked: the journal's end is read, a snapshot taken | what is below that end is in the snapshot; the rest of it waits in its outbox |
| rebuild | a scratch database from those records | as on the worst day, by the same code |
| compare | every journaled table of the snapshot with the scratch database's | as `stablerail diff` |
| store | when, how much, what differed | the worker of `recovery` that leads makes a metric of it |

The scratch database is dropped at the end; one that a killed check left behind is dropped by the next. The snapshot is held until then, so
PostgreSQL keeps what changes meanwhile: it wants the hour with the least to do.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg
import orjson

from ledger.diff import AS_TEXT, Difference, diff, opened
from ledger.errors import JournalBroken
from ledger.migrate import upgrade
from ledger.rebuild_batch import Journaled
from ledger.rows import Connection
from ledger.sql import load
from ledger.verify import Result, unheard
from ledger.verify_chain import Progress
from stablerail.config import Settings
from stablerail.connections import connector
from stablerail.rebuild import JournalReader, alone_in, open_journal, rebuild_from

_sql = load("stablerail", "verify_rebuild.sql")

NUMBER: Final = 12
NAME: Final = "a rebuild from the journal equals the database"


async def verify_rebuild(settings: Settings, server: str, *, rows_max: int = 5, progress: Progress = unheard) -> Result:
    """`server`: the URL of a database on the server that is to hold the scratch database, by a login that may create one. The result is
    stored too. Raises KafkaError when no broker answers, and asyncpg's errors."""
    connect = connector(settings, **AS_TEXT, idle_in_transaction_session_timeout="0")
    live = await connect()
    try:
        async with (
            scratch_database(server, scratch_names(settings)) as dsn,
            open_journal(settings.kafka_bootstrap, settings.topic_prefix) as reader,
        ):
            progress("an empty database", 0, 0)
            await upgrade(dsn, settings.database_schema, role=settings.database_role)
            async with live.transaction(isolation="repeatable_read", readonly=True):
                waiting = await _moment(settings, live, reader)
                result = await _compared(settings.database_schema, live, dsn, reader, waiting, rows_max, progress)
        await live.execute(_sql.store, datetime.now(UTC), result.checked, orjson.dumps(result.offending).decode())
    except JournalBroken as error:  # there is none, or it has no beginning
        return await _store_broken(live, error)
    finally:
        await live.close()
    return result


async def _store_broken(live: Connection, error: JournalBroken) -> Result:
    result = Result(NUMBER, NAME, 0, (f"the journal is broken: {error}",))
    await live.execute(_sql.store, datetime.now(UTC), 0, orjson.dumps(result.offending).decode())
    return result


async def stored(connection: Connection) -> list[Result]:
    """What was found last; nothing before anybody looked."""
    rows = await connection.fetch(_sql.stored)
    return [Result(NUMBER, NAME, checked, (*orjson.loads(offending),), at) for at, checked, offending in rows]


async def _moment(settings: Settings, live: Connection, reader: JournalReader) -> list[Any]:
    """Takes the snapshot; its records that the journal may lack."""
    relay = await connector(settings)()
    try:
        async with relay.transaction():
            await relay.execute(_sql.lock_relay)
            await reader.to_end()
            return await live.fetch(_sql.waiting)
    finally:
        await relay.close()


async def _compared(
    schema: str,
    live: Connection,
    dsn: str,
    reader: JournalReader,
    waiting: list[Any],
    rows_max: int,
    progress: Progress,
) -> Result:
    async def known(records: AsyncIterator[Journaled]) -> AsyncIterator[Journaled]:
        async for one in records:
            yield one
        for seq, record in waiting:  # what has got to the journal all the same is a repeat
            yield Journaled(seq, record, reader.end)

    def told(done: int, total: int, _records: int, _rows: int) -> None:
        progress("a rebuild", done, total)

    async with alone_in(dsn, schema) as connection:
        restored = await rebuild_from(connection, reader, told, known)
    async with opened(dsn, schema) as rebuilt:
        found = await diff(live, rebuilt, rows_max=rows_max, progress=progress)
    return Result(NUMBER, NAME, restored.records, tuple(line for one in found if not one.equal for line in _told(one)))


def _told(one: Difference) -> list[str]:
    """A is the database, B what the journal makes of it."""
    said = (
        f"{one.table}: {one.only_a} rows only in the database, {one.only_b} only in the journal, {one.changed} differ"
    )
    return [said, *(f"{one.table}: {row}" for row in one.shown)]


def scratch_names(settings: Settings) -> str:
    """How the names of this deployment's scratch databases begin."""
    database = urlsplit(settings.secret("database_url")).path
    ours = f"{database}\0{settings.database_schema}\0{settings.topic_prefix}".encode()
    return f"stablerail_verify_{hashlib.blake2b(ours, digest_size=6).hexdigest()}_"


@asynccontextmanager
async def scratch_database(server: str, names: str) -> AsyncIterator[str]:
    """Its URL."""
    name = f"{names}{uuid.uuid4().hex[:12]}"
    connection = await asyncpg.connect(server, timeout=10)
    try:
        for row in await connection.fetch("SELECT datname FROM pg_database WHERE starts_with(datname, $1)", names):
            with suppress(asyncpg.PostgresError):  # another check is in it, or it is another login's
                await connection.execute(f"DROP DATABASE {row[0]}")
        await connection.execute(f"CREATE DATABASE {name}")
        try:
            yield urlsplit(server)._replace(path=f"/{name}").geturl()
        finally:
            await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()
