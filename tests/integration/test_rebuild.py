"""A database from its journal on real PostgreSQL: empty or forward, interrupted, and from journals that are not whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest.mock import AsyncMock

import asyncpg
import msgpack
import pytest
import zstandard

from ledger import rebuild_batch
from ledger.accounts import Account, AccountType, buffer, spendable
from ledger.assembly import Assembly, RestoreScan
from ledger.book import post
from ledger.commit import Sealed, claim_owners, lock_writer, seal
from ledger.diff import Difference, diff, opened
from ledger.errors import DatabaseAhead, DatabaseBusy, HistoriesDiffer, JournalBroken, NoRecord, SchemaOutdated
from ledger.holds import hold, void
from ledger.migrate import upgrade
from ledger.posting import Transaction, credit, debit
from ledger.rebuild import GAP, Restore, Restored, rebuild
from ledger.rebuild_batch import Journaled
from ledger.record import Message, unpack
from ledger.rows import Block, Connection, Op, Table, block
from ledger.tables import ACCOUNTS, INBOX, RESTORES, SCHEDULE, WALLET_REQUESTS, WALLETS
from ledger.verify import verify
from stablerail.dev.postgres import Postgres
from stablerail.rebuild import alone_in
from tests.support import ledger_rig
from tests.support.in_process import until
from tests.support.invariants import may_break
from tests.support.ledger_rig import AT, connect_to, owner

databases = ledger_rig.databases

SCHEMA = "stablerail"
STAGE, TOPIC = "credit", "test.moves"
NOBODY_ELSE = (
    "SELECT count(*) = 0 FROM pg_stat_activity"
    " WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
)
PENDING = Account("ada", AccountType.PENDING_WITHDRAWAL)


async def commit(
    connection: Connection,
    writer: str,
    blocks: Sequence[Block] = (),
    *,
    told: bool = True,
    messages: Sequence[Message] = (),
    at: Any = AT,
) -> Sealed:
    async with connection.transaction():
        owners = await lock_writer(connection, writer)
        messages = [Message("test.told", b"k", b"v", "1", "t")] if told else messages
        return await seal(
            connection, writer, owners, blocks=blocks, messages=messages, at=at, actor='x",\\', summary={"n": 1}
        )


def paid(number: int, user: str) -> Transaction:
    return Transaction(f"{number:032x}", "test", f"{number}", (debit(spendable(user), 7), credit(buffer(), 7)))


async def live(connection: Connection, first: int = 0, rounds: int = 6) -> None:
    """What several writers do: money, a hold that ends, rows that are made, changed, replaced and deleted."""
    async with connection.transaction():
        await claim_owners(connection, STAGE, [(TOPIC, 0), (TOPIC, 1)], AT)
    for number in range(first, first + rounds):
        at = AT + timedelta(seconds=number)
        await post(connection, "credit", [paid(2 * number, "ada"), paid(2 * number + 1, f"user {number % 3}")], at)
        key = f"{number:032x}"
        retry = ("s", key, 1, "t", b"\x00", b"{}", [], "not_yet", at)
        await commit(connection, "stage", [block(SCHEDULE, Op.INSERT, [retry])], at=at)
        done = ("s", key, 2, key, "done", at)
        blocks = [block(INBOX, Op.UPSERT, [done]), block(SCHEDULE, Op.DELETE, [("s", key)])]
        await commit(connection, "stage", blocks, told=False, at=at)
        wallet = ("ETH", f"0x{number % 2}", 'odd "user",\\', f"w{number}", at)
        await commit(connection, "wallets", [block(WALLETS, Op.UPSERT, [wallet])], at=at)
    aside = hold(f"a{first:031x}", "test", "", source=spendable("ada"), pending=PENDING, amount=2)
    await post(connection, "holds", [aside], AT)
    await post(connection, "holds", [void(f"b{first:031x}", "test", "", hold_id=f"a{first:031x}")], AT)


async def journal_of(connection: Connection) -> list[Journaled]:
    rows = await connection.fetch("SELECT seq, record FROM outbox ORDER BY seq")
    return [Journaled(seq, record, offset) for offset, (seq, record) in enumerate(rows)]


async def given(records: Iterable[Journaled]) -> AsyncIterator[Journaled]:
    for one in records:
        yield one


async def rebuilt(dsn: str, records: Iterable[Journaled], **more: Any) -> Restored:
    async with alone_in(dsn, SCHEMA) as connection:
        return await rebuild(connection, given(records), **more)


async def differing(a: str, b: str) -> list[Difference]:
    async with opened(a, SCHEMA) as one, opened(b, SCHEMA) as other:
        return [each for each in await diff(one, other) if not each.equal]


async def ask(dsn: str, question: str) -> Any:
    connection = await owner(dsn)
    try:
        return await connection.fetchval(question)
    finally:
        await connection.close()


@dataclass(frozen=True)
class Lost:
    """A database, and its journal; nothing of it was told."""

    dsn: str
    journal: list[Journaled]

    def place(self, table: str) -> int:
        """The first record with rows of it."""
        found = (any(b.table.name == table for b in unpack(one.packed).blocks) for one in self.journal)
        return next(place for place, has in enumerate(found) if has)


@pytest.fixture
async def lost(databases: Callable[[], str]) -> Lost:
    dsn = databases()
    connection: Connection = await connect_to(dsn)()
    await live(connection)
    journal = await journal_of(connection)
    await connection.close()
    return Lost(dsn, journal)


@pytest.mark.parametrize("rows_max", [1, 20, 20_000])
async def test_an_empty_database_becomes_the_lost_one(
    lost: Lost, databases: Callable[[], str], monkeypatch: pytest.MonkeyPatch, rows_max: int
) -> None:
    monkeypatch.setattr(rebuild_batch, "ROWS_MAX", rows_max)
    dsn = databases()
    seen: list[tuple[int, int, int]] = []
    restored = await rebuilt(dsn, lost.journal, progress=lambda *told: seen.append(told))
    assert await differing(lost.dsn, dsn) == []
    assert (restored.records, restored.applied, restored.repeats, restored.late) == (len(lost.journal),) * 2 + (0, 0)
    assert seen[-1] == (len(lost.journal) - 1, restored.records, restored.rows)
    connection = await owner(dsn)
    assert not [result for result in await verify(connection) if not result.holds and result.number != 9]
    await connection.close()


async def test_what_reads_a_rebuilt_database_knows_what_is_in_it_though_the_rebuild_died_when_all_was_applied(
    databases: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ledger.rebuild.OUTGROWN_PAGES", 0)
    there, dsn = databases(), databases()
    connection = await owner(there)
    await post(connection, "credit", [paid(number, "ada") for number in range(1_000)], AT)
    journal = await journal_of(connection)
    await connection.close()
    with monkeypatch.context() as dying:
        dying.setattr("ledger.rebuild._Rebuild.finish", AsyncMock(side_effect=ConnectionError))
        with pytest.raises(ConnectionError):
            await rebuilt(dsn, journal)
    assert (await rebuilt(dsn, journal)).applied == 0
    connection = await owner(dsn)
    assert await connection.fetchval("SELECT brin_summarize_new_values('entries_at')") == 0
    assert await connection.fetchval("SELECT reltuples FROM pg_class WHERE relname = 'entries'") == 2_000
    await connection.close()


async def test_an_old_backup_goes_forward_to_the_lost_one_whatever_its_outbox_held(
    postgres: Postgres, databases: Callable[[], str]
) -> None:
    dsn = databases()
    connection: Connection = await connect_to(dsn)()
    await live(connection)
    await connection.execute("UPDATE outbox SET journaled = true WHERE seq % 2 = 0")
    await connection.close()
    name = f"{dsn.rpartition('/')[2]}_backup"
    backup = postgres.create_database(name, template=dsn.rpartition("/")[2])
    try:
        connection = await connect_to(dsn)()
        await live(connection, 6)
        journal = await journal_of(connection)
        await connection.close()
        restored = await rebuilt(backup, journal)
        assert await differing(dsn, backup) == []
        assert 0 < restored.applied < restored.records == len(journal)
        assert await ask(backup, "SELECT count(*) FROM outbox WHERE NOT journaled") == 0, "the journal has them"
        again = await rebuilt(backup, journal)
        assert (again.applied, again.first_seq) == (0, restored.first_seq), "a second time changes nothing"
    finally:
        postgres.drop_database(name)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("how", ["stopped", "connection lost"])
async def test_a_rebuild_that_was_interrupted_anywhere_goes_on(
    lost: Lost, databases: Callable[[], str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(rebuild_batch, "ROWS_MAX", 30)
    dsn = databases()
    applied = []

    async def until_cut(connection: Connection, count: int) -> AsyncIterator[Journaled]:
        for place, one in enumerate(lost.journal):
            if place == count:
                if how == "stopped":
                    raise Interrupted
                await (killer := await owner(dsn)).execute(
                    "SELECT pg_terminate_backend($1)", connection.get_server_pid()
                )
                await killer.close()
            yield one

    for count in (5, 14, 20):
        with pytest.raises((Interrupted, asyncpg.PostgresError, ConnectionError)):
            async with alone_in(dsn, SCHEMA) as connection:
                await rebuild(connection, until_cut(connection, count))
        await until(lambda: ask(dsn, NOBODY_ELSE), "the server has ended the session, and its lock")
        applied.append(await ask(dsn, "SELECT count(DISTINCT digest) FROM audit"))
        check = await owner(dsn)
        assert not [result for result in await verify(check) if not result.holds and result.number != 9], (
            "whole records"
        )
        await check.close()
    assert applied == sorted(applied)
    assert applied[-1] > 0, "what was written stays"
    restored = await rebuilt(dsn, lost.journal)
    assert restored.applied < restored.records
    assert await differing(lost.dsn, dsn) == []


def _packed(one: Journaled, change: Callable[[list[Any]], list[Any]]) -> Journaled:
    fields = msgpack.unpackb(zstandard.ZstdDecompressor().decompress(one.packed))
    return one._replace(packed=zstandard.ZstdCompressor().compress(msgpack.packb(change(fields))))


def _without(journal: list[Journaled], place: int) -> list[Journaled]:
    return [*journal[:place], *journal[place + 1 :]]


def _with(journal: list[Journaled], place: int, one: Journaled) -> list[Journaled]:
    return [*journal[:place], one, *journal[place + 1 :]]


def _swapped(journal: list[Journaled], place: int) -> list[Journaled]:
    """The commit and its writer's next one."""
    stage = unpack(journal[place].packed).stage
    other = next(i for i in range(place + 1, len(journal)) if unpack(journal[i].packed).stage == stage)
    changed = list(journal)
    changed[place], changed[other] = journal[other], journal[place]
    return changed


