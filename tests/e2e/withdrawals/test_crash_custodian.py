"""kill -9 of the real worker at each boundary of the rail `circle`: Circle is asked for each transfer once, whatever it makes of it,
and every withdrawal is settled or given back, once, and told.

Notifications are signed by Circle's sandbox and arrive at the bridge, over HTTP. Not here: the relay's marks, which are the same
for every stage (the files beside this one), and where the next owner finds what it finds at another point of the list.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import pytest_asyncio

from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from tests.support import withdrawal_points
from tests.support.crash_rig import Rigs
from tests.support.proxies import Frame, Hold, Match, Proxy, Where, commit_after, http_request, produce
from tests.support.transfer_rig import PAID, PATH, REFUSED, TransferRig
from tests.support.withdrawal_points import SETTINGS, commit_of
from tests.support.withdrawal_rig import withdrawal_rig
from tests.support.worker_rig import PATIENCE_S
from topics.catalog import JOURNAL, TRANSFERS_NOTIFIED

pytestmark = pytest.mark.asyncio(loop_scope="module")

rig = withdrawal_points.rig

CALLS = {
    "STABLERAIL_CALL_TIMEOUT_S": "1.5",
    "STABLERAIL_CALL_LEASE_S": "2",
    "STABLERAIL_CALL_POLL_INTERVAL_S": "0.1",
    "STABLERAIL_CALL_RETRY_FIRST_S": "0.1",
}
DENIED = "denied"
FAILED = "failed after it was sent, and paid"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rigs(scratch: Path, postgres: Postgres, kafka: Kafka, tools: Tools) -> AsyncIterator[Rigs[TransferRig]]:
    rigs = Rigs(partial(withdrawal_rig, scratch, postgres, kafka, tools, {**SETTINGS, **CALLS}, TransferRig))
    yield rigs
    await rigs.close()


@dataclass(frozen=True)
class Point:
    """The request or reply that is held; `behind`: it is the first of its kind after this commit, which is held until all else
    is quiet."""

    name: str
    proxy: Literal["postgres", "kafka", "rpc", "api"]
    where: Where
    match: Callable[[TransferRig], Match]
    kinds: tuple[str, ...] = (PAID, DENIED)
    behind: Callable[[], Match] | None = None

    def __str__(self) -> str:
        return self.name if self.kinds[0] == PAID else f"{self.name}, {self.kinds[0]}"

    def hold(self, rig: TransferRig) -> Hold:
        proxies: dict[str, Proxy] = {"postgres": rig.postgres, "kafka": rig.kafka, "rpc": rig.rpc, "api": rig.api}
        hold = proxies[self.proxy].hold(self.match(rig), self.where)
        rig.holds.append(hold)
        return hold


def stage_points(stage: str, *names: str, kinds: tuple[str, ...]) -> list[Point]:
    """A stage's boundaries, or the named ones."""
    return [
        Point(
            one.name, one.proxy, one.where, one.match, kinds, partial(commit_of, stage) if one.behind_commit else None
        )
        for one in withdrawal_points.boundaries(stage)
        if (one.name in names if names else "mark" not in one.name)
    ]


def intent() -> Match:
    return commit_after("INSERT INTO leases (call_id")


def conclusion() -> Match:
    return commit_after("DELETE FROM leases")


def poll() -> Match:
    """The commit of what the poller tells."""
    at_work = set[int]()

    def match(frame: Frame) -> bool:
        if b"poll_transfers" in frame.raw:
            at_work.add(frame.connection)
        return frame.kind == "COMMIT" and frame.connection in at_work

    return match


def journal(rig: TransferRig) -> Match:
    return produce(rig.topic(JOURNAL.name))


def tell(rig: TransferRig) -> Match:
    return produce(rig.topic(TRANSFERS_NOTIFIED.name))


def at_circle(method: str, path: str) -> Callable[[TransferRig], Match]:
    return lambda _rig: http_request(method, path)


def of(match: Callable[[], Match]) -> Callable[[TransferRig], Match]:
    return lambda _rig: match()


def on_chain(_rig: TransferRig) -> Match:
    return http_request("POST", body_contains="eth_getTransactionReceipt")


