"""Runs are stored, within bounds and in the journal; one worker makes the day's, also when it is killed in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agents import lone_writer
from agents.treasury import reconcile_daily
from agents.treasury.reconcile_daily import ReconcileDaily
from ledger import reconciling
from ledger.reconciling import Comparison, Difference, Found, Gap, GapCode, Run, commit, differences_of, newest, run_of
from ledger.rows import Connection
from stablerail.dev.kafka import Kafka
from stablerail.metrics import Metrics
from tests.support import ledger_rig
from tests.support.in_process import SCHEMA, Ground, ground, until
from tests.support.rebuild import differences, empty_database, rebuild

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
DAY, HOUR = timedelta(days=1), timedelta(hours=1)


def found_of(*differences: Difference, gaps: tuple[Gap, ...] = ()) -> Found:
    found = Found()
    found.compared(Comparison.MIRROR, 2)
    for one in differences:
        found.differ(one)
    found.gaps.extend(gaps)
    return found


AWAY = Gap(Comparison.CIRCLE, "SOL", GapCode.AWAY, "no connection")
UNSET = Gap(Comparison.CHAIN, "SOL", GapCode.NOT_CONFIGURED, "needs a setting")
HUGE = Difference(Comparison.MIRROR, "", "system.custody_usdc:USDC", 3, -(10**30))
UNKNOWN = Difference(Comparison.CIRCLE, "", "SOL:9WzD", None, 7)


async def test_a_run_is_stored_with_its_first_differences_and_the_oldest_go(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciling, "RUNS_KEPT", 3)
    monkeypatch.setattr(reconciling, "DIFFERENCES_KEPT", 2)
    assert await newest(connection) == []
    first, _ = await commit(connection, found_of(gaps=(UNSET, AWAY)), NOW, NOW + HOUR, "ann")
    assert first.compared == {Comparison.MIRROR: (2, 0, 0)}
    assert first.due_at == NOW + HOUR, "somebody was away"
    told: list[Difference] = []
    much = Found(tell=told.append)
    much.compared(Comparison.MIRROR)
    for one in (HUGE, UNKNOWN, UNKNOWN):
        much.differ(one)
    second, _ = await commit(connection, much, NOW + DAY, NOW, "ann")
    assert (second.differences, second.ended_at, second.due_at) == (3, NOW + DAY, NOW + 2 * DAY)
    assert told == [HUGE, UNKNOWN, UNKNOWN]
    assert await differences_of(connection, second.id) == [HUGE, UNKNOWN]
    assert [one.difference for one in told[:2]] == [-(10**30) - 3, 7]
    assert await newest(connection, 5) == [second, first]
    assert await run_of(connection, first.id) == first
    assert await reconciling.last_whole(connection) == NOW + DAY
    for day in (2, 3, 4):
        await commit(connection, found_of(), NOW + day * DAY, NOW + day * DAY, "ann")
        assert await run_of(connection, first.id) is None or day == 2
    assert len(await newest(connection, 5)) == 3
    assert await differences_of(connection, second.id) == []
    assert await connection.fetchval("SELECT count(*) FROM audit_logs WHERE action = 'ledger.reconciled'") == 5


@pytest.fixture
async def at(databases: Callable[[], str], kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    async with ground(databases(), kafka.bootstrap, topic_prefix, ()) as made:
        yield made


async def runs(at: Ground) -> list[Run]:
    return await newest(at.observer, 10)


async def test_the_days_run_is_made_once_whoever_dies_in_the_middle_of_it(
    at: Ground, databases: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile_daily, "LOOK_S", 0.02)
    monkeypatch.setattr(lone_writer, "STANDBY_S", 0.02)
    moment = NOW
    at.clock = lambda: moment  # type: ignore[assignment]
    began: list[str] = []
    gaps: tuple[Gap, ...] = ()
    metrics = {name: Metrics() for name in ("one", "other")}

    def job(name: str, services: Any, *, hangs: bool = False) -> ReconcileDaily:
        async def compare(found: Found) -> None:
            began.append(name)
            if hangs:
                await asyncio.sleep(1_000)
            found.compared(Comparison.MIRROR)
            found.differ(HUGE)
            found.gaps.extend(gaps)

        return ReconcileDaily(services, compare, metrics[name].reconciled)

    def sample(name: str, metric: str, **labels: str) -> float | None:
        return metrics[name].registry.get_sample_value(f"stablerail_{metric}", labels)

    async with at.process() as survivor:
        async with at.process() as doomed:
            dies = asyncio.create_task(job("one", doomed, hangs=True).work())
            await until(lambda: _is(began == ["one"]), "the first leads and compares")
            lives = asyncio.create_task(job("other", survivor).work())
            await asyncio.sleep(0.2)
            assert began == ["one"], "the other stands by"
            dies.cancel()
            await asyncio.gather(dies, return_exceptions=True)
        await until(
            lambda: _is(sample("other", "reconcile_differences", comparison="mirror") == 1), "the other has taken over"
        )
        assert began == ["one", "other"]
        assert len(await runs(at)) == 1
        assert sample("other", "reconcile_discrepancy", comparison="mirror") == pytest.approx(10**24)
        assert sample("other", "reconciled_timestamp_seconds") == NOW.timestamp()
        # a restart neither doubles nor skips one
        lives.cancel()
        await asyncio.gather(lives, return_exceptions=True)
    async with at.process() as services:
        moment = NOW + DAY - timedelta(seconds=1)
        lives = asyncio.create_task(job("one", services).work())
        await until(
            lambda: _is(sample("one", "reconcile_differences", comparison="mirror") == 1), "it knows the last run"
        )
        assert len(await runs(at)) == 1
        moment, gaps = NOW + DAY, (AWAY,)
        await until(lambda: _ran(at, 2), "a day later")
        moment = NOW + DAY + HOUR
        gaps = ()
        await until(lambda: _ran(at, 3), "an hour after a run that could not ask everybody")
        await until(lambda: _is(sample("one", "reconciled_timestamp_seconds") == moment.timestamp()), "it is whole")
        assert began == ["one", "other", "one", "one"]
        assert services.stop.reason is None
        lives.cancel()
        await asyncio.gather(lives, return_exceptions=True)
        await services.relay.journal()
    assert [one.actor for one in await runs(at)] == ["reconcile"] * 3
    async with empty_database(at.dsn) as empty:
        await rebuild(at.bootstrap, at.prefix, empty, SCHEMA)
        assert await differences(at.dsn, empty) == {}


async def test_a_leader_that_lost_its_connection_stores_nothing_and_is_due_again(
    at: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile_daily, "LOOK_S", 0.02)
    monkeypatch.setattr(lone_writer, "STANDBY_S", 0.02)
    killer = await ledger_rig.owner(at.dsn)  # not the observer, which is asking at that moment
    tries = 0

    async def compare(found: Found) -> None:
        nonlocal tries
        tries += 1
        found.compared(Comparison.MIRROR)
        if tries == 1:
            kill = (  # in this database only: other tests share the server
                "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid)"
                " WHERE locktype = 'advisory' AND datname = current_database() AND pid <> pg_backend_pid()"
            )
            await killer.fetch(kill)

    async with at.process() as services:
        task = asyncio.create_task(ReconcileDaily(services, compare, lambda *_: None).work())
        await until(lambda: _ran(at, 1), "the second try is stored")
        assert tries == 2
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await killer.close()


async def test_a_bug_stops_the_worker(at: Ground) -> None:
    async def bug(_: Found) -> None:
        raise ZeroDivisionError

    async with at.process() as services:
        with pytest.raises(ZeroDivisionError):
            await ReconcileDaily(services, bug, lambda *_: None).work()
        assert services.stop.reason is not None
    assert await runs(at) == []


async def _is(holds: bool) -> bool:
    return holds


async def _ran(at: Ground, wanted: int) -> bool:
    return len(await runs(at)) == wanted
