"""growth.deposits: the end-to-end rate (end_to_end.py) with one, two and four workers, and the CPU that each part takes for it.

All have the same settings, the hot account in four rows, so that nothing but the number of workers differs. A part's cores are its CPU
seconds over those until the last offset is acknowledged: where they sum to the machine's, more workers have nothing to run on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Final

from tests.benchmarks import end_to_end, workload
from tests.benchmarks.end_to_end import Run
from tests.benchmarks.parts import Parts
from tests.benchmarks.records import Comparison, Record
from tests.benchmarks.sides import TWO_WORKERS

SIDES: Final = tuple(
    replace(TWO_WORKERS, name=name, workers=workers)
    for name, workers in (("one", 1), ("two together", 2), ("four together", 4))
)
PARTS: Final = {"workers": "cpu_side_s", "PostgreSQL": "cpu_postgres_s", "Kafka": "cpu_kafka_s"}


async def growth(
    parts: Parts, events: int, wallets: int, repeats: int, limit_s: float, told: Callable[[str], None]
) -> Record:
    load = workload.make(events, wallets)
    await parts.prepare(load.addresses)
    found: dict[str, list[Run]] = {side.name: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:
            run = await end_to_end.run(parts, side, load, limit_s)
            found[side.name].append(run)
            cores = ", ".join(f"{part} {getattr(run, name) / run.acked_s:.2f}" for part, name in PARTS.items())
            told(f"{side.name}: {run.rate:,.0f} events/s; cores: {cores}")
    one, two, four = ([run.rate for run in found[side.name]] for side in SIDES)
    return Record(
        "growth.deposits",
        Comparison.of("two workers against one", "events/s", two, one, 1.2),
        {
            "four_workers": Comparison.of("four workers against two", "events/s", four, two, 1.0),
            "cores": {
                name: {
                    part: round(median(getattr(run, figure) / run.acked_s for run in runs), 2)
                    for part, figure in PARTS.items()
                }
                for name, runs in found.items()
            },
            "events": events,
            "wallets": wallets,
            "buffer_rows": 4,
        },
        "as deposits.end_to_end; each number of workers with the hot account in four rows",
    )
