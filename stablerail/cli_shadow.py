"""`stablerail shadow status|advance|retreat|backfill`: the ledger beside the company's own table of balances, phase by phase."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import typer
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from ledger import shadow_phases
from ledger.errors import PhaseRefused
from ledger.rows import Connection
from ledger.shadow import Mirror
from ledger.shadow_backfill import Totals, backfill
from stablerail.cli_base import (
    EXIT_USAGE,
    Actor,
    Format,
    actor_of,
    check_own,
    err,
    fail,
    journaled,
    needed_settings,
    out,
    run,
    show,
    show_json,
)
from stablerail.config import EXIT_CONFIG, PREFIX, Settings
from topics.money import SCALE

shadow_app = typer.Typer(no_args_is_help=True, help="The ledger beside a legacy table of balances.")

T = TypeVar("T")
At = Annotated[
    datetime | None, typer.Option(help="the clock, UTC: 2026-07-01T12:00:00; else now", formats=["%Y-%m-%dT%H:%M:%S"])
]
Force = Annotated[
    bool, typer.Option("--force", help="although something stands in the way; needs --reason, and is logged")
]
Reason = Annotated[str | None, typer.Option(help="why, for the audit")]
SHOWN_MAX = 20


@shadow_app.command("status")
def status(at: At = None, format: Format = "table") -> None:
    """The phase, since when it is clean, and what stands in the way of the next."""

    async def look(connection: Connection, _mirror: Mirror, now: datetime) -> dict[str, Any]:
        state = await shadow_phases.state(connection)
        if state.changed_at is None:
            return {"phase": None}
        last = await shadow_phases.last_difference(connection)
        found = await shadow_phases.discrepancies(connection, state.changed_at, SHOWN_MAX)
        return {
            "phase": state.phase,
            "changed_at": state.changed_at,
            "changed_by": state.changed_by,
            "clean_since": shadow_phases.clean_since(state, last) if state.phase.writes else None,
            "in_the_way": shadow_phases.in_the_way(state, last, now),
            "discrepancies": [
                {**one._asdict(), "ledger": _units(one.ledger), "legacy": _units(one.legacy)} for one in found
            ],
        }

    found = _with_mirror(look, at)
    if format == "json":
        show_json(found)
        return
    if found["phase"] is None:
        out.print("phase: none yet; a worker or the API stores the first when it starts")
        return
    out.print(f"phase: {found['phase']} since {found['changed_at']:%Y-%m-%d %H:%M:%S} UTC, by {found['changed_by']}")
    if found["clean_since"] is not None:
        out.print(f"clean since: {found['clean_since']:%Y-%m-%d %H:%M:%S} UTC")
    for reason in found["in_the_way"] or ["nothing that time tells; `advance` compares all balances"]:
        out.print(f"in the way: {reason}")
    if found["discrepancies"]:
        show("table", ("user_id", "type", "ledger", "legacy", "first_seen", "last_seen"), found["discrepancies"])


@shadow_app.command("advance")
def advance(force: Force = False, reason: Reason = None, actor: Actor = None, at: At = None) -> None:
    """To the next phase: off, shadow, ledger, strict, cut_over. Compares all balances first."""
    _move(1, force, reason, actor, at)


@shadow_app.command("retreat")
def retreat(reason: Reason = None, actor: Actor = None, at: At = None) -> None:
    """To the phase before; what the legacy table missed is written there first."""
    _move(-1, True, reason or "retreat", actor, at)


@shadow_app.command("backfill")
def run_backfill(actor: Actor = None, at: At = None) -> None:
    """Give the ledger what the legacy table has and it does not, against treasury capital. Stopped, it goes on where it was."""

    async def fill(connection: Connection, mirror: Mirror, now: datetime) -> Totals:
        with _progress() as bar:
            task = bar.add_task("customers", total=None)
            return await backfill(
                connection,
                mirror,
                now,
                actor=actor_of(settings, actor),
                progress=lambda more: bar.update(task, advance=more),
            )

    settings = needed_settings("database_url")
    totals: Totals = _with_mirror(fill, at, settings, commits=True)
    out.print(f"{totals.customers} customers, {totals.opened} accounts opened")
    for one in totals.examples:
        err.print(f"not opened: {one.user_id}.{one.type}: ledger {_units(one.ledger)}, legacy {_units(one.legacy)}")
    if totals.refused:
        fail(f"{totals.refused} accounts are for a person to decide: more in the ledger, or no amount of ours")


def _move(by: int, force: bool, reason: str | None, actor: str | None, at: datetime | None) -> None:
    if force and not reason:
        fail("--force needs --reason: it is logged", EXIT_USAGE)
    settings = needed_settings("database_url")

    async def move(connection: Connection, mirror: Mirror, now: datetime) -> str:
        with _progress() as bar:
            task = bar.add_task("compared", total=None)
            state, _ = await shadow_phases.move(
                connection, mirror, by, now, actor=actor_of(settings, actor), force=reason if force else None,
                progress=lambda more: bar.update(task, advance=more),
            )  # fmt: skip
        return state.phase

    phase: str = _with_mirror(move, at, settings, commits=True)
    out.print(f"phase: {phase}")


def _with_mirror(
    action: Callable[[Connection, Mirror, datetime], Awaitable[T]],
    at: datetime | None,
    settings: Settings | None = None,
    *,
    commits: bool = False,
) -> T:
    from stablerail.connections import opener
    from stablerail.shadow import mirror_for

    given = settings or needed_settings("database_url", logs=False)
    mirror = mirror_for(given)
    if mirror is None:
        fail(
            f"{PREFIX}LEGACY_TABLE: must name a table, with {PREFIX}LEGACY_URL also {PREFIX}LEDGER_SHADOW_MODE",
            EXIT_CONFIG,
        )

    async def main() -> T:
        connection = await opener(given, None)()
        try:
            if commits:
                await check_own(given, connection)
            await mirror.check(connection)
            try:
                return await action(connection, mirror, at.replace(tzinfo=UTC) if at else datetime.now(UTC))
            except PhaseRefused as refused:
                for reason in refused.reasons:
                    err.print(f"in the way: {reason}")
                raise
        finally:
            await mirror.close()
            await connection.close()
            if commits:
                await journaled(given)

    found: T = run(main)
    return found


def _progress() -> Progress:
    columns = (TextColumn("{task.description}: {task.completed}"), TimeElapsedColumn())
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


def _units(base: int | str | object) -> str:
    """Base units as units; what is no number as it is."""
    from decimal import Decimal

    value = Decimal(str(base))
    return f"{value / SCALE:f}" if value.is_finite() else str(base)