def _money(fields: list[Any]) -> list[Any]:
    assert b"7,7" in fields[4] or b"=7" in fields[4]
    return [*fields[:4], fields[4].replace(b"=7", b"=8").replace(b"7,7", b"8,8"), fields[5]]


def _actor(fields: list[Any]) -> list[Any]:
    proof = [[name, op, [column.replace("credit", "anyone") if i == 5 else column for i, column in enumerate(columns)]]
             if name == "audit" else [name, op, columns] for name, op, columns in fields[5]]  # fmt: skip
    return [*fields[:5], proof]


def _head(fields: list[Any]) -> list[Any]:
    proof = [
        [name, op, [*columns[:-1], "{" + "ab" * 32 + "}"] if name == "owners" else columns]
        for name, op, columns in fields[5]
    ]
    return [*fields[:5], proof]


DAMAGE: dict[str, tuple[Callable[[list[Journaled], int], list[Journaled]], str]] = {
    "a hole": (_without, "after position"),
    "money edited": (lambda j, p: _with(j, p, _packed(j[p], _money)), "its contents are not those"),
    "who did it edited": (lambda j, p: _with(j, p, _packed(j[p], _actor)), "does not follow from what"),
    "a head edited": (lambda j, p: _with(j, p, _packed(j[p], _head)), "do not agree"),
    "another order": (_swapped, "after position"),
    "a version to come": (lambda j, p: _with(j, p, _packed(j[p], lambda f: [99, *f[1:]])), "version 99"),
    "not a record": (lambda j, p: _with(j, p, j[p]._replace(packed=b"what?")), "not a commit record"),
    "a record cut off": (lambda j, p: _with(j, p, j[p]._replace(packed=j[p].packed[:-9])), "not a commit record"),
    "no proof": (lambda j, p: _with(j, p, _packed(j[p], lambda f: [*f[:5], []])), "do not agree"),
    "a place taken twice": (
        lambda j, p: [*j[: p + 1], _packed(j[p], _money), *j[p + 1 :]],
        "its contents are not those",
    ),
}


