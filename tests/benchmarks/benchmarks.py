"""Which benchmarks there are, against what each is measured, and what becomes of the runs."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import TypeVar

from stablerail.dev.postgres import Postgres
from tests.benchmarks import (
    bridge,
    end_to_end,
    growth,
    growth_deposits,
    growth_memory,
    latency,
    ledger_load,
    ledger_posting,
    ledger_reads,
    ledger_shadow,
    provisioning,
    rebuild_speed,
    withdrawals_fill,
    withdrawals_growth,
    withdrawals_latency,
    withdrawals_send,
    workload,
)
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
    entries: int
    reads: int
    payments: int
    posting: ledger_load.Sizes
    webhooks: int
    grown_entries: int
    backlog: int
    grown_s_max: float
    approvals: int
    single_calls: int
    blocks: int
    blocks_skipped: int
    in_flight: int
    heads: int
    memory_minutes: float


FULL = Plan(
    events=100_000, wallets=5_000, latency_events=800, repeats=5, run_s_max=90, entries=5_000_000, reads=3_000,
    payments=3_000, posting=ledger_load.FULL, webhooks=20_000, approvals=5_000, single_calls=1_000,
    grown_entries=10_000_000, backlog=500_000, grown_s_max=600,
    blocks=60, blocks_skipped=10, in_flight=10_000, heads=30, memory_minutes=20,
)  # fmt: skip
QUICK = Plan(
    events=2_000, wallets=300, latency_events=50, repeats=1, run_s_max=60, entries=20_000, reads=250,
    payments=400, posting=ledger_load.QUICK, webhooks=500, approvals=300, single_calls=40,
    grown_entries=20_000, backlog=2_000, grown_s_max=60,
    blocks=3, blocks_skipped=1, in_flight=200, heads=2, memory_minutes=0.5,
)  # fmt: skip


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


async def deposits_growth(parts: Parts, plan: Plan, told: Told) -> Record:
    load = workload.make(plan.events, plan.wallets)
    full: list[end_to_end.Run] = []
    empty: list[end_to_end.Run] = []
    async with growth.databases(parts, load.addresses, plan.grown_entries, plan.repeats):
        for turn in range(plan.repeats):
            full.append(await growth.run_grown(parts, load, plan.backlog, turn + 100, plan.grown_s_max))
            told(f"full: {full[-1].rate:,.0f} events/s")
            empty.append(await growth.run_empty(parts, load, turn, plan.run_s_max))
            told(f"empty: {empty[-1].rate:,.0f} events/s")
    return Record(
        "deposits.growth",
        Comparison.of(
            f"a worker with {plan.grown_entries:,} entries and a backlog of {plan.backlog:,} against an empty system",
            *("events/s", [run.rate for run in full], [run.rate for run in empty], 0.9),
        ),
        {
            "entries": plan.grown_entries,
            "backlog": plan.backlog,
            "events_of_the_empty": plan.events,
            "wallets": plan.wallets,
            "wal_bytes_per_event": Spread.of([run.wal_bytes / run.events for run in full], 1),
            "wal_bytes_per_event_empty": Spread.of([run.wal_bytes / run.events for run in empty], 1),
            **{
                f"{name}_us_per_event{of}": Spread.of([getattr(run, name) / run.events * 1e6 for run in runs], 1)
                for of, runs in (("", full), ("_empty", empty))
                for name in ("cpu_side_s", "cpu_postgres_s")
            },
        },
        "as deposits.end_to_end; the full database has as many deposits, reports and inbox rows as its entries are of; no"
        " checkpoint but the server's own after the first round's beginning",
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


async def reads(parts: Parts, plan: Plan, told: Told) -> Record:
    unit, draw = "reads/s", random.Random(1)
    names = [each.name for each in fields(ledger_reads.Reads)]
    found: dict[str, list[float]] = {name: [] for name in names}
    async with ledger_reads.filled(parts, plan.entries) as calls:
        for _ in range(plan.repeats):
            for pair in zip(names[::2], names[1::2], strict=True):
                number = plan.reads // 5 if "page" in pair[0] else plan.reads
                measured = await ledger_reads.rates([getattr(calls, name) for name in pair], draw, number)
                for name, rate in zip(pair, measured, strict=True):
                    found[name].append(rate)
                    told(f"{name}: {rate:,.0f} {unit}")
    return Record(
        "ledger.reads",
        Comparison.of(
            "the balance at a time of a hot account against a bare select of the entry by its primary key",
            *(unit, found["balance_at"], found["bare_entry"], 0.5),
        ),
        {
            "balance": Comparison.of(
                "a customer's balance, by the account's name, against a bare select of the account by its primary key",
                *(unit, found["balance"], found["bare_account"], 0.8),
            ),
            "statement_page": Comparison.of(
                "a statement's page of 100 lines from some time on: the hot account against one of 1,000 entries",
                *("pages/s", found["page"], found["page_of_small"], 0.33),
            ),
            "entries": plan.entries,
            "customers": ledger_reads.CUSTOMERS,
        },
        "one read after the other over one connection, places drawn at random; opening the statement is part of its page",
    )


async def withdrawals_sent(parts: Parts, plan: Plan, told: Told) -> Record:
    return await withdrawals_send.send(parts, plan.payments, plan.repeats, plan.run_s_max, told)


async def withdrawals_in_the_pool(parts: Parts, plan: Plan, told: Told) -> Record:
    return await withdrawals_latency.measure(parts, plan.latency_events // 2, plan.repeats, plan.run_s_max, told)


async def bridge_webhooks(parts: Parts, plan: Plan, told: Told) -> Record:
    return await bridge.webhooks(parts, plan.webhooks, plan.repeats, plan.run_s_max, told)


def _posting(
    benchmark: Callable[[Postgres, ledger_load.Sizes, int, Told], Awaitable[Record]],
) -> Callable[[Parts, Plan, Told], Awaitable[Record]]:
    return lambda parts, plan, told: benchmark(parts.postgres, plan.posting, plan.repeats, told)


BENCHMARKS: dict[str, Callable[[Parts, Plan, Told], Awaitable[Record]]] = {
    "deposits.end_to_end": deposits_end_to_end,
    "deposits.growth": deposits_growth,
    "deposits.latency": deposits_latency,
    "growth.deposits": lambda parts, plan, told: growth_deposits.growth(
        parts, plan.events, plan.wallets, plan.repeats, plan.run_s_max, told
    ),
    "growth.memory": lambda _parts, plan, told: growth_memory.memory(plan.memory_minutes, told),
    "bridge.webhooks": bridge_webhooks,
    "ledger.reads": reads,
    "ledger.hot_batch": _posting(ledger_posting.hot_batch),
    "ledger.single": _posting(ledger_posting.single),
    "ledger.growth": _posting(ledger_posting.growth),
    "ledger.floor": _posting(ledger_posting.floor),
    "provisioning.burst": lambda parts, plan, told: provisioning.burst(parts, plan.approvals, plan.repeats, told),
    "provisioning.rate": lambda parts, plan, told: provisioning.rate(parts, plan.single_calls, plan.repeats, told),
    "rebuild.speed": lambda parts, plan, told: rebuild_speed.speed(
        parts, plan.events, plan.wallets, plan.repeats, told
    ),
    "shadow.reads": lambda parts, plan, told: ledger_shadow.reads(parts, plan.reads, plan.repeats, told),
    "shadow.writes": lambda parts, plan, told: ledger_shadow.writes(parts, plan.reads, plan.repeats, told),
    "withdrawals.send": withdrawals_sent,
    "withdrawals.latency": withdrawals_in_the_pool,
    "withdrawals.block_fill": lambda parts, plan, told: withdrawals_fill.measure(
        parts, plan.blocks, plan.blocks_skipped, min(plan.repeats, 3), plan.run_s_max + plan.blocks, told
    ),
    "withdrawals.growth": lambda parts, plan, told: withdrawals_growth.growth(
        parts, plan.in_flight, plan.heads, plan.repeats, told
    ),
}
