"""A database rebuilt from the journal topic alone, and what differs from the one that was lost.

The product's own command comes later; this shows that the journal holds everything it will need.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import orjson

from ledger.commit import link
from ledger.errors import JournalBroken
from ledger.migrate import upgrade
from ledger.record import CommitRecord, unpack
from ledger.rows import Connection, write
from ledger.tables import JOURNALED
from tests.support.in_process import read_topic
from topics.catalog import JOURNAL

OUTSIDE = frozenset(
    {"outbox", "relay", "leases", "rate_limits", "workers", "worker_restarts", "crashes", "api_keys", "alembic_version"}
)
"""Tables that ledger/tables.py declares outside of the journal, and Alembic's own."""


@dataclass(frozen=True)
class Report:
    """What a rebuild read and wrote."""

    records: int
    repeats: int
    """Messages of records that were there already."""
    messages: int
    """Those the records want emitted."""


async def rebuild(bootstrap: str, prefix: str, dsn_empty: str, schema: str) -> Report:
    """Migrates the empty database and writes every record of the journal to it. Raises JournalBroken."""
    journal = await read_topic(bootstrap, JOURNAL, prefix)
    records = list(assemble(journal))
    messages = await apply(records, dsn_empty, schema)
    whole = sum(1 for message in journal if dict(message.headers).get("part", b"0") == b"0")
    return Report(len(records), whole - len(records), messages)


def assemble(messages: Iterable[Any]) -> Iterator[tuple[int, bytes]]:
    """(sequence, record) in the order in which each was first whole. Raises JournalBroken for what is not whole."""
    parts: dict[int, dict[int, bytes]] = {}
    whole: set[int] = set()
    for message in messages:
        if message.key is None or len(message.key) != 8 or message.value is None:
            raise JournalBroken(f"offset {message.offset} is not a record of ours")
        seq = int.from_bytes(message.key)
        headers = dict(message.headers)
        number, count = int(headers.get("part", b"0")), int(headers.get("parts", b"1"))
        found = parts.setdefault(seq, {})
        if found.setdefault(number, message.value) != message.value:
            raise JournalBroken(f"record {seq} is there twice, with other contents")
        if seq not in whole and len(found) == count:
            whole.add(seq)
            yield seq, b"".join(found[i] for i in range(count))
    if broken := parts.keys() - whole:
        raise JournalBroken(f"record {min(broken)} lacks a part")


async def apply(records: Iterable[tuple[int, bytes]], dsn_empty: str, schema: str) -> int:
    """Writes the records, all or none; the number of messages in them. Raises JournalBroken at the first that is not the
    next of its owners' hash chains."""
    await upgrade(dsn_empty, schema)
    connection = await connect(dsn_empty, schema)
    heads: Heads = {}
    messages = 0
    try:
        async with connection.transaction():
            for seq, packed in records:
                record = unpack(packed)
                try:
                    await write(connection, [*record.blocks, *record.proof])
                except asyncpg.PostgresError as error:
                    raise JournalBroken(f"record {seq} cannot be written: {error}") from error
                await _check_links(connection, seq, record, heads)
                messages += len(record.messages)
            # the next commit's batch is one that no row has
            await connection.execute("SELECT setval('batches', (SELECT coalesce(max(batch), 1) FROM audit))")
    finally:
        await connection.close()
    return messages


Heads = dict[tuple[str, str, int], tuple[int, int, bytes]]
"""Owner row -> epoch, position, head."""


async def _check_links(connection: Connection, seq: int, record: CommitRecord, heads: Heads) -> None:
    """What the record made of the owner rows follows from what they were and from its contents."""
    rows = await connection.fetch(
        "SELECT o.stage, o.topic, o.partition, o.epoch, o.position, o.head,"
        " a.digest, a.at, a.actor, a.summary, a.head, a.batch, a.ledger, a.logs"
        " FROM owners o LEFT JOIN audit a USING (stage, topic, partition, position)"
    )
    links = [(tuple(row[:3]), *row[3:]) for row in map(tuple, rows) if heads.get(row[:3]) != row[3:6]]
    if not links:
        raise JournalBroken(f"record {seq} has no link in any chain")
    for key, epoch, position, head, digest, at, actor, summary, audited, *seals in links:
        last_epoch, last_position, last_head = heads.get(key, (0, 0, b""))
        expected = None
        if audited is not None:
            expected = link(last_head, record.digest, at, actor, orjson.loads(summary), (*seals,))
        if (position, digest) != (last_position + 1, record.digest) or not head == audited == expected:
            raise JournalBroken(f"record {seq} is not the next of {key} after position {last_position}")
        if epoch < last_epoch:
            raise JournalBroken(f"record {seq} was written by an owner of {key} that had lost it")
        heads[key] = (epoch, position, head)


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
        await connection.execute(f"CREATE DATABASE {name}")
        yield urlsplit(beside)._replace(path=f"/{name}").geturl()
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()


async def connect(dsn: str, schema: str) -> Connection:
    """In the schema, with one way to write times."""
    settings = {"search_path": schema, "timezone": "UTC", "jit": "off"}
    connection: Connection = await asyncpg.connect(dsn, server_settings=settings)
    return connection
