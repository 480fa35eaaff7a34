"""A database rebuilt from the journal topic alone, by the product's own functions, and what differs from the one that was lost."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from ledger.assembly import Assembly
from ledger.rebuild import Restored
from ledger.rebuild import rebuild as ledger_rebuild
from ledger.rebuild_batch import Journaled
from ledger.rows import Connection
from ledger.tables import JOURNALED
from stablerail.rebuild import alone_in, open_journal, rebuild_from
from tests.support.migrated import migrate

OUTSIDE = frozenset(
    {
        "outbox",
        "relay",
        "leases",
        "rate_limits",
        "workers",
        "worker_restarts",
        "crashes",
        "rebuild_checks",
        "shadow_marks",
        "shadow_outbox",
        "api_keys",
        "alembic_version",
    }
)
"""Tables that ledger/tables.py declares outside of the journal, and Alembic's own."""


async def rebuild(bootstrap: str, prefix: str, dsn_empty: str, schema: str) -> Restored:
    """Migrates the empty database and brings it to the journal's end, as `stablerail rebuild` does. Raises LedgerError."""
    await migrate(dsn_empty, schema)
    async with alone_in(dsn_empty, schema) as connection, open_journal(bootstrap, prefix) as reader:
        return await rebuild_from(connection, reader, lambda *_: None)


def assemble(messages: Iterable[Any]) -> Iterator[tuple[int, bytes]]:
    """(sequence, record) of the journal's messages, each record once. Raises JournalBroken."""
    assembly = Assembly()
    seen: set[int] = set()
    for message in messages:
        one = assembly.take(message.offset, message.key, message.value, message.headers)
        if one is not None and one.seq not in seen:
            seen.add(one.seq)
            yield one.seq, one.packed
    assembly.check_end()


async def apply(records: Iterable[tuple[int, bytes]], dsn_empty: str, schema: str) -> Restored:
    """As `rebuild`, from these records."""
    await migrate(dsn_empty, schema)
    async with alone_in(dsn_empty, schema) as connection:
        return await ledger_rebuild(connection, in_order(records))


async def in_order(records: Iterable[tuple[int, bytes]]) -> AsyncIterator[Journaled]:
    """Records as a reader of the topic gives them."""
    for offset, (seq, packed) in enumerate(records):
        yield Journaled(seq, packed, offset)


async def differences(dsn_a: str, dsn_b: str, schema: str = "stablerail") -> dict[str, list[str]]:
    """Table -> rows that only one of the databases has, as text after `a: ` or `b: `. Empty: they are the same."""
    found: dict[str, list[str]] = {}
    for table in JOURNALED:
        a, b = await _rows(dsn_a, schema, table.name), await _rows(dsn_b, schema, table.name)
        rows = [f"a: {row}" for row in (a - b).elements()] + [f"b: {row}" for row in (b - a).elements()]
        if rows:
            found[table.name] = rows
    return found


async def tables_outside(dsn: str, schema: str = "stablerail") -> set[str]:
    """The tables of the schema that are not journaled."""
    connection = await connect(dsn, schema)
    try:
        rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = $1", schema)
        return {row[0] for row in rows} - {table.name for table in JOURNALED}
    finally:
        await connection.close()


async def _rows(dsn: str, schema: str, table: str) -> Counter[str]:
    """Every column of every row, as PostgreSQL writes them: exact for each type we use."""
    connection = await connect(dsn, schema)
    try:
        return Counter(row[0] for row in await connection.fetch(f"SELECT t::text FROM {table} t"))
    finally:
        await connection.close()


@asynccontextmanager
async def empty_database(beside: str) -> AsyncIterator[str]:
    """The DSN of one more database on the same server."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    connection = await asyncpg.connect(beside)
    try:
        await connection.execute(f"CREATE DATABASE {name} STRATEGY FILE_COPY")
        yield urlsplit(beside)._replace(path=f"/{name}").geturl()
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()


async def connect(dsn: str, schema: str) -> Connection:
    """In the schema, with one way to write times."""
    settings = {"search_path": schema, "timezone": "UTC", "jit": "off"}
    connection: Connection = await asyncpg.connect(dsn, server_settings=settings)
    return connection
