"""`stablerail ledger correct …` and `stablerail suspense assign`: what people correct, by two of them. `ledger close`.

Whoever reaches the database through this program is believed who they say they are: give each person a login of their own.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.table import Table

from ledger import corrections
from ledger.accounts import Account
from ledger.book import close_account
from ledger.commit import OVERTAKEN
from ledger.corrections import Correction
from ledger.errors import BadAccountName
from ledger.posting import Leg, credit, debit
from ledger.reading import AccountName
from ledger.rows import Connection
from stablerail.cli_base import fail, journaled, needed_settings, out, run
from stablerail.config import Settings
from topics.money import format_amount, parse_amount

correct_app = typer.Typer(no_args_is_help=True, help="Corrections by people: one asks, another approves.")
suspense_app = typer.Typer(no_args_is_help=True, help="Money whose owner was not known.")

T = TypeVar("T")

Actor = Annotated[str | None, typer.Option(help="who you are; or STABLERAIL_ACTOR")]
Reason = Annotated[str, typer.Option(help="why, for whoever approves and for the audit")]
Reference = Annotated[str, typer.Option(help="what it is about, such as a deposit's id; else the correction's own id")]
Id = Annotated[str | None, typer.Option(help="a UUID of yours: asking twice with it asks once")]


@correct_app.command("request")
def request(
    reason: Reason, debit_: Annotated[list[str], typer.Option("--debit", help="ACCOUNT=AMOUNT, such as ada.usdc_balance:USDC=12.50")],
    credit_: Annotated[list[str], typer.Option("--credit", help="as --debit; the sums must be equal")],
    reference: Reference = "", id: Id = None, actor: Actor = None,
) -> None:  # fmt: skip
    """Ask for a balanced correction; prints its id. Nothing moves before another person approves."""
    legs = [*(_leg(text, debit) for text in debit_), *(_leg(text, credit) for text in credit_)]
    key = id_of(id)

    def ask(connection: Connection, who: str, at: datetime) -> Awaitable[Correction]:
        return corrections.request(connection, key, legs, reason, who, at, reference=reference)

    shown(changed(ask, actor))


@correct_app.command("approve")
def approve(correction_id: str, actor: Actor = None) -> None:
    """Post a correction that somebody else asked for."""
    found = id_of(correction_id)
    shown(changed(lambda connection, who, at: corrections.approve(connection, found, who, at), actor))


@correct_app.command("reject")
def reject(correction_id: str, actor: Actor = None) -> None:
    """End a correction without posting it."""
    found = id_of(correction_id)
    shown(changed(lambda connection, who, at: corrections.reject(connection, found, who, at), actor))


@correct_app.command("show")
def show(correction_id: str) -> None:
    """One correction."""
    found = id_of(correction_id)
    shown(looked_up(lambda connection: corrections.find(connection, found)))


@correct_app.command("list")
def list_(
    state: Annotated[Literal["requested", "approved", "rejected"] | None, typer.Option(help="only these")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000)] = 100,
) -> None:
    """Corrections, newest first."""
    table = Table(
        "id", "kind", "state", "asked by", "decided by", "reason", header_style="bold", pad_edge=False, box=None
    )
    for one in looked_up(lambda connection: corrections.list_corrections(connection, state, limit)):
        table.add_row(one.id, one.kind, one.state, one.requested_by, one.decided_by or "", one.reason)
    out.print(table, markup=False)


@suspense_app.command("assign")
def assign(
    user: str, amount: str, reason: Reason, reference: Reference = "", id: Id = None, actor: Actor = None
) -> None:
    """Ask that AMOUNT of USDC in suspense becomes USER's; another person approves it with `ledger correct approve`."""
    units, key = _amount(amount), id_of(id)

    def ask(connection: Connection, who: str, at: datetime) -> Awaitable[Correction]:
        return corrections.assign_suspense(connection, key, user, units, reason, who, at, reference=reference)

    shown(changed(ask, actor))


@suspense_app.callback()
def _suspense() -> None:
    """Keeps `assign` a command of the group while it is the only one."""


def close(
    account: Annotated[str, typer.Argument(metavar="ACCOUNT", help="owner.type:ASSET or owner.type[shard]:ASSET")],
    reason: Annotated[str, typer.Option(help="why, for the audit")],
    actor: Actor = None,
) -> None:
    """Close an account for good; it must be empty and have no open hold."""
    try:
        found = AccountName.parse(account).account()
    except BadAccountName as error:
        fail(f"{error.code}: {error}", 2)

    async def end(connection: Connection, who: str, at: datetime) -> datetime:
        closed_at, _ = await close_account(connection, corrections.WRITER, found, at, actor=who, reason=reason)
        return closed_at

    out.print(f"{found} is closed since {changed(end, actor).isoformat()}", markup=False, highlight=False)


def _leg(text: str, side: Callable[[Account, int], Leg]) -> Leg:
    name, _, amount = text.rpartition("=")
    try:
        account = AccountName.parse(name).account()
    except BadAccountName as error:
        fail(f"{text}: a leg is ACCOUNT=AMOUNT, and {error}", 2)
    return side(account, _amount(amount))


def _amount(text: str) -> int:
    try:
        return parse_amount(text)
    except ValueError as error:
        fail(f"{text}: {error}", 2)


def id_of(given: str | None) -> str:
    if given is None:
        return uuid.uuid4().hex
    try:
        return uuid.UUID(given).hex
    except ValueError:
        fail(f"{given}: an id is a UUID", 2)


def who_of(settings: Settings, given: str | None) -> str:
    who = (given or settings.actor or "").strip()
    if not who:
        fail("say who you are: --actor NAME, or STABLERAIL_ACTOR", 2)
    return who


def changed(action: Callable[[Connection, str, datetime], Awaitable[T]], actor: str | None) -> T:
    settings = needed_settings("database_url", logs=False)
    who = who_of(settings, actor)

    async def acted(connection: Connection) -> T:
        done = await action(connection, who, datetime.now(UTC))
        await journaled(settings)
        return done

    found: T = _connected(settings, acted)
    return found


def looked_up(reading: Callable[[Connection], Awaitable[Any]]) -> Any:
    return _connected(needed_settings("database_url", logs=False), reading)


def _connected(settings: Settings, act: Callable[[Connection], Awaitable[Any]]) -> Any:
    """Runs it on a connection; a deadlock's victim, or whoever came second, runs again."""
    from stablerail.connections import connector

    async def action() -> Any:
        connection = await connector(settings)()
        try:
            for _ in range(2):
                with suppress(*OVERTAKEN):
                    return await act(connection)
            return await act(connection)
        finally:
            await connection.close()

    return run(action)


def shown(found: Correction) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in found.plain().items():
        if name != "legs" and value is not None:
            table.add_row(name, str(value))
    for leg in found.legs:
        side = "debit" if leg.direction == "d" else "credit"
        table.add_row(side, f"{leg.account} {format_amount(leg.amount)}")
    out.print(table, markup=False)
