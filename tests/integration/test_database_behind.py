"""An old backup that nobody brought forward: whoever starts on it is stopped before anything is told or done."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from urllib.parse import urlsplit

import asyncpg
import pytest
from aiokafka.errors import KafkaConnectionError, KafkaError

from agents.emitter import Emitter
from agents.journal_end import last_records
from ledger.commit import lock_writer, seal
from ledger.errors import ACopy, DatabaseBehind
from ledger.journal import Relay
from ledger.links import Placed
from ledger.migrate import upgrade
from ledger.rows import Connection, Op, Table, block
from stablerail.api.journal import Journal
from stablerail.config import Settings, load_settings
from stablerail.connections import connector, relay_of
from stablerail.dev.kafka import Kafka
from stablerail.dev.processes import free_port
from stablerail.problems import Problem
from tests.integration import test_cli
from tests.integration.test_cli import Result
from tests.integration.test_rebuild import live
from tests.support.in_process import SCHEMA, Ground, ground, until
from tests.support.migrated import migrate
from tests.support.proxies import KafkaProxy
from tests.support.rebuild import connect, differences, empty_database, rebuild
from tests.support.withdrawals import api_of
from topics.catalog import JOURNAL

run, clean = test_cli.run, test_cli.clean


@pytest.fixture
async def at(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    async with ground(database, kafka.bootstrap, topic_prefix, []) as it:
        yield it


def settings_of(at: Ground, dsn: str) -> Settings:
    return load_settings(env_file=None, database_url=dsn, kafka_bootstrap=at.bootstrap, topic_prefix=at.prefix)


async def nothing(_records: object, _untold: int) -> None:
    """Publishes nowhere."""


async def work(at: Ground, first: int) -> None:
    async with at.process() as services:
        await live(await services.connect(), first, 1)
        await services.relay.journal()


async def check(at: Ground, dsn: str) -> None:
    relay: Relay = relay_of(settings_of(at, dsn), nothing)
    try:
        await relay.check()
    finally:
        await relay.close()


async def assert_stops(at: Ground, dsn: str, *program: str) -> None:
    names = {
        "DATABASE_URL": dsn,
        "KAFKA_BOOTSTRAP": at.bootstrap,
        "TOPIC_PREFIX": at.prefix,
        "API_PORT": str(free_port()),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "stablerail.cli", *program),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **{f"STABLERAIL_{name}": value for name, value in names.items()}},
    )
    try:
        told = (await asyncio.wait_for(process.communicate(), 100))[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
    assert (process.returncode, "database_behind" in told, "rebuild --take-over" in told) == (70, True, True), told
    assert "Traceback" not in told


async def test_whoever_starts_on_an_old_backup_is_stopped_until_it_is_rebuilt(
    at: Ground, run: Callable[..., Result]
) -> None:
    async with empty_database(at.dsn) as backup:
        await work(at, 0)
        await rebuild(at.bootstrap, at.prefix, backup, SCHEMA)
        await check(at, backup)  # it has all that was journaled
        await work(at, 1)
        await check(at, at.dsn)
        with pytest.raises(
            DatabaseBehind, match=r"the journal has record \d+, of .* run: stablerail rebuild --take-over"
        ):
            await check(at, backup)
        await assert_stops(at, backup, "worker", "deposits")
        await assert_stops(at, backup, "api")
        journal = Journal.of(settings_of(at, backup))
        with pytest.raises(Problem) as caught:  # Kafka was away when it started
            await journal.take(None)
        assert (caught.value.status, caught.value.code) == (503, "database_behind")
        with pytest.raises(Problem, match="database_behind"):
            journal.check()
        await journal.stop()
        kafka = {"kafka_bootstrap": at.bootstrap, "topic_prefix": at.prefix}
        legacy = {"legacy_table": "public.balances", "legacy_columns": '{"usdc_balance": "usdc"}'}
        for words, code in (
            (("keys", "create", "--scope", "read"), 1),
            (("recovery", "open"), 1),
            (("maintain",), 1),
            (("reconcile",), 69),
            (("shadow", "advance"), 1),
        ):
            told_no = await asyncio.to_thread(run, *words, database_url=backup, **kafka, **legacy)
            assert (told_no.exit_code, told_no.output[:17]) == (code, "database_behind: "), told_no.output
        done = await asyncio.to_thread(run, "rebuild", database_url=backup, **kafka)
        assert done.exit_code == 0, done.output
        with pytest.raises(ACopy):
            await check(at, backup)
        done = await asyncio.to_thread(run, "rebuild", "--take-over", database_url=backup, **kafka)
        assert done.exit_code == 0, done.output
        await check(at, backup)
        with pytest.raises(DatabaseBehind):  # the lost one, come back
            await check(at, at.dsn)


class Moving:
    """One address for a database and the standby that is promoted when it has died."""

    def __init__(self, at: Ground) -> None:
        self._at = at
        self.dsn = at.dsn
        self.looks = 0
        """At the journal's end."""
        self.away = 0
        """So many looks find no broker."""

    async def connect(self) -> Connection:
        return await connector(settings_of(self._at, self.dsn), synchronous_commit="off")()

    async def last(self) -> list[Placed]:
        self.looks += 1
        if self.away:
            self.away -= 1
            raise KafkaConnectionError("away")
        return await last_records(self._at.bootstrap, self._at.prefix)

    async def promote(self, dsn: str) -> None:
        """The connections of the first are lost, and who connects anew comes to the other."""
        self.dsn = dsn
        await self._at.observer.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = 'stablerail'"
        )


