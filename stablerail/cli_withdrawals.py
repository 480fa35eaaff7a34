"""`stablerail withdrawals settle|approve`: two people end a withdrawal that nothing ends by itself. What they asked for is a correction:
`ledger correct list`, `show` and `reject` are for it too.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from ledger import corrections
from ledger.accounts import AccountType
from ledger.corrections import Correction
from ledger.rows import Connection
from stablerail.cli_base import EXIT_USAGE, Person, changed, fail, needed_settings, person_of
from stablerail.cli_corrections import Id, Reason, id_of, shown
from stablerail.config import Settings

if TYPE_CHECKING:
    from agents.withdrawals.ended_by_people import Outside

withdrawals_app = typer.Typer(no_args_is_help=True, help="Withdrawals that nothing ends by itself: two people do.")


@withdrawals_app.command("settle")
def settle(
    withdrawal: Annotated[str, typer.Argument(metavar="ID", help="the withdrawal's id; `recovery status` lists those in review")],
    reason: Reason,
    paid: Annotated[bool, typer.Option("--paid/--failed", help="its recipient has the money; or never gets it, and it is given back")],
    tx: Annotated[str, typer.Option(help="of --paid: the transaction that paid it")] = "",
    id: Id = None, actor: Person = None,
) -> None:  # fmt: skip
    """Ask that a withdrawal ends as paid, or as failed. Nothing moves before another person approves. Refused while it may still be
    paid, and where a chain that we read says otherwise."""
    if paid != bool(tx):
        fail("--paid wants the transaction, --tx HASH; --failed has none", EXIT_USAGE)
    try:
        key = uuid.UUID(withdrawal).hex
    except ValueError:
        fail(f"{withdrawal}: an id is a UUID", EXIT_USAGE)
    correction, settings = id_of(id), needed_settings("database_url", logs=False)

    async def ask(connection: Connection, who: str, at: datetime) -> Correction:
        from agents.withdrawals import ended_by_people

        async with _outside(connection, settings, key) as outside:
            return await ended_by_people.request(connection, correction, key, tx or None, outside, reason, who, at)

    from agents.withdrawals.errors import UnknownWithdrawal

    try:
        shown(changed(ask, actor, who=person_of))
    except UnknownWithdrawal as error:
        fail(f"{error.code}: {withdrawal}; `GET /v1/withdrawals` lists them")


@withdrawals_app.command("approve")
def approve(
    correction_id: Annotated[str, typer.Argument(help="as `settle` printed it; `ledger correct list` has it too")],
    actor: Person = None,
) -> None:
    """End the withdrawal as somebody else asked for. All of it is looked at once more."""
    key, settings = id_of(correction_id), needed_settings("database_url", logs=False)

    async def end(connection: Connection, who: str, at: datetime) -> Correction:
        from agents.withdrawals import ended_by_people

        withdrawal, _ = ended_by_people.about(await corrections.find(connection, key))
        async with _outside(connection, settings, withdrawal) as outside:
            return await ended_by_people.approve(connection, key, outside, who, at)

    shown(changed(end, actor, who=person_of))


@asynccontextmanager
async def _outside(connection: Connection, settings: Settings, id: str) -> AsyncIterator[Outside]:
    """The endpoints of the withdrawal's chain, and Circle, as far as they are set."""
    from agents.withdrawals import stored
    from agents.withdrawals.ended_by_people import Outside
    from agents.withdrawals.look import ChainWriter
    from connectors.circle.client import CircleClient
    from stablerail.connections import rpcs

    chain = circle = None
    async with AsyncExitStack() as stack:
        withdrawal = await stored.read(connection, id)
        name = next((one for one in settings.rpc_urls if withdrawal is not None and one == withdrawal.chain), None)
        if name is not None:
            endpoints = [await stack.enter_async_context(rpc) for rpc in rpcs(settings, name)]
            token = settings.usdc_contracts[name].lower()
            chain = ChainWriter(endpoints, token, settings.finality_depths_blocks[name])
        key, secret = settings.circle_api_key, settings.circle_entity_secret
        if key is not None and secret is not None:
            client = CircleClient(settings.circle_api_url, key, secret, settings.call_timeout_s)
            circle = await stack.enter_async_context(client)
        yield Outside(chain, circle, settings.shards_of(AccountType.SYSTEM_BUFFER_USDC))
