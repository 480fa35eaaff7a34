"""The command line. Each command says what is missing before it starts anything."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from stablerail.cli_audit import audit_app
from stablerail.cli_base import EXIT_PIPE, EXIT_USAGE, Actor, Format, Kind, changed, err, looked_up, out, show
from stablerail.cli_base import fail as _fail
from stablerail.cli_base import needed_settings as _settings
from stablerail.cli_base import run as _run
from stablerail.cli_chains import chains_app
from stablerail.cli_corrections import close, correct_app, suspense_app
from stablerail.cli_deposits import deny_app, shortfall_app
from stablerail.cli_dlq import dlq_app
from stablerail.cli_lanes import lanes_app
from stablerail.cli_ledger import ledger_app
from stablerail.cli_limits import limits_app
from stablerail.cli_maintain import maintain
from stablerail.cli_rebuild import diff, rebuild
from stablerail.cli_reconcile import reconcile
from stablerail.cli_recovery import recovery_app
from stablerail.cli_replay import replay
from stablerail.cli_shadow import shadow_app
from stablerail.cli_tx import tx_app
from stablerail.cli_verify import verify_app
from stablerail.cli_wallets import wallets_app, workers_app
from stablerail.cli_withdrawals import withdrawals_app
from stablerail.config import Settings, names_without_effect
from stablerail.config_shown import describe
from stablerail.config_values import PORT_MAX

if TYPE_CHECKING:
    from ledger.rows import Connection
    from stablerail.topics_admin import TopicState


class Root(TyperGroup):
    """What is typed goes into texts of the database, which takes no bytes that are none. What is printed may be more than somebody
    wants to read, such as `head`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for number, argument in enumerate(args, 1):
            if not argument.isascii() and any("\ud800" <= letter <= "\udfff" for letter in argument):
                raise typer.BadParameter(f"argument {number} is not UTF-8", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (sys.stdout, sys.stderr):  # what is left in them goes there at the end of the process
                os.dup2(nowhere, stream.fileno())
            raise typer.Exit(EXIT_PIPE) from None


app = typer.Typer(cls=Root, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
topics_app = typer.Typer(no_args_is_help=True, help="Kafka topics, as topics/catalog.py declares them.")
keys_app = typer.Typer(no_args_is_help=True, help="API keys. A key is shown once and stored hashed.")
dev_app = typer.Typer(no_args_is_help=True, help="Kafka, PostgreSQL and a chain on this machine, without containers.")
app.add_typer(topics_app, name="topics")
app.add_typer(keys_app, name="keys")
app.add_typer(dev_app, name="dev")
app.add_typer(ledger_app, name="ledger")
app.add_typer(verify_app, name="verify")
app.add_typer(audit_app, name="audit")
app.add_typer(lanes_app, name="lanes")
app.add_typer(limits_app, name="limits")
app.add_typer(tx_app, name="tx")
app.add_typer(suspense_app, name="suspense")
app.add_typer(wallets_app, name="wallets")
app.add_typer(workers_app, name="workers")
app.add_typer(withdrawals_app, name="withdrawals")
app.add_typer(deny_app, name="deny")
app.add_typer(chains_app, name="chains")
app.add_typer(shadow_app, name="shadow")
app.add_typer(shortfall_app, name="shortfall")
app.add_typer(dlq_app, name="dlq")
app.add_typer(recovery_app, name="recovery")
ledger_app.add_typer(correct_app, name="correct")
ledger_app.command("close")(close)
app.command("replay")(replay)
app.command("maintain")(maintain)
app.command()(reconcile)
app.command()(rebuild)
app.command()(diff)


@contextmanager
def _loading() -> Iterator[None]:
    """Around the imports of a long-lived process: what modules make stays, and the collector would look at it in vain."""
    gc.disable()
    yield
    gc.enable()


@app.command()
def config(format: Format = "table") -> None:
    """Print every setting with its effective value; secrets are masked."""
    found = [
        {"setting": row.name, "value": row.value, "is": "default" if row.is_default else "set", "help": row.help}
        for row in describe(_settings(logs=False))
    ]
    show(format, ("setting", "value", "is", "help"), found)
    for unused in names_without_effect():
        err.print(f"{unused.name} has no effect: {unused.expected}")


@app.command()
def migrate(
    only: Annotated[
        Literal["pre", "post"] | None, typer.Option(help="pre: before a roll-out; post: when no old process is left")
    ] = None,
) -> None:
    """Bring the database schema to the newest revision."""
    from ledger.migrate import upgrade

    settings = _settings("database_url")
    _run(
        lambda: upgrade(
            settings.secret("database_url"), settings.database_schema, only or "all", settings.database_role
        )
    )
    out.print(f"schema {settings.database_schema} is at the newest {f'{only} ' if only else ''}revision")


@app.command()
def worker(
    movements: Annotated[
        list[str] | None,
        typer.Argument(help="onboarding, deposits, chains, withdrawals, investing, treasury, recovery; none = all"),
    ] = None,
    port: Annotated[int | None, typer.Option(help="web port of the (first) worker")] = None,
    supervisor: Annotated[int | None, typer.Option(hidden=True, help="process id of whoever started it")] = None,
) -> None:
    """Run one movement in this process, or several as children that are restarted when they stop."""
    with _loading():
        from stablerail.movements import MOVEMENTS, NEEDS

    chosen = tuple(movements or MOVEMENTS)
    unknown = [name for name in chosen if name not in MOVEMENTS]
    if unknown:
        _fail(f"unknown movement {', '.join(unknown)}; there are {', '.join(MOVEMENTS)}", EXIT_USAGE)
    settings = _settings(*dict.fromkeys(need for name in chosen for need in NEEDS[name]))
    first = port if port is not None else settings.worker_port
    if not 1 <= first <= PORT_MAX + 1 - len(chosen):
        _fail(f"{len(chosen)} ports from {first} on: there are 1 to {PORT_MAX}, and each movement takes one", 2)
    if len(chosen) == 1:
        with _loading():
            from stablerail.worker import run_worker

        run_worker(chosen[0], settings, first, supervisor)
    from stablerail.supervisor import supervise

    code = asyncio.run(
        supervise(
            chosen,
            first,
            restart_wait_s_max=settings.worker_restart_wait_max_s,
            shutdown_timeout_s=settings.worker_shutdown_timeout_s,
        )
    )
    raise typer.Exit(code)


@app.command()
def bridge() -> None:
    """Run the webhook bridge: vendors' webhooks in, Kafka events out."""
    with _loading():
        from stablerail.servers import run_bridge

    run_bridge(_settings("circle_api_key", "circle_entity_secret", "sumsub_webhook_secret"))


@app.command()
def api() -> None:
    """Run the HTTP API."""
    with _loading():
        from stablerail.servers import run_api

    run_api(_settings("database_url"))


@topics_app.command("create")
def topics_create() -> None:
    """Create what is missing; what differs is reported, not changed."""
    from stablerail.topics_admin import admin, create_missing

    settings = _settings(logs=False)

    async def action() -> None:
        async with admin(settings.kafka_bootstrap) as client:
            for topic in await create_missing(client, settings.topic_prefix, settings.kafka_replication_factor):
                out.print(f"created {topic.named(settings.topic_prefix)}")

    _run(action)
    _list_topics(settings, "table")


@topics_app.command("list")
def topics_list(format: Format = "table") -> None:
    """Every declared topic and what differs on the broker; exit code 1 when something does."""
    if not _list_topics(_settings(logs=False), format):
        raise typer.Exit(1)


def _list_topics(settings: Settings, format: Kind) -> bool:
    from stablerail.topics_admin import admin, inspect

    async def read() -> list[TopicState]:
        async with admin(settings.kafka_bootstrap) as client:
            return await inspect(client, settings.topic_prefix)

    found = [
        {
            "topic": state.topic.named(settings.topic_prefix),
            "key": state.topic.key,
            "partitions": state.topic.partitions,
            "state": "missing" if not state.exists else "differs" if state.drift else "ok",
            "differences": state.drift,
        }
        for state in _run(read)
    ]
    show(format, ("topic", "key", "partitions", "state", "differences"), found, bad=("missing", "differs"))
    return all(one["state"] == "ok" for one in found)


@keys_app.command("create")
def keys_create(
    scope: Annotated[list[str], typer.Option(help="read, withdraw or admin; may be given several times")],
    name: Annotated[str, typer.Option(help="whose key it is, for the list")] = "unnamed",
    actor: Actor = None,
) -> None:
    """Make a key and print it, once."""
    from stablerail.keys import CreatedKey, Scope, create_key

    known = [member.value for member in Scope]
    if unknown := [one for one in scope if one not in known]:
        _fail(f"unknown scope {', '.join(unknown)}; there are {', '.join(known)}", EXIT_USAGE)

    async def create(connection: Connection, who: str, _: datetime) -> CreatedKey:
        try:
            return await create_key(connection, [Scope(one) for one in scope], name, actor=who)
        except ValueError as error:
            _fail(str(error), EXIT_USAGE)

    sys.stdout.write(changed(create, actor).token.get_secret_value() + "\n")


@keys_app.command("list")
def keys_list(format: Format = "table") -> None:
    """Every key, without its secret."""
    from stablerail.keys import list_keys

    found = [{**asdict(key), "scopes": sorted(key.scopes)} for key in looked_up(list_keys)]
    show(format, ("id", "name", "scopes", "created_at", "revoked_at"), found)


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="as `keys list` shows it")], actor: Actor = None
) -> None:
    """End a key."""
    from stablerail.keys import revoke_key

    def revoke(connection: Connection, who: str, _: datetime) -> Awaitable[bool]:
        return revoke_key(connection, key_id, actor=who)

    if not changed(revoke, actor):
        _fail(f"no key {key_id} that is not revoked already")
    out.print(f"revoked {key_id}")