@asynccontextmanager
async def living(at: Ground, moving: Moving) -> AsyncIterator[tuple[Relay, Emitter]]:
    emitter = Emitter(at.bootstrap, at.prefix)
    await emitter.start()
    relay = Relay(moving.connect, emitter.journal, (KafkaError,), moving.last)
    try:
        yield relay, emitter
    finally:
        with suppress(DatabaseBehind):
            await relay.close()
        await emitter.stop()


async def commit(at: Ground, first: int) -> None:
    connection = await at.connect()
    await live(connection, first, 1)
    await connection.close()


async def test_a_living_process_that_comes_to_a_standby_without_the_last_commits_is_stopped(at: Ground) -> None:
    moving = Moving(at)
    async with empty_database(at.dsn) as standby, living(at, moving) as (relay, _):
        await commit(at, 0)
        await relay.journal()
        await rebuild(at.bootstrap, at.prefix, standby, SCHEMA)
        await commit(at, 1)
        await relay.journal()
        assert moving.looks == 1, "one for each connection"
        last = await at.observer.fetchval("SELECT max(seq) FROM outbox")
        relay.emitted([last])
        await moving.promote(standby)
        with pytest.raises(DatabaseBehind):
            await relay.journal()
        with pytest.raises(DatabaseBehind):  # again, and whatever it wants of it
            await relay.tidy()
        with pytest.raises(DatabaseBehind):
            await relay.check()


async def test_a_living_process_that_comes_to_a_standby_with_all_commits_goes_on_when_kafka_lets_it_look(
    at: Ground,
) -> None:
    moving = Moving(at)
    async with empty_database(at.dsn) as standby, living(at, moving) as (relay, _):
        await commit(at, 0)
        await relay.journal()
        await rebuild(at.bootstrap, at.prefix, standby, SCHEMA)
        moving.away = 2
        await moving.promote(standby)
        await relay.journal()
        assert moving.looks == 1 + 3
        await relay.journal()
        assert moving.looks == 1 + 3


async def test_the_api_answers_for_nothing_and_stops_when_its_database_turns_out_to_be_behind(at: Ground) -> None:
    moving, stopped = Moving(at), asyncio.Event()
    async with empty_database(at.dsn) as standby, living(at, moving) as (relay, emitter):
        journal = Journal(relay, emitter)
        journal.on_unfit = stopped.set
        await upgrade(standby, SCHEMA)
        await commit(at, 0)
        await journal.take(None)
        journal.check()
        relay.emitted([1])
        await moving.promote(standby)
        with pytest.raises(Problem, match="database_behind"):
            await journal.take(None)
        assert stopped.is_set()
        with pytest.raises(Problem, match="database_behind"):
            journal.check()
        await journal.stop()