@pytest.mark.parametrize("rows_max", [1, 20_000])
async def test_a_journal_that_is_not_whole_is_named_and_nothing_is_half_applied(
    lost: Lost, databases: Callable[[], str], monkeypatch: pytest.MonkeyPatch, rows_max: int
) -> None:
    monkeypatch.setattr(rebuild_batch, "ROWS_MAX", rows_max)
    dsn = databases()
    place = lost.place("entries")
    for name, (broken, told) in DAMAGE.items():
        records = broken(lost.journal, place)
        with pytest.raises(JournalBroken, match=rf"^record \d+ at offset \d+: .*{told}") as caught:
            await rebuilt(dsn, records)
        assert "\n" not in str(caught.value), name
    restored = await rebuilt(dsn, lost.journal)
    assert restored.records == len(lost.journal)
    assert await differing(lost.dsn, dsn) == [], "what came before the damage was whole"


async def test_a_record_that_came_again_with_other_contents_is_named(lost: Lost, databases: Callable[[], str]) -> None:
    """Its two halves agree: somebody made another history of that place."""
    other = databases()
    connection: Connection = await connect_to(other)()
    await post(connection, "credit", [paid(1_000, "eve")], AT)
    [forged] = await journal_of(connection)
    await connection.close()
    with pytest.raises(JournalBroken, match=r"^record 1 at offset 0: credit -\[0\] has another record at position 1"):
        await rebuilt(databases(), [*lost.journal, forged])


