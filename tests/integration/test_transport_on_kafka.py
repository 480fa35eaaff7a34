"""The batched transport on a real broker: worker processes that join, leave, die and crash; nothing lost, all in order."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from tests.support.transport_rig import PARTITIONS, Rig, rig

LONG_S = 60
"""A session that no stall of a busy machine outlasts: where nobody may take over, a rebalance would be a repeat."""
GAPS_MAX = 8
"""Of a second without anything new: some are the machine's."""


@pytest.fixture
async def bench(kafka: Kafka, topic_prefix: str, tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(kafka.bootstrap, f"{topic_prefix}in", tmp_path) as it:
        yield it


async def trickle(bench: Rig, done: asyncio.Event) -> None:
    """Records until `done`, so that whatever happens meanwhile meets work in hand, however slow the machine is."""
    while not done.is_set():
        await bench.produce(40)
        await asyncio.sleep(0.1)


async def test_every_record_is_processed_once_in_order_and_committed(bench: Rig) -> None:
    await bench.produce(2500)
    worker = await bench.worker(session_s=LONG_S)
    await bench.until_all_processed()
    await bench.produce(2500)
    await bench.until_all_processed()
    assert bench.repeats() == 0
    assert await bench.end(worker) == 0


@pytest.mark.parametrize("partition", [0, None], ids=["one_full", "all_full"])
async def test_a_full_buffer_neither_loses_records_nor_waits_a_second(bench: Rig, partition: int | None) -> None:
    await bench.produce(40_000, b"x" * 400, partition)
    await bench.worker(buffer=4, delay_s=0.005, session_s=LONG_S)
    await bench.until_all_processed()
    # 16 fetches of a megabyte, each more than the buffer takes: Faust alone sleeps a second after each. All partitions
    # together are four fetches, too few seconds to tell from a busy machine: there it is that nothing gets lost.
    gaps = bench.lines("G")
    assert partition is None or len(gaps) < GAPS_MAX, gaps
    assert bench.repeats() == 0


async def test_transaction_markers_do_not_hold_the_commit_back(kafka: Kafka, topic_prefix: str, tmp_path: Path) -> None:
    topic = f"{topic_prefix}in"
    async with rig(kafka.bootstrap, topic, tmp_path, transactional_id=f"{topic}-writer") as bench:
        worker = await bench.worker()
        for _ in range(5):
            async with bench.producer.transaction():
                await bench.produce(40)
        await bench.until_all_processed()
        assert bench.produced[0][-1] > 50 - 1, "each transaction leaves a marker at an offset"
        assert await bench.end(worker) == 0


async def test_what_takes_the_place_of_records_that_the_broker_lost_is_read_and_committed(
    tools: Tools, tmp_path: Path
) -> None:
    """As after a leader that was not in sync, or a disk that was lost: offsets that were read and committed are others' now."""
    with Kafka(tmp_path / "kafka", tools) as broker:
        async with rig(broker.bootstrap, "in", tmp_path) as bench:
            await bench.worker(session_s=LONG_S)
            await bench.produce(400, b"old")
            await bench.until_all_processed()
            broker.kill()
            for partition in range(PARTITIONS):
                shutil.rmtree(broker.directory / "node1" / f"in-{partition}")
            broker.start()
            for value, each in (("new", 10), ("newer", 20)):
                await bench.produce(40, value.encode())
                wanted = {(str(n), str(offset)) for n in range(PARTITIONS) for offset in range(each - 10, each)}
                async with asyncio.timeout(100):
                    while {(line[2], line[3]) for line in bench.lines("R") if line[4] == value} != wanted:
                        await asyncio.sleep(0.05)
                    while await bench.committed() != dict.fromkeys(range(PARTITIONS), each):
                        await asyncio.sleep(0.05)


async def test_a_worker_joins_and_one_leaves_and_nothing_is_lost(bench: Rig) -> None:
    first, done = await bench.worker(delay_s=0.05), asyncio.Event()
    await bench.until(lambda: bench.assigned(first) is not None, "the first worker's assignment")
    load = asyncio.create_task(trickle(bench, done))
    second = await bench.worker(delay_s=0.05)
    half = PARTITIONS // 2
    await bench.until(
        lambda: len(bench.assigned(second) or ()) == len(bench.assigned(first) or ()) == half, "a share each"
    )
    before = len(bench.lines("R"))
    await bench.until(lambda: len(bench.lines("R")) > before + 200, "work on both")
    assert await bench.end(first) == 0
    await bench.until(lambda: len(bench.assigned(second) or ()) == PARTITIONS, "the second has all")
    done.set()
    await load
    await bench.until_all_processed()
    assert await bench.end(second) == 0


async def test_a_worker_killed_with_work_in_hand_loses_nothing(bench: Rig) -> None:
    victim, done = await bench.worker(delay_s=0.05), asyncio.Event()
    heir = await bench.worker(delay_s=0.01)
    await bench.until(lambda: bool(bench.assigned(victim)) and bool(bench.assigned(heir)), "both at work")
    load = asyncio.create_task(trickle(bench, done))
    await bench.until(lambda: len(bench.lines("R")) > 400, "work in hand")
    assert await bench.end(victim, signal.SIGKILL) == -signal.SIGKILL
    done.set()
    await load
    await bench.until_all_processed()
    assert await bench.end(heir) == 0


async def test_a_worker_frozen_past_its_session_cannot_move_the_commit(bench: Rig) -> None:
    frozen = await bench.worker(delay_s=0.5)  # not done with all of it before it is frozen, on a busy machine either
    await bench.until(lambda: len(bench.assigned(frozen) or ()) == PARTITIONS, "the assignment")
    await bench.produce(4000)
    await bench.until(lambda: len(bench.lines("R")) > 100, "work in hand")
    frozen.send_signal(signal.SIGSTOP)
    heir = await bench.worker()
    await bench.until(lambda: len(bench.assigned(heir) or ()) == PARTITIONS, "the heir has all")
    await bench.until_all_processed()
    frozen.send_signal(signal.SIGCONT)
    await bench.until(lambda: bool(bench.assigned(heir)) and len(bench.lines("A")) >= 4, "the thawed one joins again")
    await bench.produce(400)
    await bench.until_all_processed()
    assert await bench.end(frozen) == 0
    assert await bench.end(heir) == 0


@pytest.mark.parametrize("table", [False, True], ids=["plain", "with_a_table"])
async def test_a_bug_stops_the_process_and_the_commit_before_the_bad_record(bench: Rig, table: bool) -> None:
    worker = await bench.worker(bug="poison", table=table)
    await bench.until(lambda: bench.assigned(worker) is not None, "an assignment")
    await bench.produce(400)
    await bench.until_all_processed()
    good = await bench.committed()
    await bench.produce(1, b"poison", partition=2)
    await bench.produce(400)
    assert await asyncio.wait_for(worker.wait(), 100) == 70, bench.logs()
    after = await bench.check_commits()
    assert after[2] == good[2], "the commit stands at the record the stage failed on"

    fixed = await bench.worker(table=table)
    await bench.until_all_processed()
    assert await bench.end(fixed) == 0
