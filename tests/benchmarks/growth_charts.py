"""What growth.deposits and growth.memory measured as pictures: the cores that each part took, and each process's memory over time."""

from __future__ import annotations

from html import escape
from typing import Any, Final

from tests.benchmarks.figure import STYLE, TOP, WIDTH

LEFT: Final = 130
ROW: Final = 44
HIGH: Final = 320
COLOURS: Final = (
    "#2f7d5b", "#b3261e", "#3b6ea8", "#b07d2b", "#7a4fa3", "#2b8f9a", "#c2557b", "#6b7d2b", "#8a5a3c", "#5a6b7b",
)  # fmt: skip


def _page(record: dict[str, Any], title: str, small: str, height: int, parts: list[str]) -> str:
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(record['name'])}: {escape(title)}</title>",
        f'<style>{STYLE}</style><rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="16" y="28">{escape(record["name"])}: {escape(title)}</text>',
        f'<text class="small" x="16" y="46">{escape(small)}</text>',
    ]
    foot = f'<text class="small" x="16" y="{height - 12}">{record["cpus"]} CPUs; {escape(record["date"])}</text>'
    return "\n".join([*head, *parts, foot, "</svg>"]) + "\n"


def draw_cores(record: dict[str, Any]) -> str:
    """SVG text: `also.cores`, by number of workers, a bar with a piece for each part."""
    rows = record["also"]["cores"]
    most = max([record["cpus"], *(sum(parts.values()) for parts in rows.values())])
    scale = (WIDTH - LEFT - 40) / most
    drawn = []
    for number, (name, parts) in enumerate(rows.items()):
        x, y = float(LEFT), TOP + ROW * number
        drawn.append(f'<text x="16" y="{y + 20}">{escape(name)}</text>')
        for colour, (part, cores) in zip(COLOURS, parts.items(), strict=False):
            drawn.append(
                f'<rect fill="{colour}" x="{x:.1f}" y="{y + 4}" width="{cores * scale:.1f}" height="22" rx="2"/>'
            )
            drawn.append(f'<text class="small" x="{x + 2:.1f}" y="{y + 38}">{escape(part)} {cores:.2f}</text>')
            x += cores * scale
    edge = LEFT + record["cpus"] * scale
    drawn.append(f'<line class="goal" x1="{edge:.1f}" y1="{TOP}" x2="{edge:.1f}" y2="{TOP + ROW * len(rows)}"/>')
    return _page(
        record, "cores that each part took", "Dashes: what the machine has.", TOP + ROW * len(rows) + 34, drawn
    )


def draw_memory(record: dict[str, Any]) -> str:
    """SVG text: `also.rss_mb`, a line for each process over the minutes."""
    series = record["also"]["rss_mb"]
    most = max(max(samples) for samples in series.values()) * 1.05
    wide = WIDTH - LEFT - 160
    drawn = [f'<line class="axis" x1="{LEFT}" y1="{TOP + HIGH}" x2="{LEFT + wide}" y2="{TOP + HIGH}"/>']
    for number, (name, samples) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        step = wide / max(1, len(samples) - 1)
        points = " ".join(f"{LEFT + n * step:.1f},{TOP + HIGH * (1 - one / most):.1f}" for n, one in enumerate(samples))
        drawn.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>')
        y = TOP + 18 * number + 12
        drawn.append(f'<text class="small" style="fill:{colour}" x="{LEFT + wide + 12}" y="{y}">{escape(name)}</text>')
    drawn.append(f'<text class="small" x="16" y="{TOP + 10}">{most:.0f} MB</text>')
    drawn.append(f'<text class="small" x="{LEFT}" y="{TOP + HIGH + 16}">0 to {record["also"]["minutes"]:g} min</text>')
    return _page(record, "resident memory of each process", record["measured"], TOP + HIGH + 50, drawn)
