"""Where crash tests of withdrawals and of orders hold a worker, stage by stage, and the rig that the tests of a module of
withdrawals share.

A module takes the fixtures by name: `rigs, rig = withdrawal_points.rigs, withdrawal_points.rig`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest_asyncio

from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from tests.support.crash_rig import Rigs
from tests.support.proxies import (
    Frame,
    Hold,
    Match,
    Proxy,
    Where,
    commit_after,
    http_request,
    kafka_request,
    produce,
    sql_contains,
)
from tests.support.withdrawal_rig import WithdrawalRig, withdrawal_rig
from tests.support.worker_rig import PATIENCE_S, WorkerRig
from topics.catalog import (
    CHAIN_HEADS,
    JOURNAL,
    ORDERS_CANCELLED,
    ORDERS_EXPIRED,
    ORDERS_FILLED,
    ORDERS_PLACED,
    ORDERS_RESERVED,
    ORDERS_SETTLED,
    TRANSACTIONS_BROADCAST,
    TRANSACTIONS_CONFIRMED,
    TRANSACTIONS_SIGNED,
    TRANSFERS_NOTIFIED,
    WITHDRAWALS_ACCEPTED,
    WITHDRAWALS_REQUESTED,
    WITHDRAWALS_SETTLED,
    Topic,
)

SETTINGS = {
    "STABLERAIL_KAFKA_SESSION_TIMEOUT_S": "2",
    "STABLERAIL_DATABASE_IDLE_TIMEOUT_S": "60",  # a held statement is not a frozen worker here
    "STABLERAIL_RPC_TIMEOUT_S": "60",  # nor is a held call a slow node
}
MARK = "UPDATE outbox SET journaled"

FLOW: dict[str, tuple[Topic, Topic | None]] = {
    "accept_withdrawals": (WITHDRAWALS_REQUESTED, WITHDRAWALS_ACCEPTED),
    "sign_transactions": (WITHDRAWALS_ACCEPTED, TRANSACTIONS_SIGNED),
    "broadcast_transactions": (TRANSACTIONS_SIGNED, TRANSACTIONS_BROADCAST),
    "track_confirmations": (CHAIN_HEADS, TRANSACTIONS_CONFIRMED),
    "raise_fees": (CHAIN_HEADS, TRANSACTIONS_SIGNED),
    "top_up_lanes": (CHAIN_HEADS, TRANSACTIONS_SIGNED),
    "settle_withdrawals": (TRANSACTIONS_CONFIRMED, WITHDRAWALS_SETTLED),
    "reserve_orders": (ORDERS_PLACED, ORDERS_RESERVED),
    "settle_fills": (ORDERS_FILLED, ORDERS_SETTLED),
    "release_cancelled_orders": (ORDERS_CANCELLED, ORDERS_SETTLED),
    "release_expired_orders": (ORDERS_EXPIRED, ORDERS_SETTLED),
    "transfer_by_custodian": (WITHDRAWALS_ACCEPTED, None),
    "settle_transfers": (TRANSFERS_NOTIFIED, WITHDRAWALS_SETTLED),
}
"""Stage -> (what it reads, what it tells)."""
WOKEN_BY_BLOCKS = ("track_confirmations", "settle_withdrawals")


class Behind(Protocol):
    """A rig whose workers are behind proxies, which have the names that a boundary calls them by."""

    holds: list[Hold]

    def topic(self, name: str) -> str: ...


@dataclass(frozen=True)
class Boundary:
    """The request or reply that is held. `behind_commit`: it is the first of its kind after the stage's commit, which is held
    until all else is quiet."""

    name: str
    stage: str
    proxy: Literal["postgres", "kafka", "rpc"]
    where: Where
    match: Callable[[Behind], Match]
    behind_commit: bool = False

    def __str__(self) -> str:
        return self.name

    def hold(self, rig: Behind) -> Hold:
        proxy: Proxy = getattr(rig, self.proxy)
        hold = proxy.hold(self.match(rig), self.where)
        rig.holds.append(hold)
        return hold


_CHANGED = {
    "track_confirmations": "attempts",
    "top_up_lanes": "gas_top_ups",
    "settle_transfers": "insert into entries",  # how a transfer goes on changes its withdrawal too
}


def commit_of(stage: str) -> Match:
    """The commit of a batch of this stage that changes what it is there for."""
    name, at_work = stage.encode(), set[int]()
    is_of_orders = FLOW[stage][1] in (ORDERS_RESERVED, ORDERS_SETTLED)
    changed = "orders" if is_of_orders else _CHANGED.get(stage, "withdrawal_history")

    def match(frame: Frame) -> bool:
        if name in frame.raw and "inbox" in frame.name.lower():
            at_work.add(frame.connection)
        if frame.kind not in ("COMMIT", "ROLLBACK"):
            return False
        ours = frame.connection in at_work and frame.kind == "COMMIT"
        at_work.discard(frame.connection)
        written = " ".join(frame.before).lower()
        return ours and "insert into outbox" in written and changed in written

    return match


def boundaries(stage: str) -> list[Boundary]:
    """In the order in which a worker comes to them."""
    return list(_boundaries(stage))


def _boundaries(stage: str) -> Iterator[Boundary]:
    source, told = FLOW[stage]

    def journal(rig: Behind) -> Match:
        return produce(rig.topic(JOURNAL.name))

    def emit(rig: Behind) -> Match:
        assert told is not None
        return produce(rig.topic(told.name))

    def ack(rig: Behind) -> Match:
        return kafka_request("OffsetCommit", rig.topic(source.name))

    def commit(_rig: Behind) -> Match:
        return commit_of(stage)

    def mark(_rig: Behind) -> Match:
        return lambda frame: frame.kind == "WITH" and sql_contains(MARK)(frame)

    def mark_commit(_rig: Behind) -> Match:
        return commit_after(MARK)

    def send(_rig: Behind) -> Match:
        return http_request("POST", body_contains="eth_sendRawTransaction")

    if stage == "broadcast_transactions":
        yield Boundary("before the node has it", stage, "rpc", "request", send)
        yield Boundary("the node has it, the reply lost", stage, "rpc", "reply", send)
    yield Boundary("before the commit", stage, "postgres", "request", commit)
    yield Boundary("committed, the reply lost", stage, "postgres", "reply", commit)
    yield Boundary("before the journal", stage, "kafka", "request", journal, True)
    yield Boundary("journaled, the reply lost", stage, "kafka", "reply", journal, True)
    yield Boundary("before the relay's mark", stage, "postgres", "request", mark, True)
    yield Boundary("before the mark's commit", stage, "postgres", "request", mark_commit, True)
    yield Boundary("marked, the reply lost", stage, "postgres", "reply", mark_commit, True)
    if told is not None:
        yield Boundary("before telling", stage, "kafka", "request", emit)
        yield Boundary("told, the reply lost", stage, "kafka", "reply", emit)
    yield Boundary("before the acknowledgement", stage, "kafka", "request", ack, True)
    yield Boundary("acknowledged, the reply lost", stage, "kafka", "reply", ack, True)


async def killed_at(
    rig: WorkerRig,
    boundary: Boundary,
    said: Awaitable[Any],
    until_there: AbstractAsyncContextManager[Any] | None = None,
) -> None:
    """The worker is killed exactly there while it works on what is said, and another goes on; then everything ever said came to what it
    must, once."""
    first = rig.postgres.hold(commit_of(boundary.stage), "request") if boundary.behind_commit else boundary.hold(rig)
    await said
    async with until_there or nullcontext():
        await first.wait_hit_async(PATIENCE_S)
    hold = first
    if boundary.behind_commit:
        await rig.until(rig.is_idle, "what was committed before is journaled")
        hold = boundary.hold(rig)
        assert first.release()
        await hold.wait_hit_async(PATIENCE_S)
    rig.worker.kill()
    assert not hold.release(), "a dead client's packet does not go on"
    rig.start_worker()
    await rig.check()


async def kill_at(rig: WithdrawalRig, boundary: Boundary) -> None:
    """While it works on withdrawals."""
    # a head wakes what waits for a signature too; which of the two stages signs is then a race
    heads = rig.blocks() if boundary.stage in WOKEN_BY_BLOCKS else None
    await killed_at(rig, boundary, rig.ask(), heads)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rigs(scratch: Path, postgres: Postgres, kafka: Kafka, tools: Tools) -> AsyncIterator[Rigs[WithdrawalRig]]:
    rigs = Rigs(partial(withdrawal_rig, scratch, postgres, kafka, tools, SETTINGS))
    yield rigs
    await rigs.close()


@pytest_asyncio.fixture(loop_scope="module")
async def rig(rigs: Rigs[WithdrawalRig]) -> WithdrawalRig:
    """One worker, idle, that owns every partition."""
    return await rigs.quiet()
