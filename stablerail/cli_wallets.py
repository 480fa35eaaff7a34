"""`stablerail wallets …` and `stablerail workers …`: wallet provisioning and the workers, by hand. As /v1/admin/workers."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from ledger.rows import Connection
from stablerail.cli_base import (
    EXIT_USAGE,
    Actor,
    Format,
    changed,
    err,
    fail,
    looked_up,
    needed_settings,
    out,
    show,
    show_json,
)
from topics.events import Chain

wallets_app = typer.Typer(no_args_is_help=True, help="Customers' wallets: where they are, and what an operator may do.")
workers_app = typer.Typer(no_args_is_help=True, help="The workers: how they are, restart them, run a job now.")


User = Annotated[str, typer.Argument(help="the customer's id")]


def _now() -> datetime:
    return datetime.now(UTC)


@wallets_app.command("status")
def wallets_status(user: User, format: Format = "table") -> None:
    """A customer's chains: pending, ready or failed."""
    from stablerail.api.onboarding_routes import status_of

    found = looked_up(lambda connection: status_of(connection, user))
    if found is None:
        fail(f"unknown_user: {user} was never approved, and has no wallet")
    if format == "json":
        show_json(found.model_dump(mode="json"))
        return
    show("table", ("chain", "status", "address", "error"), (chain.model_dump() for chain in found.chains))
    waits = f", next at {found.next_attempt_at:%Y-%m-%d %H:%M:%S}" if found.next_attempt_at else ""
    frozen = "; frozen for withdrawals" if found.frozen else ""
    out.print(f"{found.status} after {found.attempts} attempts{waits}{frozen}")


@wallets_app.command("backfill")
def wallets_backfill(
    chain: Annotated[Chain, typer.Option(help="the chain that everybody is to have a wallet on", case_sensitive=False)],
    actor: Actor = None,
) -> None:
    """Queue a wallet on CHAIN for every customer who was never promised one. It may be cut off and run again."""
    from agents.onboarding.control import backfill

    if chain not in needed_settings("database_url", logs=False).provisioned_chains:
        fail(f"STABLERAIL_PROVISIONED_CHAINS does not name {chain}: new customers would not get it", EXIT_USAGE)

    async def fill(connection: Connection, who: str, _: datetime) -> int:
        done = 0
        async for done, left in backfill(connection, chain, who, _now):
            err.print(f"{done} queued, {left} to go")
        return done

    done = changed(fill, actor)
    out.print(f"{chain}: {done} customers queued; `stablerail workers status` shows their jobs")


@workers_app.command("trigger")
def workers_trigger(user: User, actor: Actor = None) -> None:
    """Run a customer's wallet job now: what failed, and what waits for its next attempt."""
    from agents.onboarding.control import trigger

    found = changed(lambda connection, who, at: trigger(connection, user, who, at), actor)
    if found is None:
        fail(f"unknown_user: {user} was never approved, and has no wallet")
    out.print(f"due now: {', '.join(found.chains) or 'nothing was failed or waiting'}")


@workers_app.command("status")
def workers_status(format: Format = "table") -> None:
    """Every worker that was heard of lately, and the jobs by state."""
    from stablerail import workers

    async def read(connection: Connection) -> Any:
        return await workers.seen(connection), await workers.jobs(connection, _now())

    found, (states, stuck) = looked_up(read)
    if format == "json":
        show_json({"workers": [{**asdict(one), "state": one.state} for one in found], "jobs": states, "stuck": stuck})
        return
    rows = [
        {**asdict(one), "state": one.state, "trouble": "; ".join(f"{part}: {why}" for part, why in one.trouble.items())}
        for one in found
    ]
    show("table", ("id", "movement", "state", "started_at", "trouble"), rows)
    told = ", ".join(f"{count} {state}" for state, count in states.items()) or "none"
    out.print(f"jobs: {told}; {stuck} stuck")


@workers_app.command("metrics")
def workers_metrics() -> None:
    """What each worker counts of jobs, calls and stages, as JSON."""
    from stablerail import workers

    show_json({one.id: one.figures for one in looked_up(workers.seen)})


@workers_app.command("health")
def workers_health() -> None:
    """Exit code 1 with the reasons when a movement has no worker that works, or a job is stuck."""
    from stablerail import workers

    found = looked_up(lambda connection: workers.trouble(connection, _now()))
    if found:
        fail("; ".join(f"{part}: {why}" for part, why in found.items()))
    out.print("ok")


@workers_app.command("restart")
def workers_restart(
    movement: Annotated[str, typer.Argument(help="as `worker --help` names them")], actor: Actor = None
) -> None:
    """Each worker of MOVEMENT finishes what it has in hand and is started anew by whoever runs it."""
    from stablerail import workers

    try:
        changed(lambda connection, who, at: workers.restart(connection, [movement], who, at), actor)
    except ValueError as error:
        fail(str(error), EXIT_USAGE)
    out.print(f"{movement}: restart ordered")
