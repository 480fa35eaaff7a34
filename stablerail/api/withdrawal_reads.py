"""Withdrawals: rows -> answers."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import asyncpg

from agents.withdrawals.withdrawal import ENDED, Status, Withdrawal
from ledger.cursors import opaque, opened
from ledger.sql import load
from stablerail.api import models
from stablerail.keys import Connection
from topics.money import format_amount

_SQL = load("stablerail.api", "withdrawals.sql")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last withdrawal of a page: the time it was asked for never changes, so a page starts behind it for good."""

    requested_at: datetime
    id: UUID

    def text(self) -> str:
        """Opaque to callers, so that it may change."""
        return opaque(f"{(self.requested_at - _EPOCH) // timedelta(microseconds=1)}.{self.id.hex}".encode())

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """ValueError when it is not one of ours."""
        try:
            micros, _, id = opened(text).decode("ascii").partition(".")
            return cls(_EPOCH + timedelta(microseconds=int(micros)), UUID(hex=id))
        except (ValueError, OverflowError):
            raise ValueError("not a cursor of ours") from None


async def withdrawal(connection: Connection, id: UUID) -> models.WithdrawalHistory | None:
    """None when there is no such withdrawal."""
    row = await connection.fetchrow(_SQL.withdrawal, id)
    if row is None:
        return None
    head = await connection.fetchval(_SQL.head, row["chain"])
    return models.WithdrawalHistory(
        **_withdrawal(row),
        history=[models.WithdrawalStep(**step) for step in await connection.fetch(_SQL.history, id)],
        attempts=[_attempt(each, head) for each in await connection.fetch(_SQL.attempts, id)],
        transfer=_transfer(await connection.fetchrow(_SQL.transfer, id)),
    )


async def withdrawals(
    connection: Connection,
    user_id: str | None,
    status: Status | None,
    chain: str | None,
    after: Cursor | None,
    limit: int,
) -> models.Withdrawals:
    """At most `limit` withdrawals after the cursor, the newest first."""
    place = (after.requested_at, after.id) if after else (None, None)
    # One more than the page tells whether another page follows.
    filters = (status.value if status else None, chain, *place, limit + 1)
    if user_id is not None:
        rows = await connection.fetch(_SQL.page_of_user, *filters, user_id)
    elif status is not None and status not in ENDED:
        rows = await connection.fetch(_SQL.page_of_open, *filters)
    else:
        rows = await connection.fetch(_SQL.page, *filters)
    page = rows[:limit]
    more = len(rows) > limit
    return models.Withdrawals(
        withdrawals=[models.Withdrawal(**_withdrawal(row)) for row in page],
        next=Cursor(page[-1]["requested_at"], page[-1]["id"]).text() if more else None,
    )


def of_row(withdrawal: Withdrawal) -> models.Withdrawal:
    """A row that was just written or locked."""
    fields = withdrawal._asdict()
    for inner in ("fingerprint", "hold_id", "version"):
        del fields[inner]
    return models.Withdrawal(**_shown(fields))


def _withdrawal(row: asyncpg.Record) -> dict[str, Any]:
    return _shown({**row, "id": row["id"].hex})


def _shown(fields: dict[str, Any]) -> dict[str, Any]:
    fields["to"] = fields.pop("recipient")
    fields["amount"] = format_amount(int(fields["amount"]))
    return fields


def _transfer(row: asyncpg.Record | None) -> models.CustodianTransfer | None:
    if row is None:
        return None
    return models.CustodianTransfer(**{**row, "tx_hashes": row["tx_hashes"].split()})


def _attempt(row: asyncpg.Record, head: int | None) -> models.Attempt:
    fields = dict(row)
    mined = row["block_number"]
    for fee in ("max_fee", "priority_fee"):
        fields[f"{fee}_wei"] = str(int(fields.pop(fee)))
    confirmations = None if mined is None or head is None else max(0, head - mined)
    return models.Attempt(**fields, confirmations=confirmations)
