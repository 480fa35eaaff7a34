"""growth.memory: the resident memory of each process of the product under load: its last quarter over its second.

The rig of chaos with nothing broken: one worker of each movement, bridge and API; approvals, deposits, orders, withdrawals on both
rails, duplicates and nonsense, so many at once as chaos has. The first quarter is left out: caches fill.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import Final

import asyncpg

from tests.benchmarks.records import Comparison, Record
from tests.chaos.asking import ERRORS
from tests.chaos.inputs import History
from tests.chaos.load import Load
from tests.chaos.rig import Rig, running

TARGET: Final = 20
"""Events in flight."""
SAMPLES: Final = 240
SHOWN: Final = 60
GOAL: Final = 1 / 1.1
FUND_S: Final = 300.0
SEED: Final = 1


async def memory(minutes: float, told: Callable[[str], None]) -> Record:
    """Raises AssertionError where a process ended meanwhile: what began anew has not grown."""
    async with (
        running({}, lambda _phase: None, workers=1) as rig,
        Load(rig, history := History(SEED), {}) as load,
    ):
        assert await load.fund(FUND_S), "the first customers' money did not come"
        samples = await _sampled(rig, load, minutes * 60, told)
        assert rig.restarts == 0, f"ended by themselves: {rig.ended}"
        assert load.failure is None, load.failure
    grown = {name: quarters(found) for name, found in samples.items()}
    worst = max(grown, key=lambda name: grown[name][1] / grown[name][0])
    second, last = grown[worst]
    return Record(
        "growth.memory",
        Comparison.of(
            f"second quarter over last, of the process that grew most ({worst})",
            "MB",
            [last],
            [second],
            GOAL,
            less_is_better=True,
        ),
        {
            "minutes": minutes,
            "inputs": len(history.inputs),
            "ended": sum(one.is_done for one in history.inputs),
            "last_over_second": {name: round(after / before, 3) for name, (before, after) in sorted(grown.items())},
            "rss_mb": {name: _thinned(found) for name, found in sorted(samples.items())},
        },
        "resident memory of each process of the product; one worker of each movement, nothing broken",
    )


def quarters(samples: list[float]) -> tuple[float, float]:
    """The means of the second quarter and of the last."""
    size = len(samples) // 4
    return mean(samples[size : 2 * size]), mean(samples[-size:])


def _thinned(samples: list[float]) -> list[float]:
    return [round(one, 1) for one in samples[:: max(1, len(samples) // SHOWN)]]


async def _sampled(rig: Rig, load: Load, seconds: float, told: Callable[[str], None]) -> dict[str, list[float]]:
    """MB by process, evenly over the time, while the load keeps `TARGET` events in flight."""
    busy = [asyncio.create_task(_issue(load)), asyncio.create_task(_look(load))]
    found: dict[str, list[float]] = {name: [] for name in rig.programs}
    started = time.monotonic()
    try:
        for number in range(SAMPLES):
            for name, samples in found.items():
                samples.append(rss_mb(rig.stack.children[name].pid))
            for task in busy:
                if task.done():
                    task.result()
            await asyncio.sleep(max(0.0, started + (number + 1) * seconds / SAMPLES - time.monotonic()))
    finally:
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
    told(f"memory: {', '.join(f'{name} {samples[-1]:.0f} MB' for name, samples in found.items())}")
    return found


async def _issue(load: Load) -> None:
    while True:
        if load.history.in_flight < TARGET:
            with suppress(TimeoutError):
                await asyncio.wait_for(load.issue(), 10)
        await asyncio.sleep(0.02)


async def _look(load: Load) -> None:
    while True:
        with suppress(*ERRORS, asyncpg.InterfaceError):
            await load.look()
        await asyncio.sleep(1)


def rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)
