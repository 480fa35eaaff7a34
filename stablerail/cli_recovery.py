"""`stablerail recovery status|open`: what a restored database keeps closed, and how it opens. Each opening is a log."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ledger.rows import Connection
from stablerail.cli_base import (
    EXIT_FOUND,
    EXIT_USAGE,
    Actor,
    Format,
    actor_of,
    check_own,
    fail,
    journaled,
    looked_up,
    needed_settings,
    out,
    run,
    show,
    show_json,
    show_table,
)
from stablerail.config import Settings
from topics.money import format_amount

if TYPE_CHECKING:
    from agents.recovery.comparing import Compared
    from agents.recovery.restoring import Gate
    from agents.withdrawals.withdrawal import Lane

recovery_app = typer.Typer(
    no_args_is_help=True, help="After a restore: what is closed, and opening it once it was compared."
)


@recovery_app.command("status")
def status(format: Format = "table") -> None:
    """What is closed since when and why, what the last comparison found, and which withdrawals wait for a person."""
    from agents.recovery import restoring

    async def read(connection: Connection) -> Any:
        return (
            await restoring.last_restore(connection),
            await restoring.closed_lanes(connection),
            await restoring.closed_gates(connection),
            await restoring.findings(connection),
            await restoring.parked(connection),
        )

    restore, lanes, gates, findings, parked = looked_up(read)
    closed = [(lane.key, lane.updated_at if restore is None else restore.at, lane.reason) for lane in lanes]
    closed += [(gate.name, gate.closed_at, gate.reason) for gate in gates]
    rows = []
    for name, since, reason in closed:
        at, code, found = findings.get(name, (None, None, {}))
        seen = at is not None and at >= since
        unknown = f": {found['unknown']}" if code and found.get("unknown") else ""
        compared = {"compared_at": at, "found": f"{code or 'agrees'}{unknown}"} if seen else {}
        rows.append({"closed": name, "since": since, "reason": reason, "compared_at": None, "found": None, **compared})
    waiting = [{**one._asdict(), "amount": format_amount(one.amount)} for one in parked]
    if format == "json":
        show_json({"restored": restore and restore._asdict(), "closed": rows, "withdrawals": waiting})
        return
    if restore is None:
        out.print("this database was never restored")
    else:
        out.print(
            f"restored {restore.at:%Y-%m-%d %H:%M:%S} by {restore.actor}: {restore.records} records; its own begin at"
            f" {restore.first_seq}"
        )
    if rows:
        columns = ("closed", "since", "reason", "compared_at", "found")
        show("table", columns, ({**row, "compared_at": row["compared_at"] or "never"} for row in rows))
    else:
        out.print("nothing is closed")
    if waiting:
        show("table", ("id", "user_id", "chain", "amount", "recipient", "code", "since"), waiting)
    out.print(f"{len(waiting)} withdrawals wait for a person")


@recovery_app.command("open")
def open_(
    lane: Annotated[
        list[str] | None, typer.Option(help="only this lane, as `status` shows it; may be repeated")
    ] = None,
    partner: Annotated[
        list[str] | None, typer.Option(help="only this partner, such as circle; may be repeated")
    ] = None,
    accept_unknown: Annotated[
        bool,
        typer.Option("--accept-unknown", help="of --partner: open though it has what we do not know; with --reason"),
    ] = False,
    reason: Annotated[str, typer.Option(help="of --accept-unknown: what was done about it; for the audit")] = "",
    actor: Actor = None,
) -> None:
    """Compare what is closed with its chain or its partner, and open what agrees. Exit code 1 when something stays closed."""
    from agents.withdrawals.lanes import check_reason

    settings = needed_settings("database_url", logs=False)
    who = actor_of(settings, actor)
    if accept_unknown:
        if not partner or lane:
            fail("--accept-unknown is for the partners that --partner names", EXIT_USAGE)
        try:
            check_reason(reason)
        except ValueError as error:
            fail(f"bad_reason: {error}", EXIT_USAGE)
    wanted = None if not (lane or partner) else {*_lanes(lane or ()), *(f"partner:{one}" for one in partner or ())}
    done: list[Compared] = run(lambda: _open(settings, wanted, reason if accept_unknown else "", who))
    known = {one.name for one in done}
    if wanted is not None and wanted - known:
        fail(f"not_closed: {', '.join(sorted(wanted - known))}; `stablerail recovery status` shows what is")
    if not done:
        out.print("nothing is closed")
        return
    rows = [(one.name, f"closed: {one.code}" if one.code else "open", one.told) for one in done]
    show_table(("compared", "", "found"), rows)
    for one in done:
        for unknown in one.unknown:
            out.print(f"{one.name}: not known to the database: {unknown}")
    if any(one.code for one in done):
        raise typer.Exit(EXIT_FOUND)


def _lanes(given: Sequence[str]) -> list[str]:
    """As they are stored: the chain as it is, the signer in lower case."""
    return [chain + colon + signer.lower() for chain, colon, signer in (one.partition(":") for one in given)]


async def _open(settings: Settings, wanted: set[str] | None, accepted: str, who: str) -> list[Compared]:
    """Compares and opens; what became of each. `accepted`: why what is unknown at a partner is no reason to stay closed."""
    from agents.recovery import restoring
    from stablerail.connections import connector

    connection = await connector(settings)()
    try:
        await check_own(settings, connection)
        lanes = [one for one in await restoring.closed_lanes(connection) if wanted is None or one.key in wanted]
        gates = [one for one in await restoring.closed_gates(connection) if wanted is None or one.name in wanted]
        done = [await _lane(settings, connection, lane) for lane in lanes]
        done += [await _gate(settings, connection, gate, accepted) for gate in gates]
        opens = {one.name for one in done if not one.code}
        if done:
            await restoring.open_compared(
                connection, [lane for lane in lanes if lane.key in opens], [gate for gate in gates if gate.name in opens],
                [one.log(who) for one in done], datetime.now(UTC), who,
            )  # fmt: skip
            await journaled(settings)
        return done
    finally:
        await connection.close()


async def _lane(settings: Settings, connection: Connection, lane: Lane) -> Compared:
    from agents.recovery.comparing import compare_lane
    from stablerail.connections import rpcs
    from topics.events import Chain

    async with AsyncExitStack() as stack:
        endpoints = rpcs(settings, Chain(lane.chain)) if lane.chain in settings.rpc_urls else ()
        for endpoint in endpoints:
            stack.push_async_callback(endpoint.close)
        return await compare_lane(connection, lane, endpoints)


async def _gate(settings: Settings, connection: Connection, gate: Gate, accepted: str) -> Compared:
    from agents.recovery import comparing
    from connectors.circle.client import CircleClient

    if gate.partner != "circle":
        found = comparing.Compared(gate.name, comparing.NO_COMPARISON, "nobody knows how to ask this partner")
    elif settings.circle_api_key is None or settings.circle_entity_secret is None:
        found = await comparing.compare_circle(connection, gate, None, settings.network, None)
    else:
        async with CircleClient(
            settings.circle_api_url, settings.circle_api_key, settings.circle_entity_secret, settings.call_timeout_s
        ) as client:
            found = await comparing.compare_circle(
                connection, gate, client, settings.network, settings.circle_wallet_set_id
            )
    if found.code in (comparing.WALLETS_UNKNOWN, comparing.TRANSFERS_UNKNOWN, comparing.NO_COMPARISON) and accepted:
        return replace(found, code="", told=f"{found.told}; accepted: {accepted}")
    return found
