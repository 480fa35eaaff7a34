"""A ledger's history twice: as rows in PostgreSQL, and as a list that is read in the most naive way there is."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import asyncpg

from ledger.accounts import account_id
from ledger.reading import AccountName

START = datetime(2026, 3, 1, tzinfo=UTC)
TICK = timedelta(microseconds=1)
BUFFER = AccountName("system", "system_buffer_usdc", "USDC")
CUSTODY = AccountName("system", "custody_usdc", "USDC")
WORLD = AccountName("system", "world_usdc", "USDC", "")
SHARDS = ("", "0", "1", "10", "9")
CHAINS = ("ETH", "MATIC")


def spendable(user: str) -> AccountName:
    return AccountName(user, "usdc_balance", "USDC", "")


def _id(name: AccountName) -> str:
    return account_id(name.owner, name.type, name.asset, name.shard or "")


@dataclass(frozen=True)
class Row:
    account: AccountName
    version: int
    transaction_id: uuid.UUID
    seq: int
    direction: str
    amount: int
    after: int
    at: datetime
    kind: str
    reference: str

    @property
    def change(self) -> int:
        return self.amount if self.direction == "d" else -self.amount


@dataclass
class Books:
    rows: list[Row] = field(default_factory=list)
    stored: int = 0
    last: dict[AccountName, Row] = field(default_factory=dict)

    def post(
        self, legs: Sequence[tuple[AccountName, int]], at: datetime, reference: str = "r", id: uuid.UUID | None = None
    ) -> datetime:
        """One transaction; a positive amount is a debit. Its time is not before any of its accounts' last."""
        last = self.last
        at = max([at, *(last[account].at for account, _ in legs if account in last)])
        transaction_id = id or uuid.UUID(int=random.Random(len(self.rows)).getrandbits(128))
        for seq, (account, change) in enumerate(legs):
            before = last.get(account)
            version, held = (before.version, before.after) if before is not None else (0, 0)
            row = Row(
                *(account, version + 1, transaction_id, seq, "d" if change > 0 else "c", abs(change), held + change),
                *(at, "deposit", reference),
            )
            last[account] = row
            self.rows.append(row)
        return at

    async def store(self, connection: asyncpg.Connection) -> None:
        """What was posted since the last time."""
        new, self.stored = self.rows[self.stored :], len(self.rows)
        transactions = {row.transaction_id: (row.kind, row.reference, uuid.UUID(int=0), row.at) for row in new}
        await connection.executemany(
            "INSERT INTO transactions (id, kind, reference, fingerprint, at) VALUES ($1, $2, $3, $4, $5)",
            [(id_, *rest) for id_, rest in transactions.items()],
        )
        await connection.copy_records_to_table(
            "entries",
            records=[
                (
                    _id(r.account),
                    r.version,
                    r.transaction_id,
                    r.seq,
                    r.direction,
                    r.amount,
                    r.after,
                    r.at,
                )
                for r in new
            ],
            columns=["account_id", "version", "transaction_id", "seq", "direction", "amount", "balance_after", "at"],
            schema_name="stablerail",
        )
        await connection.executemany(
            "INSERT INTO accounts (id, owner, type, asset, shard, balance, version, updated_at)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (id) DO UPDATE"
            " SET balance = excluded.balance, version = excluded.version, updated_at = excluded.updated_at",
            [
                (_id(row.account), *row.account, row.after, row.version, row.at)
                for row in {row.account: row for row in new}.values()
            ],
        )

    # -- naive reading ---------------------------------------------------------------------------------------------------

    def of(self, name: AccountName) -> list[Row]:
        """The account's rows in the statement's order."""
        rows = [r for r in self.rows if r.account[:3] == name[:3] and name.shard in (None, r.account.shard)]
        return sorted(rows, key=lambda row: (row.at, row.account.shard, row.version))

    def balance(self, name: AccountName, at: datetime | None = None) -> int:
        return sum(row.change for row in self.of(name) if at is None or row.at <= at)

    def names(self) -> list[AccountName]:
        """Every account of one shard, and every one of all its shards."""
        single = {row.account for row in self.rows}
        return sorted(single) + sorted({name._replace(shard=None) for name in single})

    def times(self) -> list[datetime]:
        return sorted({row.at for row in self.rows})

    def references(self) -> Iterable[str]:
        return sorted({row.reference for row in self.rows})


def some_books(seed: int, transactions: int = 250) -> Books:
    """Writers whose clocks differ, batches that share a time, hot shards, an asset more, amounts beyond a double."""
    draw, books = random.Random(seed), Books()
    clocks = {shard: START + timedelta(milliseconds=draw.randrange(50)) for shard in SHARDS}
    for number in range(transactions):
        shard = draw.choice((*SHARDS, "0", "0"))
        if draw.random() < 0.4:
            clocks[shard] += timedelta(microseconds=draw.choice((1, 2, 1_000, 60_000_000)))
        amount = draw.choice((1, 25_000_000, 10**30 + draw.randrange(9)))
        user, reference = draw.choice(("ada", "bob", "eve.usdc:x")), f"deposit-{number // 3}"
        buffer, chain = BUFFER._replace(shard=shard), CUSTODY._replace(shard=draw.choice(CHAINS))
        legs = [(spendable(user), amount), (buffer, -amount)]
        if draw.random() < 0.3:
            legs += [(chain, amount), (WORLD, -amount)]
        if draw.random() < 0.2:
            legs += [(buffer, amount), (buffer, -amount)]  # several lines of one transaction on one account
        if draw.random() < 0.2:
            exposure, fiat = (
                AccountName(user, "fiat_exposure", "USD", ""),
                AccountName("system", "system_buffer_fiat", "USD", ""),
            )
            legs += [(exposure, 7), (fiat, -7)]
        books.post(legs, clocks[shard], reference)
    return books
