"""kill -9 of the real worker at each boundary of a stage, and the loss of a connection there.

A proxy holds exactly the request, or the reply, that the boundary is made of. Each test first looks at what a worker
that died there leaves behind, then lets another worker finish, and compares everything that was ever sent with the
database, the ledger, the journal and what was told. The tests share one database, so each crash adds to the ones before.
So do a worker's coming and going under load.
"""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass

import pytest

from tests.support import crash_points
from tests.support.crash_points import Point, commit, journal
from tests.support.crash_rig import STAGES, CrashRig, Found, Sent
from tests.support.proxies import Frame, Hold, Match, commit_after, offset_commit, produce, sql_contains
from tests.support.worker_rig import PATIENCE_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

rigs, rig = crash_points.rigs, crash_points.rig
SETTINGS = {
    "STABLERAIL_KAFKA_SESSION_TIMEOUT_S": "2",
    "STABLERAIL_DATABASE_IDLE_TIMEOUT_S": "60",  # a held statement is not a frozen worker here
}
MARK = "UPDATE outbox SET journaled"
_IN_THE_LEDGER = """
SELECT d.tx_hash FROM deposits d
JOIN accounts a ON a.owner = d.user_id AND a.type = 'usdc_balance'
JOIN transactions t ON t.reference = replace(d.id::text, '-', '')
JOIN entries e ON e.account_id = a.id AND e.transaction_id = t.id
WHERE d.recipient = $1 ORDER BY e.version
"""


@dataclass(frozen=True)
class Boundary(Point):
    """Where a worker dies, and how the frame that is held looks."""

    kind: str


def _mark(_rig: CrashRig) -> Match:
    return lambda frame: frame.kind == "WITH" and sql_contains(MARK)(frame)


def _mark_commit(_rig: CrashRig) -> Match:
    return commit_after(MARK)


def _emit(rig: CrashRig) -> Match:
    return produce(rig.topic("deposits.credited"))


def _ack(rig: CrashRig) -> Match:
    return offset_commit(rig.group)


COMMITTED = Found(committed=True)
JOURNALED = Found(committed=True, journaled=True)
MARKED = Found(committed=True, journaled=True, marked=True)
TOLD = Found(committed=True, journaled=True, marked=True, told=True)
ACKED = Found(committed=True, journaled=True, marked=True, told=True, acked=True)
UNMARKED = Found(committed=True, journaled=True, marked=False, told=True, acked=True)
"""What is in the journal is told beside the mark."""

COMMIT_REQUEST = Boundary("before the commit", "postgres", "request", commit, Found(), "COMMIT")
COMMIT_REPLY = Boundary("committed, the reply lost", "postgres", "reply", commit, COMMITTED, "COMMIT")
JOURNAL_REQUEST = Boundary("before the journal", "kafka", "request", journal, COMMITTED, "Produce")
JOURNAL_REPLY = Boundary("journaled, the reply lost", "kafka", "reply", journal, JOURNALED, "Produce")
MARK_REQUEST = Boundary("before the relay's mark", "postgres", "request", _mark, UNMARKED, "WITH")
MARK_COMMIT_REQUEST = Boundary("before the mark's commit", "postgres", "request", _mark_commit, UNMARKED, "COMMIT")
MARK_COMMIT_REPLY = Boundary("marked, the reply lost", "postgres", "reply", _mark_commit, ACKED, "COMMIT")
EMIT_REQUEST = Boundary("before telling", "kafka", "request", _emit, MARKED, "Produce")
EMIT_REPLY = Boundary("told, the reply lost", "kafka", "reply", _emit, TOLD, "Produce")
ACK_REQUEST = Boundary("before the acknowledgement", "kafka", "request", _ack, TOLD, "OffsetCommit")
ACK_REPLY = Boundary("acknowledged, the reply lost", "kafka", "reply", _ack, ACKED, "OffsetCommit")
BOUNDARIES = [
    COMMIT_REQUEST,
    COMMIT_REPLY,
    JOURNAL_REQUEST,
    JOURNAL_REPLY,
    MARK_REQUEST,
    MARK_COMMIT_REQUEST,
    MARK_COMMIT_REPLY,
    EMIT_REQUEST,
    EMIT_REPLY,
    ACK_REQUEST,
    ACK_REPLY,
]


async def held_at(rig: CrashRig, boundary: Boundary) -> tuple[Hold, list[Sent], Frame]:
    """The worker with one batch stopped at the boundary, and more deposits waiting behind it; where it can, it has
    committed some of those too."""
    hold = boundary.hold(rig)
    batch = await rig.deposit_together()
    frame = await hold.wait_hit_async(PATIENCE_S)
    behind = await rig.deposit_everywhere()
    if boundary not in (COMMIT_REQUEST, COMMIT_REPLY):

        async def second_batch() -> int:
            return await rig.committed(behind)

        await rig.until(second_batch, "another batch is in flight behind the held one")
    if boundary.kind != "OffsetCommit":
        await rig.time_to_acknowledge()
    await rig.until_at(boundary.leaves, batch, f"{boundary} leaves what it must")
    return hold, batch, frame


@pytest.mark.parametrize("boundary", BOUNDARIES, ids=str)
async def test_a_worker_killed_at_a_boundary_loses_nothing_and_repeats_nothing(
    rig: CrashRig, boundary: Boundary
) -> None:
    hold, batch, frame = await held_at(rig, boundary)

    rig.worker.kill()
    assert not hold.release(), "a dead client's packet does not go on"

    assert frame.kind == boundary.kind
    assert await rig.found(batch) == boundary.leaves
    rig.start_worker()
    await rig.check()


