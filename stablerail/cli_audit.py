"""`stablerail audit …`: who did what beside the flow of events, and whether the record of it is whole."""

from __future__ import annotations

import csv
import sys
from datetime import datetime
from typing import Annotated, Any, Literal

import orjson
import typer

from ledger import audit_logs
from ledger.audit_logs import Cursor, Logged, Wanted
from ledger.rows import Connection
from ledger.verify import verify_logs
from stablerail.answers import parse_time
from stablerail.cli_base import EXIT_USAGE, Format, err, fail, looked_up, show
from stablerail.cli_verify import show_results, shown_progress

audit_app = typer.Typer(no_args_is_help=True, help="Acts of people and programs: list, verify, export.")

COLUMNS = (
    "at", "actor", "action", "resource", "resource_id", "status", "error", "address", "user_agent", "before", "after",
)  # fmt: skip

ActorFilter = Annotated[str | None, typer.Option(help="only this actor's")]
ActionFilter = Annotated[str | None, typer.Option(help="only this action: api_key.created")]
ResourceFilter = Annotated[str | None, typer.Option(help="only this kind of thing, or KIND/ID: api_key")]
SinceFilter = Annotated[str | None, typer.Option(help="from this time on: RFC 3339 with a zone, or a date")]
UntilFilter = Annotated[str | None, typer.Option(help="before this time")]


@audit_app.command("list")
def audit_list(
    actor: ActorFilter = None,
    action: ActionFilter = None,
    resource: ResourceFilter = None,
    since: SinceFilter = None,
    until: UntilFilter = None,
    after: Annotated[str | None, typer.Option(help="the cursor that the page before ended with")] = None,
    limit: Annotated[int, typer.Option(help="most logs", min=1, max=1_000)] = 50,
    format: Format = "table",
) -> None:
    """One page, oldest first."""
    wanted = _wanted(actor, action, resource, since, until)
    try:
        cursor = Cursor.parse(after) if after is not None else None
    except ValueError as error:
        fail(f"--after: {error}", EXIT_USAGE)
    found: list[Logged] = looked_up(lambda connection: audit_logs.page(connection, wanted, cursor, limit))
    if format == "json":
        show(format, COLUMNS, map(_exported, found))
    else:
        columns = ("at", "actor", "action", "resource", "status")
        show(format, columns, (dict(zip(columns, _short(one), strict=True)) for one in found))
    if len(found) == limit:
        err.print(f"more: --after {found[-1].cursor}")


@audit_app.command("verify")
def audit_verify(format: Format = "table") -> None:
    """Check that no log was edited, deleted, inserted or moved; exit code 1 when one was."""
    with shown_progress() as progress:

        async def read(connection: Connection) -> Any:
            return await verify_logs(connection, progress=progress)

        result = looked_up(read)
    show_results([result], format)


@audit_app.command("export")
def audit_export(
    actor: ActorFilter = None,
    action: ActionFilter = None,
    resource: ResourceFilter = None,
    since: SinceFilter = None,
    until: UntilFilter = None,
    format: Annotated[Literal["csv", "json"], typer.Option(help="csv, or one JSON object a line")] = "csv",
) -> None:
    """All of them to standard output, oldest first."""
    wanted = _wanted(actor, action, resource, since, until)

    async def read(connection: Connection) -> None:
        write = csv.writer(sys.stdout).writerow
        if format == "csv":
            write(COLUMNS)
        async with connection.transaction(readonly=True):
            async for one in audit_logs.every(connection, wanted):
                if format == "json":
                    show(format, COLUMNS, [_exported(one)])
                else:
                    write(map(_cell, _exported(one).values()))

    looked_up(read)


def _exported(one: Logged) -> dict[str, Any]:
    plain = one.plain()
    return {name: plain[name] for name in COLUMNS}


def _short(one: Logged) -> tuple[Any, ...]:
    log = one.log
    status = log.status if log.error is None else f"{log.status}: {log.error}"
    return one.at, log.actor, log.action, f"{log.resource}/{log.resource_id}", status


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text  # a spreadsheet would run it


def _wanted(
    actor: str | None, action: str | None, resource: str | None, since: str | None, until: str | None
) -> Wanted:
    kind, _, resource_id = (resource or "").partition("/")
    return Wanted(actor, action, kind or None, resource_id or None, _time("--since", since), _time("--until", until))


def _time(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return parse_time(text)
    except ValueError as error:
        fail(f"{option}: {error}", EXIT_USAGE)
