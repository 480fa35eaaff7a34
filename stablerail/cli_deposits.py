"""`stablerail deny …`: whom we take no money from and send none to. `stablerail shortfall …`: what was reversed after it was spent."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import asdict
from datetime import datetime
from typing import Annotated

import typer

from chain.errors import BadAddress
from ledger.corrections import Correction
from ledger.rows import Connection
from stablerail import denied, shortfalls
from stablerail.cli_base import EXIT_USAGE, Actor, Format, changed, fail, looked_up, out, person_of, show
from stablerail.cli_corrections import Id, id_of, shown
from stablerail.shortfalls import NothingOwed
from topics.events import Chain
from topics.money import format_amount

deny_app = typer.Typer(no_args_is_help=True, help="The deny-list: addresses we take no money from and send none to.")
shortfall_app = typer.Typer(
    no_args_is_help=True, help="What customers owe of deposits that were reversed after they were spent."
)

ChainName = Annotated[Chain, typer.Argument(help="the chain", case_sensitive=False)]
Address = Annotated[str, typer.Argument(help="an address of that chain")]
Reason = Annotated[str, typer.Option(help="why, for the audit")]
Deposit = Annotated[str, typer.Argument(metavar="DEPOSIT", help="the deposit's id")]


@deny_app.command("add")
def deny(chain: ChainName, address: Address, reason: Reason, actor: Actor = None) -> None:
    """Deny an address from now on."""
    done = changed(lambda connection, who, at: _change(denied.add(connection, chain, address, reason, who, at)), actor)
    out.print(f"{address} on {chain} is denied" + ("" if done else " already"))


@deny_app.command("remove")
def allow(chain: ChainName, address: Address, reason: Reason, actor: Actor = None) -> None:
    """Deny an address no more."""
    done = changed(
        lambda connection, who, at: _change(denied.remove(connection, chain, address, reason, who, at)), actor
    )
    if not done:
        fail(f"{address} on {chain} is not denied")
    out.print(f"{address} on {chain} is denied no more")


@deny_app.command("list")
def denied_list(
    chain: Annotated[Chain | None, typer.Option(help="only this chain", case_sensitive=False)] = None,
    format: Format = "table",
) -> None:
    """Every denied address."""
    found = looked_up(lambda connection: denied.listed(connection, chain))
    show(format, ("chain", "address", "denied_by", "denied_at", "reason"), map(asdict, found))


@shortfall_app.command("list")
def shortfall_list(format: Format = "table") -> None:
    """What is owed, oldest first."""
    found = [{**asdict(one), "owed": format_amount(one.owed)} for one in looked_up(shortfalls.listed)]
    show(format, ("deposit_id", "user_id", "owed", "since", "chain", "tx_hash"), found)


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
    """Take what is owed from the customer's balance, as far as it goes; or ask to write it off, and then say who you are."""
    key = id_of(deposit)
    if write_off:
        correction_id = id_of(id)

        async def ask(connection: Connection, who: str, at: datetime) -> Correction:
            try:
                return await shortfalls.write_off(connection, key, correction_id, reason, who, at)
            except NothingOwed as error:
                fail(f"nothing_owed: {error}")

        shown(changed(ask, actor, who=person_of))
        return

    async def take(connection: Connection, who: str, at: datetime) -> tuple[int, int]:
        try:
            return await shortfalls.settle(connection, key, who, at)
        except NothingOwed as error:
            fail(f"nothing_owed: {error}")

    taken, owed = changed(take, actor)
    out.print(f"took {format_amount(taken)}; {format_amount(owed)} is still owed")


async def _change(changing: Awaitable[bool]) -> bool:
    try:
        return await changing
    except (BadAddress, ValueError) as error:
        fail(str(error), EXIT_USAGE)
