"""Owner rows, epochs, the hash chain, and `seal`: how every commit ends, whoever makes it.

| phase | what | why there |
| --- | --- | --- |
| lock_owners | owner rows, in order, before anything else | whoever lost the partition stops here; commits of one partition are a sequence |
| … | inbox, facts, account locks, decisions | under the owner lock, so what was read stays true |
| seal: rows | of a large commit each table's rows by a statement of their own | PostgreSQL writes while the next are made and the record is packed |
| seal: record | what is left, audit and owner rows, then a row of `outbox`, in the last statement | its number follows all it depends on |
| … `unlocked` | nothing is locked before; that one statement is the transaction, and writes if what was read is so still | two turns instead of five |
| seal: legacy | where a table of balances is beside the ledger: what was posted, there too (shadow.py) | together, or not at all |

The chain: head' = SHA-256(head ‖ digest of the commit's content ‖ who, when, what for, batch, hashes of the commit's
append-only rows), one link per owner row, kept in `audit` and in the journal. An edited, deleted, inserted or reordered
row breaks it: of the chain itself, or of the tables that proof.py names.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final

import asyncpg
import orjson

from ledger.audit_logs import Log
from ledger.beside import ended, sent
from ledger.errors import Fenced, RecordTooLarge
from ledger.proof import ledger_digest, logs_digest
from ledger.record import Message, pack, pack_content
from ledger.rows import PASSING, Block, Connection, Op, block, numbers, texts, uuids, write, write_then
from ledger.shadow import mirror_of
from ledger.sql import load
from ledger.tables import AUDIT, AUDIT_LOGS, OWNERS

_sql = load("ledger", "sql/commit.sql")

RECORD_BYTES_MAX: Final = 64 * 1024 * 1024
"""A compressed record over it is refused; a batch of many events is split instead."""
OVERLAP_MIN: Final = 16 * 1024
"""Bytes of a table's rows from which a statement of their own is worth its round trip: it runs while the rest is made."""
MESSAGES_AT_ONCE: Final = 100
NO_TOPIC: Final = "-"
"""The `topic` of writers that consume none: API, CLI, sweeper, performers, watchers."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A locked owner row."""

    topic: str
    partition: int
    epoch: int
    position: int
    head: bytes
    batch: int
    """The commit's number, the same for all its owners. Drawn before the lock: unique, but not in order of commits."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A commit that is about to be: what the relay and the emitter need of it."""

    seq: int
    record: bytes
    stage: str
    at: datetime
    messages: Sequence[Message]


async def lock_owners(connection: Connection, stage: str, epochs: dict[tuple[str, int], int]) -> list[Owner]:
    """Locks the owner rows of (topic, partition) -> our epoch, sorted. Raises Fenced when one is another's."""
    keys = sorted(epochs)
    rows = await connection.fetch(_sql.lock_owners, stage, [t for t, _ in keys], [p for _, p in keys])
    return held([Owner(*row) for row in rows], stage, epochs)


def held(owners: list[Owner], stage: str, epochs: dict[tuple[str, int], int]) -> list[Owner]:
    """The locked owners, when they are all of (topic, partition) -> our epoch. Raises Fenced."""
    found = {(o.topic, o.partition): o.epoch for o in owners}
    lost = tuple(key for key in sorted(epochs) if found.get(key) != epochs[key])
    if lost:
        raise Fenced(stage, lost)
    return owners


async def claim_owners(
    connection: Connection, stage: str, keys: Sequence[tuple[str, int]], at: datetime
) -> tuple[dict[tuple[str, int], int], Sealed]:
    """In a transaction: makes us the owner of the partitions by bumping their epochs. Returns the epochs.

    The bump is a commit like any other, so that a rebuilt database has the same owner rows.
    """
    keys = sorted(keys)
    await connection.execute(_sql.make_owners, stage, [t for t, _ in keys], [p for _, p in keys])
    rows = await connection.fetch(_sql.lock_owners, stage, [t for t, _ in keys], [p for _, p in keys])
    owners = [Owner(t, p, epoch + 1, *rest) for t, p, epoch, *rest in rows]
    sealed = await seal(connection, stage, owners, blocks=[], messages=[], at=at, actor=stage, summary={"epoch": 1})
    return {(o.topic, o.partition): o.epoch for o in owners}, sealed


