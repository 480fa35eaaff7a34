"""results.json as a picture: each comparison as a bar, its ratio as a share of its goal, its spread, and a line at the goal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

WIDTH, LEFT, ROW, TOP = 860, 350, 58, 64
STEPS_LEFT, STEP = 90, 34
STYLE = """
text{font:13px system-ui,sans-serif;fill:#1b2733}.small{font-size:11px;fill:#5a6b7b}.title{font-size:16px;font-weight:600}
.met{fill:#2f7d5b}.missed{fill:#b3261e}.spread{stroke:#1b2733;stroke-width:1.5}.goal{stroke:#1b2733;stroke-dasharray:3 3}
.axis{stroke:#c9d2da}.page{fill:#fff}
@media(prefers-color-scheme:dark){text{fill:#dfe7ee}.small{fill:#93a4b3}.spread,.goal{stroke:#dfe7ee}.page{fill:#12181f}
.axis{stroke:#2a3541}.met{fill:#4fae84}.missed{fill:#e0625a}}
"""


def draw(records: Sequence[dict[str, Any]]) -> str:
    """SVG text. `records` as results.json holds them."""
    rows = [row for record in records for row in _rows(record)]
    most = max([1.0, *(row["ratio_max"] / row["goal"] for _, row in rows)]) * 1.08
    height = TOP + ROW * len(rows) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>Benchmarks: ratio to the baseline, higher is better</title>",
        f'<style>{STYLE}</style><rect class="page" width="{WIDTH}" height="{height}"/>',
        '<text class="title" x="16" y="28">Ratio to the baseline, as a share of its goal</text>',
        '<text class="small" x="16" y="46">Higher is better. Bar: ratio of the medians. Line: the rounds, lowest to highest.'
        " Dashes: the goal.</text>",
    ]
    for number, (name, row) in enumerate(rows):
        parts += _bar(name, row, TOP + ROW * number, (WIDTH - LEFT - 30) / most)
    dates = sorted({record["date"] for record in records})
    machine = ", ".join(sorted({f"{record['cpus']} CPUs" for record in records}))
    parts.append(f'<text class="small" x="16" y="{height - 12}">{escape(machine)}; {escape(", ".join(dates))}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _rows(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield record["name"], record
    for name, value in record["also"].items():
        if isinstance(value, dict) and "ratio" in value:
            yield f"{record['name']} · {name.replace('_', ' ')}", value


def _bar(name: str, row: dict[str, Any], y: int, scale: float) -> list[str]:
    kind, middle = "met" if row["met"] else "missed", y + 24
    scale /= row["goal"]
    ends = (LEFT + row["ratio_min"] * scale, LEFT + row["ratio_max"] * scale)
    goal = LEFT + row["goal"] * scale
    figures = f"{row['ours']['median']:,g} against {row['baseline']['median']:,g} {row['unit']}"
    return [
        f'<text x="16" y="{y + 20}">{escape(name)}</text>',
        f'<text class="small" x="16" y="{y + 36}">{escape(figures)}</text>',
        f'<line class="axis" x1="{LEFT}" y1="{y}" x2="{LEFT}" y2="{y + ROW}"/>',
        f'<rect class="{kind}" x="{LEFT}" y="{y + 12}" width="{row["ratio"] * scale:.1f}" height="24" rx="2"/>',
        f'<line class="spread" x1="{ends[0]:.1f}" y1="{middle}" x2="{ends[1]:.1f}" y2="{middle}"/>',
        f'<line class="goal" x1="{goal:.1f}" y1="{y + 4}" x2="{goal:.1f}" y2="{y + 44}"/>',
        f'<text class="small" x="{LEFT}" y="{y + 50}">{row["ratio"]:.2f}, goal {row["goal"]:.2f}: {kind}</text>',
    ]


def draw_steps(record: dict[str, Any]) -> str:
    """SVG text: each step of `also.steps` as a bar from where the one before ends; each is the time up to and with it."""
    ends = [(name, spread["median"]) for name, spread in record["also"]["steps"].items()]
    scale = (WIDTH - STEPS_LEFT - 150) / max(end for _, end in ends)
    height = TOP + STEP * len(ends) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(record['name'])}: what each step takes</title>",
        f'<style>{STYLE}</style><rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="16" y="28">{escape(record["name"])}: {escape(record["unit"])} of each step</text>',
        f'<text class="small" x="16" y="46">{escape(record["measured"])}</text>',
    ]
    before = 0.0
    for number, (name, end) in enumerate(ends):
        y, left, right = (
            TOP + STEP * number,
            STEPS_LEFT + min(before, end) * scale,
            STEPS_LEFT + max(before, end) * scale,
        )
        parts += [
            f'<text x="16" y="{y + 20}">{escape(name)}</text>',
            f'<rect class="{"met" if end >= before else "missed"}" x="{left:.1f}" y="{y + 6}"'
            f' width="{right - left:.1f}" height="20" rx="2"/>',
            f'<text class="small" x="{right + 6:.1f}" y="{y + 20}">{end - before:+.1f}, {end:.1f} so far</text>',
        ]
        before = end
    parts.append(f'<text class="small" x="16" y="{height - 12}">{record["cpus"]} CPUs; {escape(record["date"])}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