async def test_an_empty_database_is_behind_and_one_whose_last_commits_never_got_there_is_not(at: Ground) -> None:
    async with empty_database(at.dsn) as empty:
        await upgrade(empty, SCHEMA)
        await check(at, empty)  # nothing was ever journaled
        await work(at, 0)
        with pytest.raises(DatabaseBehind):
            await check(at, empty)
    connection = await connect(at.dsn, SCHEMA)
    await live(connection, 1, 1)
    await connection.close()
    await check(at, at.dsn)


async def test_an_old_backup_is_noticed_also_where_something_foreign_stands_at_the_journals_end(at: Ground) -> None:
    async with empty_database(at.dsn) as empty:
        await upgrade(empty, SCHEMA)
        await work(at, 0)
        await at.send(JOURNAL, b"abcdefgh", b"is no record")
        with pytest.raises(DatabaseBehind):
            await check(at, empty)
    await check(at, at.dsn)


async def test_a_newer_programs_last_record_says_what_the_database_must_have(at: Ground) -> None:
    async with empty_database(at.dsn) as empty:
        await upgrade(empty, SCHEMA)
        # as after two million commits: a number that only a record has
        await at.observer.execute("SELECT setval('outbox_seq_seq', 2_500_000)")
        newer = block(Table("of_tomorrow", ("id",), "id:text"), Op.INSERT, [("1",)])
        async with at.process() as services:
            connection = await services.connect()
            async with connection.transaction():
                owners = await lock_writer(connection, "api")
                await seal(
                    connection, "api", owners, blocks=[], messages=[], at=at.clock(), actor="x", summary={},
                    written=[newer],
                )  # fmt: skip
            await services.relay.journal()
        await check(at, at.dsn)
        with pytest.raises(DatabaseBehind):
            await check(at, empty)


async def test_what_stands_at_the_journals_end_besides_does_not_hide_its_records(at: Ground) -> None:
    await work(at, 0)
    records = await last_records(at.bootstrap, at.prefix)
    assert len(records) > 3
    seq = records[-1].seq
    await at.send(JOURNAL, b"what?", b"is this")
    await at.send(JOURNAL, (seq - 1).to_bytes(8, "big"), b"came late")
    await at.send(JOURNAL, (seq + 1).to_bytes(8, "big"), b"cut off", [("part", b"0"), ("parts", b"2")])
    assert await last_records(at.bootstrap, at.prefix) == records
    await at.send(JOURNAL, b"abcdefgh", b"looks like a number")
    assert await last_records(at.bootstrap, at.prefix) == records
    assert await last_records(at.bootstrap, f"{at.prefix}none.") == []
    await check(at, at.dsn)
    with pytest.raises(asyncpg.PostgresError):
        await check(at, at.dsn + "_none")


async def test_a_standby_that_has_the_last_record_and_not_all_before_it_is_behind(at: Ground) -> None:
    """It was promoted and at work before the journal had the last commits of the one that died."""
    async with empty_database(at.dsn) as standby:
        await work(at, 0)
        await rebuild(at.bootstrap, at.prefix, standby, SCHEMA)
        await check(at, standby)
        await work(at, 1)
        async with replace(at, dsn=standby).process() as services:
            connection = await services.connect()
            async with connection.transaction():
                owners = await lock_writer(connection, "other")
                sealed = await seal(
                    connection, "other", owners, blocks=[], messages=[], at=at.clock(), actor="x", summary={}
                )  # fmt: skip
            await services.relay.journal()
        assert max(one.seq for one in await last_records(at.bootstrap, at.prefix)) == sealed.seq
        with pytest.raises(DatabaseBehind):
            await check(at, standby)


async def test_a_restored_database_is_not_behind_for_late_records_of_the_one_that_was_lost(
    at: Ground, run: Callable[..., Result]
) -> None:
    async with empty_database(at.dsn) as restored:
        await work(at, 0)
        kafka = {"kafka_bootstrap": at.bootstrap, "topic_prefix": at.prefix}
        await migrate(restored, SCHEMA)
        done = await asyncio.to_thread(run, "rebuild", "--take-over", database_url=restored, **kafka)
        assert done.exit_code == 0, done.output
        await work(at, 1)
        await check(at, restored)
        await work(replace(at, dsn=restored), 2)
        await check(at, restored)