async def test_a_repeated_record_is_left_out_wherever_it_stands(lost: Lost, databases: Callable[[], str]) -> None:
    dsn = databases()
    journal = [*lost.journal[:7], *lost.journal[2:9], *lost.journal[7:], *lost.journal]
    restored = await rebuilt(dsn, journal)
    assert (restored.records, restored.repeats) == (len(lost.journal), 7 + len(lost.journal))
    assert await differing(lost.dsn, dsn) == []


async def test_a_database_of_another_history_is_not_mixed_with_this_journal(
    lost: Lost, databases: Callable[[], str]
) -> None:
    dsn = databases()
    connection: Connection = await connect_to(dsn)()
    await post(connection, "credit", [paid(1_000, "eve")], AT)
    await connection.close()
    with pytest.raises(HistoriesDiffer, match=r"another head of credit -\[0\] at position 1"):
        await rebuilt(dsn, lost.journal)
    assert await ask(dsn, "SELECT count(*) FROM entries") == 2


async def test_a_database_that_is_ahead_of_the_journal_is_not_lost(lost: Lost) -> None:
    with pytest.raises(DatabaseAhead, match=r"2 commits .* start its workers"):
        await rebuilt(lost.dsn, lost.journal[:-2])
    await (connection := await owner(lost.dsn)).execute("DELETE FROM outbox")
    await connection.close()
    with pytest.raises(JournalBroken, match=r"ends before position \d of holds -\[0\]"):
        await rebuilt(lost.dsn, lost.journal[:-2])


