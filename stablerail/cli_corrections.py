"""`stablerail ledger correct …` and `stablerail suspense assign`: what people correct, by two of them. `ledger close`.

Whoever reaches the database through this program is believed who they say they are: give each person a login of their own.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Literal

import typer

from ledger import corrections
from ledger.accounts import Account
from ledger.book import close_account
from ledger.corrections import Correction
from ledger.errors import BadAccountName
from ledger.posting import Leg, credit, debit
from ledger.reading import AccountName
from ledger.rows import Connection
from stablerail.cli_base import (
    EXIT_USAGE,
    Actor,
    Format,
    Person,
    changed,
    fail,
    looked_up,
    out,
    person_of,
    show,
    show_json,
    show_table,
)
from topics.money import format_amount, parse_amount

correct_app = typer.Typer(no_args_is_help=True, help="Corrections by people: one asks, another approves.")
suspense_app = typer.Typer(no_args_is_help=True, help="Money whose owner was not known.")

Reason = Annotated[str, typer.Option(help="why, for whoever approves and for the audit")]
Reference = Annotated[str, typer.Option(help="what it is about, such as a deposit's id; else the correction's own id")]
Id = Annotated[str | None, typer.Option(help="a UUID of yours: asking twice with it asks once")]
Known = Annotated[str, typer.Argument(metavar="ID", help="as `ledger correct list` shows it")]


@correct_app.command("request")
def request(
    reason: Reason, debit_: Annotated[list[str], typer.Option("--debit", help="ACCOUNT=AMOUNT, such as ada.usdc_balance:USDC=12.50")],
    credit_: Annotated[list[str], typer.Option("--credit", help="as --debit; the sums must be equal")],
    reference: Reference = "", id: Id = None, actor: Person = None,
) -> None:  # fmt: skip
    """Ask for a balanced correction; prints its id. Nothing moves before another person approves."""
    legs = [*(_leg(text, debit) for text in debit_), *(_leg(text, credit) for text in credit_)]
    key = id_of(id)

    def ask(connection: Connection, who: str, at: datetime) -> Awaitable[Correction]:
        return corrections.request(connection, key, legs, reason, who, at, reference=reference)

    shown(changed(ask, actor, who=person_of))


@correct_app.command("approve")
def approve(correction_id: Known, actor: Person = None) -> None:
    """Post a correction that somebody else asked for."""
    found = id_of(correction_id)
    shown(changed(lambda connection, who, at: corrections.approve(connection, found, who, at), actor, who=person_of))


@correct_app.command("reject")
def reject(correction_id: Known, actor: Person = None) -> None:
    """End a correction without posting it."""
    found = id_of(correction_id)
    shown(changed(lambda connection, who, at: corrections.reject(connection, found, who, at), actor, who=person_of))


@correct_app.command("show")
def show_(correction_id: Known, format: Format = "table") -> None:
    """One correction."""
    key = id_of(correction_id)
    found: Correction = looked_up(lambda connection: corrections.find(connection, key))
    if format == "json":
        show_json(found.plain())
    else:
        shown(found)


@correct_app.command("list")
def list_(
    state: Annotated[Literal["requested", "approved", "rejected"] | None, typer.Option(help="only these")] = None,
    limit: Annotated[int, typer.Option(help="most corrections", min=1, max=1_000)] = 100,
    format: Format = "table",
) -> None:
    """Corrections, newest first."""
    found = looked_up(lambda connection: corrections.list_corrections(connection, state, limit))
    columns = ("id", "kind", "state", "requested_by", "decided_by", "reason")
    show(format, columns, (one.plain() for one in found))


@suspense_app.command("assign")
def assign(
    user: Annotated[str, typer.Argument(help="the customer's id")],
    amount: Annotated[str, typer.Argument(help="decimal USDC: 12.50")],
    reason: Reason,
    reference: Reference = "",
    id: Id = None,
    actor: Person = None,
) -> None:
    """Ask that AMOUNT of USDC in suspense becomes USER's; another person approves it with `ledger correct approve`."""
    units, key = _amount(amount), id_of(id)

    def ask(connection: Connection, who: str, at: datetime) -> Awaitable[Correction]:
        return corrections.assign_suspense(connection, key, user, units, reason, who, at, reference=reference)

    shown(changed(ask, actor, who=person_of))


@suspense_app.callback()
def _suspense() -> None:
    """Keeps `assign` a command of the group while it is the only one."""


def close(
    account: Annotated[str, typer.Argument(metavar="ACCOUNT", help="owner.type:ASSET or owner.type\\[shard]:ASSET")],
    reason: Annotated[str, typer.Option(help="why, for the audit")],
    actor: Actor = None,
) -> None:
    """Close an account for good; it must be empty and have no open hold."""
    try:
        found = AccountName.parse(account).account()
    except BadAccountName as error:
        fail(f"{error.code}: {error}", EXIT_USAGE)

    async def end(connection: Connection, who: str, at: datetime) -> datetime:
        closed_at, _ = await close_account(connection, corrections.WRITER, found, at, actor=who, reason=reason)
        return closed_at

    out.print(f"{found} is closed since {changed(end, actor).isoformat()}")


def _leg(text: str, side: Callable[[Account, int], Leg]) -> Leg:
    name, _, amount = text.rpartition("=")
    try:
        account = AccountName.parse(name).account()
    except BadAccountName as error:
        fail(f"{text}: a leg is ACCOUNT=AMOUNT, and {error}", EXIT_USAGE)
    return side(account, _amount(amount))


def _amount(text: str) -> int:
    try:
        return parse_amount(text)
    except ValueError as error:
        fail(f"{text}: {error}", EXIT_USAGE)


def id_of(given: str | None) -> str:
    if given is None:
        return uuid.uuid4().hex
    try:
        return uuid.UUID(given).hex
    except ValueError:
        fail(f"{given}: an id is a UUID", EXIT_USAGE)


def shown(found: Correction) -> None:
    rows = [(name, value) for name, value in found.plain().items() if name != "legs" and value is not None]
    legs = [
        ("debit" if leg.direction == "d" else "credit", f"{leg.account} {format_amount(leg.amount)}")
        for leg in found.legs
    ]
    show_table(("", ""), [*rows, *legs])
