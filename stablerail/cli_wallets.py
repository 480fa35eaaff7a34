"""`stablerail wallets …` and `stablerail workers …`: wallet provisioning and the workers, by hand. As /v1/admin/workers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from ledger.rows import Connection
from stablerail.cli_base import actor_of, fail, journaled, needed_settings, out, run
from stablerail.cli_corrections import Actor
from stablerail.config import Settings
from topics.events import Chain

wallets_app = typer.Typer(no_args_is_help=True, help="Customers' wallets: where they are, and what an operator may do.")
workers_app = typer.Typer(no_args_is_help=True, help="The workers: how they are, restart them, run a job now.")


def _now() -> datetime:
    return datetime.now(UTC)


def _with(
    action: Callable[[Connection], Awaitable[Any]], *, changes: bool = False, settings: Settings | None = None
) -> Any:
    from stablerail.connections import connector

    used = settings or needed_settings("database_url", logs=False)

    async def work() -> Any:
        connection = await connector(used)()
        try:
            found = await action(connection)
            if changes:
                await journaled(used)
            return found
        finally:
            await connection.close()

    return run(work)


@wallets_app.command("status")
def wallets_status(user: str) -> None:
    """A customer's chains: pending, ready or failed."""
    from stablerail.api.onboarding_routes import status_of

    found = _with(lambda connection: status_of(connection, user))
    if found is None:
        fail(f"unknown_user: {user} was never approved, and has no wallet")
    table = Table("chain", "status", "address", "error", header_style="bold", pad_edge=False, box=None)
    for chain in found.chains:
        table.add_row(chain.chain, chain.status, chain.address or "", chain.error or "")
    out.print(table, markup=False)
    waits = f", next at {found.next_attempt_at:%Y-%m-%d %H:%M:%S}" if found.next_attempt_at else ""
    frozen = "; frozen for withdrawals" if found.frozen else ""
    out.print(f"{found.status} after {found.attempts} attempts{waits}{frozen}", highlight=False)


@wallets_app.command("backfill")
def wallets_backfill(
    chain: Annotated[Chain, typer.Option(help="the chain that everybody is to have a wallet on")], actor: Actor = None
) -> None:
    """Queue a wallet on CHAIN for every customer who was never promised one. It may be cut off and run again."""
    from agents.onboarding.control import backfill

    settings = needed_settings("database_url", logs=False)
    if chain not in settings.provisioned_chains:
        fail(f"STABLERAIL_PROVISIONED_CHAINS does not name {chain}: new customers would not get it", 2)

    async def work(connection: Connection) -> int:
        done = 0
        async for done, left in backfill(connection, chain, actor_of(settings, actor), _now):
            out.print(f"{done} queued, {left} to go", highlight=False)
        return done

    done = _with(work, changes=True, settings=settings)
    out.print(f"{chain}: {done} customers queued; `stablerail workers status` shows their jobs", highlight=False)


@workers_app.command("trigger")
def workers_trigger(user: str, actor: Actor = None) -> None:
    """Run a customer's wallet job now: what failed, and what waits for its next attempt."""
    from agents.onboarding.control import trigger

    settings = needed_settings("database_url", logs=False)
    who = actor_of(settings, actor)
    found = _with(lambda connection: trigger(connection, user, who, _now()), changes=True, settings=settings)
    if found is None:
        fail(f"unknown_user: {user} was never approved, and has no wallet")
    out.print(f"due now: {', '.join(found.chains) or 'nothing was failed or waiting'}", highlight=False)


@workers_app.command("status")
def workers_status() -> None:
    """Every worker that was heard of lately, and the jobs by state."""
    from stablerail import workers

    async def work(connection: Connection) -> Any:
        return await workers.seen(connection), await workers.jobs(connection, _now())

    found, (states, stuck) = _with(work)
    table = Table("worker", "movement", "state", "since", "trouble", header_style="bold", pad_edge=False, box=None)
    for one in found:
        trouble = "; ".join(f"{part}: {why}" for part, why in one.trouble.items())
        table.add_row(one.id, one.movement, one.state, f"{one.started_at:%Y-%m-%d %H:%M}", trouble)
    out.print(table, markup=False)
    told = ", ".join(f"{count} {state}" for state, count in states.items()) or "none"
    out.print(f"jobs: {told}; {stuck} stuck", highlight=False)


@workers_app.command("metrics")
def workers_metrics() -> None:
    """What each worker counts of jobs, calls and stages, as JSON."""
    import orjson

    from stablerail import workers

    found = {one.id: one.figures for one in _with(workers.seen)}
    out.print_json(orjson.dumps(found).decode())


@workers_app.command("health")
def workers_health() -> None:
    """Exit code 1 with the reasons when a movement has no worker that works, or a job is stuck."""
    from stablerail import workers

    found = _with(lambda connection: workers.trouble(connection, _now()))
    if found:
        fail("; ".join(f"{part}: {why}" for part, why in found.items()))
    out.print("ok")


@workers_app.command("restart")
def workers_restart(movement: str, actor: Actor = None) -> None:
    """Each worker of MOVEMENT finishes what it has in hand and is started anew by whoever runs it."""
    from stablerail import workers

    settings = needed_settings("database_url", logs=False)
    who = actor_of(settings, actor)
    try:
        _with(lambda c: workers.restart(c, [movement], who, _now()), changes=True, settings=settings)
    except ValueError as error:
        fail(str(error), 2)
    out.print(f"{movement}: restart ordered")
