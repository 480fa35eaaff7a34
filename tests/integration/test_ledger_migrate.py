"""The ledger's schema goes up while workers of the version before write, and nothing of theirs fails."""

from __future__ import annotations

import asyncio
from typing import get_args

import asyncpg
import pytest
from alembic.runtime.migration import HeadMaintainer, MigrationStep

from ledger import migrate
from ledger.accounts import Account, AccountType, buffer, spendable
from ledger.book import post
from ledger.commit import NO_TOPIC, link
from ledger.errors import SchemaOutdated
from ledger.holds import hold
from ledger.migrate import Part, is_newest, run_to, upgrade
from ledger.posting import Transaction, credit, debit
from ledger.record import pack, pack_content, unpack
from ledger.roles import ROLE
from ledger.rows import Connection, Op, Table, block, write
from ledger.tables import ENTRIES, OWNERS
from tests.support.ledger_rig import AT, assert_holds, connect_to, differences, dump, owner, unguard, until

# as writers of revision 0001 know them
OLD_ACCOUNTS = Table(
    "accounts",
    ("id",),
    "id:uuid owner:text type:text asset:text shard:text balance:numeric version:int updated_at:time",
)
OLD_TRANSACTIONS = Table("transactions", ("id",), "id:uuid kind:text reference:text fingerprint:uuid at:time")
OLD_AUDIT = Table(
    "audit",
    ("stage", "topic", "partition", "position"),
    "stage:text topic:text partition:int position:int at:time actor:text summary:json digest:bytes head:bytes",
)
OLD_OWNER = "SELECT position, head FROM owners WHERE stage = $1 FOR UPDATE"
OLD_RECORD = "INSERT INTO outbox (stage, topic, partitions, at, record) VALUES ($1, '-', '{0}', $2, $3)"
OLD_LOCK = """
SELECT x.number, a.balance::text, a.version
FROM unnest($1::text::uuid[]) WITH ORDINALITY AS x(id, number)
JOIN accounts a ON a.id = x.id
ORDER BY a.id
FOR UPDATE OF a
"""


async def old_post(connection: Connection, writer: str, number: int) -> None:
    """A deposit as the program of revision 0001 posts it: without a role, its commits without numbers."""
    accounts = [spendable(f"user {number % 5}"), buffer()]
    async with connection.transaction():
        await connection.execute("INSERT INTO owners VALUES ($1, '-', 0, 0, 0, '') ON CONFLICT DO NOTHING", writer)
        position, head = await connection.fetchrow(OLD_OWNER, writer) or (0, b"")
        found = await connection.fetch(OLD_LOCK, "{" + ",".join(account.id for account in accounts) + "}")
        held = {accounts[place - 1]: (int(balance), version) for place, balance, version in found}
        id = Transaction("", writer, str(number), ()).fingerprint()
        entries, rows = [], []
        for seq, (account, direction, change) in enumerate(zip(accounts, "dc", (7, -7), strict=True)):
            balance, version = held.get(account, (0, 0))
            entries.append((account.id, version + 1, id, seq, direction, 7, balance + change, AT))
            name = (account.id, account.owner, account.type, account.asset, account.shard)
            rows.append((*name, balance + change, version + 1, AT))
        blocks = [
            block(OLD_TRANSACTIONS, Op.INSERT, [(id, "test", "", id, AT)]),
            block(ENTRIES, Op.INSERT, entries),
            block(OLD_ACCOUNTS, Op.UPSERT, rows),
        ]
        content, digest = pack_content(blocks, [])
        head, owned = link(head, digest, AT, writer, {}, (None, None, None)), (writer, NO_TOPIC, 0)
        proof = [
            block(OLD_AUDIT, Op.INSERT, [(*owned, position + 1, AT, writer, {}, digest, head)]),
            block(OWNERS, Op.UPSERT, [(*owned, 0, position + 1, head)]),
        ]
        await write(connection, [*blocks, *proof])
        await connection.execute(OLD_RECORD, writer, AT, pack(writer, NO_TOPIC, AT, content, proof))


