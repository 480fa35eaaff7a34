"""ledger.hot_batch, ledger.single, ledger.growth, ledger.floor: what becomes of the runs of ledger_sides.py."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Final

from stablerail.dev.postgres import Postgres
from tests.benchmarks import ledger_floor
from tests.benchmarks.ledger_fill import fill
from tests.benchmarks.ledger_load import BATCH, TEMPLATE, Sizes, batches, connect, database, make_template
from tests.benchmarks.ledger_sides import (
    CONNECTIONS,
    WARM,
    Run,
    run_naive,
    run_ours,
    run_plain_fold,
    run_two_rows,
)
from tests.benchmarks.records import Comparison, Record, Spread

Told = Callable[[str], None]
UNIT: Final = "transfers/s"
RATE_AIM: Final = 32_000
DISK_BYTES_AIM: Final = 450
FLOOR_GOAL: Final = 0.25
"""Nobody's order: three parts for all that makes rows a ledger, one for the rows."""
DATABASE: Final = "benchmark_ledger"
GROWN: Final = "benchmark_ledger_grown"
SMALL: Final = "benchmark_ledger_small"


def _rates(runs: list[Run]) -> list[float]:
    return [run.rate for run in runs]


async def hot_batch(postgres: Postgres, sizes: Sizes, repeats: int, told: Told) -> Record:
    await make_template(postgres, sizes.users)
    sides = {
        "ours": (run_ours, sizes.hot),
        "plain fold": (run_plain_fold, sizes.hot),
        "naive": (run_naive, sizes.naive),
    }
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name, (side, transfers) in sides.items():
            async with database(postgres, DATABASE) as dsn:
                runs[name].append(await side(dsn, sizes.users, batches(transfers, sizes.users, turn)))
            told(f"{name}: {runs[name][-1].rate:,.0f} {UNIT}")
    rates = {name: _rates(some) for name, some in runs.items()}
    return Record(
        "ledger.hot_batch",
        Comparison.of(
            "a batch by ledger.book.post, journaled, against the plainest fold of the same rows",
            *(UNIT, rates["ours"], rates["plain fold"], 0.8),
        ),
        {
            "naive": Comparison.of(
                f"a batch by ledger.book.post against naive posting, seven statements over {CONNECTIONS} connections",
                *(UNIT, rates["ours"], rates["naive"], 30.0),
            ),
            "rate_aim": RATE_AIM,
            "rate_met": median(rates["ours"]) >= RATE_AIM,
            "disk_bytes_per_transfer": Spread.of([run.disk_bytes for run in runs["ours"]], 1),
            "disk_bytes_per_transfer_aim": DISK_BYTES_AIM,
            "wal_bytes_per_transfer": Spread.of([run.wal_bytes for run in runs["ours"]], 1),
            "wal_bytes_per_transfer_plain_fold": Spread.of([run.wal_bytes for run in runs["plain fold"]], 1),
            "batch": BATCH,
            "transfers": sizes.hot,
            "users": sizes.users,
        },
        "each transfer from one hot account to a random user, ids random; one connection, ours with its relay's beside it",
    )


async def single(postgres: Postgres, sizes: Sizes, repeats: int, told: Told) -> Record:
    await make_template(postgres, sizes.users)
    rates: dict[str, list[float]] = {"ours": [], "two rows": [], "journaled": []}
    for turn in range(repeats):
        for name, found in rates.items():
            work = batches(sizes.single, sizes.users, turn, size=1)
            async with database(postgres, DATABASE) as dsn:
                if name == "two rows":
                    run = await run_two_rows(dsn, sizes.users, work)
                else:
                    run = await run_ours(dsn, sizes.users, work, journaled=name == "journaled")
            found.append(run.rate)
            told(f"{name}: {run.rate:,.0f} {UNIT}")
    return Record(
        "ledger.single",
        Comparison.of(
            "one transfer after the other by ledger.book.post against BEGIN; INSERT two rows; COMMIT",
            *(UNIT, rates["ours"], rates["two rows"], 0.5),
        ),
        {"journaled_each": Spread.of(rates["journaled"]), "transfers": sizes.single},
        "one connection, the relay beside it; journaled_each waits for the relay after each transfer",
    )