async def lock_writer(connection: Connection, writer: str) -> list[Owner]:
    """The owner row of a writer without a topic (API, CLI, sweeper, performers): made when missing, then locked."""
    rows = await connection.fetch(_sql.lock_owners, writer, [NO_TOPIC], [0])
    if not rows:
        await connection.execute(_sql.make_owners, writer, [NO_TOPIC], [0])
        rows = await connection.fetch(_sql.lock_owners, writer, [NO_TOPIC], [0])
    return [Owner(*row) for row in rows]


async def read_writer(
    connection: Connection, writer: str, accounts: Sequence[str]
) -> tuple[list[Owner], list[tuple[Any, ...]]]:
    """The writer's owner row, not locked, and those of the accounts (ids) that there are: number in the list from 1, balance,
    version, updated_at, closed_at. Nothing where the owner row is missing."""
    rows = await connection.fetch(_sql.read_writer, writer, NO_TOPIC, uuids(accounts))
    return [Owner(*row[:6]) for row in rows[:1]], [tuple(row)[6:] for row in rows if row[6] is not None]


async def seal(
    connection: Connection,
    stage: str,
    owners: Sequence[Owner],
    *,
    blocks: Iterable[Block],
    messages: Iterable[Message],
    at: datetime,
    actor: str,
    summary: dict[str, Any],
    written: Sequence[Block] = (),
    logs: Sequence[Log] = (),
    unlocked: Mapping[str, int] | None = None,
) -> Sealed:
    """The end of a transaction: writes `blocks`, audit and owner rows, then the commit record.

    `blocks` and `messages` may be made as they are taken: PostgreSQL writes one while the next is made. `written` are rows that
    the transaction has written already (the inbox claim); they belong to the record too. `logs` become rows of `audit_logs`.
    Rows of `transactions` are of the owners' batch (`proof.ledger_blocks`). Raises RecordTooLarge, or asyncpg's errors for
    conflicts; the caller rolls back and runs again.

    `unlocked`: account id -> version, as they were read with the owners, open and without a lock. All is one statement then, and
    needs no transaction around it. Where another writer has been at any of them, or is, it raises Overtaken and writes nothing.
    """
    logged = [log.row(owners[0].batch, n, at) for n, log in enumerate(logs)]
    made: list[Block] = []
    late: list[Block] = []
    async with _Writing(connection) as writing:
        for one in blocks:
            made.append(one)
            if unlocked is None and sum(map(len, one.columns)) >= OVERLAP_MIN:
                await writing.start(one)
            else:
                late.append(one)
        if logged:
            late.append(block(AUDIT_LOGS, Op.INSERT, logged))
            made.append(late[-1])
        said = await _taken(messages)
        content, digest = pack_content([*written, *made], said)
        seals = (owners[0].batch, ledger_digest(made), logs_digest(logged))
        proof = _proof(stage, owners, digest, at, actor, summary, seals)
        topic = owners[0].topic
        record = pack(stage, topic, at, content, proof)
    if len(record) > RECORD_BYTES_MAX:
        raise RecordTooLarge(f"{len(record)} bytes; at most {RECORD_BYTES_MAX}")
    partitions = [owner.partition for owner in owners]
    last = [*late, *proof]
    record_row = (stage, topic, partitions, at, record)
    seq: int | None
    if unlocked is None:
        seq = await write_then(connection, last, _sql.insert_record, *record_row)
    else:
        heads = texts([f"\\x{o.head.hex()}" for o in owners])
        read = (numbers([o.position for o in owners]), heads, uuids(unlocked), numbers(unlocked.values()))
        seq = await write_then(connection, last, _sql.insert_record, *record_row, *read, provided=_sql.unchanged)
        if seq is None:
            raise Overtaken
    assert seq is not None
    mirror = mirror_of(connection)
    if mirror is not None:  # never without a legacy table
        await mirror.follow(connection, made)
    return Sealed(seq, record, stage, at, said)


