"""`stablerail rebuild` and `stablerail diff` from a real journal topic, and from what pg_dump made of a database an hour before."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from agents.sweeper import Sweeper
from ledger import rebuild_batch
from ledger.errors import ACopy
from ledger.migrate import upgrade
from ledger.record import Message
from ledger.rows import Connection
from stablerail.config import load_settings
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.rebuild import rebuild_database
from tests.integration import test_cli
from tests.integration.test_cli import Result
from tests.integration.test_database_behind import check
from tests.integration.test_rebuild import commit, live
from tests.support.in_process import SCHEMA, Ground, ground
from tests.support.migrated import migrate
from tests.support.rebuild import connect, differences, empty_database, rebuild
from topics.catalog import JOURNAL, RECORD_BYTES_MAX, WALLETS_REQUESTED
from topics.envelope import value_of
from topics.events import Chain, WalletsRequested

run, clean = test_cli.run, test_cli.clean


def asked(user: str) -> Message:
    event = WalletsRequested(user_id=user, chains=(Chain.ETH,))
    return Message(WALLETS_REQUESTED.name, user.encode(), value_of(event), user, event.ce_type())


@pytest.fixture
async def at(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    async with ground(database, kafka.bootstrap, topic_prefix, [WALLETS_REQUESTED]) as it:
        yield it


@asynccontextmanager
async def working(at: Ground) -> AsyncIterator[Connection]:
    """A worker's connection."""
    connection = await at.connect(application_name="stablerail")
    try:
        yield connection
    finally:
        await connection.close()


async def told(at: Ground, connection: Connection) -> None:
    """As workers that ran to the end: everything is journaled and told, and gone from the outbox."""
    async with at.process() as services:
        await services.relay.journal()
        services.relay.emitted([row[0] for row in await connection.fetch("SELECT seq FROM outbox WHERE journaled")])


def postgres_tool(tools: Tools, name: str, dsn: str, *arguments: str) -> None:
    environment = {**os.environ, "PGPASSWORD": urlsplit(dsn).password or ""}
    plain = urlsplit(dsn)._replace(netloc=urlsplit(dsn).netloc.replace(f":{urlsplit(dsn).password}@", "@")).geturl()
    subprocess.run([str(tools.postgres_bin / name), "-d", plain, *arguments], env=environment, check=True)


async def test_a_dump_of_an_hour_ago_and_the_journal_are_the_lost_database(
    at: Ground, tools: Tools, tmp_path: Path, run: Callable[..., Result]
) -> None:
    dump = str(tmp_path / "dump")
    async with working(at) as connection:
        await live(connection)
        await told(at, connection)
        left = await commit(connection, "api", told=False, messages=[asked("one")])
        await asyncio.to_thread(postgres_tool, tools, "pg_dump", at.dsn, "-Fc", "--no-sync", "-f", dump)
        async with at.process() as services:
            await services.relay.journal()
            await services.emitter.emit(left.messages, left.stage, left.at)
            services.relay.emitted([left.seq])
        await live(connection, 6)
        noise = Message("test.told", None, os.urandom(RECORD_BYTES_MAX + 100_000), "1", "t")
        await commit(connection, "api", told=False, messages=[noise])
        await told(at, connection)
        await commit(connection, "api", told=False, messages=[asked("two")])
        async with at.process() as services:
            await services.relay.journal()  # and died before it told
    kafka = {"kafka_bootstrap": at.bootstrap, "topic_prefix": at.prefix}
    async with empty_database(at.dsn) as backup, empty_database(at.dsn) as empty:
        await asyncio.to_thread(postgres_tool, tools, "pg_restore", backup, "--no-owner", dump)
        await upgrade(empty, SCHEMA)
        for dsn in (backup, empty):
            done = await asyncio.to_thread(run, "rebuild", database_url=dsn, **kafka)
            assert done.exit_code == 0, done.output
            assert "the database is at the end of the journal" in done.output
            assert await differences(at.dsn, dsn) == {}
            rebuilt = Ground(dsn, at.bootstrap, at.prefix, at.observer, at.producer, at.clock)
            async with working(rebuilt) as connection:
                assert await connection.fetchval("SELECT count(*) FROM outbox") == 1
            same = await asyncio.to_thread(run, "diff", at.dsn, "env:STABLERAIL_DATABASE_URL")
            assert same.exit_code == 0, same.output
            assert "differs" not in same.output
            assert "not compared: alembic_version, api_keys" in same.output
        async with rebuilt.process() as services:
            with pytest.raises(ACopy):
                await Sweeper(services, abandoned_s=0).sweep(await services.connect())
        assert len(await at.told(WALLETS_REQUESTED)) == 1, "a copy tells nobody"
        own = await asyncio.to_thread(run, "rebuild", "--take-over", database_url=empty, **kafka)
        assert (own.exit_code, "nothing is signed or asked" in own.output) == (0, True), own.output
        async with rebuilt.process() as services:
            await Sweeper(services, abandoned_s=0).sweep(await services.connect())
            await Sweeper(services, abandoned_s=0).sweep(await services.connect())
        users = [WalletsRequested.model_validate_json(each.value).user_id for each in await at.told(WALLETS_REQUESTED)]
        assert sorted(users) == ["one", "two"], "what may not have left is told, and nothing else again"
        await bad_days(at, empty, run, kafka)


