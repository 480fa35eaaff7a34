"""Deliveries on a real PostgreSQL: what is acknowledged and told, whatever happens between the two."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from agents.intake import Delivered
from ledger.accounts import spendable
from ledger.errors import DatabaseBehind
from ledger.record import Message, pack, pack_content
from ledger.rows import Connection, Op, Table, block
from ledger.sql import load
from tests.support import ledger_rig
from tests.support.ledger_rig import (
    AT,
    MOVES,
    STAGE,
    WAIT_S,
    Bench,
    assert_holds,
    balance,
    own,
    record,
    records_read,
    until,
)
from topics.envelope import Received

databases, dsn, connection, bench = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection, ledger_rig.bench


async def commits(bench: Bench) -> int:
    """Batches committed, claims aside."""
    found: int = await bench.connection.fetchval("SELECT count(*) FROM audit WHERE summary <> '{\"epoch\": 1}'")
    return found


async def until_rows(bench: Bench, query: str, wanted: int) -> None:
    deadline = asyncio.get_running_loop().time() + WAIT_S
    while await bench.connection.fetchval(query) != wanted:
        assert asyncio.get_running_loop().time() < deadline, f"{query} is not {wanted}"
        await asyncio.sleep(0.01)


def told(bench: Bench) -> list[str]:
    """Ids of the events that were told, in order, without repeats."""
    return list(dict.fromkeys(event_id for topic, event_id in bench.emitter.told() if topic == "test.told"))


def first_times(records: Sequence[tuple[int, bytes]]) -> list[int]:
    return list(dict.fromkeys(seq for seq, _ in records))


# -- the way of a batch ------------------------------------------------------------------------------------------------


async def test_what_is_acknowledged_was_committed_journaled_and_told_in_order(bench: Bench) -> None:
    worker = await bench.start(0, 1)
    await worker.feed(*(record(n, amount=n + 1) for n in range(20)))
    await worker.feed(record(0, "bob", partition=1), record(1, "bob", move="refuse", partition=1))
    await worker.until_acked((0, 19), (1, 1))
    assert told(bench) == [*(f"0/{n}/told" for n in range(20)), "1/0/told"]
    assert bench.emitter.told()[-1] == ("test.moves.dlq", "unwanted")
    assert worker.delivery.positions == {("test.moves", 0): 19, ("test.moves", 1): 1}
    assert (worker.count("done"), worker.count("rejected")) == (21, 1)
    assert worker.delivery.messages_emitted == 22
    await asyncio.wait_for(worker.delivery.drained(), 100)
    await worker.services.relay.close()
    assert await bench.connection.fetchval("SELECT count(*) FROM outbox") == 0
    await assert_holds(bench.connection, emitted=True)


async def test_a_redelivery_to_the_next_worker_changes_nothing(bench: Bench) -> None:
    first = await bench.start()
    await first.feed(record(0), record(1))
    await first.until_acked((0, 1))
    await first.end()
    second = await bench.start()
    await second.feed(record(0), record(1), record(2))
    await second.until_acked((0, 2))
    assert (second.count("repeat"), second.count("done")) == (2, 1)
    assert await balance(bench.connection, spendable("ada")) == 3
    assert told(bench) == ["0/0/told", "0/1/told", "0/2/told"]


async def test_an_event_of_another_stages_is_acknowledged_and_leaves_no_row(bench: Bench) -> None:
    worker = await bench.start(stage=replace(STAGE, takes=lambda event: event.user == "ada"))
    await worker.feed(record(0, "bob"))
    await worker.until_acked((0, 0))
    assert await commits(bench) == 0
    bench.emitter.gate.clear()
    await worker.feed(record(1))
    await worker.feed(record(2, "bob"))
    await worker.feed(record(3, "bob", value=b"{"), record(4, "bob"))  # who knows whose the third is
    await until_rows(bench, "SELECT least(count(*), 1) FROM inbox", 1)
    assert worker.acked == [(0, 0), (0, 2)], "the transport waits for what was delivered before"
    bench.emitter.gate.set()
    await worker.until_acked((0, 4))
    assert worker.acked == [(0, 0), (0, 2), (0, 1), (0, 4)]
    assert worker.delivery.positions == {("test.moves", 0): 4}
    assert [worker.count(outcome) for outcome in ("done", "rejected", "skipped")] == [1, 1, 3]
    assert await bench.connection.fetchval("SELECT count(*) FROM inbox") == 2
    assert told(bench) == ["0/1/told"]
    await assert_holds(bench.connection)


async def test_a_stage_that_prepares_ahead_does_so_while_the_batch_before_commits_and_once_for_each(
    bench: Bench,
) -> None:
    prepared: list[list[str]] = []
    loading, go_on = asyncio.Event(), asyncio.Event()

    async def prepare(events: Sequence[Received]) -> int:
        prepared.append([event.id for event in events])
        return len(prepared)

    async def load(connection: Connection, events: Sequence[Received], number: int, at: Any) -> Any:
        assert [event.id for event in events] == prepared[number - 1], "what was prepared for this batch"
        loading.set()
        await go_on.wait()
        return await STAGE.load(connection, events, None, at)

    worker = await bench.start(stage=replace(STAGE, prepare=prepare, load=load, prepares_ahead=True))
    await worker.feed(record(0))
    await loading.wait()
    await worker.feed(record(1), record(2))
    await until(lambda: len(prepared) == 2, "the second batch is prepared while the first commits")
    assert await bench.connection.fetchval("SELECT count(*) FROM inbox") == 0
    go_on.set()
    await worker.until_acked((0, 2))
    assert prepared == [["0/0"], ["0/1", "0/2"]]
    assert told(bench) == ["0/0/told", "0/1/told", "0/2/told"]
    await asyncio.wait_for(worker.delivery.drained(), 100)
    await assert_holds(bench.connection)


async def test_what_fails_to_prepare_ahead_and_what_is_split_is_prepared_again(bench: Bench) -> None:
    prepared: list[list[str]] = []

    async def prepare(events: Sequence[Received]) -> None:
        prepared.append([event.id for event in events])
        if len(prepared) == 1:
            raise ConnectionError("a node is away")

    worker = await bench.start(stage=replace(STAGE, prepare=prepare, prepares_ahead=True))
    moves = [record(n, amount=9, move="spend") for n in range(20)]  # each is refused: the batch is split
    await worker.feed(*moves)
    await worker.until_acked((0, 19))
    assert len(prepared) > 2
    assert prepared[0] == prepared[1]
    assert worker.count("rejected") == 20
    await assert_holds(bench.connection)


async def test_two_batches_are_in_flight_and_the_third_waits(bench: Bench) -> None:
    worker = await bench.start()
    await worker.feed(record(0))
    await worker.until_acked((0, 0))
    bench.emitter.gate.clear()
    for n in (1, 2, 3):
        await worker.feed(record(n))
        await until_rows(bench, "SELECT count(*) FROM inbox", min(n, 2) + 1)
    await asyncio.sleep(0.1)
    assert await commits(bench) == 3
    assert worker.acked == [(0, 0)]
    assert worker.delivery.oldest_ms is not None
    bench.emitter.gate.set()
    await worker.until_acked((0, 3))
    assert told(bench) == [f"0/{n}/told" for n in range(4)]
    assert worker.acked == [(0, n) for n in range(4)]
    await until(lambda: worker.delivery.oldest_ms is None, "an empty hand")


async def test_the_oldest_event_in_hand_is_told_while_its_batch_commits_and_no_longer(bench: Bench) -> None:
    loading, go_on = asyncio.Event(), asyncio.Event()

    async def load(connection: Connection, events: Sequence[Received], prepared: Any, at: Any) -> Any:
        if any(event.id == "0/1" for event in events):
            loading.set()
            await go_on.wait()
        return await STAGE.load(connection, events, prepared, at)

    worker = await bench.start(stage=replace(STAGE, load=load))
    bench.emitter.gate.clear()
    await worker.feed(record(0))
    await until_rows(bench, "SELECT count(*) FROM inbox", 1)
    await worker.feed(record(1))
    await loading.wait()
    assert worker.delivery.oldest_ms == record(0).timestamp
    bench.emitter.gate.set()
    await worker.until_acked((0, 0))
    await worker.feed(record(2))
    assert worker.delivery.oldest_ms == record(1).timestamp, (
        "the batch before is finished, nothing is queued but the next"
    )
    go_on.set()
    await worker.until_acked((0, 2))
    await until(lambda: worker.delivery.oldest_ms is None, "an empty hand")


@pytest.mark.parametrize("limits", [{"events_max": 10}, {"events_max": 2_000, "bytes_max": 400}])
async def test_a_batch_stays_within_its_limits(bench: Bench, limits: dict[str, int]) -> None:
    worker = await bench.start(**limits)
    bench.emitter.gate.clear()
    for n in range(2):  # as many batches as may be in flight: the rest has to wait, and waits together
        await worker.feed(record(n))
    await until_rows(bench, "SELECT count(*) FROM inbox", 2)
    for first, end in [*((n, n + 6) for n in range(2, 62, 6)), (62, 100)]:
        await worker.feed(*(record(n) for n in range(first, end)))
    bench.emitter.gate.set()
    await worker.until_acked((0, 99))
    await until(lambda: len(told(bench)) == 100, "every message")
    sizes = [
        row[0]
        for row in await bench.connection.fetch("SELECT (summary->>'done')::int FROM audit WHERE summary ? 'done'")
    ]
    assert sum(sizes) == 100
    if "bytes_max" in limits:
        assert max(sizes) < 50, "no more runs once the limit is reached"
    else:
        assert max(sizes) <= 10


async def test_a_lost_answer_of_the_broker_journals_again_and_tells_once(bench: Bench) -> None:
    worker = await bench.start()
    await worker.feed(record(0))
    await worker.until_acked((0, 0))
    bench.emitter.failures = 2
    await worker.feed(record(1))
    await worker.until_acked((0, 1))
    assert len(bench.emitter.journaled) == 3 + 2
    assert len(first_times(bench.emitter.journaled)) == 3
    assert [event_id for _, event_id in bench.emitter.told()] == ["0/0/told", "0/1/told"]


# -- crashes -----------------------------------------------------------------------------------------------------------


async def test_what_a_crash_left_untold_is_told_by_the_next_owner_before_anything_new(bench: Bench) -> None:
    first = await bench.start()
    bench.emitter.gate.clear()
    await first.feed(record(0), record(1, move="refuse"))
    await until(lambda: len(first_times(bench.emitter.journaled)) == 2, "the journal")
    await first.end()
    bench.emitter.gate.set()
    second = await bench.start()
    await second.feed(record(1, move="refuse"), record(2))
    await second.until_acked((0, 2))
    assert [what for _, what in bench.emitter.told()] == ["0/0/told", "unwanted", "0/2/told"]
    await assert_holds(bench.connection)


async def test_what_a_crash_left_untold_is_read_some_at_a_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it may be more than a process has room for."""
    first = await bench.start(events_max=1, in_flight=5)
    bench.emitter.gate.clear()
    await first.feed(*(record(offset) for offset in range(5)))
    await until(lambda: len(first_times(bench.emitter.journaled)) == 6, "the journal")
    await first.end()
    bench.emitter.gate.set()
    read = records_read(monkeypatch, load("ledger", "sql/journal.sql").left_by_partitions)
    largest = max(len(packed) for _, packed in bench.emitter.journaled)
    monkeypatch.setattr("ledger.journal.BYTES_AT_ONCE", largest * 3 // 2)
    second = await bench.start()
    await second.feed(record(5))
    await second.until_acked((0, 5))
    assert [what for _, what in bench.emitter.told()] == [f"0/{offset}/told" for offset in range(6)]
    assert max(len(some) for some in read) == 2
    await assert_holds(bench.connection)


async def test_what_a_newer_programs_owner_left_is_told_also_where_its_tables_are_not_known(bench: Bench) -> None:
    newer = block(Table("of_tomorrow", ("id",), "id:text"), Op.INSERT, [("1",)])
    content, _ = pack_content([newer], [Message("test.told", b"k", b"v", "left", "test")])
    await bench.connection.execute(
        "INSERT INTO outbox (stage, topic, partitions, at, journaled, record) VALUES ($1, $2, '{0}', $3, true, $4)",
        *(STAGE.name, MOVES.name, AT, pack(STAGE.name, MOVES.name, AT, content, [])),
    )
    worker = await bench.start()
    await worker.feed(record(0))
    await worker.until_acked((0, 0))
    assert told(bench) == ["left", "0/0/told"]


async def test_a_database_that_turns_out_to_be_behind_stops_the_process_and_is_no_events_fault(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found after a lost connection, when what may have been committed is to be finished."""

    async def journal(*_: Any, **__: Any) -> None:
        raise DatabaseBehind(7, AT)

    worker = await bench.start()
    await worker.feed(record(0))
    await worker.until_acked((0, 0))
    monkeypatch.setattr(worker.services.relay, "journal", journal)
    worker.delivery._in_doubt = True
    await worker.feed(record(1))
    assert "rebuild --take-over" in await worker.until_stopped()
    assert await bench.connection.fetchval("SELECT count(*) FROM crashes") == 0
    assert worker.acked == [(0, 0)]


async def test_a_poison_event_stops_the_process_twice_then_is_a_dead_letter_and_its_neighbours_are_settled(
    bench: Bench,
) -> None:
    run = [record(0), record(1), record(2, move="crash"), record(3, "bob"), record(4)]
    for _ in range(2):
        worker = await bench.start()
        await worker.feed(*run)
        assert "ZeroDivisionError" in await worker.until_stopped()
        assert worker.acked == []
        assert worker.services.unready == {"test_stage": "bug"}
        await worker.end()
    assert await bench.outcomes() == ["done", "done"], "those before it"
    worker = await bench.start()
    await worker.feed(*run)
    await worker.until_acked((0, 4))
    assert not worker.services.stop.stopping
    assert told(bench) == ["0/0/told", "0/1/told", "0/3/told", "0/4/told"]
    letters = [m for m in bench.emitter.messages if m.topic == "test.moves.dlq"]
    assert [(m.value, dict(m.headers or ())["dlq_code"]) for m in letters] == [(run[2].value, b"bug")]
    assert await bench.connection.fetchval('SELECT count FROM crashes WHERE "offset" = 2') == 3
    await assert_holds(bench.connection)


async def test_another_event_where_one_crashed_before_begins_its_count_anew(bench: Bench) -> None:
    """The topic was made anew. What a program of before has counted is of whatever stands there."""
    before = 'INSERT INTO crashes (stage, topic, partition, "offset", count, error, last_at) VALUES'
    await bench.connection.execute(f"{before} ($1, $2, 0, 0, 1, 'E', $3)", STAGE.name, MOVES.name, AT)
    first, second = record(0, move="crash"), record(0, "bob", move="crash")
    for event, count in ((first, 2), (second, 1), (second, 2)):
        worker = await bench.start()
        await worker.feed(event)
        assert "ZeroDivisionError" in await worker.until_stopped()
        await worker.end()
        assert await bench.connection.fetchval("SELECT count FROM crashes") == count
    worker = await bench.start()
    await worker.feed(second)
    await worker.until_acked((0, 0))
    letters = [m for m in bench.emitter.messages if m.topic == "test.moves.dlq"]
    assert [dict(m.headers or ())["dlq_code"] for m in letters] == [b"bug"]


async def test_many_refusals_in_a_batch_are_settled_in_smaller_ones(bench: Bench) -> None:
    worker = await bench.start()
    await worker.feed(*(record(n, move="spend" if n % 2 else "credit", amount=1 + n % 2) for n in range(60)))
    await worker.until_acked((0, 59))
    assert worker.count("done") + worker.count("rejected") == 60
    assert worker.count("rejected") == 15, "every fourth finds two"
    assert await balance(bench.connection, spendable("ada")) == 0
    await assert_holds(bench.connection)


async def test_a_partition_that_went_and_came_back_while_it_was_claimed_is_claimed_again(bench: Bench) -> None:
    """Kafka is slow to take the claim; meanwhile the group gives the partition to another worker, and back."""
    claimed, go_on = asyncio.Event(), asyncio.Event()

    class Slow(ledger_rig.FakeEmitter):
        async def journal(self, records: Sequence[tuple[int, bytes]], untold: int) -> None:
            claimed.set()
            await go_on.wait()
            await super().journal(records, untold)

    worker = await bench.start(emitter=Slow())
    await claimed.wait()
    worker.delivery.revoked({(MOVES.name, 0)})
    await own(bench.connection)
    worker.delivery.assigned({(MOVES.name, 0)})
    go_on.set()
    await worker.feed(record(0))
    await worker.until_acked((0, 0))
    assert worker.delivery._fenced is None


async def test_what_anybody_outside_can_cause_blows_no_fuse(bench: Bench) -> None:
    stage = replace(STAGE, bystanders=frozenset({"unwanted"}))
    worker = await bench.start(stage=stage, fuse_run=5)
    await worker.feed(*(record(n, move="refuse") for n in range(20)), record(20))
    await worker.until_acked((0, 20))
    assert worker.services.unready == {}
    assert Counter(await bench.outcomes()) == {"rejected": 20, "done": 1}


async def test_a_fuse_stops_the_stage_before_it_commits(bench: Bench) -> None:
    worker = await bench.start(fuse_run=5)
    await worker.feed(*(record(n, move="refuse") for n in range(5)))
    await worker.until_acked((0, 4))
    await worker.feed(record(5, move="refuse"))
    await until(lambda: worker.services.unready, "the fuse")
    assert worker.services.unready == {"test_stage": "fuse: 6 refusals in a row; at most 5"}
    await worker.feed(record(6))
    await asyncio.sleep(0.1)
    assert worker.acked == [(0, 4)]
    assert await bench.outcomes() == ["rejected"] * 5
    assert not worker.services.stop.stopping
    async with asyncio.timeout(100):
        await worker.delivery.drained()  # a graceful stop has nothing to wait for
    assert worker.services.observer.registry.get_sample_value("stablerail_fuse_blown", {"stage": "test_stage"}) == 1  # type: ignore[attr-defined]


async def test_what_was_committed_of_a_batch_is_told_although_its_rest_blows_the_fuse(bench: Bench) -> None:
    worker = await bench.start(fuse_run=5)
    moves = ["credit"] * 10 + ["spend"] * 10  # each of these is refused: the batch is split
    await worker.feed(*(record(n, amount=1 if move == "credit" else 99, move=move) for n, move in enumerate(moves)))
    await until(lambda: worker.services.unready, "the fuse")
    await until(lambda: len(bench.emitter.told()) == 15, "what was committed")
    assert told(bench) == [f"0/{n}/told" for n in range(10)]
    assert worker.acked == []
    async with asyncio.timeout(100):
        await worker.delivery.drained()
    await assert_holds(bench.connection)


async def test_an_unexpected_error_outside_an_event_stops_the_process(bench: Bench) -> None:
    worker = await bench.start()
    run: Any = SimpleNamespace(topic="", partition=0, records=[])  # the transport never brings an empty one
    await worker.delivery._intake._incoming.put(Delivered(run, lambda: None))
    assert "IndexError" in await worker.until_stopped()
