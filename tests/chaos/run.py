"""One run: everything up, customers funded, faults and load for some seconds, then quiet; the oracle has the last word."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import asyncpg

from tests.chaos import oracle, witness
from tests.chaos.asking import ERRORS
from tests.chaos.faults import Faults
from tests.chaos.inputs import History
from tests.chaos.load import Load
from tests.chaos.oracle import Difference
from tests.chaos.rig import MOVEMENTS, ROOT, Rig, running
from tests.chaos.witness import Places

READ: dict[str, tuple[str, ...]] = {
    "onboarding": ("kyc.approved", "wallets.requested", "wallets.provisioned"),
    "deposits": ("deposits.notified",),
    "withdrawals": ("withdrawals.requested", "withdrawals.accepted", "transfers.notified", "transactions.confirmed"),
    "investing": ("orders.placed", "orders.filled", "orders.cancelled", "orders.expired"),
}
"""Topics whose every event is acknowledged in the end; heads of the chain never end."""
FIRST_MONEY = "the first customers' money"
CLOCKS_S = {"deposits-1": 7.0, "deposits-2": -7.0, "withdrawals-2": 11.0, "onboarding-1": -5.0, "investing-2": 20.0}
"""How far the clocks of these processes are from the others' (and from the database's)."""


@dataclass
class Plan:
    """`target`: events in flight at once. `least`: of each kind of fault, with `in_flight_min` events in flight."""

    seed: int
    seconds: float
    target: int = 30
    least: int = 1
    in_flight_min: int = 5
    fund_s: float = 300.0
    drain_s: float = 300.0
    pause_s: tuple[float, float] = (0.3, 2.5)
    more_s: float = 0.0
    """Beyond `seconds` it goes on for so long at most, while a kind of fault has not hit enough."""
    kinds: tuple[str, ...] = ()
    """Faults; empty: all of them."""
    weights: dict[str, int] = field(default_factory=dict)
    """Of what is in the load, over its own."""
    workers: int = 2
    """Of each movement."""
    product: Path = ROOT
    """The folder that holds the product's packages."""

    def is_enough(self, hits: list[int]) -> bool:
        """Of one kind of fault: how many events were in flight at each."""
        return sum(number >= self.in_flight_min for number in hits) >= self.least


@dataclass
class Result:
    """`differences` are what the oracle found; `short`: kinds of faults that did not hit as they must for the run to count."""

    plan: Plan
    history: History
    differences: list[Difference] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    restarts: int = 0
    ended: list[tuple[str, int, str]] = field(default_factory=list)
    drained_s: float | None = None
    """How long the end of everything took after the faults; None: it did not end."""


@dataclass
class View:
    """What is shown while it runs."""

    phase: str = "starting"
    left_s: float = 0.0
    history: History | None = None
    faults: Faults | None = None
    rig: Rig | None = None
    said: Callable[[str], None] = lambda _text: None

    def say(self, phase: str) -> None:
        self.phase = phase
        self.said(phase)


async def run(plan: Plan, view: View) -> Result:
    """Raises PartFailed where the rig itself does not start."""
    history = History(plan.seed)
    result = Result(plan, history)
    async with running(CLOCKS_S, view.say, plan.product, plan.workers) as rig, Load(rig, history, plan.weights) as load:
        view.history, view.rig = history, rig
        view.say(FIRST_MONEY)
        funded = await load.fund(plan.fund_s)
        faults = view.faults = Faults(rig, load, history, plan.pause_s, plan.is_enough, plan.kinds)
        view.say("breaking")
        if funded:
            await _break(plan, view, load, faults)
        view.say("faults end")
        await faults.heal()
        view.say("draining")
        result.drained_s = await _drained(plan, rig, load)
        view.say("judging")
        at = places(rig)
        users = sorted({customer.user for customer in load.customers})
        told = await witness.told(at, users)
        result.differences = oracle.judge(history.inputs, await witness.world(at), told)
        result.differences += _undrained(history, result)
        if load.failure is not None:
            result.differences.append(Difference("the API answers as it says", repr(load.failure)))
        for difference in result.differences[:5]:
            result.traces.append("\n".join(await _told_of(difference, history, at)))
        result.restarts, result.ended = rig.restarts, list(rig.ended)
    result.short = _short(plan, history, faults)
    return result


