"""`stablerail dlq list|show|redrive|discard`: dead letters, by hand. As /v1/admin/dlq."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Final
from uuid import UUID

import typer

from agents.recovery import redrive_dead_letters as letters
from agents.recovery.errors import BadReason, LetterRefused
from agents.recovery.letters import Letter, State, headers_of, plain, shown
from agents.recovery.redrive_dead_letters import AT_ONCE, Filter
from ledger.rows import Connection
from stablerail.answers import parse_time
from stablerail.cli_base import (
    EXIT_FOUND,
    EXIT_USAGE,
    Actor,
    Format,
    changed,
    err,
    fail,
    looked_up,
    out,
    show,
    show_table,
)
from topics.codes import Whose

dlq_app = typer.Typer(no_args_is_help=True, help="Dead letters: events that were refused, and what is done about them.")

LIMIT: Final = 1_000
COLUMNS: Final = ("id", "topic", "code", "class", "state", "last_at", "attempts")
LetterId = Annotated[str, typer.Argument(metavar="ID", help="as `dlq list` shows it")]
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
        fail(f"--after {after}: not what a page ended with", EXIT_USAGE)
    found: list[Letter] = looked_up(lambda connection: letters.page(connection, wanted, limit + 1, place))
    show(format, COLUMNS, map(as_json if format == "json" else plain, found[:limit]))
    if len(found) > limit:
        err.print(f"more: --after {letters.place_of(found[limit - 1])}")


@dlq_app.command("show")
def dlq_show(letter: LetterId, format: Format = "table") -> None:
    """One with its contents: text as text, else hex."""
    key = _id(letter)
    found: Letter = _refusable(lambda: looked_up(lambda connection: letters.find(connection, key)))
    if format == "json":
        show(format, COLUMNS, [as_json(found)])  # a line, which `replay --file` reads
        return
    rows = [(name, value) for name, value in plain(found).items() if value is not None]
    if found.key is not None:
        rows.append(("key", shown(found.key)))
    rows += [(f"header {name}", text) for name, text in headers_of(found)]
    show_table(("", ""), [*rows, ("value", "none" if found.value is None else shown(found.value))])


@dlq_app.command("redrive")
def dlq_redrive(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="as `dlq list` shows them")] = None,
    eligible: Annotated[bool, typer.Option("--eligible", help="every open one that it can help")] = False,
    topic: Topic = None,
    code: CodeName = None,
    yes: Annotated[bool, typer.Option("--yes", help="with --eligible: do it, do not only show")] = False,
    force: Annotated[bool, typer.Option("--force", help="also where its code says that it cannot help")] = False,
    actor: Actor = None,
) -> None:
    """Send events to their topics again as they came, with their ids. What is settled already is not settled twice."""
    if bool(ids) == eligible:
        fail("name the letters, or say --eligible", EXIT_USAGE)
    if (topic or code or yes) and not eligible:
        fail("--topic, --code and --yes belong to --eligible", EXIT_USAGE)
    keys = [_id(text) for text in ids or ()]

    sent: list[Letter] = []
    refused: list[LetterRefused] = []

    def that_can(connection: Connection) -> Awaitable[list[Letter]]:
        return letters.eligible(connection, Filter(topic, code, states=(State.OPEN,)), AT_ONCE)

    async def act(connection: Connection, who: str, _: datetime) -> None:
        while True:
            some = [one.id for one in await that_can(connection)] if eligible else keys[:AT_ONCE]
            done = await letters.redrive(connection, some, who, datetime.now(UTC), force=force)
            sent.extend(done.sent)
            refused.extend(done.refused)
            if not eligible:
                keys[:] = [*keys[AT_ONCE:], *done.left]
            if not done.sent if eligible else not keys:
                return

    if eligible and not yes:
        found: list[Letter] = looked_up(that_can)
        show("table", COLUMNS, map(plain, found))
        out.print(f"{len(found)} would be redriven; say --yes" if found else "nothing to redrive")
        return
    changed(act, actor)
    show("table", COLUMNS, map(plain, sent))
    out.print(f"{len(sent)} redriven; they leave within half a minute")
    for error in refused:
        err.print(f"{error.code}: {error}", style="red")
    raise typer.Exit(EXIT_FOUND if refused else 0)


@dlq_app.command("discard")
def dlq_discard(
    letter: LetterId,
    reason: Annotated[str, typer.Option(help="why, for the audit")],
    actor: Actor = None,
) -> None:
    """End a letter for good; the audit keeps its bytes and the reason."""
    key = _id(letter)

    async def act(connection: Connection, who: str, at: datetime) -> Letter:
        done, _ = await letters.discard(connection, key, reason, who, at)
        return done

    done: Letter = _refusable(lambda: changed(act, actor))
    out.print(f"{done.id} is discarded")


def as_json(letter: Letter) -> dict[str, Any]:
    """A letter with its contents, as `list` and `show` write it and `stablerail replay --file` reads it."""
    contents = {
        name: None if raw is None else base64.b64encode(raw).decode()
        for name, raw in (("key", letter.key), ("value", letter.value))
    }
    return {**plain(letter), **contents, "headers": letter.headers}


def _refusable(act: Callable[[], Letter]) -> Letter:
    try:
        return act()
    except LetterRefused as error:
        fail(f"{error.code}: {error}", EXIT_USAGE if isinstance(error, BadReason) else EXIT_FOUND)


def _id(text: str) -> str:
    try:
        return UUID(text).hex
    except ValueError:
        fail(f"{text}: an id is 32 hex digits; `stablerail dlq list` shows them", EXIT_USAGE)


def _time(text: str | None) -> datetime | None:
    try:
        return None if text is None else parse_time(text)
    except ValueError as error:
        fail(f"--since {text}: {error}", EXIT_USAGE)
