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
from ledger.errors import ACopy
from ledger.migrate import upgrade
from ledger.record import Message
from ledger.rows import Connection
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from tests.integration import test_cli
from tests.integration.test_cli import Result
from tests.integration.test_rebuild import commit, live
from tests.support.in_process import SCHEMA, Ground, ground
from tests.support.rebuild import differences, empty_database, rebuild
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


async def test_a_backup_whose_last_commits_the_journal_lacks_takes_them_there_first(
    at: Ground, run: Callable[..., Result]
) -> None:
    async with working(at) as connection:
        await live(connection)
        await told(at, connection)
        await commit(connection, "api", told=False, messages=[asked("one")])
    kafka = {"kafka_bootstrap": at.bootstrap, "topic_prefix": at.prefix}
    ahead = await asyncio.to_thread(run, "rebuild", database_url=at.dsn, **kafka)
    assert ahead.exit_code == 1
    assert ahead.output.startswith("database_ahead: the database has 1 commits")
    done = await asyncio.to_thread(run, "rebuild", "--publish", database_url=at.dsn, **kafka)
    assert done.exit_code == 0, done.output
    async with empty_database(at.dsn) as empty:
        restored = await rebuild(at.bootstrap, at.prefix, empty, SCHEMA)
        assert restored.to_tell == 1
        assert await differences(at.dsn, empty) == {}