async def test_numbers_go_on_far_above_those_that_the_lost_database_may_have_given(
    lost: Lost, databases: Callable[[], str]
) -> None:
    dsn = databases()
    last = lost.journal[-1].seq
    batch = await ask(lost.dsn, "SELECT max(batch) FROM audit")
    restored = await rebuilt(dsn, lost.journal)
    assert (restored.seq_last, restored.first_seq) == (last, last + GAP)
    connection: Connection = await connect_to(dsn)()
    sealed = await commit(connection, "rebuild")
    await connection.close()
    assert sealed.seq == last + GAP
    assert await ask(dsn, "SELECT max(batch) FROM audit") == batch + GAP


async def test_what_a_lost_database_sent_late_is_left_out_by_every_rebuild_after(
    lost: Lost, databases: Callable[[], str]
) -> None:
    """Two commits reach the topic after the journal was read for a rebuild: before and after the commit that closes it."""
    second = databases()
    history, late = lost.journal[:-2], lost.journal[-2:]
    restored = await rebuilt(second, history)
    connection: Connection = await connect_to(second)()
    await connection.execute("DELETE FROM outbox")
    row = (1, AT, "x", restored.first_seq, restored.records)
    await commit(connection, "rebuild", [block(RESTORES, Op.INSERT, [row])], told=False)
    await commit(connection, "holds")  # at the place in the chain that the late records have
    closing, after = await journal_of(connection)
    topic = [*history, late[0], closing, late[1], after, late[0]]
    await connection.close()
    scan = RestoreScan()
    for one in topic:
        scan.take(one)
    assert scan.found == [Restore(restored.first_seq, restored.records)]
    third = databases()
    again = await rebuilt(third, topic, restores=scan.found)
    assert (again.records, again.late) == (len(history) + 2, 3)
    assert await differing(second, third) == []


async def test_messages_that_may_not_have_left_wait_in_the_outbox_and_no_others(
    lost: Lost, databases: Callable[[], str]
) -> None:
    telling = [one.seq for one in lost.journal if unpack(one.packed).messages]
    dsn = databases()
    open = telling[-3]
    said = [one._replace(open=min(one.seq, open)) for one in lost.journal]
    restored = await rebuilt(dsn, said)
    rows = "SELECT array_agg(seq ORDER BY seq) FROM outbox WHERE journaled"
    assert await ask(dsn, rows) == telling[-3:]
    assert restored.to_tell == 3
    await rebuilt(dsn, said)
    assert await ask(dsn, rows) == telling[-3:], "once"
    silent = databases()
    tell_from = AT + timedelta(seconds=4)
    recent = [one.seq for one in lost.journal if (r := unpack(one.packed)).messages and r.at >= tell_from]
    await rebuilt(silent, lost.journal, tell_from=tell_from)
    assert await ask(silent, rows) == recent, "an older program's records do not say: the last hour is told again"


async def test_an_outbox_row_is_as_its_writer_left_it(lost: Lost, databases: Callable[[], str]) -> None:
    dsn = databases()
    await rebuilt(dsn, lost.journal)
    rows = "SELECT seq, stage, topic, partitions, at, record FROM outbox ORDER BY seq"
    a, b = await owner(lost.dsn), await owner(dsn)
    theirs = {row["seq"]: row for row in await a.fetch(rows)}
    assert all(row == theirs[row["seq"]] for row in await b.fetch(rows))
    await a.close()
    await b.close()


