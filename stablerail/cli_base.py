"""What every command of the CLI uses: the two consoles, how it fails, its settings, how it runs."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn

import typer
from rich.console import Console

from stablerail.config import EXIT_CONFIG, ConfigError, Settings, load_settings

# piped into a file or another program nothing is wrapped
out = Console(width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True, width=None if sys.stderr.isatty() else 240)

"""EX_CONFIG."""
JOURNAL_WAIT_S: Final = 10.0
"""What is committed is safe already: a person need not wait for a broker that is away."""


def fail(message: str, code: int = 1) -> NoReturn:
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def needed_settings(*needed: str, logs: bool = True) -> Settings:
    """The settings, or the end of the program with each wrong or missing one's name and what is expected."""
    from stablerail.telemetry import configure_logging

    try:
        settings = load_settings()
        settings.require(*needed)
    except ConfigError as error:
        fail(str(error), EXIT_CONFIG)
    if logs:
        configure_logging(settings.log_format, settings.log_level)
    return settings


def dsn_of(given: str) -> str:
    """A database's URL as it is, or of a variable: `env:NAME`."""
    name = given.removeprefix("env:")
    if name == given:
        return given
    if not (found := os.environ.get(name)):
        fail(f"the variable {name} is not set", 2)
    return found


def actor_of(settings: Settings, given: str | None) -> str:
    """Who acts, for the audit: as they say, else the login they have on this machine."""
    import getpass

    try:
        return given or settings.actor or f"os:{getpass.getuser()}"
    except (KeyError, OSError):  # a container's user without a name
        return f"os:{os.getuid()}"


async def journaled(settings: Settings) -> None:
    """Returns when the journal has what this command committed; where Kafka does not take it, one line says who will."""
    from aiokafka.errors import KafkaError

    from agents.emitter import Emitter
    from stablerail.connections import relay_of

    emitter = Emitter(settings.kafka_bootstrap, settings.topic_prefix)
    relay = relay_of(settings, emitter.journal)
    client = logging.getLogger("aiokafka")
    level = client.level
    client.setLevel(logging.CRITICAL)  # the line below says it
    try:
        async with asyncio.timeout(JOURNAL_WAIT_S):
            await emitter.start()
            await relay.journal()
    except (KafkaError, OSError):  # TimeoutError is an OSError
        err.print("committed; Kafka is not reachable, the next worker will journal it", highlight=False, soft_wrap=True)
    finally:
        await relay.close()
        await emitter.stop()
        client.setLevel(level)


def run(action: Callable[[], Awaitable[Any]]) -> Any:
    """Runs a short command; what it cannot reach, or the ledger refuses, is said in one line."""
    import asyncpg
    from aiokafka.errors import KafkaError

    from chain.errors import ChainError
    from ledger.errors import LedgerError

    async def main() -> Any:
        return await action()

    try:
        return asyncio.run(main())
    except LedgerError as error:
        fail(f"{error.code}: {error}")
    except ConfigError as error:
        fail(str(error), EXIT_CONFIG)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, KafkaError, ChainError) as error:
        fail(f"{type(error).__name__}: {error}")
