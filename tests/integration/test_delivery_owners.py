"""Deliveries on a real PostgreSQL where connections die, rows are locked, and two workers are at the same accounts or partition."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from agents.stage import settle
from ledger.accounts import buffer, spendable
from ledger.rows import Connection
from tests.integration.test_delivery_worker import told, until_rows
from tests.support import ledger_rig
from tests.support.ledger_rig import (
    AT,
    MOVES,
    POOL,
    STAGE,
    Bench,
    Worker,
    assert_holds,
    balance,
    connect_to,
    items,
    own,
    record,
    until,
)
from topics.envelope import Received

databases, dsn, connection, bench = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection, ledger_rig.bench


# -- the database ------------------------------------------------------------------------------------------------------


async def kill_backends(bench: Bench) -> int:
    rows = await bench.connection.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'stablerail' AND pid <> pg_backend_pid()"
    )
    return len(rows)


async def test_killed_connections_lose_nothing_and_double_nothing(bench: Bench) -> None:
    worker = await bench.start(events_max=5)
    killed = 0
    for n in range(150):
        await worker.feed(record(n, f"user{n % 7}"))
        if n % 30 == 10:
            await until(lambda n=n: len(worker.acked) > n - 10, "some progress")
            killed += await kill_backends(bench)
    await worker.until_acked((0, 149))
    assert killed >= 5
    assert told(bench) == [f"0/{n}/told" for n in range(150)]
    assert await balance(bench.connection, POOL) == -150
    assert not worker.services.stop.stopping
    await assert_holds(bench.connection)


async def test_a_commit_whose_answer_was_lost_while_it_was_still_running_is_told_before_it_is_acknowledged(
    bench: Bench,
) -> None:
    """The server may commit after the client has lost it and come back: all events are repeats then."""
    other: Connection = await connect_to(bench.dsn)()
    begun = other.transaction()
    lost = False

    async def prepare(_events: Sequence[Received]) -> Any:
        nonlocal lost
        if not lost:
            lost = True
            await begun.start()
            epochs = dict(worker.delivery._epochs)
            await settle(other, STAGE, items(record(0)), epochs, AT, None)
            worker.delivery._connection.terminate()  # type: ignore[union-attr]

    worker = await bench.start(stage=replace(STAGE, prepare=prepare))
    await worker.feed(record(0))
    await until_rows(
        bench,
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()",
        1,
    )
    await begun.commit()
    await other.close()
    await worker.until_acked((0, 0))
    assert told(bench) == ["0/0/told"]
    assert worker.count("repeat") == 1


async def test_a_row_that_is_locked_too_long_is_waited_for(bench: Bench) -> None:
    worker = await bench.start(lock_timeout_s=0.05)
    await worker.feed(record(0))
    await worker.until_acked((0, 0))
    async with bench.connection.transaction():
        await bench.connection.execute("SELECT 1 FROM accounts FOR UPDATE")
        await worker.feed(record(1))
        await asyncio.sleep(0.3)
        assert worker.acked == [(0, 0)]
    await worker.until_acked((0, 1))
    assert await balance(bench.connection, spendable("ada")) == 2


async def busy(bench: Bench, moves: str, rounds: int, **changes: Any) -> list[Worker]:
    """Two workers at once, each with its own partition, over the same accounts in opposite order."""
    workers = [await bench.start(partition, **changes) for partition in (0, 1)]
    for n in range(rounds):
        for partition, worker in enumerate(workers):
            names = [f"user{n}", f"user{n + 1}"]
            name, note = names if partition else reversed(names)
            await worker.feed(record(n, name, 2, moves, note=note, partition=partition))
    for partition, worker in enumerate(workers):
        await worker.until_acked((partition, rounds - 1))
        assert not worker.services.stop.stopping
    return workers


async def test_two_workers_that_make_and_move_the_same_accounts_end_with_the_right_sums(bench: Bench) -> None:
    await busy(bench, "cross", 40, events_max=3)
    assert await balance(bench.connection, buffer()) == -40 * 2 * 4
    assert await balance(bench.connection, spendable("user0")) == 4
    assert await balance(bench.connection, spendable("user20")) == 8
    await assert_holds(bench.connection)


async def test_two_workers_share_a_hot_account(bench: Bench) -> None:
    workers = [await bench.start(partition, events_max=50) for partition in (0, 1)]
    for partition, worker in enumerate(workers):
        for start in range(0, 500, 50):
            await worker.feed(
                *(record(n, f"u{n % 9}-{partition}", partition=partition) for n in range(start, start + 50))
            )
    for partition, worker in enumerate(workers):
        await worker.until_acked((partition, 499))
    assert await balance(bench.connection, POOL) == -1_000
    lines = await bench.connection.fetchval("SELECT count(*) FROM entries WHERE account_id = $1", POOL.id)
    assert lines == 1_000
    for partition in (0, 1):
        mine = [event_id for event_id in told(bench) if event_id.startswith(f"{partition}/")]
        assert mine == [f"{partition}/{n}/told" for n in range(500)]
    await assert_holds(bench.connection)


async def test_two_workers_that_get_the_same_event_by_two_partitions_settle_it_once(bench: Bench) -> None:
    workers = [await bench.start(partition) for partition in (0, 1)]
    for n in range(30):
        for partition, worker in enumerate(workers):
            await worker.feed(record(n, f"user{n}", id=f"same{n}", partition=partition))
    for partition, worker in enumerate(workers):
        await worker.until_acked((partition, 29))
    assert sum((Counter({k: w.count(k) for k in ("done", "repeat")}) for w in workers), Counter()) == {
        "done": 30, "repeat": 30,
    }  # fmt: skip
    assert await balance(bench.connection, POOL) == -30


# -- who owns what -----------------------------------------------------------------------------------------------------


async def test_a_fenced_worker_writes_nothing_acknowledges_nothing_and_stops(bench: Bench) -> None:
    old = await bench.start(0, 1, fenced_s_max=0.5)
    await old.feed(record(0), record(0, "bob", partition=1))
    await old.until_acked((0, 0), (1, 0))
    new = await bench.start(1)
    await new.feed(record(1, "bob", partition=1))
    await new.until_acked((1, 1))
    await old.feed(record(1), record(1, "bob", partition=1), record(2, "bob", partition=1))
    await old.until_acked((0, 1))
    assert "fenced" in await old.until_stopped()
    assert set(old.acked) == {(0, 0), (1, 0), (0, 1)}
    assert old.delivery.held() == {("test.moves", 0)}
    assert await balance(bench.connection, spendable("bob")) == 2
    await assert_holds(bench.connection)


async def test_a_fenced_worker_that_is_assigned_again_goes_on(bench: Bench) -> None:
    worker = await bench.start()
    await worker.feed(record(0))
    await worker.until_acked((0, 0))
    await own(bench.connection)
    await worker.feed(record(1))
    await until(lambda: worker.delivery._fenced is not None, "the fence")
    stops = worker.delivery._fenced
    worker.delivery.assigned({(MOVES.name, 0)})
    assert stops is not None
    assert stops.cancelled(), "what would stop the process, had no assignment come"
    await worker.feed(record(1))
    await worker.until_acked((0, 1))
    assert not worker.services.stop.stopping
    assert worker.acked == [(0, 0), (0, 1)]


async def test_records_of_a_partition_that_went_away_are_dropped(bench: Bench) -> None:
    worker = await bench.start(0, 1)
    await worker.feed(record(0))
    await worker.until_acked((0, 0))
    worker.delivery.revoked({(MOVES.name, 1)})
    await worker.feed(record(0, "bob", partition=1), record(1))
    await worker.until_acked((0, 1))
    assert worker.acked == [(0, 0), (0, 1)]
    assert await balance(bench.connection, spendable("bob")) is None


async def test_an_assignment_bumps_the_epoch_of_what_is_new_only(bench: Bench) -> None:
    worker = await bench.start(0)
    await worker.feed(record(0))
    await worker.until_acked((0, 0))
    worker.delivery.assigned({(MOVES.name, 0), (MOVES.name, 1)})
    await worker.feed(record(0, partition=1))
    await worker.until_acked((1, 0))
    rows = await bench.connection.fetch("SELECT partition, epoch FROM owners ORDER BY partition")
    assert [tuple(row) for row in rows] == [(0, 1), (1, 1)]