def _short(plan: Plan, history: History, faults: Faults) -> list[str]:
    """Kinds of faults that have not hit enough."""
    hits = history.hits()
    return [kind for kind in faults.kinds if not plan.is_enough(hits.get(kind, []))]


async def _break(plan: Plan, view: View, load: Load, faults: Faults) -> None:
    """The load keeps `target` events in flight while the faults are at work."""
    ends = time.monotonic() + plan.seconds
    breaking = asyncio.create_task(faults.work())
    looking = asyncio.create_task(_look_forever(load))
    try:
        while (left := ends - time.monotonic()) > 0 or (left > -plan.more_s and _short(plan, load.history, faults)):
            view.left_s = max(left, 0.0)
            if load.history.in_flight < plan.target:
                with suppress(TimeoutError):
                    await asyncio.wait_for(load.issue(), 10)
                await asyncio.sleep(0.02)
            else:
                await asyncio.sleep(0.1)
            for task in (breaking, looking):
                if task.done():
                    task.result()
    finally:
        for task in (breaking, looking):
            task.cancel()
        await asyncio.gather(breaking, looking, return_exceptions=True)


async def _look_forever(load: Load) -> None:
    while True:
        with suppress(*ERRORS, asyncpg.InterfaceError):
            await load.look()
        await asyncio.sleep(1)


async def _drained(plan: Plan, rig: Rig, load: Load) -> float | None:
    """Seconds until nothing is on its way any more; None when the limit passed first."""
    started = time.monotonic()
    try:
        await rig.until(load.settled, "everything has ended", limit_s=plan.drain_s, pause_s=1)
        left = max(10.0, plan.drain_s - (time.monotonic() - started))
        await rig.until(partial(_is_quiet, rig), "everything is acknowledged", limit_s=left, pause_s=1)
    except AssertionError:
        return None
    return time.monotonic() - started


async def _is_quiet(rig: Rig) -> bool:
    at = places(rig)
    for query in witness.LEFT.values():
        if (await rig.rows(query))[0][0]:
            return False
    for movement in MOVEMENTS:
        topics = [f"{at.prefix}{name}" for name in READ.get(movement, ())]
        if topics and await witness.lag(at, [f"stablerail-{at.prefix}{movement}"], topics):
            return False
    return True


def _undrained(history: History, result: Result) -> list[Difference]:
    if result.drained_s is not None:
        return []
    open_ones = [one for one in history.inputs if not one.is_done]
    text = "what was asked for has not come to its end" if open_ones else "not everything is acknowledged"
    return [
        Difference("everything ends", f"{one.kind} {one.key}: {text}", frozenset({one.key}), one.user)
        for one in open_ones[:10]
    ] or [Difference("everything ends", text)]


def places(rig: Rig) -> Places:
    return Places(
        rpc_url=rig.anvil.rpc_url, usdc=rig.usdc.address, signer=rig.stack.hot_wallet,
        circle_wallet=rig.wallets["MATIC"].address, circle_url=rig.stack.url("circle"), api_url=rig.stack.url("api"),
        api_key=rig.api_key, dsn=rig.dsn, bootstrap=rig.kafka.bootstrap, prefix="chaos.",
    )  # fmt: skip


async def _told_of(difference: Difference, history: History, at: Places) -> list[str]:
    """The smallest history that shows it, and the way of the money."""
    lines = [f"{difference.rule}: {difference.text}", "  what happened:"]
    lines += [f"    {line}" for line in history.lines(set(difference.keys), difference.user)]
    lines += ["  the money:"]
    lines += [f"    {line}" for line in await witness.trace(at, difference.user, difference.keys)]
    return lines
