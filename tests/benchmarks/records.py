"""docs/benchmarks/results.json: one record per benchmark, replaced whole when that benchmark runs again."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


@dataclass(frozen=True)
class Spread:
    """The runs of one side, in the order in which they were made."""

    median: float
    min: float
    max: float
    runs: list[float]

    @classmethod
    def of(cls, runs: Sequence[float], digits: int = 2) -> Spread:
        rounded = [round(run, digits) for run in runs]
        return cls(round(statistics.median(rounded), digits), min(rounded), max(rounded), rounded)


@dataclass(frozen=True)
class Comparison:
    """`ratio` is of the medians, higher is better; `ratio_min` and `ratio_max` of the rounds, each against its own."""

    compares: str
    unit: str
    ours: Spread
    baseline: Spread
    ratio: float
    ratio_min: float
    ratio_max: float
    goal: float
    met: bool

    @classmethod
    def of(
        cls,
        compares: str,
        unit: str,
        ours: Sequence[float],
        baseline: Sequence[float],
        goal: float,
        *,
        less_is_better: bool = False,
    ) -> Comparison:
        mine, other = Spread.of(ours), Spread.of(baseline)
        over, under = (other, mine) if less_is_better else (mine, other)
        rounds = [a / b for a, b in zip(over.runs, under.runs, strict=True)]
        ratio = over.median / under.median
        low, high = round(min(rounds), 3), round(max(rounds), 3)
        return cls(compares, unit, mine, other, round(ratio, 3), low, high, goal, ratio >= goal)


@dataclass(frozen=True)
class Record:
    """`first` is the figure that the benchmark is judged by; `also` holds the rest: comparisons and plain figures."""

    name: str
    first: Comparison
    also: dict[str, Any]
    measured: str
    """How, in a sentence."""

    def plain(self, described: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": self.name,
            **asdict(self.first),
            "also": _plain(self.also),
            "measured": self.measured,
            **described,
        }

    def comparisons(self) -> list[Comparison]:
        return [self.first, *(value for value in self.also.values() if isinstance(value, Comparison))]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return asdict(value) if isinstance(value, Comparison | Spread) else value


def save(records: Sequence[dict[str, Any]], directory: Path = DIRECTORY) -> None:
    """Puts the records among those that are there, and draws the figure anew."""
    from tests.benchmarks.figure import draw, draw_steps
    from tests.benchmarks.growth_charts import draw_cores, draw_memory

    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "results.json"
    known = {record["name"]: record for record in (json.loads(file.read_text()) if file.exists() else [])}
    known |= {record["name"]: record for record in records}
    everything = [known[name] for name in sorted(known)]
    file.write_text(json.dumps(everything, indent=2, ensure_ascii=False) + "\n")
    (directory / "results.svg").write_text(draw(everything))
    for record in everything:
        for figure, drawn in (("steps", draw_steps), ("cores", draw_cores), ("rss_mb", draw_memory)):
            if figure in record["also"]:
                (directory / f"{record['name'].replace('.', '_')}.svg").write_text(drawn(record))