REFUSAL = (REFUSED, PAID)
WANTED = stage_points("transfer_by_custodian", kinds=(PAID, DENIED, REFUSED))
PERFORMED = [
    Point("before the intent's commit", "postgres", "request", of(intent)),
    Point("intended, the reply lost", "postgres", "reply", of(intent)),
    Point("intent journaled, the reply lost", "kafka", "reply", journal, behind=intent),
    Point("before Circle has it", "api", "request", at_circle("POST", PATH)),
    Point("Circle has it, the reply lost", "api", "reply", at_circle("POST", PATH)),
    Point("before the conclusion's commit", "postgres", "request", of(conclusion)),
    Point("concluded, the reply lost", "postgres", "reply", of(conclusion)),
    Point("concluded, the reply lost", "postgres", "reply", of(conclusion), REFUSAL),
    Point("before telling", "kafka", "request", tell, REFUSAL),
    Point("told, the reply lost", "kafka", "reply", tell, REFUSAL),
]
SETTLED = [
    Point("before the chain is asked", "rpc", "request", on_chain, (PAID, FAILED)),
    Point("the chain's answer lost", "rpc", "reply", on_chain, (PAID,)),
    *stage_points("settle_transfers", kinds=(PAID,)),
]
RELEASED = stage_points(
    "settle_transfers", "before the commit", "committed, the reply lost", "before telling", kinds=(DENIED,)
)
POLLED = [
    Point("Circle's answer lost", "api", "reply", at_circle("GET", "/v1/w3s/transactions/")),
    Point("committed, the reply lost", "postgres", "reply", of(poll)),
    Point("before telling", "kafka", "request", tell),
    Point("told, the reply lost", "kafka", "reply", tell),
]


async def kill_at(rig: TransferRig, point: Point, first: Hold, *, swept: bool = False) -> None:
    """The worker is killed exactly there, another goes on. `swept`: what was committed has no next owner, so the sweeper finishes
    it, which waits for half a minute."""
    await first.wait_hit_async(PATIENCE_S)
    hold = first
    if point.behind is not None:
        await rig.until(rig.is_idle, "what was committed before is journaled")
        hold = point.hold(rig)
        assert first.release()
        await hold.wait_hit_async(PATIENCE_S)
    rig.worker.kill()
    assert not hold.release(), "a dead client's packet does not go on"
    if swept:
        await rig.database.execute("UPDATE outbox SET at = at - interval '1 minute'")
    rig.start_worker()


def armed(rig: TransferRig, point: Point) -> Hold:
    return point.hold(rig) if point.behind is None else rig.postgres.hold(point.behind(), "request")


@pytest.mark.parametrize("point", WANTED, ids=str)
async def test_a_worker_killed_where_transfers_are_wanted_asks_for_each_once(rig: TransferRig, point: Point) -> None:
    first = armed(rig, point)
    await rig.ask_for(*point.kinds)
    await kill_at(rig, point, first)
    await rig.check()


@pytest.mark.parametrize("point", PERFORMED, ids=str)
async def test_a_worker_killed_around_the_call_has_circle_make_one_transfer(rig: TransferRig, point: Point) -> None:
    first = armed(rig, point)
    await rig.ask_for(*point.kinds)
    await kill_at(rig, point, first, swept=True)
    await rig.check()


@pytest.mark.parametrize("point", SETTLED, ids=str)
async def test_a_worker_killed_where_a_payment_is_settled_settles_it_once(rig: TransferRig, point: Point) -> None:
    await rig.ask_for(*point.kinds)
    await rig.until_under_way()
    first = armed(rig, point)
    async with rig.blocks():
        await kill_at(rig, point, first)
    await rig.check()


@pytest.mark.parametrize("point", RELEASED, ids=str)
async def test_a_worker_killed_where_a_hold_is_released_releases_it_once(rig: TransferRig, point: Point) -> None:
    first = armed(rig, point)
    await rig.ask_for(*point.kinds)
    await kill_at(rig, point, first)
    await rig.check()


@pytest.mark.parametrize("point", POLLED, ids=str)
async def test_a_worker_killed_where_lost_webhooks_are_asked_for_settles_each_once(
    rig: TransferRig, point: Point
) -> None:
    rig.circle.sandbox.deliveries.disorder.drop = 10**6
    if not rig.polls:
        rig.polls = True
        await asyncio.to_thread(rig.worker.stop, timeout_s=PATIENCE_S)  # Circle answers it in this loop
        rig.start_worker()
    first = armed(rig, point)
    await rig.ask_for(*point.kinds)
    async with rig.blocks():
        await kill_at(rig, point, first, swept=True)
    await rig.check()
