"""Which benchmarks there are, against what each is measured, and what becomes of the runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from tests.benchmarks import end_to_end, latency, workload
from tests.benchmarks.latency import Latency, quantile
from tests.benchmarks.parts import Parts
from tests.benchmarks.records import Comparison, Record, Spread
from tests.benchmarks.sides import BARE, HOP_AND_COMMIT, LAB, PLAIN, TWO_WORKERS, WORKER, Side

R = TypeVar("R")
Told = Callable[[str], None]
"""Is told after each run: which side, and its figure."""


@dataclass(frozen=True)
class Plan:
    """How much is measured. `FULL` is what results.json holds; `QUICK` only shows that everything works."""

    events: int
    wallets: int
    latency_events: int
    repeats: int
    run_s_max: float


FULL = Plan(events=100_000, wallets=5_000, latency_events=800, repeats=5, run_s_max=90)
QUICK = Plan(events=2_000, wallets=300, latency_events=50, repeats=1, run_s_max=60)


async def _in_turn(
    sides: Sequence[Side], repeats: int, one: Callable[[Side], Awaitable[R]], show: Callable[[R], str], told: Told
) -> dict[str, list[R]]:
    """A B C A B C …: what drifts on the machine drifts for all."""
    found: dict[str, list[R]] = {side.name: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            outcome = await one(side)
            found[side.name].append(outcome)
            told(f"{side.name}: {show(outcome)}")
    return found


async def deposits_end_to_end(parts: Parts, plan: Plan, told: Told) -> Record:
    load = workload.make(plan.events, plan.wallets)
    await parts.prepare(load.addresses)
    found = await _in_turn(
        (WORKER, BARE, LAB, PLAIN, TWO_WORKERS),
        plan.repeats,
        lambda side: end_to_end.run(parts, side, load, plan.run_s_max),
        lambda run: f"{run.rate:,.0f} events/s",
        told,
    )
    rates = {name: [run.rate for run in runs] for name, runs in found.items()}
    ours, unit = found[WORKER.name], "events/s"
    figures = {
        f"{name.replace(' ', '_')}_{figure}": round(median(getattr(run, figure) for run in runs) * factor, 2)
        for name, runs in found.items()
        for figure, factor in (("cpu_side_s", 1), ("cpu_postgres_s", 1), ("cpu_kafka_s", 1), ("acked_s", 1))
    }
    return Record(
        "deposits.end_to_end",
        Comparison.of(
            "the worker against its own delivery and settle in a bare aiokafka getmany loop",
            *(unit, rates[WORKER.name], rates[BARE.name], 0.95),
        ),
        {
            "plain_loop": Comparison.of(
                "the worker against the prototype's plain loop: decode, inbox, fold, outbox rows; no journal, no deposits",
                *(unit, rates[WORKER.name], rates[LAB.name], 1.0),
            ),
            "tuned_plain_loop": Comparison.of(
                "the worker against the same plain loop made as fast as it goes",
                *(unit, rates[WORKER.name], rates[PLAIN.name], 1.0),
            ),
            "two_workers": Comparison.of(
                "two workers with four buffer rows against one worker with one",
                *(unit, rates[TWO_WORKERS.name], rates[WORKER.name], 1.2),
            ),
            "plain_loop_aim": 1.5,
            "events": plan.events,
            "wallets": plan.wallets,
            "partitions": workload.PARTITIONS,
            "wal_bytes_per_event": Spread.of([run.wal_bytes / run.events for run in ours], 1),
            "wal_bytes_per_event_plain": Spread.of([run.wal_bytes / run.events for run in found[PLAIN.name]], 1),
            "journal_bytes_per_event": Spread.of([run.journal_bytes / run.events for run in ours], 1),
            **figures,
        },
        "all events wait in Kafka; from waking the processes to the broker's time of the last deposits.credited",
    )


async def deposits_latency(parts: Parts, plan: Plan, told: Told) -> Record:
    load = workload.make(plan.latency_events, plan.latency_events, in_turn=True)
    await parts.prepare(load.addresses)
    found = await _in_turn(
        (WORKER, HOP_AND_COMMIT),
        plan.repeats,
        lambda side: latency.run(parts, side, load, plan.run_s_max),
        lambda run: f"{quantile(run.readable_ms, 0.5):.2f} ms",
        told,
    )

    def spread(side: Side, figure: Callable[[Latency], list[float]], share: float) -> Spread:
        return Spread.of([quantile(figure(run), share) for run in found[side.name]])

    ours, bare = (spread(side, lambda run: run.readable_ms, 0.5) for side in (WORKER, HOP_AND_COMMIT))
    return Record(
        "deposits.latency",
        Comparison.of(
            "p50 of one bare Kafka hop and one bare commit, over ours from sent to readable balance",
            *("ms", ours.runs, bare.runs, 0.5),
            less_is_better=True,
        ),
        {
            "readable_p99_ms": spread(WORKER, lambda run: run.readable_ms, 0.99),
            "credited_p50_ms": spread(WORKER, lambda run: run.credited_ms, 0.5),
            "credited_p99_ms": spread(WORKER, lambda run: run.credited_ms, 0.99),
            "hop_and_commit_p99_ms": spread(HOP_AND_COMMIT, lambda run: run.readable_ms, 0.99),
            "events_per_run": plan.latency_events,
            "events_per_s": latency.RATE_PER_S,
            "partitions": workload.PARTITIONS,
        },
        "from sending to the first SELECT that sees the balance, asked again and again; both sides in the same way",
    )


BENCHMARKS: dict[str, Callable[[Parts, Plan, Told], Awaitable[Record]]] = {
    "deposits.end_to_end": deposits_end_to_end,
    "deposits.latency": deposits_latency,
}