@dev_app.command("up")
def dev_up(directory: Annotated[Path, typer.Option(help="where data and logs go")] = Path(".dev/parts")) -> None:
    """Start Kafka, PostgreSQL and a chain with USDC; stays until Ctrl-C or `dev down`."""
    from stablerail.dev.errors import DevError
    from stablerail.dev.parts import dev_up as up

    try:
        up(directory, out)
    except (DevError, OSError) as error:  # OSError: a directory or a disk that takes nothing
        _fail(str(error))


@dev_app.command("down")
def dev_down(directory: Annotated[Path, typer.Option(help="as given to up")] = Path(".dev/parts")) -> None:
    """Stop what `dev up` started in another shell."""
    from stablerail.dev.errors import DevError
    from stablerail.dev.parts import dev_down as down

    try:
        down(directory)
    except (DevError, OSError) as error:
        _fail(str(error))


@app.command()
def demo(once: Annotated[bool, typer.Option(help="end by itself; exit code 0 when everything agrees")] = False) -> None:
    """The whole story on this machine: approval, wallets, a deposit, its finality, and a withdrawal whose worker is killed
    (kill -9) between signature and sending.
    """
    from stablerail.demo import run_demo

    raise typer.Exit(run_demo(once=once))


if __name__ == "__main__":
    app()
