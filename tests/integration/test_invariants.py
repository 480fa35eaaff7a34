"""The worker of `recovery` that looks at the invariants, and `verify --watch`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import orjson
import pytest

from agents.services import Services
from ledger.accounts import buffer, spendable
from ledger.book import post
from ledger.posting import Transaction, credit, debit
from ledger.verify import Result, verify
from stablerail import invariants
from stablerail.config import load_settings
from stablerail.dev.kafka import Kafka
from stablerail.invariants import Invariants
from tests.integration import test_cli
from tests.support.in_process import Ground, ground, until
from tests.support.invariants import may_break
from tests.support.ledger_rig import unguard

run, clean = test_cli.run, test_cli.clean

BREAK = "INSERT INTO accounts VALUES (gen_random_uuid(), 'ada', 'usdc_balance', 'USDC', '', $1, 1, now())"
MEND = "DELETE FROM accounts"


@pytest.fixture
async def at(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    async with ground(database, kafka.bootstrap, topic_prefix, []) as made:
        yield made


class Looks:
    """A worker that looks all the time, and the numbers that each of its looks found broken; None: another leads."""

    def __init__(self, at: Ground, services: Services) -> None:
        settings = load_settings(env_file=None, database_url=at.dsn, verify_interval_s=0.05)
        self.found: list[set[int] | None] = []
        self.invariants = Invariants(settings, services, self._tell)

    def _tell(self, results: Sequence[Result]) -> None:
        self.found.append({one.number for one in results if not one.holds} if results else None)

    async def until(self, found: set[int] | None) -> None:
        del self.found[:]

        async def seen() -> bool:
            return found in self.found[-1:]

        await until(seen, f"a look that finds {found}")


async def test_one_worker_looks_and_the_next_one_goes_on_when_it_is_gone(
    at: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariants, "PAUSE_RATIO", 0.0)  # after a look of seconds nobody would look for minutes
    async with at.process() as one, at.process() as other:
        first, second = Looks(at, one), Looks(at, other)
        leading = asyncio.create_task(first.invariants.work())
        await first.until(set())
        standing_by = asyncio.create_task(second.invariants.work())
        try:
            await second.until(None)
            await at.observer.execute(BREAK, 5)
            await first.until({2, 3})
            await at.observer.execute(MEND)
            await first.until(set())
            leading.cancel()
            # its connection goes with the process
            await at.observer.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid)"
                " WHERE locktype = 'advisory' AND datname = current_database()"
            )
            await second.until(set())
        finally:
            for task in (leading, standing_by):
                task.cancel()
            await asyncio.gather(leading, standing_by, return_exceptions=True)


async def test_what_a_whole_look_found_is_not_forgotten_by_the_looks_after_it(at: Ground) -> None:
    """A row of the past that was changed: looks since a checkpoint do not see it, so none is kept while it is so."""
    may_break(at.dsn, "an entry of the past is edited")
    funded = Transaction("f" * 32, "top_up", "", (debit(spendable("ada"), 50), credit(buffer(), 50)))
    async with at.process() as services:
        looks, connection = Looks(at, services).invariants, await services.connect()
        await post(connection, "api", [funded], at.clock())
        assert all(one.holds for one in await looks.look(connection))
        await unguard(at.observer)
        await at.observer.execute("UPDATE entries SET at = at + interval '1 second'")
        assert all(one.holds for one in await looks.look(connection)), "since the checkpoint nothing was committed"
        anew = Looks(at, services).invariants
        for _ in range(2):
            assert {one.number for one in await anew.look(connection) if not one.holds} == {11}


async def test_what_is_committed_while_no_worker_is_at_work_waits_and_breaks_nothing(
    at: Ground, run: Callable[..., Any]
) -> None:
    """The console's own commits, and what a restored database has still to tell."""
    kafka = {"kafka_bootstrap": at.bootstrap, "topic_prefix": at.prefix}
    done = await asyncio.to_thread(run, "keys", "create", "--scope", "read", database_url=at.dsn, **kafka)
    assert done.exit_code == 0, done.output
    await at.observer.execute("UPDATE outbox SET at = now() - interval '10 minutes'")
    verified = await asyncio.to_thread(run, "verify", database_url=at.dsn, **kafka)
    assert verified.exit_code == 0, verified.output
    assert "1 commits wait for a worker to tell them" in verified.output
    beat = "INSERT INTO workers VALUES ('{0}', 'deposits', 'h', 1, now() - interval '{0}', now() - interval '{1}', '{{}}', '{{}}')"
    restored = "INSERT INTO restores VALUES (1, now(), 'ann', 1, 0)"
    for age, statements, holds in (
        ("10 minutes", (beat.format("2 seconds", "1 second"),), True),
        ("10 minutes", (beat.format("2 hours", "1 minute"),), True),
        ("10 minutes", (beat.format("2 minutes", "1 second"),), False),
        ("61 minutes", (), False),
        ("61 minutes", (restored,), True),
        ("61 minutes", ("DELETE FROM relay",), True),
    ):
        transaction = at.observer.transaction(isolation="repeatable_read")
        await transaction.start()
        await at.observer.execute(f"UPDATE outbox SET at = now() - interval '{age}'")
        for statement in statements:
            await at.observer.execute(statement)
        (nine,) = [one for one in await verify(at.observer) if one.number == 9]
        assert (nine.holds, bool(nine.waits)) == (holds, True), statements
        await transaction.rollback()


async def lines_of(process: Any) -> AsyncIterator[dict[str, Any]]:
    while line := await asyncio.wait_for(process.stdout.readline(), 100):
        yield orjson.loads(line)


async def test_watch_tells_each_change_and_ends_by_ctrl_c_with_the_last_looks_code(at: Ground) -> None:
    may_break(at.dsn, "a balance is made up")
    command = (sys.executable, "-m", "stablerail.cli", "verify", "--watch", "1", "--format", "json")
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "STABLERAIL_DATABASE_URL": at.dsn},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores Ctrl-C
    )
    try:
        told = lines_of(process)
        first = [(await anext(told))["number"] for _ in range(12)]
        assert first == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 13, 14]
        await at.observer.execute(BREAK, 5)
        changed = [await anext(told) for _ in range(2)]
        assert [(one["number"], one["holds"]) for one in changed] == [(2, False), (3, False)]
        assert "'difference': '5'" in changed[0]["offending"][0]
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 100) == 1
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