class _Writing:
    """One statement at a time, which PostgreSQL carries out while we make the next."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> _Writing:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits also when something else failed, which is what is raised then: before, the connection takes no rollback."""
        if self._task is None:
            return
        await (self._task if kind is None else ended(self._task))

    async def start(self, block: Block) -> None:
        if self._task is not None:
            await self._task
        self._task = await sent(write(self._connection, [block]))


async def _taken(messages: Iterable[Message]) -> list[Message]:
    """Made in slices, between which the loop sends on what PostgreSQL is to write."""
    taken: list[Message] = []
    coming = iter(messages)
    while True:
        some = list(islice(coming, MESSAGES_AT_ONCE))
        taken += some
        if len(some) < MESSAGES_AT_ONCE:
            return taken
        await asyncio.sleep(0)


def check_outside(connection: Connection) -> None:
    """ValueError within a transaction: what is sealed there may be rolled back by whoever began it, after it was told as committed."""
    if connection.is_in_transaction():
        raise ValueError("this commits by itself: the connection must not be in a transaction")


class Overtaken(Exception):
    """What was read without a lock is another writer's by now; nothing was written."""


class Unchanged(Exception):
    """Raised inside a transaction of one's own: nothing is to be committed, not even an owner row that was made."""


Seals = tuple[int | None, bytes | None, bytes | None]
"""batch, hash of the commit's ledger rows, hash of its logs. Without a batch: made before version 0003 of the schema."""


def link(head: bytes, digest: bytes, at: datetime, actor: str, summary: Any, seals: Seals) -> bytes:
    """The next head. `summary` as JSON values: text keys and integers, so that it is the same when it is read back."""
    about = [at.astimezone(UTC).isoformat(), actor, summary]
    if seals[0] is not None:
        about += [seals[0], *(None if one is None else one.hex() for one in seals[1:])]
    return hashlib.sha256(head + digest + orjson.dumps(about, option=orjson.OPT_SORT_KEYS)).digest()


def _proof(
    stage: str, owners: Sequence[Owner], digest: bytes, at: datetime, actor: str, summary: dict[str, Any], seals: Seals
) -> list[Block]:
    heads = [link(owner.head, digest, at, actor, summary, seals) for owner in owners]
    audit = [
        (stage, o.topic, o.partition, o.position + 1, at, actor, summary, digest, head, *seals)
        for o, head in zip(owners, heads, strict=True)
    ]
    rows = [(stage, o.topic, o.partition, o.epoch, o.position + 1, head) for o, head in zip(owners, heads, strict=True)]
    return [block(AUDIT, Op.INSERT, audit), block(OWNERS, Op.UPSERT, rows)]


OVERTAKEN: Final[tuple[type[Exception], ...]] = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
    asyncpg.UniqueViolationError,
)
"""Another writer was first: the same transaction is run again."""
TRANSIENT: Final[tuple[type[Exception], ...]] = (
    *OVERTAKEN,
    *PASSING,
    asyncpg.InternalClientError,  # the driver lost count of a connection that was killed; it must not be used again
    asyncpg.InterfaceError,  # the connection is closed already
    OSError,  # ConnectionError and TimeoutError are OSErrors
)
"""Errors after which the same transaction is run again: another writer was first, or the server was away."""


@contextmanager
def lost_not_cancelled() -> Iterator[None]:
    """asyncpg cancels what waits for a connection that dies while it is made, and nobody cancelled our task: that is a
    lost connection. Taken for a cancellation it would end a loop of ours without a word. The other way round, a task that was
    cancelled and whose rollback then failed is cancelled: taken for a lost connection its loop would never end."""
    try:
        yield
    except asyncio.CancelledError:
        if _is_cancelled():
            raise
        raise ConnectionResetError("the connection was lost while it was made") from None
    except Exception:
        if _is_cancelled():
            raise asyncio.CancelledError from None
        raise


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
