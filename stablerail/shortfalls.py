"""Shortfalls: what a customer owes us of a deposit that was reversed after it was spent. The entries of `shortfall_usdc` are the
list; a deposit's id is what each of them is about.

| way | moves | by |
| --- | --- | --- |
| settle | debit shortfall_usdc, credit the customer's balance, as far as it has | one person |
| write off | debit shortfall_usdc, credit treasury_capital_usdc | two: a correction |
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from ledger import corrections, store
from ledger.accounts import SHORTFALL, SYSTEM, Account, AccountType, spendable
from ledger.audit_logs import Log
from ledger.commit import lock_writer, seal
from ledger.corrections import Correction
from ledger.posting import Transaction, credit, debit
from ledger.rows import Connection
from ledger.sql import load
from topics.money import format_amount

_sql = load("stablerail", "operations.sql")

WRITER: Final = corrections.WRITER
"""One lock for both: what is asked for is not taken meanwhile."""
TREASURY: Final = Account(SYSTEM, AccountType.TREASURY_CAPITAL_USDC)


@dataclass(frozen=True, slots=True)
class Shortfall:
    """What is owed of one deposit."""

    deposit_id: str
    user_id: str | None
    chain: str | None
    tx_hash: str | None
    owed: int
    """Base units; below zero where more was settled than was owed."""
    since: datetime


class NothingOwed(Exception):
    """Nothing is owed of this deposit, or nothing can be taken now; the text says which."""


async def listed(connection: Connection, deposit_id: str | None = None) -> Sequence[Shortfall]:
    """Oldest first."""
    rows = await connection.fetch(_sql.shortfalls, SHORTFALL.id, deposit_id)
    return [Shortfall(id, user, chain, tx_hash, int(owed), since) for id, user, chain, tx_hash, owed, since in rows]


async def settle(connection: Connection, deposit_id: str, actor: str, at: datetime) -> tuple[int, int]:
    """Takes what the customer has, at most what is owed: (taken, still owed). Raises NothingOwed.

    Doing it again takes what has come since: what is owed is read under the lock of the account it is owed on.
    """
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        if await connection.fetchval(_sql.open_write_offs, deposit_id):
            raise NothingOwed(f"a correction of {deposit_id} waits for approval; reject it first")
        found = await _owed(connection, deposit_id)
        assert found.user_id is not None
        balances, at = await store.lock_balances(connection, (SHORTFALL, spendable(found.user_id)), at)
        found = await _owed(connection, deposit_id)
        taken = min(found.owed, balances[spendable(found.user_id)].balance)
        if taken <= 0:
            raise NothingOwed(f"{found.user_id} has nothing that could be taken; {format_amount(found.owed)} is owed")
        legs = (debit(SHORTFALL, taken), credit(spendable(found.user_id), taken))
        transaction = Transaction(uuid.uuid4().hex, "shortfall_settled", deposit_id, legs)
        fold = await store.lock(connection, [transaction], at)
        fold.post(transaction)
        about = {"user_id": found.user_id, "taken": format_amount(taken), "owed": format_amount(found.owed - taken)}
        await seal(
            connection, WRITER, owners, blocks=store.blocks_of(fold, owners[0].batch), messages=[], at=fold.at,
            actor=actor, summary={"shortfall.settled": 1},
            logs=[Log(actor, "shortfall.settled", "deposit", deposit_id, after=about)],
        )  # fmt: skip
    return taken, found.owed - taken


async def write_off(
    connection: Connection, deposit_id: str, correction_id: str, reason: str, actor: str, at: datetime
) -> Correction:
    """Asks that all that is owed of the deposit becomes the company's loss; another person approves it. The same id asks once.
    Raises NothingOwed, CorrectionRefused."""
    found = await _owed(connection, deposit_id)
    legs = (debit(SHORTFALL, found.owed), credit(TREASURY, found.owed))

    async def left() -> int:
        return (await _owed(connection, deposit_id)).owed

    return await corrections.request(
        connection, correction_id, legs, reason, actor, at, reference=deposit_id, left=left
    )


async def _owed(connection: Connection, deposit_id: str) -> Shortfall:
    found = await listed(connection, deposit_id)
    if not found or found[0].owed <= 0 or found[0].user_id is None:
        raise NothingOwed(f"nothing is owed of deposit {deposit_id}")
    return found[0]
