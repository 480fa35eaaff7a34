"""What every command of the CLI uses: the two consoles, how it shows and how it fails, its settings, who acts, how it runs.

| exit code | means |
| --- | --- |
| 0 | done; of what looks for something: nothing was found |
| 1 | something was found, or what was asked for is refused or is not there |
| 2 | the command line is wrong: nothing was asked |
| 69 | what it needs does not answer: nothing is known |
| 78 | a setting is wrong or missing |
| 130, 141 | Ctrl-C; whoever read its output went away |

Programs that stay (`worker`, `api`, `bridge`) end with 0, 78, or 70 where they must be started anew.

Stdout has what was asked for, stderr everything else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ledger.rows import Connection
from stablerail.config import EXIT_CONFIG, ConfigError, Settings, load_settings

EXIT_FOUND: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNAVAILABLE: Final = 69
"""EX_UNAVAILABLE."""
EXIT_PIPE: Final = 141
"""As of a program that SIGPIPE ended."""
JOURNAL_WAIT_S: Final = 10.0
"""What is committed is safe already: a person need not wait for a broker that is away."""
LOOK_S_MAX: Final = 5.0
"""At the journal's end, before anything is done: who hurries is not kept by a broker that is away."""

T = TypeVar("T")
Actor = Annotated[
    str | None, typer.Option(help="who acts, for the audit; else STABLERAIL_ACTOR, else os: and your login here")
]
Person = Annotated[
    str | None, typer.Option("--actor", help="who you are; else STABLERAIL_ACTOR; it takes two, so nobody is guessed")
]
Kind = Literal["table", "json"]
Format = Annotated[Kind, typer.Option("--format", help="json: an object, of a list one in each line")]


class _Console(Console):
    """Shows data as they are: brackets are no markup, `:id:` is no picture, no line is broken."""

    def __init__(self, *, stderr: bool = False) -> None:
        # in a file, or for another program, a row is a line
        width = None if (sys.stderr if stderr else sys.stdout).isatty() else 10_000
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def on_broken_pipe(self) -> NoReturn:
        raise  # it is called while one is handled; stablerail.cli ends the program


out = _Console()
err = _Console(stderr=True)


def fail(message: str, code: int = EXIT_FOUND) -> NoReturn:
    err.print(message, style="red")
    raise typer.Exit(code)


# -- what is shown ------------------------------------------------------------------------------------------------------


def show_json(found: Any) -> None:
    """One object, for programs and for people who look at it."""
    option = orjson.OPT_INDENT_2 | orjson.OPT_UTC_Z
    sys.stdout.write(orjson.dumps(found, option=option).decode() + "\n")


def show(format: Kind, columns: Sequence[str], found: Iterable[Mapping[str, Any]], *, bad: Sequence[str] = ()) -> None:
    """A list: every value of each as a line of JSON, or the columns as a table, the cells of `bad` in red."""
    if format == "json":
        for one in found:
            sys.stdout.write(orjson.dumps(one, option=orjson.OPT_UTC_Z).decode() + "\n")
        sys.stdout.flush()  # what is said of it comes after it
    else:
        show_table(columns, ([one[name] for name in columns] for one in found), bad=bad)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, bad: Sequence[str] = ()) -> None:
    table = Table(show_header=any(columns), header_style="bold", pad_edge=False, box=None)
    for name in columns:
        table.add_column(name.replace("_", " "), overflow="fold")  # a hash is whole, however narrow the terminal
    for row in rows:
        table.add_row(*(Text(cell, "red" if cell in bad else "") for cell in map(_cell, row)))
    out.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


# -- settings and actors ------------------------------------------------------------------------------------------------


def needed_settings(*needed: str, logs: bool = True) -> Settings:
    """The settings, or the end of the program with each wrong or missing one's name and what is expected. `logs`: of a program that
    stays; others say themselves what they meet."""
    from stablerail.telemetry import configure_logging

    try:
        settings = load_settings()
        settings.require(*needed)
    except ConfigError as error:
        fail(str(error), EXIT_CONFIG)
    configure_logging(settings.log_format, settings.log_level if logs else "error")
    return settings


def dsn_of(given: str) -> str:
    """A database's URL as it is, or of a variable: `env:NAME`."""
    name = given.removeprefix("env:")
    if name == given:
        return given
    if not (found := os.environ.get(name)):
        fail(f"the variable {name} is not set", EXIT_USAGE)
    return found


def actor_of(settings: Settings, given: str | None) -> str:
    """Who acts, for the audit: as they say, else the login they have on this machine."""
    import getpass

    if said := _said(settings, given):
        return said
    try:
        return f"os:{getpass.getuser()}"
    except (KeyError, OSError):  # a container's user without a name
        return f"os:{os.getuid()}"


