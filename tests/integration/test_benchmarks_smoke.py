"""The benchmarks run and count what they measure; their figures mean nothing here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from tests.benchmarks.benchmarks import BENCHMARKS, QUICK
from tests.benchmarks.ledger_floor import STEPS
from tests.benchmarks.ledger_reads import Reads
from tests.benchmarks.parts import Parts, describe
from tests.benchmarks.records import Comparison, save

pytestmark = pytest.mark.timeout(1_200)  # all take a minute and a half; on a machine that others use too, several


@pytest.fixture
def parts(scratch: Path, tools: Tools, tmp_path: Path) -> Iterator[Parts]:
    """Parts of its own, because their processes are measured too."""
    directory = scratch / "benchmarks"
    with Kafka(directory / "kafka", tools) as kafka, Postgres(directory / "postgres", tools) as postgres:
        yield Parts(kafka, postgres, tmp_path)


async def test_each_benchmark_measures_every_side_and_loses_no_deposit(parts: Parts, tmp_path: Path) -> None:
    described = await describe(parts)
    told: list[str] = []
    # growth.memory is chaos's rig with nothing broken, which takes minutes: `--quick --minutes 3` tries it
    names = [name for name in BENCHMARKS if name != "growth.memory"]
    records = [
        await BENCHMARKS[name](parts, replace(QUICK, run_s_max=100, grown_s_max=100), told.append) for name in names
    ]
    sides = ["worker", "bare", "lab", "plain", "two workers", "full", "empty", "worker", "hop and commit"]
    sides += ["one", "two together", "four together"]
    sides += ["bridge", "verify only"]
    sides += [side.name for side in fields(Reads)]
    sides += ["ours", "plain fold", "naive", "ours", "two rows", "journaled", "20,000 entries", "1,000 entries", *STEPS]
    sides += ["worker", "bare httpx", "worker", "bare httpx"]
    sides += ["rebuild", "COPY"]
    sides += ["by HTTP, comparing", "by HTTP, legacy", "comparing", "legacy", "ledger", "dual write"]
    sides += ["ours", "bare send", "through Kafka", "signatures", "withdrawal", "hop and commit"]
    sides += ["filled", "200 in flight", "100 in flight"]
    assert [line.partition(":")[0] for line in told] == sides
    # in the two blocks that count here nothing may be settled yet
    slow = {"withdrawals.block_fill"}
    pairs = [(record.name, one) for record in records for one in record.comparisons()]
    assert all(one.baseline.min > 0 and (one.ours.min > 0 or name in slow) for name, one in pairs)
    save([record.plain(described) for record in records], tmp_path / "docs")
    written = json.loads((tmp_path / "docs" / "results.json").read_text())
    assert [record["name"] for record in written] == sorted(names)
    (end_to_end,) = [record for record in written if record["name"] == "deposits.end_to_end"]
    assert end_to_end["also"]["journal_bytes_per_event"]["median"] > 0
    assert (tmp_path / "docs" / "results.svg").read_text().count(
        "<rect class="
    ) == 1 + 5 + 1 + 2 + 3 + 5 + 3 + 1 + 2 + 1 + 2 + 3 + 1
    assert "four together" in (tmp_path / "docs" / "growth_deposits.svg").read_text()
    floor = (tmp_path / "docs" / "ledger_floor.svg").read_text()
    assert [f">{step}<" in floor for step in STEPS] == [True] * len(STEPS)


def test_a_missed_goal_is_recorded_as_missed() -> None:
    missed = Comparison.of("a against b", "events/s", [90.0, 80.0, 85.0], [100.0, 100.0, 90.0], goal=0.95)
    assert (missed.ratio, missed.met) == (0.85, False)
    assert (missed.ratio_min, missed.ratio_max) == (0.8, 0.944)


def test_a_shorter_time_is_a_better_ratio() -> None:
    faster = Comparison.of("a against b", "ms", [4.0], [3.0], goal=0.5, less_is_better=True)
    assert (faster.ratio, faster.met) == (0.75, True)
