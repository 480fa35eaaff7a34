"""Rows -> answers. Each function is one consistent look: its statements share a snapshot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias
from uuid import UUID

import asyncpg

from agents.deposits.deposit import transaction_ids
from ledger.accounts import SYSTEM, USDC, AccountType, may_own
from ledger.cursors import opaque, opened
from ledger.reading import OwnerBalance, owner_balances
from ledger.sql import load
from stablerail import answers
from stablerail.api import models
from stablerail.keys import Connection
from topics.money import format_amount

_SQL = load("stablerail.api", "reads.sql")
ACQUIRE_TIMEOUT_S: Final = 2.0
_ODD: Final = frozenset({"pending", "orphaned", "reversed", "parked", "vanished"})
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Balances = Callable[[Connection, str], Awaitable[dict[str, OwnerBalance]]]
"""Where balances are read."""


@asynccontextmanager
async def snapshot(pool: Pool) -> AsyncGenerator[Connection]:
    """A connection in a read-only transaction whose statements all see the same state."""
    async with (
        pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        yield connection


async def balances(connection: Connection, user_id: str, read: Balances = owner_balances) -> models.Balances | None:
    """None when the user is not known. A known user without an account has zero."""
    held = {} if user_id == SYSTEM else await read(connection, user_id)
    if not held:
        if not await _known(connection, user_id):
            return None
        held = {USDC: OwnerBalance(USDC, {AccountType.USDC_BALANCE.value: 0})}
    not_final = {row["asset"]: int(row["amount"]) for row in await connection.fetch(_SQL.not_final, user_id)}
    return models.Balances(
        user_id=user_id,
        balances=[
            models.Balance(**answers.of_held(balance).model_dump(), not_final=format_amount(not_final.get(asset, 0)))
            for asset, balance in held.items()
        ],
    )


async def wallets(connection: Connection, user_id: str) -> models.Wallets | None:
    """None when the user is not known."""
    if not await _known(connection, user_id):
        return None
    return models.Wallets(
        user_id=user_id,
        wallets=[models.Wallet(**row) for row in await connection.fetch(_SQL.wallets, user_id)],
        awaited=[models.AwaitedWallet(**row) for row in await connection.fetch(_SQL.wallets_awaited, user_id)],
    )


async def deposit(connection: Connection, deposit_id: UUID) -> models.DepositHistory | None:
    """None when there is no such deposit."""
    row = await connection.fetchrow(_SQL.deposit, deposit_id)
    if row is None:
        return None
    transactions = await connection.fetch(_SQL.transactions, transaction_ids(deposit_id.hex, row["generation"]))
    entries: dict[UUID, list[models.Entry]] = defaultdict(list)
    for entry in await connection.fetch(_SQL.entries, row["user_id"], [each["id"] for each in transactions]):
        entries[entry["transaction_id"]].append(_entry(entry))
    return models.DepositHistory(
        **_deposit(row),
        reports=[models.Report(**report) for report in await connection.fetch(_SQL.reports, deposit_id)],
        transactions=[
            models.Transaction(id=each["id"].hex, kind=each["kind"], at=each["at"], entries=entries[each["id"]])
            for each in transactions
        ],
    )


async def deposits(connection: Connection, user_id: str, after: Cursor | None, limit: int) -> models.Deposits | None:
    """At most `limit` deposits after the cursor. None when the user is not known."""
    if not await _known(connection, user_id):
        return None
    # One more than the page tells whether another page follows.
    if after is None:
        rows = await connection.fetch(_SQL.deposits_first, user_id, limit + 1)
    elif after.credited_at is None:
        rows = await connection.fetch(_SQL.deposits_after_pending, user_id, limit + 1, after.deposit_id)
    else:
        rows = await connection.fetch(_SQL.deposits_after, user_id, limit + 1, after.deposit_id, after.credited_at)
    page = rows[:limit]
    more = len(rows) > limit
    return models.Deposits(
        deposits=[models.Deposit(**_deposit(row)) for row in page],
        next=Cursor(page[-1]["credited_at"], page[-1]["id"]).text() if more else None,
    )


async def listed_deposits(
    connection: Connection, user_id: str | None, chain: str | None, status: str | None, after: str | None, limit: int
) -> models.ListedDeposits:
    """At most `limit` deposits of anybody after the cursor. ValueError when it is none of ours."""
    try:
        place = UUID(bytes=opened(after)) if after is not None else None
    except ValueError:
        raise ValueError("not a cursor of ours") from None
    query = _SQL.listed
    if user_id is not None:
        query = _SQL.listed_of_user
    elif status in _ODD:
        query = _SQL.listed_odd
    rows = await connection.fetch(query, user_id, chain, status, place, limit + 1)
    return models.ListedDeposits(
        deposits=[models.Deposit(**_deposit(row)) for row in rows[:limit]],
        next=opaque(rows[limit - 1]["id"].bytes) if len(rows) > limit else None,
    )


async def listed_wallets(
    connection: Connection, user_id: str | None, chain: str | None, after: str | None, limit: int
) -> models.ListedWallets:
    """At most `limit` wallets of anybody after the cursor. ValueError when it is none of ours."""
    place: tuple[str | None, str | None] = (None, None)
    if after is not None:
        try:
            first, separator, last = opened(after).decode("ascii").partition(":")
        except ValueError:
            raise ValueError("not a cursor of ours") from None
        if not separator or "\0" in first + last:
            raise ValueError("not a cursor of ours")
        place = (first, last)
    rows = await connection.fetch(_SQL.listed_wallets, user_id, chain, *place, limit + 1)
    more = rows[limit - 1] if len(rows) > limit else None
    return models.ListedWallets(
        wallets=[models.ListedWallet(**row) for row in rows[:limit]],
        next=opaque(f"{more['chain']}:{more['address']}".encode()) if more else None,
    )


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last deposit of a page. A page starts behind it, whatever was credited meanwhile."""

    credited_at: datetime | None
    deposit_id: UUID

    def text(self) -> str:
        """Opaque to callers, so that it may change."""
        micros = "" if self.credited_at is None else (self.credited_at - _EPOCH) // timedelta(microseconds=1)
        return opaque(f"{micros}.{self.deposit_id.hex}".encode())

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """ValueError when it is not one of ours."""
        try:
            micros, _, deposit_id = opened(text).decode("ascii").partition(".")
            at = _EPOCH + timedelta(microseconds=int(micros)) if micros else None
            return cls(at, UUID(hex=deposit_id))
        except (ValueError, OverflowError):
            raise ValueError("not a cursor of ours") from None


async def _known(connection: Connection, user_id: str) -> bool:
    # The company's own accounts have an owner too; they are no customer's.
    return may_own(user_id) and bool(await connection.fetchval(_SQL.known_user, user_id))


def _deposit(row: asyncpg.Record) -> dict[str, Any]:
    fields = dict(row)
    fields["id"] = row["id"].hex
    fields["to"] = fields.pop("recipient")
    fields["amount"] = format_amount(int(row["amount"]))
    return fields


def _entry(row: asyncpg.Record) -> models.Entry:
    return models.Entry(
        account=row["type"],
        asset=row["asset"],
        direction="debit" if row["direction"] == "d" else "credit",
        amount=format_amount(int(row["amount"])),
        balance_after=format_amount(int(row["balance_after"])),
        version=row["version"],
    )