def person_of(settings: Settings, given: str | None) -> str:
    """Who acts where a second person is needed: two may have one login, so it must be said."""
    return _said(settings, given) or fail("say who you are: --actor NAME, or STABLERAIL_ACTOR", EXIT_USAGE)


def _said(settings: Settings, given: str | None) -> str:
    return (given or "").strip() or (settings.actor or "").strip()


# -- how a command runs -------------------------------------------------------------------------------------------------


def looked_up(reading: Callable[[Connection], Awaitable[Any]], settings: Settings | None = None) -> Any:
    """What it reads on a connection of its own."""
    used = settings or needed_settings("database_url", logs=False)
    return run(lambda: connected(used, reading))


def changed(
    action: Callable[[Connection, str, datetime], Awaitable[T]],
    actor: str | None,
    *,
    who: Callable[[Settings, str | None], str] = actor_of,
) -> T:
    """What it did, once the journal has it. It is given who acts, and the time; a deadlock's victim, or whoever came second, does it
    again."""
    from ledger.commit import OVERTAKEN

    settings = needed_settings("database_url", logs=False)
    name = who(settings, actor)

    async def act(connection: Connection) -> T:
        await check_own(settings, connection)
        for _ in range(2):
            with suppress(*OVERTAKEN):
                return await action(connection, name, datetime.now(UTC))
        return await action(connection, name, datetime.now(UTC))

    async def committed() -> T:
        done: T = await connected(settings, act)
        await journaled(settings)
        return done

    found: T = run(committed)
    return found


async def connected(settings: Settings, act: Callable[[Connection], Awaitable[Any]]) -> Any:
    """What it does on a connection of its own."""
    from stablerail.connections import connector

    connection = await connector(settings)()
    try:
        return await act(connection)
    finally:
        await connection.close()


async def check_own(settings: Settings, connection: Connection) -> None:
    """Before anything is committed: what is written in a copy, or in a backup that was not brought forward, gets nowhere and is in the
    way of its rebuild. Raises ACopy and DatabaseBehind; while Kafka is away nobody knows the latter."""
    from aiokafka.errors import KafkaError

    from ledger.errors import ACopy
    from ledger.journal import is_copy
    from stablerail.connections import relay_of

    if await is_copy(connection):
        raise ACopy

    async def nowhere(*_: Any) -> None:
        """It only looks."""

    with suppress(KafkaError, TimeoutError):
        async with asyncio.timeout(LOOK_S_MAX):
            await relay_of(settings, nowhere).look()


async def journaled(settings: Settings) -> None:
    """Returns when the journal has what this command committed; where Kafka does not take it, one line says who will."""
    from aiokafka.errors import KafkaError

    from agents.emitter import Emitter
    from stablerail.connections import relay_of

    emitter = Emitter(settings.kafka_bootstrap, settings.topic_prefix)
    relay = relay_of(settings, emitter.journal)
    try:
        async with asyncio.timeout(JOURNAL_WAIT_S):
            await emitter.start()
            await relay.journal()
    except (KafkaError, OSError):  # TimeoutError is an OSError
        err.print("Kafka is not reachable: the next worker journals what was committed")
    finally:
        await relay.close()
        await emitter.stop()


@contextmanager
def _driver_silent() -> Iterator[None]:
    """What Kafka's driver logs is said once, as the command's own line."""
    client = logging.getLogger("aiokafka")
    level = client.level
    client.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        client.setLevel(level)


def run(action: Callable[[], Awaitable[Any]]) -> Any:
    """Runs a short command; what it cannot reach, or the ledger refuses, is said in one line."""
    import asyncpg
    from aiokafka.errors import KafkaError

    from chain.errors import ChainError
    from ledger.errors import BadAccountName, BadCursor, BadLegs, BadPeriod, LedgerError, LegacyAway, ReasonMissing

    async def main() -> Any:
        return await action()

    try:
        with _driver_silent():
            return asyncio.run(main())
    except LedgerError as error:
        mistyped = isinstance(error, BadAccountName | BadCursor | BadLegs | BadPeriod | ReasonMissing)
        away = EXIT_UNAVAILABLE if isinstance(error, LegacyAway) else EXIT_FOUND
        fail(f"{error.code}: {error}", EXIT_USAGE if mistyped else away)
    except ConfigError as error:
        fail(str(error), EXIT_CONFIG)
    except ChainError as error:
        fail(str(error), EXIT_UNAVAILABLE)
    except BrokenPipeError:  # of stdout: a driver says another thing of its own connections
        raise
    except asyncpg.UndefinedTableError as error:
        fail(f"{told(error)}; `stablerail migrate` makes the schema", EXIT_UNAVAILABLE)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, KafkaError) as error:
        fail(told(error), EXIT_UNAVAILABLE)


def told(error: Exception) -> str:
    """Its name and its text; a TimeoutError has none, a driver's may begin with the name."""
    name, text = type(error).__name__, str(error)
    return text if name in text else f"{name}: {text}".removesuffix(": ")
