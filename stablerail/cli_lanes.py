"""`stablerail lanes list|pause|open`: the hot wallets that sign withdrawals; each change is a log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated

import typer
from rich.table import Table

from agents.withdrawals import lanes
from agents.withdrawals.errors import LaneRestored
from ledger.commit import Sealed
from ledger.rows import Connection
from stablerail.cli_base import fail, out
from stablerail.cli_corrections import Actor, changed, looked_up

lanes_app = typer.Typer(
    no_args_is_help=True, help="Hot wallets that sign withdrawals: a lane for each signer on a chain."
)

Name = Annotated[str, typer.Argument(metavar="LANE", help="as `lanes list` shows it: MATIC:0x…")]


@lanes_app.command("list")
def lanes_list() -> None:
    """Every lane, its nonces, and why it is paused."""
    table = Table("lane", "next nonce", "chain's", "state", "reason", header_style="bold", pad_edge=False, box=None)
    for lane in looked_up(lanes.list_lanes):
        table.add_row(lane.key, str(lane.next_nonce), str(lane.chain_nonce), lane.status, lane.reason)
    out.print(table, markup=False)


@lanes_app.command("pause")
def lanes_pause(
    lane: Name,
    reason: Annotated[str, typer.Option(help="why; it is shown until the lane is opened")],
    actor: Actor = None,
) -> None:
    """Sign nothing more until the lane is opened; what is signed goes its way."""
    key = _key(lane)
    _act(lane, "paused", lambda connection, who, at: lanes.pause_lane(connection, key, reason, at, who), actor)


@lanes_app.command("open")
def lanes_open(
    lane: Name,
    force: Annotated[bool, typer.Option("--force", help="though it was not compared since a restore")] = False,
    reason: Annotated[str, typer.Option(help="of --force: how you know that nothing is forgotten; for the audit")] = "",
    actor: Actor = None,
) -> None:
    """Sign again. After foreign_nonce only once it is known who else used the key; after a restore `recovery open` does it."""
    key, forced = _key(lane), reason if force else None
    _act(lane, "open", lambda connection, who, at: lanes.open_lane(connection, key, at, who, forced=forced), actor)


def _act(
    lane: str, state: str, act: Callable[[Connection, str, datetime], Awaitable[Sealed]], actor: str | None
) -> None:
    try:
        changed(act, actor)
    except LookupError:
        fail(f"unknown_lane: {lane}; `stablerail lanes list` shows them", 2)
    except ValueError as error:
        fail(f"bad_reason: {error}", 2)
    except LaneRestored as error:
        fail(f"{error.code}: {error}")
    out.print(f"{lane} is {state}", markup=False, highlight=False)


def _key(lane: str) -> tuple[str, str]:
    chain, _, signer = lane.partition(":")
    return chain, signer.lower()