async def test_two_databases_that_took_over_one_after_the_other_are_two_lines_though_nothing_came_between(
    at: Ground, run: Callable[..., Result]
) -> None:
    """The first is lost before it does anything; a process of it that nobody stopped writes late."""
    kafka = {"kafka_bootstrap": at.bootstrap, "topic_prefix": at.prefix}
    async with empty_database(at.dsn) as first, empty_database(at.dsn) as second, empty_database(at.dsn) as third:
        await work(at, 0)
        for dsn in (first, second):
            await migrate(dsn, SCHEMA)
            done = await asyncio.to_thread(run, "rebuild", "--take-over", database_url=dsn, **kafka)
            assert done.exit_code == 0, done.output
        await work(replace(at, dsn=first), 1)
        await check(at, second)
        await work(replace(at, dsn=second), 2)
        await check(at, second)
        with pytest.raises(DatabaseBehind):
            await check(at, first)
        restored = await rebuild(at.bootstrap, at.prefix, third, SCHEMA)
        assert restored.late > 0
        assert await differences(second, third) == {}


@asynccontextmanager
async def beside(at: Ground) -> AsyncIterator[tuple[str, Callable[[], Awaitable[None]]]]:
    """A database more, and what has it and the first one change their addresses: connections to either are lost."""
    dsn = urlsplit(at.dsn)._replace(path="/postgres").geturl()
    admin = await asyncpg.connect(dsn)

    async def renamed(old: str, new: str) -> None:
        await admin.execute(f"ALTER DATABASE {old} ALLOW_CONNECTIONS false")  # who lost one asks for another at once
        await admin.fetch("SELECT pg_terminate_backend(pid, 10_000) FROM pg_stat_activity WHERE datname = $1", old)
        await admin.execute(f"ALTER DATABASE {old} RENAME TO {new}")
        await admin.execute(f"ALTER DATABASE {new} ALLOW_CONNECTIONS true")

    async with empty_database(dsn) as other:
        names = [urlsplit(each).path[1:] for each in (at.dsn, other)]

        async def change() -> None:
            for old, new in zip([*names, f"{names[0]}_aside"], [f"{names[0]}_aside", *names], strict=True):
                await renamed(old, new)

        yield other, change
    await admin.close()


async def test_an_api_that_only_reads_answers_for_no_database_that_is_behind(at: Ground) -> None:
    async with beside(at) as (standby, change), api_of(at) as client:
        await work(at, 0)
        await rebuild(at.bootstrap, at.prefix, standby, SCHEMA)
        assert (await client.get("/v1/admin/limits")).status_code == 200
        await change()  # it has all commits, but no keys
        assert (await client.get("/v1/admin/limits")).json()["code"] == "invalid_key"
        await change()
        await work(at, 1)
        assert (await client.get("/v1/admin/limits")).status_code == 200
        await change()
        for path in ("/v1/admin/limits", "/readyz"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["code"]) == (503, "database_behind")
        await change()
        assert (await client.get("/readyz")).json()["code"] == "database_behind", "its process ends"


async def test_an_api_reads_while_kafka_is_away_and_looks_at_its_database_when_it_is_back(
    at: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stablerail.api.journal.LOOK_AGAIN_S", 0.05)
    host, _, port = at.bootstrap.rpartition(":")
    with KafkaProxy(host, int(port)) as kafka:
        async with beside(at) as (standby, change), api_of(at, kafka_bootstrap=kafka.address) as client:
            await rebuild(at.bootstrap, at.prefix, standby, SCHEMA)
            await work(at, 0)
            kafka.refuse(True)
            kafka.cut()
            await change()
            assert (await client.get("/readyz")).status_code == 200
            kafka.refuse(False)

            async def found_out() -> bool:
                return bool((await client.get("/readyz")).status_code == 503)

            await until(found_out, "the look")
            assert (await client.get("/v1/admin/limits")).json()["code"] == "database_behind"
