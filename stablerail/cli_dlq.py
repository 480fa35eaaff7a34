"""`stablerail dlq list|show|redrive|discard`: dead letters, by hand. As /v1/admin/dlq."""

from __future__ import annotations

import base64
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import orjson
import typer
from rich.table import Table

from agents.recovery import redrive_dead_letters as letters
from agents.recovery.errors import LetterRefused
from agents.recovery.letters import Letter, State, headers_of, plain, shown
from agents.recovery.redrive_dead_letters import AT_ONCE, Filter
from ledger.rows import Connection
from stablerail.answers import format_time, parse_time
from stablerail.cli_base import actor_of, err, fail, journaled, needed_settings, out, run
from stablerail.cli_corrections import Actor
from topics.codes import Whose

dlq_app = typer.Typer(no_args_is_help=True, help="Dead letters: events that were refused, and what is done about them.")

LIMIT: Final = 1_000
Format = Annotated[Literal["table", "json"], typer.Option(help="json: a line for each, contents included")]
Topic = Annotated[str | None, typer.Option(help="only of this topic, with or without .dlq")]
CodeName = Annotated[str | None, typer.Option("--code", help="only with this code")]
Class = Annotated[Whose | None, typer.Option("--class", help="only what is the affair of these")]


@dlq_app.command("list")
def dlq_list(
    topic: Topic = None,
    code: CodeName = None,
    whose: Class = None,
    state: Annotated[list[State] | None, typer.Option(help="else open and redriven")] = None,
    since: Annotated[str | None, typer.Option(help="refused at or after this time")] = None,
    after: Annotated[str | None, typer.Option(help="the next page: what the last one ended with")] = None,
    limit: Annotated[int, typer.Option(help="most letters", min=1, max=LIMIT)] = 50,
    format: Format = "table",
) -> None:
    """Those that wait for somebody, the last refused first."""
    states = tuple(state) if state else (State.OPEN, State.REDRIVEN)
    wanted = Filter(topic, code, whose, states, _time(since))
    try:
        place = None if after is None else letters.place(after)
    except ValueError:
        fail(f"--after {after}: not what a page ended with", 2)
    found = _with(lambda connection: letters.page(connection, wanted, limit + 1, place))
    shown_now = found[:limit]
    if format == "json":
        for letter in shown_now:
            sys.stdout.write(orjson.dumps(as_json(letter)).decode() + "\n")
        sys.stdout.flush()
    else:
        _show(shown_now)
    if len(found) > limit:  # beside the lines of json
        err.print(f"more: --after {letters.place_of(shown_now[-1])}", highlight=False, soft_wrap=True)


@dlq_app.command("show")
def dlq_show(letter: Annotated[str, typer.Argument(metavar="ID")], format: Format = "table") -> None:
    """One with its contents: text as text, else hex."""
    key = _id(letter)
    found: Letter = _with(lambda connection: letters.find(connection, key))
    if format == "json":
        sys.stdout.write(orjson.dumps(as_json(found)).decode() + "\n")
        return
    table = Table.grid(padding=(0, 2))
    for name, value in plain(found).items():
        if value is not None:
            table.add_row(name, format_time(value) if isinstance(value, datetime) else str(value))
    if found.key is not None:
        table.add_row("key", shown(found.key))
    for name, text in headers_of(found):
        table.add_row(f"header {name}", text or "")
    table.add_row("value", "none" if found.value is None else shown(found.value))
    out.print(table, markup=False, highlight=False)


@dlq_app.command("redrive")
def dlq_redrive(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...")] = None,
    eligible: Annotated[bool, typer.Option("--eligible", help="every open one that it can help")] = False,
    topic: Topic = None,
    code: CodeName = None,
    yes: Annotated[bool, typer.Option("--yes", help="with --eligible: do it, do not only show")] = False,
    force: Annotated[bool, typer.Option("--force", help="also where its code says that it cannot help")] = False,
    actor: Actor = None,
) -> None:
    """Send events to their topics again as they came, with their ids. What is settled already is not settled twice."""
    if bool(ids) == eligible:
        fail("name the letters, or say --eligible", 2)
    if (topic or code or yes) and not eligible:
        fail("--topic, --code and --yes belong to --eligible", 2)
    settings = needed_settings("database_url", logs=False)
    who = actor_of(settings, actor)
    keys = [_id(text) for text in ids or ()]

    async def act(connection: Connection) -> tuple[list[Letter], list[LetterRefused]]:
        sent: list[Letter] = []
        refused: list[LetterRefused] = []
        while True:
            now = datetime.now(UTC)
            if eligible:
                found = await letters.eligible(connection, Filter(topic, code, states=(State.OPEN,)), AT_ONCE)
                if not yes:
                    return found, []
                some = [one.id for one in found]
            else:
                some, keys[:] = keys[:AT_ONCE], keys[AT_ONCE:]
            done = await letters.redrive(connection, some, who, now, force=force)
            sent += done.sent
            refused += done.refused
            if not eligible:
                keys.extend(done.left)
            if not done.sent if eligible else not keys:
                await journaled(settings)
                return sent, refused

    sent, refused = _with(act)
    _show(sent)
    if eligible and not yes:
        out.print(f"{len(sent)} would be redriven; say --yes" if sent else "nothing to redrive", highlight=False)
        return
    out.print(f"{len(sent)} redriven; they leave within half a minute", highlight=False)
    for error in refused:
        out.print(f"{error.code}: {error}", markup=False, highlight=False, style="red")
    raise typer.Exit(1 if refused else 0)


@dlq_app.command("discard")
def dlq_discard(
    letter: Annotated[str, typer.Argument(metavar="ID")],
    reason: Annotated[str, typer.Option(help="why, for the audit")],
    actor: Actor = None,
) -> None:
    """End a letter for good; the audit keeps its bytes and the reason."""
    settings = needed_settings("database_url", logs=False)
    key = _id(letter)

    async def act(connection: Connection) -> Letter:
        done, _ = await letters.discard(connection, key, reason, actor_of(settings, actor), datetime.now(UTC))
        await journaled(settings)
        return done

    out.print(f"{_with(act).id} is discarded", highlight=False)


def as_json(letter: Letter) -> dict[str, Any]:
    """A letter with its contents, as `list` and `show` write it and `stablerail replay --file` reads it."""
    contents = {
        name: None if raw is None else base64.b64encode(raw).decode()
        for name, raw in (("key", letter.key), ("value", letter.value))
    }
    return {**plain(letter), **contents, "headers": letter.headers}


def _show(found: list[Letter]) -> None:
    table = Table(
        "id", "topic", "code", "class", "state", "refused", "attempts", header_style="bold", pad_edge=False, box=None
    )
    for one in found:
        row = plain(one)
        table.add_row(one.id, one.topic, one.code, row["class"], one.state, format_time(one.last_at), str(one.attempts))
    out.print(table, markup=False, highlight=False)


def _with(action: Callable[[Connection], Awaitable[Any]]) -> Any:
    from stablerail.connections import connector

    settings = needed_settings("database_url", logs=False)

    async def work() -> Any:
        connection = await connector(settings)()
        try:
            return await action(connection)
        finally:
            await connection.close()

    try:
        return run(work)
    except LetterRefused as error:
        fail(f"{error.code}: {error}")


def _id(text: str) -> str:
    try:
        return UUID(text).hex
    except ValueError:
        fail(f"{text}: an id is 32 hex digits; `stablerail dlq list` shows them", 2)


def _time(text: str | None) -> datetime | None:
    try:
        return None if text is None else parse_time(text)
    except ValueError as error:
        fail(f"--since {text}: {error}", 2)
