"""A worker that stands still (SIGSTOP) where it holds what others need, and wakes after another took its partitions.

The other goes on within seconds, because the server ends a transaction that nobody continues. The woken one can do no
harm: its commits are refused by the epoch, and all that it can still say was committed.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from agents.crash import EXIT_BUG
from tests.support import crash_points
from tests.support.crash_points import Point, commit, journal
from tests.support.crash_rig import CrashRig, Found
from tests.support.proxies import Hold, Match, commit_after, sql_contains
from tests.support.warm import WarmChild
from tests.support.worker_rig import PATIENCE_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

rigs, rig = crash_points.rigs, crash_points.rig
SETTINGS = {
    "STABLERAIL_KAFKA_SESSION_TIMEOUT_S": "3",
    "STABLERAIL_DATABASE_IDLE_TIMEOUT_S": "10",  # on a busy machine as well it is frozen before its transaction is ended
    "STABLERAIL_DATABASE_LOCK_TIMEOUT_S": "1",
}


@dataclass(frozen=True)
class Frozen(Point):
    """Where the worker stops. `late`: what is held goes on only after the other has finished."""

    late: bool = False


def _statement(text: str) -> Callable[[CrashRig], Match]:
    return lambda _rig: sql_contains(text)


COMMITTED = Found(committed=True)
ACCOUNTS_LOCKED = Frozen("accounts locked", "postgres", "reply", _statement("JOIN accounts a ON a.id = x.id"), Found())
FREEZES = [
    ACCOUNTS_LOCKED,
    Frozen("rows written", "postgres", "reply", _statement("INSERT INTO entries"), Found()),
    Frozen("its commit on the way", "postgres", "request", commit, Found(), late=True),
    Frozen("relay locked", "postgres", "reply", _statement("FROM relay WHERE id = 1 FOR UPDATE"), COMMITTED),
    Frozen("relay locked, its record on the way", "kafka", "request", journal, COMMITTED, late=True),
]


async def freeze(rig: CrashRig, point: Frozen) -> tuple[WarmChild, Hold]:
    """The worker stopped in the middle of a batch, its locks held, with more deposits of the same wallet in hand."""
    frozen = rig.worker
    hold = point.hold(rig)
    batch = await rig.deposit_together()
    await hold.wait_hit_async(PATIENCE_S)
    await rig.deposit_together()
    fetches = rig.kafka.hits["Fetch"]

    async def fetched() -> bool:
        return rig.kafka.hits["Fetch"] > fetches + 3

    await rig.until(fetched, "the worker has read them")
    frozen.send_signal(signal.SIGSTOP)
    if not point.late:
        assert hold.release(), "the bytes are in its socket; it does not read them"
    assert await rig.open_transactions() >= 1
    assert await rig.found(batch) == point.leaves
    await rig.deposit_everywhere()
    return frozen, hold


async def until_back_or_ended(rig: CrashRig, woken: WarmChild) -> None:
    """A fenced worker joins the group again, or ends itself for its supervisor to start another."""

    async def back_or_ended() -> bool:
        return woken.returncode is not None or await rig.members() == 2

    await rig.until(back_or_ended, "the woken worker is back in the group or has ended")
    assert woken.returncode in (None, EXIT_BUG)


async def retire(rig: CrashRig, worker: WarmChild) -> None:
    """Stops the one of two workers; the other owns everything again."""
    if worker.returncode is None:
        before = await rig.epochs()
        assert worker.stop(timeout_s=PATIENCE_S) == 0
        await rig.until_owned(before)


@pytest.mark.parametrize("point", FREEZES, ids=str)
async def test_a_worker_frozen_with_its_locks_delays_the_next_for_seconds_and_does_no_harm_when_it_wakes(
    rig: CrashRig, point: Frozen
) -> None:
    frozen, hold = await freeze(rig, point)

    rig.start_worker()
    await rig.until_settled()

    if point.late:
        hold.release()
    frozen.send_signal(signal.SIGCONT)
    await rig.deposit_everywhere()
    await until_back_or_ended(rig, frozen)
    await rig.deposit_everywhere()
    await rig.check()
    await retire(rig, frozen)


async def test_a_worker_that_wakes_alone_acknowledges_nothing_that_another_began(rig: CrashRig) -> None:
    frozen, _ = await freeze(rig, ACCOUNTS_LOCKED)
    hold = rig.postgres.hold(commit_after("INSERT INTO inbox", "INSERT INTO outbox"))
    before = await rig.epochs()
    rig.start_worker()
    await hold.wait_hit_async(PATIENCE_S)

    async def owns_all() -> bool:  # each stage by itself: one may be at its first commit while the other still claims
        return all(epoch > before[key] for key, epoch in (await rig.epochs()).items())

    await rig.until(owns_all, "the new worker owns every partition of every stage")
    rig.worker.kill()
    hold.release()

    async def empty() -> bool:
        return await rig.members() == 0

    await rig.until(empty, "Kafka has given both up")
    frozen.send_signal(signal.SIGCONT)

    await rig.check()
    assert frozen.returncode is None, "fenced, it goes on with what Kafka gives it back"
    rig.workers.append(frozen)
