"""Balances under lock, and the rows of what a fold made of them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from ledger.accounts import Account
from ledger.errors import TransactionReused
from ledger.posting import Balance, Fold, Transaction
from ledger.proof import ledger_blocks
from ledger.rows import Block, Connection, Op, block, uuids
from ledger.sql import load
from ledger.tables import ACCOUNTS

_sql = load("ledger", "sql/store.sql")


async def lock_balances(
    connection: Connection, accounts: Iterable[Account], at: datetime
) -> tuple[dict[Account, Balance], datetime]:
    """Locks the accounts, sorted; missing ones are empty. Also a time not before any of their last entries.

    An account that another writer makes at the same moment is not seen: its first entry's key then conflicts, and the
    transaction runs again.
    """
    wanted = list(accounts)
    balances = {account: Balance() for account in wanted}
    rows = await connection.fetch(_sql.lock, uuids([account.id for account in wanted]))
    for number, balance, version, updated_at in rows:
        balances[wanted[number - 1]] = Balance(int(balance), version, stored=True)
        at = max(at, updated_at)
    return balances, at


async def already_posted(
    connection: Connection, transactions: Iterable[Transaction]
) -> dict[str, TransactionReused | None]:
    """Of these transactions, those whose id exists: None when its contents are the same, else the refusal."""
    wanted = {transaction.id: transaction for transaction in transactions}
    rows = await connection.fetch(_sql.known, list(wanted))
    return {
        key: None if fingerprint == wanted[key].fingerprint() else TransactionReused(transaction_id)
        for key, transaction_id, fingerprint in rows
    }


def blocks_of(fold: Fold, at: datetime, batch: int) -> list[Block]:
    """The rows of a fold: transactions, entries, and the accounts as they are after it. `batch`: the locked owners'."""
    if not fold.transactions:
        return []
    balances = fold.balances
    touched = sorted(fold.touched)
    at = at.astimezone(UTC)  # hashed as text
    return [
        *ledger_blocks(
            [(t.id, t.kind, t.reference, t.fingerprint(), at, batch) for t in fold.transactions],
            [(*entry, at) for entry in fold.entries],
        ),
        block(
            ACCOUNTS,
            Op.UPSERT,
            [(a.id, a.owner, a.type, a.asset, a.shard, balances[a].balance, balances[a].version, at) for a in touched],
        ),
    ]
