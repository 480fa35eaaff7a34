"""`stablerail rebuild`: a database from the journal. `stablerail diff A B`: whether two databases are equal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ledger.diff import ROWS_MAX, Difference
from ledger.errors import DatabaseAhead
from ledger.rebuild import Restored
from ledger.rows import Connection
from stablerail.cli_base import (
    EXIT_FOUND,
    EXIT_USAGE,
    Actor,
    actor_of,
    dsn_of,
    err,
    fail,
    journaled,
    needed_settings,
    out,
    run,
    show_table,
)
from stablerail.cli_verify import shown_progress


def rebuild(
    publish: Annotated[
        bool,
        typer.Option(help="take to the journal what the database has and the journal lacks; a copy's with --take-over"),
    ] = False,
    take_over: Annotated[bool, typer.Option("--take-over", help="the deployment goes on with this database")] = False,
    actor: Actor = None,
) -> None:
    """Bring the database to the end of the journal: an empty one (`stablerail migrate` made its tables), or an old backup.

    As it is called, it makes a copy to look at, equal to the database that was lost; nothing that is written in a copy gets
    anywhere. A database that lacks nothing stays as it is. --take-over makes it the deployment's own, with every lane and partner
    closed: `stablerail recovery status` shows them, `stablerail recovery open` compares and opens. Workers, API and bridge must be
    stopped. What has been applied stays; after an interruption call it again.
    """
    from agents.recovery.restoring import close
    from stablerail.rebuild import publish_waiting, rebuild_database

    settings = needed_settings("database_url", logs=False)

    async def action() -> Restored:
        async def closed(connection: Connection, restored: Restored) -> None:
            await close(
                connection,
                datetime.now(UTC),
                actor_of(settings, actor),
                first_seq=restored.first_seq,
                records=restored.records,
            )

        async def forward() -> Restored:
            with _shown() as progress:
                return await rebuild_database(settings, progress, closed if take_over else None)

        try:
            restored = await forward()
        except DatabaseAhead as ahead:  # it has all of the journal now
            if not publish or (ahead.is_copy and not take_over):
                raise
            await publish_waiting(settings)
            restored = await forward()
        if take_over:
            await journaled(settings)
        return restored

    started = time.monotonic()
    restored: Restored = run(action)
    _show_restored(restored, time.monotonic() - started)
    if take_over:
        out.print(
            "the database is at the end of the journal and the deployment's own; nothing is signed or asked of a partner"
        )
        out.print("before you have said: stablerail recovery open")
    elif restored.is_copy:
        out.print("the database is at the end of the journal: a copy; --take-over makes it the deployment's")
    else:
        out.print("the database is at the end of the journal, and was before: it stays as it is, and is no copy")
        out.print("never lost: start its workers. Restored from a backup: stablerail rebuild --take-over")


def diff(
    a: Annotated[
        str, typer.Argument(help="a database's URL, or env:NAME of a variable that holds it", show_default=False)
    ],
    b: Annotated[str, typer.Argument(help="the other's, alike", show_default=False)],
    schema: Annotated[str, typer.Option(help="of the tables, in both")] = "stablerail",
    rows: Annotated[
        int, typer.Option(help="most differing rows that are shown of a table", min=0, max=1_000)
    ] = ROWS_MAX,
) -> None:
    """Compare every journaled table of two databases, row by row; exit code 1 when one differs.

    A URL in a command line is seen by everybody on the machine: give one with a password as env:NAME.
    """
    from ledger import diff as compared

    dsns = [dsn_of(a), dsn_of(b)]

    async def action() -> tuple[list[Difference], list[str]]:
        try:
            async with compared.opened(dsns[0], schema) as one, compared.opened(dsns[1], schema) as other:
                found = await compared.diff(one, other, rows_max=rows, progress=progress)
                outside = {name for each in (one, other) for name in await compared.tables_outside(each)}
        except ValueError:  # its text may hold the URL
            fail("a database's URL is not one that PostgreSQL takes", EXIT_USAGE)
        return found, sorted(outside)

    with shown_progress() as progress:
        found, outside = run(action)
    out.print(f"A {_place(dsns[0])}\nB {_place(dsns[1])}")
    _show_differences(found, outside)
    raise typer.Exit(0 if all(one.equal for one in found) else EXIT_FOUND)


def _place(dsn: str) -> str:
    """Without user, password and options."""
    parts = urlsplit(dsn)
    return f"{parts.hostname or 'local'}:{parts.port or 5432}{parts.path}"


@contextmanager
def _shown() -> Iterator[Any]:
    """A bar on the terminal's stderr; nothing where that is a file or another program."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("journal", total=None, told="")
        started = time.monotonic()

        def progress(done: int, total: int, records: int, rows: int) -> None:
            rate = rows / max(time.monotonic() - started, 0.001)
            told = f"{records:,} records, {rows:,} rows, {rate:,.0f} rows/s"
            bar.update(task, completed=done, total=total, told=told)

        yield progress


def _show_restored(restored: Restored, took_s: float) -> None:
    at = f"{restored.at_last:%Y-%m-%d %H:%M:%S} UTC" if restored.at_last else "-"
    rows = (
        ("records in the journal", f"{restored.records:,}, the last {restored.seq_last}, of {at}"),
        ("applied", f"{restored.applied:,}, with {restored.rows:,} rows"),
        ("repeated, left out", f"{restored.repeats:,}"),
        ("of a database lost before, left out", f"{restored.late:,}"),
        ("messages that are no records, left out", f"{restored.foreign:,}"),
        ("may not have been told, wait in the outbox", f"{restored.to_tell:,}"),
        ("new records begin with", f"{restored.first_seq}"),
        ("took", f"{took_s:.1f} s, {restored.rows / max(took_s, 0.001):,.0f} rows/s"),
    )
    show_table(("", ""), rows)


def _show_differences(found: list[Difference], outside: list[str]) -> None:
    rows = []
    for one in found:
        counts = (one.rows_a, one.rows_b, one.only_a, one.only_b, one.changed)
        rows.append((one.table, *(f"{count:,}" for count in counts), "equal" if one.equal else "differs"))
    show_table(("table", "rows in A", "rows in B", "only in A", "only in B", "changed", ""), rows, bad=("differs",))
    for one in found:
        for row in one.shown:
            out.print(f"{one.table}: {row}")
    out.print(f"not compared: {', '.join(outside)}")
