"""Rows and commit records on a real PostgreSQL: every table, every operation, and the same rows again from the record."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import asyncpg
import msgpack
import pytest
import zstandard

from ledger import record as records
from ledger.accounts import SHORTFALL, buffer, spendable
from ledger.commit import Owner, _proof, claim_owners, lock_owners, lock_writer, seal
from ledger.errors import JournalBroken, RecordTooLarge
from ledger.links import links_of
from ledger.posting import Fold, Transaction, credit, debit
from ledger.record import Message, pack, pack_content, proof_of, told_of, unpack
from ledger.rows import Block, Changes, Connection, Op, Table, block, write
from ledger.store import blocks_of, lock
from ledger.tables import (
    APPEND_ONLY,
    CALLS,
    CHAIN_CURSORS,
    DEPOSITS,
    ENTRIES,
    INBOX,
    JOURNALED,
    LANES,
    SCHEDULE,
    TRANSACTIONS,
    WALLET_REQUESTS,
)
from tests.support import ledger_rig
from tests.support.ledger_rig import (
    AT,
    POOL,
    Bench,
    assert_holds,
    balance,
    connect_to,
    differences,
    dump,
    owner,
    rebuild,
    record,
    unguard,
    until,
)

databases, dsn, connection, bench = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection, ledger_rig.bench
ROWS_ARE_MADE_UP = "rows of every kind, to see how they are written"

FIXED = {
    ("inbox", "outcome"): "done", ("entries", "direction"): "d", ("calls", "state"): "open", ("dead_letters", "state"): "open",
    ("wallet_provisioning_jobs", "state"): "queued", ("kyc_standings", "standing"): "approved",
    ("accounts", "closed_at"): None, ("transactions", "hold_step"): "capture", ("reversals", "direction"): "d",
    ("reversals", "amount"): 10**31, ("holds", "state"): "open", ("holds", "ended_at"): None,
    ("holds", "amount"): 10**31, ("holds", "captured"): 0,
    ("wallet_requests", "status"): "requested", ("deposits", "status"): "credited", ("audit_logs", "status"): "done",
    ("withdrawals", "status"): "completed", ("withdrawals", "rail"): "chain", ("lanes", "status"): "open",
    ("attempts", "kind"): "payment", ("attempts", "status"): "signed",
    ("gas_top_ups", "state"): "done", ("orders", "status"): "reserved", ("orders", "filled"): 0, ("orders", "code"): None,
    ("orders", "ends_as"): None, ("orders", "fills_due"): 10**30, ("orders", "ended_at"): None,
    ("order_fills", "paid_from"): "hold", ("shadow", "phase"): "shadow",
    ("attempt_wishes", "kind"): "cancel", ("attempt_wishes", "state"): "open",
    ("corrections", "kind"): "correction", ("corrections", "state"): "approved", ("corrections", "decided_by"): "bob",
}  # fmt: skip


def row(table: Table, n: int, change: int = 0) -> tuple[Any, ...]:
    """A row whose key is told by n and whose other columns by n and `change`."""
    made = []
    for name, kind in table.columns:
        number = n * 1000 + (0 if name in table.key else change) + 1
        values: dict[str, Any] = {
            "uuid": f"{number:032x}", "text": f'tä, {{"x"}} NULL \\ {number}', "int": number, "bool": bool(number % 2),
            "bytes": number.to_bytes(4, "big") + b"\0\xff", "numeric": 10**30 + number,
            "time": AT + timedelta(microseconds=number), "json": {"n": number, "deep": ["ü", None, 1.5, {"\\": '"'}]},
        }  # fmt: skip
        made.append(FIXED.get((table.name, name), values[kind]))
    return tuple(made)


def key(table: Table, n: int) -> tuple[Any, ...]:
    names = [name for name, _ in table.columns]
    return tuple(row(table, n)[names.index(name)] for name in table.key)


async def stored(connection: Connection, table: Table) -> list[str]:
    return (await dump(connection))[table.name]


@pytest.mark.parametrize("table", JOURNALED, ids=lambda table: table.name)
async def test_every_table_is_written_inserted_changed_and_deleted_as_declared(
    table: Table, connection: Connection, dsn: str
) -> None:
    await write(connection, [block(table, Op.INSERT, [row(table, 1), row(table, 2), row(table, 3)])])
    assert len(await stored(connection, table)) == 3
    with pytest.raises(asyncpg.UniqueViolationError):
        await write(connection, [block(table, Op.INSERT, [row(table, 9), row(table, 2)])])
    changed = [
        block(table, Op.UPSERT, [row(table, 2, change=5), row(table, 4)]),
        block(table, Op.DELETE, [key(table, 1)]),
    ]
    if table in APPEND_ONLY:  # nobody changes them, but what would be written is written as declared
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await write(connection, changed)
        connection = await owner(dsn)
        await unguard(connection)
    await write(connection, changed)
    assert len(await stored(connection, table)) == 3
    columns = ", ".join(name for name, _ in table.columns)
    read = await connection.fetch(f"SELECT {columns} FROM {table.name}")
    kinds = [kind for _, kind in table.columns]
    back = {tuple(_plain(kind, value) for kind, value in zip(kinds, one, strict=True)) for one in read}
    wanted = [row(table, 2, change=5), row(table, 3), row(table, 4)]
    assert back == {tuple(_plain(kind, value) for kind, value in zip(kinds, one, strict=True)) for one in wanted}
    await connection.close()


def _plain(kind: str, value: Any) -> str:
    if kind == "json":
        import json

        return json.dumps(json.loads(value) if isinstance(value, str) else value, sort_keys=True)
    if kind == "uuid":
        return str(value).replace("-", "")
    return str(int(value)) if kind == "numeric" else str(value)


@pytest.mark.parametrize("table", [WALLET_REQUESTS])
async def test_nothing_is_kept_as_nothing(table: Table, connection: Connection) -> None:
    await write(connection, [block(table, Op.INSERT, [("ada", "ETH", "requested", AT, None, None)])])
    assert await connection.fetchval("SELECT ready_at FROM wallet_requests") is None


async def test_every_kind_of_row_survives_the_record_and_makes_the_same_rows_elsewhere(
    databases: Callable[[], str], connection: Connection
) -> None:
    blocks = [block(table, Op.INSERT, [row(table, 1)]) for table in JOURNALED]
    blocks += [block(table, Op.UPSERT, [row(table, 2)]) for table in JOURNALED if table not in APPEND_ONLY]
    message = Message("t", None, b"\0\xff", "id", "type", None)
    letter = Message("t.dlq", b"k", None, headers=[("a", b"\0"), ("a", b"2")])
    content, digest = pack_content(blocks, [message, letter])
    kept = unpack(pack("stage", "topic", AT, content, []))
    assert (kept.stage, kept.topic, kept.at, kept.digest) == ("stage", "topic", AT, digest)
    assert digest == hashlib.sha256(content).digest()
    assert [(b.table, b.op, b.columns) for b in kept.blocks] == [(b.table, b.op, b.columns) for b in blocks]
    assert [m.kafka_headers("s", AT) for m in kept.messages] == [m.kafka_headers("s", AT) for m in (message, letter)]
    assert [m[:6] for m in kept.messages] == [message[:6], letter[:6]]
    other: Connection = await connect_to(databases())()
    await write(connection, blocks)
    await write(other, kept.blocks)
    assert await dump(other) == await dump(connection)
    await other.close()


def test_a_record_from_before_a_table_had_its_last_columns_is_read_without_them() -> None:
    whole = block(TRANSACTIONS, Op.INSERT, [("1" * 32, "deposit", "r", "2" * 32, AT, None, None, None, 7)])
    older = Block(TRANSACTIONS, Op.INSERT, whole.columns[:-1])
    gone = block(TRANSACTIONS, Op.DELETE, [("2" * 32,)])
    content, _ = pack_content([older, gone], [])
    kept = unpack(pack("stage", "topic", AT, content, [])).blocks
    assert [b.columns for b in kept] == [older.columns, gone.columns]


def test_of_a_newer_programs_record_what_it_tells_and_its_place_in_the_chains_can_be_read() -> None:
    """Tables of its own among what it wrote and in its proof, and a column of its own in the audit."""
    newer = block(Table("of_tomorrow", ("id",), "id:text"), Op.INSERT, [("1",)])
    message = Message("t", b"k", b"v", "id", "type")
    content, digest = pack_content([newer], [message])
    owners = [Owner("t", partition, 3, 7, b"", 1) for partition in (0, 1)]
    audit, places = _proof("s", owners, digest, AT, "x", {}, (1, None, None))
    audit.columns.append("=new")
    packed = pack("s", "t", AT, content, [audit, newer, places])
    assert told_of(packed) == ("s", AT, [message])
    proof = proof_of(packed)
    assert proof.at == AT
    assert [(link.owner, link.place.position) for link in links_of(proof)] == [(("s", "t", 0), 8), (("s", "t", 1), 8)]
    with pytest.raises(JournalBroken, match="of_tomorrow"):
        unpack(packed)


@pytest.mark.parametrize("read", [unpack, told_of, proof_of])
@pytest.mark.parametrize(
    "damaged",
    [
        b"", b"no zstd", zstandard.compress(b"\xc1"), zstandard.compress(msgpack.packb([2, 1, 2, 3, 4, 5])),
        zstandard.compress(msgpack.packb([1, "s"])), zstandard.compress(msgpack.packb(7)),
        zstandard.compress(msgpack.packb([1, "s", "t", "no time", b"", []])),
    ],
)  # fmt: skip
def test_what_is_no_record_is_broken_and_nothing_else(damaged: bytes, read: Callable[[bytes], Any]) -> None:
    with pytest.raises(JournalBroken):
        read(damaged)


def test_a_record_of_a_table_that_is_not_known_is_broken_for_whoever_wants_its_rows() -> None:
    content = msgpack.packb([[["none", "i", []]], []])
    with pytest.raises(JournalBroken):
        unpack(zstandard.compress(msgpack.packb([1, "s", "t", AT.isoformat(), content, []])))


def test_a_record_that_unpacks_to_too_much_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    content, _ = pack_content([], [Message("t", None, bytes(10_000))])
    packed = pack("s", "t", AT, content, [])
    monkeypatch.setattr(records, "BYTES_MAX", 1_000)
    with pytest.raises(JournalBroken):
        unpack(packed)


async def test_a_record_that_nobody_could_unpack_is_not_committed(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "BYTES_MAX", 100_000)
    message = Message("t", None, bytes(100_000))  # compressed it is small
    async with connection.transaction():
        owners = await lock_writer(connection, "cli")
        with pytest.raises(RecordTooLarge):
            await seal(connection, "cli", owners, blocks=[], messages=[message], at=AT, actor="x", summary={})
    assert await connection.fetchval("SELECT count(*) FROM outbox") == 0


async def test_a_later_write_of_a_key_replaces_the_earlier_one(connection: Connection) -> None:
    await write(connection, [block(CHAIN_CURSORS, Op.INSERT, [row(CHAIN_CURSORS, 5)])])
    changes = Changes()
    changes.insert(INBOX, row(INBOX, 1))
    changes.upsert(INBOX, row(INBOX, 1, change=2))  # still an insert: another writer's row must be noticed
    changes.upsert(INBOX, row(INBOX, 2))
    changes.upsert(INBOX, row(INBOX, 2, change=2))
    for table in (WALLET_REQUESTS, CHAIN_CURSORS):
        changes.insert(table, row(table, 3))
        changes.upsert(table, row(table, 4))
        for n in (3, 4, 5):
            changes.delete(table, key(table, n))
    assert {(b.table.name, b.op) for b in changes.blocks()} == {
        ("inbox", Op.INSERT), ("inbox", Op.UPSERT), ("wallet_requests", Op.DELETE), ("chain_cursors", Op.DELETE),
    }  # fmt: skip
    await write(connection, changes.blocks())
    attempts = await connection.fetch("SELECT attempt FROM inbox ORDER BY 1")
    assert [r[0] for r in attempts] == [row(INBOX, n, change=2)[2] for n in (1, 2)]
    assert await stored(connection, CHAIN_CURSORS) == []


async def test_an_update_writes_what_may_change_of_a_row_that_is_there_and_joins_what_the_commit_wrote_of_it(
    connection: Connection,
) -> None:
    lane = ("MATIC", "0x1", 7, 5, "open", "", 1, AT)
    other = ("MATIC", "0x2", *lane[2:])
    await write(connection, [block(LANES, Op.INSERT, [lane])])
    changes = Changes()
    changes.update(LANES, (*lane[:2], 8, *lane[3:]))
    changes.update(LANES, (*lane[:2], 9, 6, *lane[4:]))
    changes.insert(LANES, other)
    changes.update(LANES, (*other[:2], 3, *other[3:]))  # still an insert: another writer's row must be noticed
    made = {b.op: b for b in changes.blocks()}
    assert set(made) == {Op.INSERT, Op.UPDATE}
    assert len(made[Op.UPDATE].columns) == 8, "the key and what may change"
    await write(connection, made.values())
    rows = await connection.fetch("SELECT signer, next_nonce, chain_nonce FROM lanes ORDER BY signer")
    assert [tuple(one) for one in rows] == [("0x1", 9, 6), ("0x2", 3, 5)]
    upserted = Changes()
    upserted.update(LANES, lane)
    upserted.upsert(LANES, lane)
    upserted.update(LANES, lane)
    assert [b.op for b in upserted.blocks()] == [Op.UPSERT], "the whole row is written"
    upserted.delete(LANES, lane[:2])
    assert [b.op for b in upserted.blocks()] == [Op.DELETE]


NASTY = [
    "",
    "NULL",
    "null",
    "-",
    "=",
    "{",
    "}",
    "{}",
    ",",
    '"',
    "\\",
    '\\"',
    "a,b",
    " x ",
    "\n\t",
    "ä",
    "\U0001f4b8",
    "'; --",
]


@pytest.mark.parametrize("shared", [False, True])
async def test_any_text_is_kept_as_it_is(shared: bool, connection: Connection) -> None:
    """Also as one value of a whole column, and beside nothing."""
    for batch in [[text] * 2 for text in NASTY] if shared else [NASTY, [*NASTY, None]]:
        rows = [
            (f"{n:032x}", "s", "p", "o", f"{n + 1:032x}", {"t": text}, (text or "").encode(), "open", AT,
             None, 1, 0, None, None, None)
            for n, text in enumerate(batch)
        ]  # fmt: skip
        keyed = [("s", f"{n:032x}", 1, "t", None, b"", [], text or "", AT) for n, text in enumerate(batch)]
        await connection.execute("DELETE FROM calls")
        await connection.execute("DELETE FROM schedule")
        await connection.execute("DELETE FROM deposits")
        await write(connection, [block(CALLS, Op.INSERT, rows), block(SCHEDULE, Op.INSERT, keyed)])
        read = await connection.fetch("SELECT request->>'t', fingerprint FROM calls ORDER BY id")
        assert [tuple(r) for r in read] == [(text, (text or "").encode()) for text in batch]
        codes = await connection.fetch("SELECT code FROM schedule ORDER BY event_id")
        assert [r[0] for r in codes] == [text or "" for text in batch]
        places = [
            (f"{n:032x}", n, "c", "t", "r", "a", 1, text or "", "pending", 0, "", text, n if text else None,
             None, AT if text else None, None, AT, text or None, None, n)
            for n, text in enumerate(batch)
        ]  # fmt: skip
        await write(connection, [block(DEPOSITS, Op.INSERT, places)])
        back = await connection.fetch("SELECT user_id, block_hash, block_number, credited_at FROM deposits ORDER BY id")
        assert [tuple(r) for r in back] == [(p[7], p[11], p[12], p[14]) for p in places]


# -- commits -----------------------------------------------------------------------------------------------------------


async def test_a_database_made_from_the_journal_is_the_same_to_the_row(
    bench: Bench, databases: Callable[[], str]
) -> None:
    workers = [await bench.start(partition, events_max=7) for partition in (0, 1)]
    moves = ("credit", "spend", "refuse", "cross", "credit", "retry")
    for n in range(0, 60, 3):
        for partition, worker in enumerate(workers):
            await worker.feed(
                *(record(i, f"u{i % 4}", 3, moves[(i + partition) % 6], note="u9", partition=partition)
                  for i in range(n, n + 3))
            )  # fmt: skip
    for partition, worker in enumerate(workers):
        await worker.until_acked((partition, 59))
    assert len(bench.emitter.journaled) > 10
    other: Connection = await connect_to(databases())()
    await rebuild(other, [*bench.emitter.journaled, *bench.emitter.journaled])
    assert differences(await dump(other), await dump(bench.connection)) == {}
    await assert_holds(other)
    await other.close()


async def test_the_sequence_number_is_drawn_last(dsn: str) -> None:
    first, second = await connect_to(dsn)(), await connect_to(dsn)()

    async def close(connection: Connection, writer: str) -> int:
        owners = await lock_writer(connection, writer)
        done = await seal(connection, writer, owners, blocks=[], messages=[], at=AT, actor="me", summary={})
        return done.seq

    async with first.transaction():
        await lock_writer(first, "first")
        async with second.transaction():
            earlier = await close(second, "second")
        later = await close(first, "first")
    assert earlier < later, "a commit that began before may depend on one that ended before"
    await first.close()
    await second.close()


async def test_the_sequence_number_is_drawn_after_the_rows_of_the_same_statement_were_waited_for(dsn: str) -> None:
    first, second, third = [await connect_to(dsn)() for _ in range(3)]
    row = block(CHAIN_CURSORS, Op.UPSERT, [("ETH", {}, AT)])

    async def commit(connection: Connection, writer: str, blocks: list[Block]) -> int:
        async with connection.transaction():
            owners = await lock_writer(connection, writer)
            done = await seal(connection, writer, owners, blocks=blocks, messages=[], at=AT, actor="me", summary={})
        return done.seq

    async with second.transaction():
        owners = await lock_writer(second, "second")
        await write(second, [row])
        waiting = asyncio.create_task(commit(first, "first", [row]))
        while not await third.fetchval("SELECT cardinality(pg_blocking_pids($1))", first.get_server_pid()):
            await asyncio.sleep(0.01)
        done = await seal(second, "second", owners, blocks=[], messages=[], at=AT, actor="me", summary={})
    assert done.seq < await waiting, "what was written over comes first in the journal"
    for connection in (first, second, third):
        await connection.close()


async def test_a_commit_that_fails_while_its_rows_are_being_written_leaves_nothing_and_a_good_connection(
    connection: Connection,
) -> None:
    """Rows of a large commit are on their way to PostgreSQL while what comes after them is made."""
    rows = [(f"chain {n}", {"text": "x" * 1_000}, AT) for n in range(100)]

    def failing() -> Iterator[Any]:
        raise LookupError("a bug")
        yield

    async def commit(blocks: list[Block], messages: Iterator[Message]) -> None:
        async with connection.transaction():
            owners = await lock_writer(connection, "cli")
            await seal(connection, "cli", owners, blocks=blocks, messages=messages, at=AT, actor="x", summary={})

    written, bad = block(CHAIN_CURSORS, Op.INSERT, rows), block(CHAIN_CURSORS, Op.INSERT, [*rows, rows[0]])
    with pytest.raises(LookupError, match="a bug"):
        await commit([written], failing())
    with pytest.raises(LookupError, match="a bug"):
        await commit([bad], failing())
    with pytest.raises(asyncpg.UniqueViolationError):
        await commit([bad, written], iter(()))
    assert await connection.fetchval("SELECT count(*) FROM chain_cursors") == 0
    await commit([written], iter(()))
    assert await connection.fetchval("SELECT count(*) FROM chain_cursors") == 100


async def test_each_commit_links_to_the_one_before(connection: Connection) -> None:
    heads = []
    for n in range(3):
        async with connection.transaction():
            owners = await lock_writer(connection, "cli")
            assert (owners[0].topic, owners[0].position) == ("-", n)
            heads.append(owners[0].head)
            await seal(connection, "cli", owners, blocks=[], messages=[], at=AT, actor="ops", summary={"n": n})
    assert heads[0] == b""
    assert len(set(heads)) == 3
    await assert_holds(connection)


async def test_a_claim_takes_each_partition_once_and_is_a_commit_itself(connection: Connection) -> None:
    for n in (1, 2):
        async with connection.transaction():
            epochs, sealed = await claim_owners(connection, "s", [("t", 1), ("t", 0)], AT)
        assert epochs == {("t", 0): n, ("t", 1): n}
        assert [b.table.name for b in unpack(sealed.record).proof] == ["audit", "owners"]
    async with connection.transaction():
        owners = await lock_owners(connection, "s", epochs)
    assert [(o.partition, o.epoch, o.position) for o in owners] == [(0, 2, 2), (1, 2, 2)]


async def test_writers_that_cross_each_others_accounts_take_turns_without_a_deadlock(dsn: str) -> None:
    users = [spendable(f"u{n}") for n in range(6)]

    async def post(worker: int) -> None:
        connection: Connection = await connect_to(dsn)()
        for n in range(25):
            order = users if (n + worker) % 2 else users[::-1]
            legs = (*(debit(user, 1) for user in order), credit(POOL, len(users)))
            transaction = Transaction(f"{worker:016x}{n:016x}", "test", "", legs)
            async with connection.transaction():
                fold = await lock(connection, [transaction], AT)
                fold.post(transaction)
                await write(connection, blocks_of(fold, 1))
        await connection.close()

    setup: Connection = await connect_to(dsn)()
    first = Transaction("f" * 32, "test", "", (*(debit(u, 1) for u in users), credit(POOL, len(users))))
    fold = await lock(setup, [first], AT)
    fold.post(first)
    await write(setup, blocks_of(fold, 1))
    await asyncio.gather(*(post(worker) for worker in range(4)))
    assert await balance(setup, POOL) == -6 * 101
    lines = await setup.fetchval("SELECT count(*) FROM entries WHERE account_id = $1", users[0].id)
    assert lines == 101
    await setup.close()


async def test_the_database_itself_refuses_a_customers_negative_balance(connection: Connection) -> None:
    for account in (SHORTFALL, buffer("7")):
        transaction = Transaction(account.id, "test", "", (debit(POOL, 5), credit(account, 5)))
        fold = await lock(connection, [transaction], AT)
        fold.post(transaction)
        await write(connection, blocks_of(fold, 1))
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(
            "INSERT INTO accounts VALUES ($1, 'ada', 'usdc_balance', 'USDC', '', -1, 1, now())", spendable("ada").id
        )
    with pytest.raises(asyncpg.CheckViolationError):
        await write(connection, [block(ENTRIES, Op.INSERT, [(POOL.id, 99, "1" * 32, 0, "d", 0, 0, AT)])])


def test_a_fold_of_nothing_writes_nothing() -> None:
    assert list(blocks_of(Fold({}, AT), 1)) == []


async def test_the_rig_waits_no_longer_than_it_says() -> None:
    with pytest.raises(AssertionError, match="never did not happen"):
        await until(lambda: False, "never", timeout_s=0.01)