async def growth(postgres: Postgres, sizes: Sizes, repeats: int, told: Told) -> Record:
    """One checkpoint, before the first round: making a database and dropping one are checkpoints too, so all are made before it and
    dropped after the last. Every page's first change after one writes it whole, and a round meets nearly every page of the indexes
    once: a server as operations.md sets it up has that behind it within the first six seconds of a quarter of an hour."""
    await make_template(postgres, sizes.users)
    smalls = [f"{SMALL}_{turn}" for turn in range(repeats)]
    grown, small = [], []
    there = sizes.large_entries // 2
    try:
        await _make_filled(postgres, GROWN, sizes.users, sizes.large_entries // 2)
        for name in smalls:
            await _make_filled(postgres, name, sizes.users, sizes.small_entries // 2)
        postgres.execute("CHECKPOINT")
        for turn, name in enumerate(smalls):
            work = batches(sizes.growth, sizes.users, turn)
            grown.append(await run_ours(postgres.dsn_of(GROWN), sizes.users, work, before=there))
            there += sizes.growth
            told(f"{sizes.large_entries:,} entries: {grown[-1].rate:,.0f} {UNIT}")
            work = batches(sizes.growth, sizes.users, turn)
            small.append(await run_ours(postgres.dsn_of(name), sizes.users, work, before=sizes.small_entries // 2))
            told(f"{sizes.small_entries:,} entries: {small[-1].rate:,.0f} {UNIT}")
    finally:
        for name in (GROWN, *smalls):
            postgres.drop_database(name)
    return Record(
        "ledger.growth",
        Comparison.of(
            f"posting into tables of {sizes.large_entries:,} entries against tables of {sizes.small_entries:,}",
            *(UNIT, _rates(grown), _rates(small), 0.9),
        ),
        {
            "wal_bytes_per_transfer": Spread.of([run.wal_bytes for run in grown], 1),
            "wal_bytes_per_transfer_small": Spread.of([run.wal_bytes for run in small], 1),
            "transfers": sizes.growth,
        },
        "both sides ours, as in ledger.hot_batch; the large tables are one database for all rounds, the small ones one for each; no"
        " checkpoint but the server's own after the first round's beginning",
    )


async def floor(postgres: Postgres, sizes: Sizes, repeats: int, told: Told) -> Record:
    await make_template(postgres, sizes.users)
    spent: dict[str, list[float]] = {step: [] for step in ledger_floor.STEPS}
    for turn in range(repeats):
        work = batches(sizes.floor, sizes.users, turn)
        for step, found in spent.items():
            async with database(postgres, DATABASE) as dsn:
                found.append(await ledger_floor.run(dsn, step, sizes.users, work))
            told(f"{step}: {found[-1]:.1f} µs")
    first, last = ledger_floor.STEPS[0], ledger_floor.STEPS[-1]
    return Record(
        "ledger.floor",
        Comparison.of(
            "the rows alone, by COPY into tables without keys, over a journaled batch by ledger.book.post",
            *("µs/transfer", spent[last], spent[first], FLOOR_GOAL),
            less_is_better=True,
        ),
        {"steps": {step: Spread.of(found) for step, found in spent.items()}, "transfers": sizes.floor},
        f"µs per transfer in batches of {BATCH:,}, up to and with each step; the first {WARM} batches do not count",
    )


async def _make_filled(postgres: Postgres, name: str, users: int, transfers: int) -> None:
    postgres.drop_database(name)
    connection = await connect(postgres.create_database(name, template=TEMPLATE))
    try:
        await fill(connection, users, transfers)
    finally:
        await connection.close()