@pytest.mark.parametrize(
    "boundary", [COMMIT_REQUEST, COMMIT_REPLY, JOURNAL_REPLY, MARK_COMMIT_REPLY, EMIT_REPLY, ACK_REQUEST], ids=str
)
async def test_a_connection_lost_at_a_boundary_is_survived_by_the_same_worker(
    rig: CrashRig, boundary: Boundary
) -> None:
    hold, _batch, frame = await held_at(rig, boundary)

    hold.drop()

    assert frame.kind == boundary.kind
    await rig.check()
    assert rig.worker.returncode is None


async def test_a_commit_that_arrives_after_its_worker_died_is_told_by_the_next(rig: CrashRig) -> None:
    hold, batch, _ = await held_at(rig, COMMIT_REQUEST)
    rig.worker.kill()
    before = await rig.epochs()

    rig.start_worker()
    await rig.until(rig.waits_for_lock, "the next owner waits for the rows that the commit holds")
    after = await rig.epochs()
    assert [key for key in before if key[0] == "credit_deposits" and after[key] != before[key]] == []
    assert await rig.found(batch) == Found()
    assert hold.release(even_if_gone=True)

    await rig.check()


async def test_a_commit_record_that_reaches_the_journal_after_its_worker_died_is_a_repeat(rig: CrashRig) -> None:
    hold, _, _ = await held_at(rig, JOURNAL_REQUEST)
    records = len(await rig.journal())
    # the dead worker's lock on the relay goes with its connection, its packet to the broker is still on the way
    rig.worker.kill()

    rig.start_worker()
    await rig.until_settled()
    before = await rig.journal()
    assert hold.release(even_if_gone=True)

    known = {seq for seq, _ in before}

    async def arrived() -> bool:  # others may come: a claim is a commit too
        return any(seq in known for seq, _ in (await rig.journal())[len(before) :])

    await rig.until(arrived, "the late record is in the journal once more")
    assert records < len(before)
    await rig.check()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (JOURNAL_REQUEST, JOURNAL_REQUEST),
        (JOURNAL_REQUEST, EMIT_REPLY),
        (EMIT_REQUEST, EMIT_REQUEST),
    ],
    ids=str,
)
async def test_a_worker_killed_while_it_finishes_what_another_left_loses_nothing(
    rig: CrashRig, first: Boundary, second: Boundary
) -> None:
    hold, batch, _ = await held_at(rig, first)
    rig.worker.kill()
    hold.release()
    assert await rig.found(batch) == first.leaves

    before = await rig.epochs()
    hold = second.hold(rig)
    rig.start_worker()
    await hold.wait_hit_async(PATIENCE_S)

    async def owned() -> bool:
        after = await rig.epochs()
        return any(after[key] > before[key] for key in before)

    await rig.until(owned, "it is killed as the owner")  # a lone writer of the same worker may have been first there
    if second.where == "request":
        await rig.until_at(second.leaves, batch, f"{second} leaves what it must")
    rig.worker.kill()
    hold.release()

    if second.where == "request":
        assert await rig.found(batch) == second.leaves
    rig.start_worker()
    await rig.check()


async def test_a_worker_told_to_stop_finishes_what_is_in_flight(rig: CrashRig) -> None:
    assert rig.worker.stop(timeout_s=PATIENCE_S) == 0
    before = await rig.epochs()
    rig.start_worker(STABLERAIL_KAFKA_SESSION_TIMEOUT_S="20")  # who lost its session cannot acknowledge
    await rig.until_owned(before)
    hold, batch, _ = await held_at(rig, EMIT_REQUEST)
    rig.worker.send_signal(signal.SIGTERM)
    assert hold.release()

    assert rig.worker.wait(PATIENCE_S) == 0
    assert await rig.found(batch) == ACKED
    rig.start_worker()
    await rig.check()


async def test_a_second_worker_that_joins_and_leaves_under_load_keeps_every_wallets_order(rig: CrashRig) -> None:
    first, ended = rig.worker, asyncio.Event()

    async def pay_on() -> None:
        while not ended.is_set():
            await rig.deposit_everywhere(1)
            await asyncio.sleep(0.02)  # a load, not a backlog that would take minutes to settle

    paying = asyncio.create_task(pay_on())
    second = rig.start_worker()

    async def shared() -> bool:
        return await rig.members() == 2 and second.log.read_text().count('"stage.owns"') >= len(STAGES)

    await rig.until(shared, "the second has its share")
    sent = list(rig.sent)

    async def settled() -> bool:
        return await rig.committed(sent) == len(sent)

    await rig.until(settled, "the two settle what comes")
    assert await asyncio.to_thread(second.stop, timeout_s=PATIENCE_S) == 0
    sent = list(rig.sent)
    await rig.until(settled, "the one settles what comes")
    ended.set()
    await paying
    rig.workers.append(first)

    await rig.check()  # nothing lost or twice, and every wallet's credits were told in the order they were sent
    for wallet in rig.wallets:
        rows = await rig.database.fetch(_IN_THE_LEDGER, wallet)
        assert [row[0] for row in rows] == [each.tx_hash for each in rig.sent if each.wallet == wallet]
