"""How the demo is shown: a table that fills on a terminal, one line per hop elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from stablerail.demo_story import Hop, Story

WIDE_COLUMNS = 110
"""From here on there is room for the file that makes each hop."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must agree at the end."""

    what: str
    found: str
    holds: bool


@contextmanager
def step(console: Console, doing: str) -> Iterator[None]:
    """A spinner while it is being done, then a line with the time it took."""
    started = time.monotonic()
    if console.is_terminal:
        with console.status(doing):
            yield
    else:
        yield
    console.print(f"[green]✓[/] {doing} [dim]{time.monotonic() - started:.1f} s[/]", highlight=False, soft_wrap=True)


@contextmanager
def showing(console: Console, story: Story) -> Iterator[None]:
    """Shows the story while it runs."""
    if console.is_terminal:
        spinner = Spinner("dots", style="yellow")
        with Live(console=console, refresh_per_second=12, get_renderable=lambda: hop_table(story, console, spinner)):
            yield
        return

    def line(hop: Hop) -> None:
        assert hop.at is not None
        since = hop.at - _start(story)
        text = f"✓ {since:7.3f} s  {hop.name}  <- {hop.by}  {hop.detail}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    story.listeners.append(line)
    try:
        yield
    finally:
        story.listeners.remove(line)


def hop_table(story: Story, console: Console, spinner: RenderableType) -> RenderableType:
    """The hops by time, those to come last; in time order, because two sources may report in any order."""
    wide = console.width >= WIDE_COLUMNS
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold dim", expand=True)
    table.add_column("", width=1)
    table.add_column("since", justify="right", no_wrap=True, min_width=9)
    table.add_column("+", justify="right", no_wrap=True, min_width=8)
    table.add_column("topic or call", no_wrap=True, min_width=30)
    if wide:
        table.add_column("made by", no_wrap=True, min_width=20)
    table.add_column("", no_wrap=not wide, overflow="ellipsis", ratio=1)
    last, waiting = _start(story), True
    for hop in _by_time(story):
        mark: RenderableType
        if hop.at is not None:
            mark, since, step_s = Text("✓", "green"), f"{hop.at - _start(story):.3f} s", f"+{hop.at - last:.3f}"
            name, last = Text(hop.name, "bold"), hop.at
        else:
            mark, since, step_s = spinner if waiting else Text("·", "dim"), "", ""
            name, waiting = Text(hop.name, "yellow" if waiting else "dim"), False
        row: list[RenderableType] = [mark, Text(since), Text(step_s, "cyan"), name]
        table.add_row(*row, *([Text(hop.by, "dim")] if wide else []), Text(hop.detail, "" if hop.at else "dim"))
    return Group(Text(""), table)


def _by_time(story: Story) -> list[Hop]:
    return sorted(story.hops.values(), key=lambda hop: hop.at if hop.at is not None else float("inf"))


def _start(story: Story) -> float:
    return story.hops["approval"].at or time.time()


def summary(checks: Sequence[Check]) -> RenderableType:
    """The panel at the end: everything that must agree, and whether it does."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for check in checks:
        mark = Text("✓", "green") if check.holds else Text("✗", "bold red")
        table.add_row(mark, check.what, Text(check.found, "bold" if check.holds else "bold red"))
    agree = all(check.holds for check in checks)
    title = "balance, chain and ledger agree" if agree else "they do not agree"
    return Panel(table, title=title, border_style="green" if agree else "red", expand=False, padding=(0, 2))
