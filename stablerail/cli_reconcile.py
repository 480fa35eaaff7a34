"""`stablerail reconcile`: compare everything that has two sides, now; or show what earlier runs found."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, TextIO

import typer

from ledger import reconciling
from ledger.commit import OVERTAKEN
from ledger.reconciling import Difference, Found, Run
from ledger.rows import Connection
from stablerail.answers import csv_text
from stablerail.cli_base import (
    EXIT_FOUND,
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
    Actor,
    Kind,
    actor_of,
    check_own,
    connected,
    err,
    fail,
    journaled,
    looked_up,
    needed_settings,
    run,
    show,
)
from stablerail.cli_verify import shown_progress
from stablerail.config import Settings
from topics.money import format_amount

COLUMNS: Final = ("user", "account", "ledger", "other", "difference", "comparison")
HISTORY: Final = ("started_at", "id", "actor", "compared", "differences", "gaps")


def reconcile(
    output: Annotated[
        Path | None, typer.Option(help="CSV into this file, whole or not at all; else stdout", dir_okay=False)
    ] = None,
    history: Annotated[bool, typer.Option("--history", help="compare nothing: list the last runs")] = False,
    limit: Annotated[int, typer.Option(help="runs that --history lists", min=1, max=reconciling.RUNS_KEPT)] = 20,
    run_id: Annotated[
        uuid.UUID | None, typer.Option("--run", help="compare nothing: what this run found, as far as it is kept")
    ] = None,
    format: Annotated[Kind, typer.Option("--format", help="of --history; differences are CSV")] = "table",
    actor: Actor = None,
) -> None:
    """Compare ledger, legacy table, custody mirror, chains and Circle; print what differs as CSV, and store the run.

    Exit code 1 when something differs; 69 when nothing does, and something could not be compared (stderr says what).
    """
    if (history and (run_id is not None or output is not None)) or (run_id is not None and actor is not None):
        fail("--history, --run and comparing exclude each other; --output is for CSV", EXIT_USAGE)
    if format != "table" and not history:
        fail("--format is of --history; differences are CSV", EXIT_USAGE)
    settings = needed_settings("database_url", logs=False)
    if history:
        runs: list[Run] = looked_up(lambda connection: reconciling.newest(connection, limit), settings)
        show(format, HISTORY, (_short(one) if format == "table" else {**asdict(one), **one.plain()} for one in runs))
        return
    with _opened(output) as lines:
        found = _compared(settings, actor, lines) if run_id is None else _stored(settings, run_id, lines)
    _told(found)
    raise typer.Exit(EXIT_FOUND if found.differences else EXIT_UNAVAILABLE if found.gaps else 0)


def _compared(settings: Settings, actor: str | None, lines: TextIO) -> Run:
    from stablerail.reconcile import reconcile as compare

    found = Found(tell=lambda one: _write(lines, one))
    started_at = datetime.now(UTC)

    async def work() -> Run:
        await connected(settings, lambda connection: check_own(settings, connection))
        with shown_progress() as progress:
            await compare(settings, found, progress)
        done: Run = await connected(
            settings, lambda connection: _committed(connection, found, started_at, actor_of(settings, actor))
        )
        await journaled(settings)
        return done

    try:
        done: Run = run(work)
    except typer.Exit as refused:  # 1 is for differences alone
        raise typer.Exit(EXIT_UNAVAILABLE if refused.exit_code == EXIT_FOUND else refused.exit_code) from None
    return done


async def _committed(connection: Connection, found: Found, started_at: datetime, actor: str) -> Run:
    for _ in range(2):
        with contextlib.suppress(*OVERTAKEN):
            return (await reconciling.commit(connection, found, started_at, datetime.now(UTC), actor))[0]
    return (await reconciling.commit(connection, found, started_at, datetime.now(UTC), actor))[0]


def _stored(settings: Settings, run_id: uuid.UUID, lines: TextIO) -> Run:
    async def both(connection: Connection) -> tuple[Run | None, list[Difference]]:
        run_ = await reconciling.run_of(connection, run_id.hex)
        return run_, await reconciling.differences_of(connection, run_id.hex)

    found, differences = looked_up(both, settings)
    if found is None:
        fail(f"unknown_run: there is no run {run_id.hex}; see stablerail reconcile --history")
    for one in differences:
        _write(lines, one)
    if len(differences) < found.differences:
        err.print(f"{len(differences):,} of {found.differences:,} are kept")
    done: Run = found
    return done


@contextmanager
def _opened(output: Path | None) -> Iterator[TextIO]:
    """Stdout as it is now (a progress bar would take it over), or a file beside, which takes its name at the end."""
    if output is None:
        sys.stdout.write(csv_text([COLUMNS]))
        yield sys.stdout
        sys.stdout.flush()
        return
    try:
        handle, beside = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    except OSError as error:
        fail(f"--output: {output}: {error.strerror}", EXIT_USAGE)
    try:
        with open(handle, "w", encoding="utf-8", newline="") as lines:
            lines.write(csv_text([COLUMNS]))
            yield lines
            lines.flush()
            os.fsync(handle)
        Path(beside).replace(output)
    except OSError as error:
        fail(f"--output: {output}: {error.strerror}", EXIT_USAGE)
    finally:
        Path(beside).unlink(missing_ok=True)


def _write(lines: TextIO, one: Difference) -> None:
    values = ["" if value is None else format_amount(value) for value in (one.ledger, one.other)]
    row = (one.user_id, one.account, *values, format_amount(one.difference), one.comparison.value)
    lines.write(csv_text([row]))


def _told(found: Run) -> None:
    for comparison, result in found.compared.items():
        verdict = (
            f"{result.differences:,} differ, by {format_amount(result.base_units)}" if result.differences else "equal"
        )
        err.print(f"{comparison}: {result.checked:,} compared, {verdict}")
    for gap in found.gaps:
        err.print(f"not compared: {gap}", style="yellow")
    err.print(f"run {found.id}")


def _short(one: Run) -> dict[str, Any]:
    return {
        **asdict(one),
        "compared": [f"{name} {result.checked:,}" for name, result in one.compared.items()],
        "gaps": "; ".join(map(str, one.gaps)),
    }
