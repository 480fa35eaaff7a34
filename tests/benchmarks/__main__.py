"""python -m tests.benchmarks [NAME] [--quick]: runs the benchmarks and writes docs/benchmarks. `make bench NAME=…` too."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import replace

import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.benchmarks.benchmarks import BENCHMARKS, FULL, QUICK, Plan
from tests.benchmarks.parts import describe, own_parts
from tests.benchmarks.records import DIRECTORY, Record, save

RUNS_PER_ROUND = {
    "deposits.end_to_end": 5, "deposits.latency": 2, "ledger.reads": 6, "ledger.hot_batch": 3, "ledger.single": 3,
    "ledger.growth": 2, "ledger.floor": 7, "withdrawals.send": 4, "withdrawals.latency": 2,
    "bridge.webhooks": 2, "deposits.growth": 2,
    "growth.deposits": 3, "growth.memory": 1, "rebuild.speed": 2, "withdrawals.block_fill": 1, "withdrawals.growth": 2,
    "provisioning.burst": 2, "provisioning.rate": 2, "shadow.reads": 5, "shadow.writes": 1,
}  # fmt: skip


async def run(names: list[str], plan: Plan, console: Console) -> tuple[list[Record], dict[str, object]]:
    records = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (
        own_parts(
            kafka=any(
                name.startswith(
                    ("deposits.", "growth.deposits", "bridge.", "withdrawals.", "provisioning.", "rebuild.", "shadow.")
                )
                for name in names
            )
        ) as parts,
        Progress(*columns, console=console) as progress,
    ):
        described = await describe(parts)
        for name in names:
            task = progress.add_task(name, total=RUNS_PER_ROUND[name] * plan.repeats)

            def told(line: str, task: int = task, name: str = name) -> None:
                progress.advance(task)  # type: ignore[arg-type]
                progress.console.print(f"  {name}  {line}", highlight=False)

            records.append(await BENCHMARKS[name](parts, plan, told))
    return records, described


def show(records: list[Record], console: Console) -> None:
    table = Table("benchmark", "ours", "baseline", "ratio", "rounds", "goal", "", header_style="bold", box=None)
    for record in records:
        for number, one in enumerate(record.comparisons()):
            table.add_row(
                record.name if number == 0 else "",
                f"{one.ours.median:,g} {one.unit}",
                f"{one.baseline.median:,g} {one.unit}",
                f"{one.ratio:.2f}",
                f"{one.ratio_min:.2f} to {one.ratio_max:.2f}",
                f"{one.goal:.2f}",
                "[green]met[/]" if one.met else "[red]missed[/]",
            )
    console.print(table)
    for record in records:
        for one in record.comparisons():
            console.print(f"  [dim]{one.ratio:.2f}[/]  {one.compares}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=sorted(BENCHMARKS), help="one benchmark; all when it is not given")
    parser.add_argument("--quick", action="store_true", help="small and once: prints JSON, writes nothing")
    parser.add_argument(
        "--minutes", type=float, default=None, help="of growth.memory, which is a try then: with --quick"
    )
    given = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it tells each retry on a topic that is just being made
    console = Console(stderr=True)
    started = time.monotonic()
    names = [given.name] if given.name else list(BENCHMARKS)
    plan = QUICK if given.quick else FULL
    if given.minutes is not None:
        plan = replace(plan, memory_minutes=given.minutes)
    records, described = uvloop.run(run(names, plan, console))
    show(records, console)
    plain = [record.plain(described) for record in records]
    if given.quick:
        json.dump(plain, sys.stdout, indent=2)
        return 0
    save(plain)
    console.print(f"{time.monotonic() - started:.0f} s; written: {DIRECTORY}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