async def bad_days(at: Ground, dsn: str, run: Callable[..., Result], kafka: dict[str, str]) -> None:
    """What the commands say."""
    rebuilt = Ground(dsn, at.bootstrap, at.prefix, at.observer, at.producer, at.clock)
    async with working(rebuilt) as connection:
        busy = await asyncio.to_thread(run, "rebuild", database_url=dsn, **kafka)
        assert (busy.exit_code, busy.output.count("\n")) == (1, 1), busy.output
        assert busy.output.startswith("database_busy: processes of ours are connected; stop workers")
        await connection.execute("UPDATE wallets SET user_id = 'eve' WHERE address = '0x1'")
    other = await asyncio.to_thread(run, "diff", at.dsn, dsn)
    assert other.exit_code == 1
    assert "wallets: A (ETH,0x1," in other.output
    assert "wallets: B (ETH,0x1,eve," in other.output
    password = urlsplit(dsn).password
    assert password
    assert password not in other.output
    for wrong, code in (("env:NO_SUCH", 2), (f"postgresql://x:{password}@127.0.0.1:bad/x", 2)):
        refused = await asyncio.to_thread(run, "diff", at.dsn, wrong)
        assert (refused.exit_code, refused.output.count("\n")) == (code, 1), refused.output
        assert password not in refused.output
    for key in (b"what?", b"abcdefgh"):
        await at.send(JOURNAL, key, b"is this")
    passed = await asyncio.to_thread(run, "rebuild", database_url=dsn, **kafka)
    assert passed.exit_code == 0, passed.output
    assert re.search(r"messages that are no records, left out +2\b", passed.output), passed.output
    none = await asyncio.to_thread(run, "rebuild", database_url=dsn, **{**kafka, "topic_prefix": "none."})
    assert none.output.startswith("journal_broken: there is no topic none.journal")


async def commit_in(dsn: str, *messages: Message) -> None:
    connection = await connect(dsn, SCHEMA)
    await commit(connection, "api", told=False, messages=messages)
    await connection.close()


async def test_the_deployments_own_database_stays_its_own_whatever_is_asked_of_it(
    at: Ground, run: Callable[..., Result]
) -> None:
    """Also where its last commits are not in the journal yet: as a backup's, they are taken there first."""
    kafka = {"kafka_bootstrap": at.bootstrap, "topic_prefix": at.prefix}
    async with working(at) as connection:
        await live(connection)
        await told(at, connection)
        await commit(connection, "api", told=False, messages=[asked("one")])
    for options in ((), ("--take-over",)):
        ahead = await asyncio.to_thread(run, "rebuild", *options, database_url=at.dsn, **kafka)
        assert ahead.exit_code == 1
        assert ahead.output.startswith("database_ahead: the database has 1 commits")
        assert "start its workers" in ahead.output
        assert "stablerail rebuild --take-over --publish" in ahead.output
        await check(at, at.dsn)
    for options in (("--publish",), ()):
        done = await asyncio.to_thread(run, "rebuild", *options, database_url=at.dsn, **kafka)
        assert done.exit_code == 0, done.output
        assert "it stays as it is, and is no copy\nnever lost: start its workers" in done.output
        await check(at, at.dsn)
    async with empty_database(at.dsn) as empty:
        restored = await rebuild(at.bootstrap, at.prefix, empty, SCHEMA)
        assert restored.to_tell == 1
        assert await differences(at.dsn, empty) == {}


