"""A customer's balances in detail: what is held and why, and what the broker says. What cannot be told is a stated gap."""

from __future__ import annotations

from datetime import datetime
from typing import Final, Literal, Protocol
from uuid import UUID

import structlog
from pydantic import Field

from connectors.alpaca.client import Position
from connectors.errors import ConnectorError, Refused
from ledger.sql import load
from stablerail.answers import Answer, Decimal, Hex
from stablerail.api import models, reads
from stablerail.api.compared import Compared
from stablerail.keys import Connection
from topics.money import format_amount

log = structlog.get_logger()
_SQL = load("stablerail.api", "detail.sql")

HOLDS_MAX: Final = 500


class Broker(Protocol):
    """Who knows what customers hold in securities."""

    async def positions(self, account_id: str) -> list[Position]:
        """Raises ConnectorError."""


class Hold(Answer):
    """An amount set aside until it is used or given back."""

    id: Hex
    asset: str = Field(examples=["USDC"])
    account: str = Field(description="where it is held", examples=["pending_investment"])
    amount: Decimal = Field(description="when it was set aside")
    remaining: Decimal = Field(description="what of it is still held")
    kind: str = Field(description="why", examples=["order_reserved", "withdrawal_hold"])
    reference: str = Field(description="the id of the withdrawal or order")
    since: datetime


class Security(Answer):
    """A position as the broker says it, in its own decimal strings."""

    symbol: str = Field(examples=["AAPL"])
    asset_class: str = Field(examples=["us_equity"])
    side: str = Field(description="long or short", examples=["long"])
    qty: str = Field(examples=["3.5"])
    avg_entry_price: str = Field(examples=["150.25"])
    cost_basis: str = Field(examples=["525.875"])
    current_price: str | None = Field(examples=["151"])
    market_value: str | None = Field(examples=["528.5"])
    unrealized_pl: str | None = Field(examples=["2.625"])


class Gap(Answer):
    """A part of the answer that is missing."""

    part: Literal["positions", "holds"]
    code: str = Field(
        description="not_configured, no_account, unknown_account, more, or why the broker did not answer: partner_unavailable, "
        "partner_outcome_unknown, partner_rate_limited, partner_refused",
        examples=["partner_unavailable"],
    )


class DetailedBalances(models.Balances):
    holds: list[Hold] = Field(description=f"the oldest first, at most {HOLDS_MAX}")
    positions: list[Security] | None = Field(description="null: not known now; `gaps` says why")
    gaps: list[Gap]


async def holds(connection: Connection, user_id: str) -> tuple[list[Hold], list[Gap]]:
    rows = await connection.fetch(_SQL.holds, user_id, HOLDS_MAX + 1)
    found = [
        Hold(
            id=row["id"].hex,
            asset=row["asset"],
            account=row["type"],
            amount=format_amount(int(row["amount"])),
            remaining=format_amount(int(row["remaining"])),
            kind=row["kind"],
            reference=row["reference"],
            since=row["created_at"],
        )
        for row in rows[:HOLDS_MAX]
    ]
    return found, [Gap(part="holds", code="more")] if len(rows) > HOLDS_MAX else []


async def positions(broker: Broker | None, account_id: UUID | None) -> tuple[list[Security] | None, list[Gap]]:
    """Never fails: the rest of the view does not depend on the broker."""
    code = "no_account"
    if broker is None:
        code = "not_configured"
    elif account_id is not None:
        try:
            found = await broker.positions(str(account_id))
            return [Security.model_validate(each, from_attributes=True) for each in found], []
        except ConnectorError as error:
            unknown = isinstance(error, Refused) and error.status == 404
            code = "unknown_account" if unknown else error.code.value
            log.warning("positions.gap", code=code, reason=str(error))
    return None, [Gap(part="positions", code=code)]


async def detailed(
    pool: reads.Pool, broker: Broker | None, user_id: str, account_id: UUID | None
) -> DetailedBalances | None:
    """None when the user is not known. No connection waits for the broker. Raises BalancesDisagree."""
    compared = Compared()
    async with reads.snapshot(pool) as connection:
        plain = await reads.balances(connection, user_id, compared.balances)
        if plain is None:
            return None
        held, more = await holds(connection, user_id)
    await compared.settle(pool)
    securities, gaps = await positions(broker, account_id)
    return DetailedBalances(
        user_id=user_id, balances=plain.balances, holds=held, positions=securities, gaps=[*more, *gaps]
    )
