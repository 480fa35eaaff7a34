"""`stablerail verify`: every invariant. `stablerail verify ledger`: the ledger's own, since a checkpoint if one is given."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ledger import verify
from ledger.checkpoint import BEGINNING, Checkpoint
from ledger.verify import ROWS_MAX, Result
from stablerail.cli_base import err, fail, needed_settings, out, run

verify_app = typer.Typer(invoke_without_command=True)
Format = Literal["table", "json"]


@verify_app.callback()
def verify_everything(context: typer.Context) -> None:
    """Check the invariants; exit code 1 when one does not hold."""
    if context.invoked_subcommand is not None:
        return
    from stablerail.verify import verify_all

    settings = needed_settings("database_url", logs=False)
    with shown_progress() as progress:
        results = run(lambda: verify_all(settings, progress))
    show(results, "table")


@verify_app.command("ledger")
def verify_ledger(
    since: Annotated[Path | None, typer.Option(help="a checkpoint: look only at what was committed after it")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="when all hold, write a checkpoint here")] = None,
    rows: Annotated[int, typer.Option(help="most offending rows of an invariant", min=1, max=1_000)] = ROWS_MAX,
    format: Annotated[Format, typer.Option(help="table or json")] = "table",
) -> None:
    """Check 1, 2, 3 and 11 and print the offending rows; exit code 1 when one does not hold.

    A checkpoint is a small file with the head of every hash chain. Keep it where the database's owner cannot write:
    it also shows that the past was not rewritten together with its hashes.
    """
    from stablerail.wiring import connector

    settings = needed_settings("database_url", logs=False)
    start = BEGINNING
    if since is not None:
        try:
            start = Checkpoint.load(since.read_bytes())
        except (OSError, ValueError) as error:
            fail(f"{since}: {error}", 2)

    async def action() -> tuple[list[Result], Checkpoint]:
        connection = await connector(settings)()
        try:
            return await verify.verify_ledger(connection, since=start, rows_max=rows, progress=progress)
        finally:
            await connection.close()

    with shown_progress() as progress:
        results, reached = run(action)
    if checkpoint is not None and all(result.holds for result in results):
        beside = checkpoint.with_name(f"{checkpoint.name}.new")
        beside.write_bytes(reached.dump())
        beside.replace(checkpoint)
    show(results, format)


def show(results: Sequence[Result], format: str) -> None:
    """Prints the results and ends the program: 0 when all hold, else 1."""
    holds = all(result.holds for result in results)
    if format == "json":
        invariants = [
            {
                "number": result.number, "name": result.name, "checked": result.checked, "holds": result.holds,
                "offending": list(result.offending),
            }
            for result in results
        ]  # fmt: skip
        sys.stdout.write(orjson.dumps({"holds": holds, "invariants": invariants}).decode() + "\n")
        raise typer.Exit(0 if holds else 1)
    table = Table("", "invariant", "checked", "offending", header_style="bold", pad_edge=False, box=None)
    for result in results:
        told = Text("holds", "green") if result.holds else Text("BROKEN", "bold red").append("", "default")
        for row in result.offending:
            told.append(f"\n{row}", "default")
        table.add_row(str(result.number), result.name, str(result.checked), told)
    out.print(table)
    raise typer.Exit(0 if holds else 1)


@contextmanager
def shown_progress() -> Iterator[Any]:
    """A bar on the terminal's stderr; nothing where that is a file or another program."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("connecting", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield progress
