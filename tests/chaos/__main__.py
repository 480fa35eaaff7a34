"""python -m tests.chaos [--seconds N] [--seed N] [--defects [NAME …] | --control]; `make chaos SECONDS=… SEED=…`.

Exit code 0: everything is as it must be, and the run counts. 1: it is not; the seed, the smallest history and the trace of the
money are printed. 2: nothing is wrong, but too few faults hit while enough was in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stablerail.dev.errors import DevError
from tests.chaos.defects import run_all, run_controls
from tests.chaos.run import Plan, Result, View, run

LINE_S = 10.0
MORE_S = 180.0
"""On a machine that is busy with other things not every kind of fault hits in the time that was asked for."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos")
    parser.add_argument("--seconds", type=float, default=120, help="of faults; longer while a kind has not hit enough")
    parser.add_argument("--seed", type=int, default=None, help="of load and faults; none: one is drawn")
    parser.add_argument("--target", type=int, default=30, help="events in flight at once")
    parser.add_argument("--least", type=int, default=None, help="of each kind of fault; none: one for each two minutes")
    parser.add_argument("--in-flight", type=int, default=5, help="a fault counts with so many events in flight")
    parser.add_argument(
        "--drain", type=float, default=300, help="seconds in which everything must end after the faults"
    )
    parser.add_argument(
        "--defects", nargs="*", default=None, help="of tests/chaos/defects.py, each of which must be found"
    )
    parser.add_argument("--control", action="store_true", help="the hunts for defects in a copy that has none")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)  # clients of brokers that were killed
    console = Console()
    if given.control:
        return run_controls(console)
    if given.defects is not None:
        return run_all(given.defects, console)
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(10**6)
    least = given.least if given.least is not None else max(1, int(given.seconds // 240))
    plan = Plan(seed, given.seconds, given.target, least, given.in_flight, given.drain, more_s=MORE_S)
    try:
        result = asyncio.run(_until_signal(plan, console))
    except DevError as error:
        console.print(f"✗ {error}", style="red", markup=False)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    return report(result, console)


async def _until_signal(plan: Plan, console: Console) -> Result:
    """SIGTERM ends it as Ctrl-C does: the parts are stopped."""
    view = View()
    with showing(view, plan, console):
        task = asyncio.create_task(run(plan, view))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await task


@contextmanager
def showing(view: View, plan: Plan, console: Console) -> Iterator[None]:
    """A live table on a terminal, a line now and then elsewhere."""
    console.print(f"chaos: seed {plan.seed}, {plan.seconds:g} s", highlight=False)
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4, get_renderable=lambda: table(view, plan)):
            yield
        return
    started, last = time.monotonic(), [0.0]

    def said(text: str) -> None:
        last[0] = time.monotonic()
        print(f"{last[0] - started:6.1f} s  {text}  {summary(view)}", flush=True)

    view.said = said

    async def tick() -> None:
        while True:
            await asyncio.sleep(LINE_S)
            said(f"{view.phase}, {view.left_s:.0f} s left" if view.phase == "breaking" else view.phase)

    task = asyncio.get_running_loop().create_task(tick())
    try:
        yield
    finally:
        task.cancel()


def summary(view: View) -> str:
    if view.history is None:
        return ""
    done = sum(one.is_done for one in view.history.inputs)
    last = view.faults.last if view.faults else ""
    restarts = view.rig.restarts if view.rig else 0
    return (
        f"{len(view.history.inputs)} inputs, {done} ended, {view.history.in_flight} in flight; "
        f"{len(view.history.faults)} faults, {restarts} restarts; last: {last}"
    )


def table(view: View, plan: Plan) -> Group:
    head = f"[bold]{view.phase}[/]" + (f", {view.left_s:.0f} s left" if view.phase == "breaking" else "")
    faults, inputs = (
        Table("fault", "hits", f"with ≥ {plan.in_flight_min} in flight", box=None),
        Table("input", "number", box=None),
    )
    if view.history is not None:
        hits = view.history.hits()
        for kind in view.faults.kinds if view.faults else ():
            found = hits.get(kind, [])
            faults.add_row(kind, str(len(found)), str(sum(n >= plan.in_flight_min for n in found)))
        for kind, number in sorted(view.history.counts().items()):
            inputs.add_row(kind, str(number))
    side = Table.grid(padding=(0, 4))
    side.add_row(faults, inputs)
    return Group(Text.from_markup(head), Text(summary(view), style="dim"), side)


def report(result: Result, console: Console) -> int:
    plan, history = result.plan, result.history
    hits = history.hits()
    shown = Table("fault", "hits", f"with ≥ {plan.in_flight_min} in flight", "most in flight", box=None)
    for kind in sorted(hits):
        found = hits[kind]
        shown.add_row(kind, str(len(found)), str(sum(n >= plan.in_flight_min for n in found)), str(max(found)))
    console.print(shown)
    counts = ", ".join(f"{number} {kind}" for kind, number in sorted(history.counts().items()))
    drained = (
        "not all of it ended"
        if result.drained_s is None
        else f"all of it ended {result.drained_s:.0f} s after the faults"
    )
    told = f"{len(history.inputs)} inputs ({counts}); {sum(map(len, hits.values()))} faults; {result.restarts} restarts; {drained}"
    console.print(told, highlight=False, soft_wrap=True)
    by_themselves = [one for one in result.ended if one[1] != 0]
    if by_themselves:
        console.print(f"{len(by_themselves)} processes ended by themselves, and were started again:", style="dim")
        for name, code, said in by_themselves[:5]:
            console.print(
                f"  {name} ({code}): {said[-300:]}", style="dim", markup=False, highlight=False, soft_wrap=True
            )
    if result.differences:
        console.print(f"✗ seed {plan.seed}: {len(result.differences)} differences", style="red bold")
        for trace in result.traces:
            console.print(trace, markup=False, highlight=False, soft_wrap=True)
        for difference in result.differences[len(result.traces) :][:50]:
            console.print(f"{difference.rule}: {difference.text}", markup=False, highlight=False, soft_wrap=True)
        return 1
    if result.short:
        need = f"at least {plan.least} with {plan.in_flight_min} in flight"
        console.print(
            f"seed {plan.seed}: nothing is wrong; it does not count: {need} of {', '.join(result.short)}",
            style="yellow",
        )
        return 2
    console.print(f"✓ seed {plan.seed}: every balance and every payment is as it must be", style="green")
    return 0


if __name__ == "__main__":
    sys.exit(main())
