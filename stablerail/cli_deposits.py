"""`stablerail deny …`: whom we take no money from and send none to. `stablerail shortfall …`: what was reversed after it was spent."""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import datetime
from typing import Annotated

import typer
from rich.table import Table

from ledger.corrections import Correction
from ledger.rows import Connection
from stablerail import denied, shortfalls
from stablerail.cli_base import fail, out
from stablerail.cli_corrections import Actor, Id, Reason, changed, id_of, looked_up, shown
from stablerail.shortfalls import NothingOwed
from topics.events import Chain
from topics.money import format_amount

deny_app = typer.Typer(no_args_is_help=True, help="The deny-list: addresses we take no money from and send none to.")
shortfall_app = typer.Typer(
    no_args_is_help=True, help="What customers owe of deposits that were reversed after they were spent."
)

ChainName = Annotated[Chain, typer.Argument(help="the chain", case_sensitive=False)]
Deposit = Annotated[str, typer.Argument(metavar="DEPOSIT", help="the deposit's id")]


@deny_app.command("add")
def deny(chain: ChainName, address: str, reason: Reason, actor: Actor = None) -> None:
    """Deny an address from now on."""
    done = changed(lambda connection, who, at: _change(denied.add(connection, chain, address, reason, who, at)), actor)
    out.print(f"{address} on {chain} is denied" + ("" if done else " already"), highlight=False)


@deny_app.command("remove")
def allow(chain: ChainName, address: str, reason: Reason, actor: Actor = None) -> None:
    """Deny an address no more."""
    done = changed(
        lambda connection, who, at: _change(denied.remove(connection, chain, address, reason, who, at)), actor
    )
    if not done:
        fail(f"{address} on {chain} is not denied")
    out.print(f"{address} on {chain} is denied no more", highlight=False)


@deny_app.command("list")
def denied_list(
    chain: Annotated[Chain | None, typer.Option(help="only this chain", case_sensitive=False)] = None,
) -> None:
    """Every denied address."""
    table = Table("chain", "address", "by", "since", "reason", header_style="bold", pad_edge=False, box=None)
    for one in looked_up(lambda connection: denied.listed(connection, chain)):
        table.add_row(one.chain, one.address, one.denied_by, f"{one.denied_at:%Y-%m-%d %H:%M}", one.reason)
    out.print(table, markup=False)


@shortfall_app.command("list")
def shortfall_list() -> None:
    """What is owed, oldest first."""
    table = Table(
        "deposit", "customer", "owed", "since", "chain", "transaction", header_style="bold", pad_edge=False, box=None
    )
    for one in looked_up(shortfalls.listed):
        since, owed = f"{one.since:%Y-%m-%d %H:%M}", format_amount(one.owed)
        table.add_row(one.deposit_id, one.user_id or "", owed, since, one.chain or "", one.tx_hash or "")
    out.print(table, markup=False)


@shortfall_app.command("settle")
def settle(
    deposit: Deposit,
    write_off: Annotated[
        bool, typer.Option(help="ask that all of it becomes the company's loss; needs a second person")
    ] = False,
    reason: Annotated[str, typer.Option(help="why, with --write-off")] = "",
    id: Id = None,
    actor: Actor = None,
) -> None:
    """Take what is owed from the customer's balance, as far as it goes; or ask to write it off."""
    key = deposit.strip().lower().replace("-", "")
    if write_off:
        correction_id = id_of(id)

        async def ask(connection: Connection, who: str, at: datetime) -> Correction:
            try:
                return await shortfalls.write_off(connection, key, correction_id, reason, who, at)
            except NothingOwed as error:
                fail(f"nothing_owed: {error}")

        shown(changed(ask, actor))
        return

    async def take(connection: Connection, who: str, at: datetime) -> tuple[int, int]:
        try:
            return await shortfalls.settle(connection, key, who, at)
        except NothingOwed as error:
            fail(f"nothing_owed: {error}")

    taken, owed = changed(take, actor)
    out.print(f"took {format_amount(taken)}; {format_amount(owed)} is still owed", highlight=False)


async def _change(changing: Awaitable[bool]) -> bool:
    try:
        return await changing
    except ValueError as error:
        fail(str(error), 2)