async def test_the_schema_goes_up_while_the_version_before_writes(database: str) -> None:
    await upgrade_to(database, "0001")
    connection = await owner(database)
    for number in range(20):
        await old_post(connection, "before", number)
    done = [0] * 4
    stop = False

    async def work(writer: int) -> None:
        mine = await owner(database)
        number = 0
        while not stop:
            number += 1
            try:
                await old_post(mine, f"old {writer}", number)
            except asyncpg.UniqueViolationError:
                continue  # two made the same account: it runs again, as the program does
            done[writer] += 1
        await mine.close()

    async def more(than: int) -> None:
        reached = [count + than for count in done]
        await until(lambda: ended() or all(count >= wanted for count, wanted in zip(done, reached, strict=True)))

    def ended() -> bool:
        return any(worker.done() for worker in workers)

    workers = [asyncio.create_task(work(writer)) for writer in range(4)]
    await more(5)
    await upgrade(database, "stablerail", "pre")
    await more(5)
    # the new version is rolled out beside them
    legs = (debit(spendable("new"), 5), credit(buffer(), 5))
    pending = Account("new", AccountType.PENDING_WITHDRAWAL)
    aside = hold("2" * 32, "test", "", source=spendable("new"), pending=pending, amount=2)
    new: Connection = await connect_to(database)()
    both = await post(new, "new", [Transaction("1" * 32, "test", "", legs), aside], AT)
    await new.close()
    assert both.sealed
    await more(5)
    assert not ended(), "nothing of the version before has failed"
    stop = True
    await asyncio.gather(*workers)
    await upgrade(database, "stablerail", "post")
    await assert_holds(connection)
    revisions = await connection.fetch("SELECT version_num FROM alembic_version")
    await upgrade(database, "stablerail")
    assert revisions == await connection.fetch("SELECT version_num FROM alembic_version"), "all of it was done"
    assert await connection.fetchval("SELECT count(*) FROM transactions") == 20 + sum(done) + 2
    unchecked = await connection.fetchval("SELECT count(*) FROM pg_constraint WHERE NOT convalidated")
    assert unchecked == 0
    await connection.close()


async def upgrade_to(database: str, revision: str) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute("CREATE SCHEMA stablerail")
    await connection.close()
    await run_to(database, "stablerail", revision)