async def test_a_copy_with_commits_of_its_own_takes_over_with_them_only_when_that_is_said(
    at: Ground, run: Callable[..., Result]
) -> None:
    kafka = {"kafka_bootstrap": at.bootstrap, "topic_prefix": at.prefix}
    async with working(at) as connection:
        await live(connection)
        await told(at, connection)
    async with empty_database(at.dsn) as copy, empty_database(at.dsn) as again:
        await migrate(copy, SCHEMA)
        made = await asyncio.to_thread(run, "rebuild", database_url=copy, **kafka)
        assert "a copy; --take-over makes it the deployment's" in made.output, made.output
        with pytest.raises(ACopy, match="run: stablerail rebuild --take-over;"):
            await check(at, copy)
        for words in (("keys", "create", "--scope", "read"), ("recovery", "open")):
            told_no = await asyncio.to_thread(run, *words, database_url=copy, **kafka)
            assert (told_no.exit_code, told_no.output[:8]) == (1, "a_copy: "), told_no.output
        assert (await asyncio.to_thread(run, "rebuild", database_url=copy, **kafka)).exit_code == 0, (
            "nothing was written"
        )
        await commit_in(copy, asked("one"))
        for options in ((), ("--publish",), ("--take-over",)):
            refused = await asyncio.to_thread(run, "rebuild", *options, database_url=copy, **kafka)
            assert refused.exit_code == 1
            assert refused.output.startswith("database_ahead: this copy has 1 commits (records "), refused.output
            assert "run: stablerail rebuild --take-over --publish" in refused.output
            with pytest.raises(ACopy):
                await check(at, copy)
        own = await asyncio.to_thread(run, "rebuild", "--take-over", "--publish", database_url=copy, **kafka)
        assert own.exit_code == 0, own.output
        await check(at, copy)
        await rebuild(at.bootstrap, at.prefix, again, SCHEMA)
        assert await differences(copy, again) == {}


async def test_a_copy_in_which_somebody_wrote_takes_nothing_over_when_another_has(
    at: Ground, run: Callable[..., Result]
) -> None:
    """Both count from the same number on."""
    kafka = {"kafka_bootstrap": at.bootstrap, "topic_prefix": at.prefix}
    async with working(at) as connection:
        await live(connection)
        await told(at, connection)
    async with empty_database(at.dsn) as copy, empty_database(at.dsn) as new:
        for dsn, options in ((copy, ()), (new, ("--take-over",))):
            await migrate(dsn, SCHEMA)
            done = await asyncio.to_thread(run, "rebuild", *options, database_url=dsn, **kafka)
            assert done.exit_code == 0, done.output
        await commit_in(copy, asked("one"))
        for options in ((), ("--take-over", "--publish")):
            refused = await asyncio.to_thread(run, "rebuild", *options, database_url=copy, **kafka)
            assert refused.output.startswith("histories_differ: the database has 1 commits"), refused.output
        await check(at, new)


class Cut(Exception):
    pass


async def test_a_rebuild_that_ended_at_its_last_moment_has_left_nothing_that_a_worker_takes_for_its_own(
    at: Ground, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is written, and the numbers begin with those that the lost one gave."""

    def cut(done: int, total: int, _records: int, _rows: int) -> None:
        if done == total:
            raise Cut

    kafka = {"kafka_bootstrap": at.bootstrap, "topic_prefix": at.prefix}
    async with working(at) as connection:
        await live(connection)
        await told(at, connection)
    async with empty_database(at.dsn) as dsn:
        await migrate(dsn, SCHEMA)
        monkeypatch.setattr(rebuild_batch, "ROWS_MAX", 1)
        with pytest.raises(Cut):
            await rebuild_database(load_settings(env_file=None, database_url=dsn, **kafka), cut)
        assert await differences(at.dsn, dsn) == {}
        with pytest.raises(ACopy):
            await check(at, dsn)
        made = await asyncio.to_thread(run, "rebuild", database_url=dsn, **kafka)
        assert "a copy; --take-over makes it the deployment's" in made.output, made.output


async def test_a_lost_database_that_comes_back_after_another_took_over_does_not_bring_its_last_commit(
    at: Ground, run: Callable[..., Result]
) -> None:
    kafka = {"kafka_bootstrap": at.bootstrap, "topic_prefix": at.prefix}
    async with working(at) as connection:
        await live(connection)
        await told(at, connection)
    async with empty_database(at.dsn) as new:
        await migrate(new, SCHEMA)
        await commit_in(at.dsn, asked("one"))  # and died before its journal
        done = await asyncio.to_thread(run, "rebuild", "--take-over", database_url=new, **kafka)
        assert done.exit_code == 0, done.output
        for options in ((), ("--publish",), ("--take-over", "--publish")):
            refused = await asyncio.to_thread(run, "rebuild", *options, database_url=at.dsn, **kafka)
            assert refused.exit_code == 1
            assert refused.output.startswith("histories_differ: the database has 1 commits"), refused.output
            assert "rebuild an empty database, or a newer backup" in refused.output
        await check(at, new)
