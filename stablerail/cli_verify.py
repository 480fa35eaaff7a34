"""`stablerail verify`: every invariant, once or again and again. `stablerail verify ledger`: the ledger's own, since a checkpoint if
one is given."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, NoReturn

import asyncpg
import orjson
import typer
from aiokafka.errors import KafkaError
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from chain.errors import ChainError
from ledger import verify
from ledger.checkpoint import BEGINNING, Checkpoint
from ledger.rows import Connection
from ledger.verify import ROWS_MAX, Result
from stablerail.cli_base import (
    EXIT_FOUND,
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
    Format,
    dsn_of,
    err,
    fail,
    looked_up,
    needed_settings,
    out,
    run,
    show_json,
    told,
)

verify_app = typer.Typer(invoke_without_command=True)


@verify_app.callback()
def verify_everything(
    context: typer.Context,
    kafka: Annotated[bool, typer.Option("--kafka", help="also what the topics hold: 9, 10 and 13")] = False,
    minutes: Annotated[int, typer.Option(help="how far back --kafka reads", min=2, max=7 * 24 * 60)] = 60,
    rebuild: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="also 12: compare with a rebuild, in a scratch database made on this server; a URL, or env:NAME",
        ),
    ] = None,
    watch: Annotated[int, typer.Option(help="look again, so many seconds after each look", min=0)] = 0,
    rows: Annotated[int, typer.Option(help="most offending rows of an invariant", min=1, max=1_000)] = 5,
    format: Format = "table",
) -> None:
    """Check the invariants; exit code 1 when one does not hold.

    A URL in a command line is seen by everybody on the machine: give one with a password as env:NAME.
    """
    if context.invoked_subcommand is not None:
        return
    from stablerail.verify import verify_all

    settings = needed_settings("database_url", logs=False)
    topics = timedelta(minutes=minutes) if kafka else None
    server = None if rebuild is None else dsn_of(rebuild)
    if watch and server:
        fail("--rebuild takes too long to --watch", EXIT_USAGE)
    if watch:
        watched(lambda: verify_all(settings, rows_max=rows, topics=topics), watch, format)
    with shown_progress() as progress:
        results = run(lambda: verify_all(settings, progress, rows_max=rows, topics=topics, rebuild=server))
    show_results(results, format)


def watched(look: Callable[[], Awaitable[list[Result]]], pause_s: float, format: str) -> NoReturn:
    """Looks until Ctrl-C: the table stays up to date on a terminal; elsewhere a line tells each change. Exit code: of the last
    look. What cannot be reached is said, and tried again."""
    last: list[Result] = []

    async def action() -> None:
        live = Live(console=out, auto_refresh=False) if out.is_terminal and format == "table" else None
        with live or nullcontext():
            while True:
                try:
                    results = await look()
                except (OSError, asyncpg.PostgresError, KafkaError, ChainError) as error:
                    err.print(f"not checked: {told(error)}")
                else:
                    if live is not None:
                        live.update(table_of(results), refresh=True)
                    else:
                        tell_changes(last, results, format)
                    last[:] = results
                await asyncio.sleep(pause_s)

    with suppress(KeyboardInterrupt):
        run(action)
    holds = all(result.holds for result in last)
    raise typer.Exit(EXIT_UNAVAILABLE if not last else 0 if holds else EXIT_FOUND)


def tell_changes(last: Sequence[Result], results: Sequence[Result], format: str) -> None:
    """One line for each invariant that is not as it was (of the first look: for each), for people or for programs."""
    before = {result.number: result.offending for result in last}
    for result in results:
        if before.get(result.number) != result.offending:
            if format == "json":
                line = orjson.dumps(plain(result)).decode()
            else:
                how = "holds" if result.holds else f"BROKEN: {'; '.join(result.offending)}"
                line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {result.number} {result.name}: {how}"
            sys.stdout.write(line + "\n")
    sys.stdout.flush()


@verify_app.command("ledger")
def verify_ledger(
    since: Annotated[Path | None, typer.Option(help="a checkpoint: look only at what was committed after it")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="when all hold, write a checkpoint here")] = None,
    rows: Annotated[int, typer.Option(help="most offending rows of an invariant", min=1, max=1_000)] = ROWS_MAX,
    format: Format = "table",
) -> None:
    """Check 1, 2, 3 and 11 and print the offending rows; exit code 1 when one does not hold.

    A checkpoint is a small file with the head of every hash chain. Keep it where the database's owner cannot write:
    it also shows that the past was not rewritten together with its hashes.
    """
    start = BEGINNING
    if since is not None:
        try:
            start = Checkpoint.load(since.read_bytes())
        except (OSError, ValueError) as error:
            fail(f"{since}: {error}", EXIT_USAGE)
    if checkpoint is not None and (checkpoint.is_dir() or not checkpoint.parent.is_dir()):
        fail(f"--checkpoint: {checkpoint}: no file can be written there", EXIT_USAGE)

    async def action(connection: Connection) -> tuple[list[Result], Checkpoint]:
        return await verify.verify_ledger(connection, since=start, rows_max=rows, progress=progress)

    with shown_progress() as progress:
        results, reached = looked_up(action)
    if checkpoint is not None and all(result.holds for result in results):
        try:
            beside = checkpoint.with_name(f"{checkpoint.name}.new")
            beside.write_bytes(reached.dump())
            beside.replace(checkpoint)
        except OSError as error:
            fail(f"all hold, but --checkpoint: {checkpoint}: {error.strerror}", EXIT_USAGE)
    show_results(results, format)


def show_results(results: Sequence[Result], format: str) -> NoReturn:
    """Prints the results and ends the program."""
    holds = all(result.holds for result in results)
    if format == "json":
        show_json({"holds": holds, "invariants": [plain(result) for result in results]})
    else:
        out.print(table_of(results))
    raise typer.Exit(0 if holds else EXIT_FOUND)


def plain(result: Result) -> dict[str, Any]:
    """For programs."""
    return {**asdict(result), "holds": result.holds}


def table_of(results: Sequence[Result]) -> Table:
    table = Table("", "invariant", "checked", "offending", header_style="bold", pad_edge=False, box=None)
    for result in results:
        how = Text("holds", "green") if result.holds else Text("BROKEN", "bold red").append("", "default")
        for row in (*result.offending, *([result.waits] if result.waits else ())):
            how.append(f"\n{row}", "default")
        table.add_row(str(result.number), result.name, str(result.checked), how)
    return table


@contextmanager
def shown_progress() -> Iterator[Any]:
    """A bar on the terminal's stderr; nothing where that is a file or another program."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("connecting", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield progress