async def test_a_migration_does_not_make_writers_wait_behind_a_long_transaction(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ledger.migrate.LOCK_WAIT_MS", 50)
    await upgrade_to(database, "0001")
    slow, connection = await owner(database), await owner(database)
    reading = slow.transaction()
    await reading.start()
    await slow.fetch("SELECT 1 FROM accounts")
    migration = asyncio.create_task(upgrade(database, "stablerail", "pre"))
    waiting = (  # others migrate on this server too
        "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
        " WHERE NOT l.granted AND l.mode = 'AccessExclusiveLock' AND d.datname = current_database()"
    )
    seen = 0
    while seen < 3:  # it waits, gives up, waits again; in between writers write
        seen += bool(await connection.fetchval(waiting))
    assert not migration.done()
    await old_post(connection, "old", 1)
    await reading.rollback()
    await migration
    await assert_holds(connection)
    for each in (slow, connection):
        await each.close()


@pytest.mark.parametrize(("before", "part"), [("0018_pre", "pre"), ("0019_pre", "post")])
async def test_the_indexes_of_payments_change_while_workers_lock_one_table_after_the_other(
    database: str, before: str, part: Part
) -> None:
    """Had the migration written one table anew before it has both, no worker in the midst of a batch would let it have the other:
    it would begin again, up to thirty times, and every payment would wait as long."""
    await upgrade_to(database, before)
    worker, connection = await owner(database), await owner(database)
    batch = worker.transaction()
    await batch.start()
    await worker.fetch("SELECT 1 FROM withdrawals FOR UPDATE")
    migration = asyncio.create_task(upgrade(database, "stablerail", part))
    waiting = (
        "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
        " WHERE NOT l.granted AND l.mode = 'AccessExclusiveLock' AND d.datname = current_database()"
    )
    while not await connection.fetchval(waiting):
        assert not migration.done()
    await worker.execute("SET lock_timeout = '300ms'")  # less than the migration waits
    await worker.fetch("SELECT 1 FROM attempts FOR UPDATE")
    await batch.commit()
    await migration
    for each in (worker, connection):
        await each.close()


async def test_a_migration_that_ends_before_its_revision_is_noted_leaves_nothing_and_goes_on(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the second revision of a run, and of those behind it."""
    await upgrade_to(database, "0017_pre")
    noted = HeadMaintainer.update_to_step

    def ended(self: HeadMaintainer, step: MigrationStep) -> None:
        if "0019_pre" in step.to_revisions:
            raise ConnectionError("the migration's process ends here")
        noted(self, step)

    monkeypatch.setattr(HeadMaintainer, "update_to_step", ended)
    with pytest.raises(ConnectionError):
        await upgrade(database, "stablerail", "pre")
    connection = await owner(database)
    found = "SELECT count(*) FROM pg_attribute WHERE attrelid = 'attempts'::regclass AND attname = 'phase'"
    assert await connection.fetchval(found) == 0
    assert await connection.fetchval("SELECT max(version_num) FROM alembic_version") == "0018_pre"
    monkeypatch.undo()
    await upgrade(database, "stablerail")
    assert await connection.fetchval(found) == 1
    await connection.close()


async def test_a_migration_that_was_a_deadlocks_victim_is_tried_again(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tries = migrate._run, 0

    async def once_a_victim(database_url: str, schema: str, revision: str) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise asyncpg.DeadlockDetectedError("deadlock detected")
        await run(database_url, schema, revision)

    monkeypatch.setattr(migrate, "_run", once_a_victim)
    monkeypatch.setattr(migrate, "LOCK_WAIT_MS", 50)
    await upgrade(database, "stablerail")
    assert tries == 2


async def test_a_rebuild_reads_records_of_the_version_before(database: str) -> None:
    await upgrade(database, "stablerail")
    connection = await owner(database)
    for number in range(3):
        await old_post(connection, "old", number)
    before = await dump(connection)
    records = [row[0] for row in await connection.fetch("SELECT record FROM outbox ORDER BY seq")]
    await unguard(connection)
    await connection.execute("TRUNCATE accounts, transactions, entries, owners, audit")
    for packed in records:
        record = unpack(packed)
        await write(connection, [*record.blocks, *record.proof])
    assert differences(before, await dump(connection)) == {}
    await connection.close()


async def test_no_index_names_the_status_of_an_attempt_or_a_withdrawal(database: str) -> None:
    """PostgreSQL leaves a row's entries in all indexes when no index names what changed (a HOT update)."""
    await upgrade(database, "stablerail")
    connection = await owner(database)
    named = await connection.fetch(
        "SELECT indexname FROM pg_indexes WHERE schemaname = 'stablerail' AND tablename IN ('attempts', 'withdrawals')"
        " AND indexdef ~ 'status'"
    )
    assert named == []
    await connection.close()


async def test_a_schema_of_a_newer_program_is_left_as_it_is(database: str) -> None:
    """Had it granted again, the application might change rows of an append-only table that only the newer program knows."""
    await upgrade(database, "stablerail")
    connection = await owner(database)
    await connection.execute("INSERT INTO alembic_version VALUES ('9999_pre'); CREATE TABLE newer (n int)")
    for part in get_args(Part):
        with pytest.raises(SchemaOutdated, match=r"newer than this program.*9999_pre"):
            await upgrade(database, "stablerail", part)
    assert not await connection.fetchval("SELECT has_table_privilege($1, 'newer', 'INSERT')", ROLE)
    assert not await is_newest(connection)
    await connection.close()


async def test_migrations_of_one_database_take_turns(database: str) -> None:
    await asyncio.gather(*(upgrade(database, "stablerail") for _ in range(3)))
    connection = await owner(database)
    assert await is_newest(connection)
    await connection.close()


async def test_the_schema_is_the_newest_only_when_every_part_of_it_is_there(database: str) -> None:
    await upgrade(database, "stablerail", "pre")
    connection = await owner(database)
    assert not await is_newest(connection)
    await upgrade(database, "stablerail", "post")
    assert await is_newest(connection)
    await connection.close()