@pytest.mark.parametrize("rows_max", [rebuild_batch.ROWS_MAX, 1])
async def test_what_an_older_program_wrote_of_a_row_leaves_the_newest_columns_as_they_were(
    rows_max: int, databases: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a new version is rolled out both write, and the older one's statements do not name the newest columns."""
    requests = Table("wallet_requests", WALLET_REQUESTS.key, WALLET_REQUESTS.spec.removesuffix(" error:text"))
    accounts = Table("accounts", ("id",), ACCOUNTS.spec.removesuffix(" closed_at:time"), ACCOUNTS.changing[:-1])
    account = (spendable("ada").id, "ada", "spendable", "USDC", "", 0, 1, AT)
    new = [("ada", chain, "failed", AT, None, f"of {chain}") for chain in ("AVAX", "ETH", "MATIC", "SOL")]
    old = [row[:-1] for row in new]
    dsn = databases()
    connection: Connection = await connect_to(dsn)()
    for writer, *blocks in (
        ("new", block(WALLET_REQUESTS, Op.INSERT, new), block(ACCOUNTS, Op.INSERT, [(*account, AT)])),
        ("old", block(requests, Op.UPSERT, old[:2]), block(accounts, Op.UPDATE, [(account[0], 0, 2, AT)])),
        ("old", block(requests, Op.DELETE, [old[2][:2]])),
        ("old", block(requests, Op.INSERT, [old[2], ("bob", "ETH", "failed", AT, None)])),
        ("new", block(WALLET_REQUESTS, Op.UPSERT, [("bob", "ETH", "failed", AT, None, "of bob")])),
    ):
        await commit(connection, writer, blocks)
    told = "SELECT string_agg(concat(user_id, chain, error), ' ' ORDER BY user_id, chain) FROM wallet_requests"
    assert await connection.fetchval(told) == "adaAVAXof AVAX adaETHof ETH adaMATIC adaSOLof SOL bobETHof bob"
    assert await connection.fetchval("SELECT closed_at FROM accounts") == AT
    journal = await journal_of(connection)
    await connection.close()
    again = databases()
    for each in (dsn, again):
        may_break(each, "an account without entries")
    monkeypatch.setattr(rebuild_batch, "ROWS_MAX", rows_max)
    await rebuilt(again, journal)
    assert await differing(dsn, again) == []


async def test_rows_that_exchange_what_must_be_unique_are_written_one_commit_after_the_other(
    databases: Callable[[], str],
) -> None:
    def account(id: str, name: str) -> Block:
        return block(ACCOUNTS, Op.UPSERT, [(id * 32, name, "t", "USDC", "", 0, 1, AT, None)])

    first = databases()
    may_break(first, "accounts without entries")
    connection: Connection = await connect_to(first)()
    await commit(connection, "w", [account("1", "a")])
    await commit(connection, "w", [account("2", "b")])
    before = await journal_of(connection)
    second = databases()
    may_break(second, "as the first")
    await rebuilt(second, before)
    for id, name in (("1", "aside"), ("2", "a"), ("1", "b")):
        await commit(connection, "w", [account(id, name)])
    journal = await journal_of(connection)
    await connection.close()
    await rebuilt(second, journal)
    assert await differing(first, second) == []


async def test_a_record_that_cannot_be_written_is_named(lost: Lost, databases: Callable[[], str]) -> None:
    """A row that is there already, by other hands."""
    dsn = databases()
    await (connection := await owner(dsn)).execute(
        f"INSERT INTO transactions (id, fingerprint, at, kind, reference) VALUES ('{1:032x}', '{1:032x}', now(), 'x', '')"
    )
    await connection.close()
    seq = lost.journal[lost.place("transactions")].seq
    with pytest.raises(JournalBroken, match=f"^record {seq} at offset .* it cannot be written: duplicate key"):
        await rebuilt(dsn, lost.journal)


async def test_nobody_may_work_in_a_database_that_is_rebuilt(databases: Callable[[], str]) -> None:
    dsn = databases()
    worker: Connection = await connect_to(dsn)()
    with pytest.raises(DatabaseBusy, match=f"process {worker.get_server_pid()}, since"):
        await rebuilt(dsn, [])
    await worker.close()
    async with alone_in(dsn, SCHEMA):
        with pytest.raises(DatabaseBusy, match="another rebuild"):
            await rebuilt(dsn, [])


async def test_a_schema_that_is_not_the_programs_is_not_written_into(database: str) -> None:
    with pytest.raises(SchemaOutdated, match="stablerail migrate"):
        await rebuilt(database, [])
    await upgrade(database, SCHEMA, "pre")
    with pytest.raises(SchemaOutdated, match="stablerail migrate"):
        await rebuilt(database, [])


async def test_one_row_that_differs_is_found_and_shown(lost: Lost, databases: Callable[[], str]) -> None:
    dsn = databases()
    await rebuilt(dsn, lost.journal)
    connection = await owner(dsn)
    await connection.execute(
        "UPDATE wallets SET created_at = created_at + interval '1 microsecond' WHERE address = '0x1'"
    )
    await connection.execute("INSERT INTO wallets VALUES ('ETH', 'zz', 'eve', 'w', now())")
    await connection.execute("DELETE FROM owners WHERE stage = 'wallets'")
    await connection.close()
    owners, wallets = await differing(lost.dsn, dsn)
    assert (owners.only_a, owners.only_b, owners.changed, owners.rows_a - owners.rows_b) == (1, 0, 0, 1)
    assert (wallets.only_a, wallets.only_b, wallets.changed) == (0, 1, 1)
    assert [row[:1] for row in wallets.shown] == ["A", "B", "B"]
    assert "0x1" in wallets.shown[0]


def parts_of(seq: int, *parts: bytes, offset: int = 0) -> list[tuple[int, bytes, bytes, list[tuple[str, bytes]]]]:
    headers = [[("part", b"%d" % i), ("parts", b"%d" % len(parts))] for i in range(len(parts))]
    return [(offset + i, seq.to_bytes(8, "big"), part, headers[i]) for i, part in enumerate(parts)]


def assembled(*messages: Any) -> list[Journaled]:
    assembly = Assembly()
    found = [one for message in messages if (one := assembly.take(*message))]
    assembly.check_end()
    return found


def test_parts_are_put_together_however_often_a_relay_was_killed_between_them() -> None:
    a, b, c = parts_of(5, b"a", b"b", b"c")
    [small] = parts_of(6, b"s")
    assert [(one.seq, one.packed) for one in assembled(a, b, a, b, c, small, a, b)] == [(5, b"abc"), (6, b"s")]


def test_a_commit_whose_last_part_never_came_is_no_damage_at_the_end_and_a_hole_before_it() -> None:
    a, b, _ = parts_of(5, b"a", b"b", b"c")
    [lower], [higher] = parts_of(4, b"s"), parts_of(6, b"s")
    assert [one.seq for one in assembled(a, b, lower)] == [4]
    with pytest.raises(JournalBroken, match="record 5 lacks a part"):
        assembled(a, b, higher)


def test_a_commit_cut_off_by_the_loss_of_its_database_is_no_hole_in_the_rebuilt_ones_journal() -> None:
    a, b, _ = parts_of(5, b"a", b"b", b"c")
    [lower], [higher], [rebuilt] = parts_of(4, b"s"), parts_of(6, b"s"), parts_of(4 + GAP, b"s")
    for order in ((a, lower, b, rebuilt), (lower, a, rebuilt), (lower, rebuilt, a, b)):
        assert [one.seq for one in assembled(*order)] == [4, 4 + GAP]
    with pytest.raises(JournalBroken, match="record 5 lacks a part"):
        assembled(lower, a, higher, rebuilt)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ((7, b"short", b"v", []), "offset 7 is not a record of ours"),
        ((7, b"12345678", None, []), "offset 7 is not a record of ours"),
        ((7, b"\0" * 8, b"v", [("part", b"x"), ("parts", b"2")]), "record 0 at offset 7: its headers"),
        ((7, b"\0" * 8, b"v", [("open", b"x")]), "record 0 at offset 7: its headers"),
        ((7, b"\0" * 8, b"v", [("part", None)]), "record 0 at offset 7: its headers"),
        ((7, b"abcdefgh", b"v", []), "offset 7: a number that no record of ours has"),
    ],
)
def test_a_message_that_is_no_record_is_named_by_its_offset(message: Any, told: str) -> None:
    with pytest.raises(NoRecord, match=told):
        assembled(message)


def test_a_part_with_other_contents_is_named() -> None:
    a, b = parts_of(5, b"a", b"b")
    with pytest.raises(JournalBroken, match="record 5 at offset 9: part 0"):
        assembled(a, (9, *a[1:2], b"x", a[3]), b)
