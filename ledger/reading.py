"""What the ledger holds, to read: balances now and then, a transaction's lines, the trial balance. Statements: statement.py.

Every function is one statement, or says that it wants a snapshot. A balance at a time is final once no commit that drew an
earlier time is still open: times come from writers' clocks, and a commit takes its own before it ends.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias
from uuid import UUID

import asyncpg

from ledger.accounts import SYSTEM, Account, account_id
from ledger.cursors import opaque, opened
from ledger.errors import AccountNotFound, BadAccountName, BadCursor, NotOnAccount, TransactionNotFound
from ledger.sql import load

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

# A string: only the type checker knows asyncpg's classes as generic.
Reader: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"

_sql = load("ledger", "sql/reading.sql")

AVAILABLE: Final = frozenset({"usdc_balance"})
"""Types of accounts that a customer can spend from at once."""
PENDING: Final = frozenset({"pending_withdrawal", "pending_investment"})
"""Types of accounts that hold a customer's money for something that is not done yet."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# An owner may hold any of the separators; type, shard and asset hold none, so the name is read from its end.
_NAME: Final = re.compile(
    r"(.{1,200})\.([a-z][a-z0-9_]{0,49})(?:\[([^\[\]]{0,100})\])?:([A-Z][A-Z0-9]{0,19})", re.ASCII
)


class AccountName(NamedTuple):
    """`owner.type:ASSET` is the sum of all shards, `owner.type[shard]:ASSET` one of them, `[]` the one without a name."""

    owner: str
    type: str
    asset: str
    shard: str | None = None

    @classmethod
    def parse(cls, text: str) -> AccountName:
        """Raises BadAccountName."""
        match = _NAME.fullmatch(text)
        if match is None or not text.isprintable():
            raise BadAccountName(text)
        owner, type_, shard, asset = match.groups()
        return cls(owner, type_, asset, shard)

    def __str__(self) -> str:
        shard = "" if self.shard is None else f"[{self.shard}]"
        return f"{self.owner}.{self.type}{shard}:{self.asset}"

    def account(self) -> Account:
        """The one to post to; where no shard is named, the one without a name."""
        return Account(self.owner, self.type, self.asset, self.shard or "")


@dataclass(frozen=True, slots=True)
class OwnerBalance:
    """What an owner has of one asset, in base units. `total` is everything, `available` and `pending` parts of it."""

    asset: str
    by_type: dict[str, int]

    @property
    def available(self) -> int:
        return sum(balance for type_, balance in self.by_type.items() if type_ in AVAILABLE)

    @property
    def pending(self) -> int:
        return sum(balance for type_, balance in self.by_type.items() if type_ in PENDING)

    @property
    def total(self) -> int:
        return sum(self.by_type.values())


@dataclass(frozen=True, slots=True)
class AccountBalance:
    account: AccountName
    by_shard: dict[str, int]

    @property
    def balance(self) -> int:
        """Base units; debits − credits."""
        return sum(self.by_shard.values())


async def owner_balances(connection: Reader, owner: str) -> dict[str, OwnerBalance]:
    """By asset; empty when the owner has no account."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for asset, type_, balance in await connection.fetch(_sql.owner_balances, owner):
        found[asset][type_] = int(balance)
    return {asset: OwnerBalance(asset, by_type) for asset, by_type in found.items()}


async def balance(connection: Reader, account: AccountName, *, at: datetime | None = None) -> AccountBalance:
    """Now, or after the last entry that is not later than `at`. Raises AccountNotFound.

    Where one row is asked for, it is found by its id; a time then costs two look-ups more, however long the account is.
    """
    # only the system's accounts have shards
    shard = "" if account.shard is None and account.owner != SYSTEM else account.shard
    if shard is None:
        name = account.owner, account.type, account.asset
        if at is None:
            rows = await connection.fetch(_sql.balances_of_shards, *name)
        else:
            rows = await connection.fetch(_sql.balances_of_shards_at, *name, at)
        if not rows:
            raise AccountNotFound(str(account))
        return AccountBalance(account, {shard: int(held) for shard, held in sorted(map(tuple, rows))})
    id_ = account_id(account.owner, account.type, account.asset, shard)
    held = None if at is None else await connection.fetchval(_sql.balance_at, id_, at)
    if held is None:
        now = await connection.fetchval(_sql.balance, id_)
        if now is None:
            raise AccountNotFound(str(account))
        held = now if at is None else 0  # it has no entry that early
    return AccountBalance(account, {shard: int(held)})


async def balance_after(connection: Reader, account: AccountName, transaction_id: UUID) -> AccountBalance:
    """After the transaction's last line on the account, in the order of its statement: time, shard, version.

    Wants a snapshot. Raises AccountNotFound, TransactionNotFound, NotOnAccount.
    """
    found = await connection.fetchrow(_sql.transaction, transaction_id)
    if found is None:
        raise TransactionNotFound(transaction_id)
    rows = await connection.fetch(_sql.balance_around, *account, found["at"], transaction_id)
    if not rows:
        raise AccountNotFound(str(account))
    own = [number for number, row in enumerate(rows) if row[2] is not None]
    if not own:
        raise NotOnAccount(transaction_id, str(account))
    last = own[-1]
    by_shard = {
        shard: int(through if number < last else after if number == last else before)
        for number, (shard, before, after, through) in enumerate(rows)
    }
    return AccountBalance(account, by_shard)


# -- transactions -------------------------------------------------------------------------------------------------------


class TransactionLine(NamedTuple):
    """One line of a transaction. `account` is one shard's name; amounts in base units."""

    account: AccountName
    direction: str
    amount: int
    balance_after: int
    version: int


@dataclass(frozen=True, slots=True)
class PostedTransaction:
    id: UUID
    kind: str
    reference: str
    at: datetime
    lines: tuple[TransactionLine, ...]


class ReferenceCursor(NamedTuple):
    """The last transaction of a page."""

    at: datetime
    transaction_id: UUID

    def text(self) -> str:
        """Opaque to callers, so that it may change."""
        micros = (self.at - _EPOCH) // timedelta(microseconds=1)
        return opaque(f"{micros}.{self.transaction_id.hex}".encode())

    @classmethod
    def parse(cls, text: str) -> ReferenceCursor:
        """Raises BadCursor."""
        try:
            micros, _, transaction_id = opened(text).decode("ascii").partition(".")
            return cls(_EPOCH + timedelta(microseconds=int(micros)), UUID(hex=transaction_id))
        except (ValueError, OverflowError):
            raise BadCursor from None


async def transaction(connection: Reader, transaction_id: UUID) -> PostedTransaction:
    """With all its lines, in their order. Raises TransactionNotFound."""
    row = await connection.fetchrow(_sql.transaction, transaction_id)
    if row is None:
        raise TransactionNotFound(transaction_id)
    return (await _with_lines(connection, [row]))[0]


async def transactions_of(
    connection: Reader, reference: str, limit: int, after: ReferenceCursor | None = None
) -> tuple[list[PostedTransaction], ReferenceCursor | None]:
    """At most `limit` transactions with this reference, oldest first, and the cursor when there are more."""
    rows = await connection.fetch(_sql.transactions_of_reference, reference, *(after or (None, None)), limit + 1)
    page = await _with_lines(connection, rows[:limit])
    return page, ReferenceCursor(page[-1].at, page[-1].id) if len(rows) > limit else None


async def _with_lines(connection: Reader, rows: Sequence[asyncpg.Record]) -> list[PostedTransaction]:
    lines: dict[UUID, list[TransactionLine]] = defaultdict(list)
    if rows:
        ids, times = [row["id"] for row in rows], [row["at"] for row in rows]
        for row in await connection.fetch(_sql.entries_of_transactions, ids, times):
            transaction_id, owner, type_, asset, shard, direction, amount, after, version = row
            account = AccountName(owner, type_, asset, shard or None)
            lines[transaction_id].append(TransactionLine(account, direction, int(amount), int(after), version))
    return [PostedTransaction(id_, kind, reference, at, tuple(lines[id_])) for id_, kind, reference, at in rows]


# -- the trial balance --------------------------------------------------------------------------------------------------


class TrialLine(NamedTuple):
    """One asset and account type. `debit` sums the accounts above zero, `credit` those below it, as a positive amount."""

    asset: str
    type: str
    accounts: int
    debit: int
    credit: int

    @property
    def balance(self) -> int:
        return self.debit - self.credit


@dataclass(frozen=True, slots=True)
class TrialBalance:
    at: datetime | None
    """None: now."""
    lines: tuple[TrialLine, ...]

    def differences(self) -> dict[str, int]:
        """Asset -> debits − credits; each is zero when the books are right."""
        found: dict[str, int] = defaultdict(int)
        for line in self.lines:
            found[line.asset] += line.balance
        return dict(found)


async def trial_balance(connection: Reader, at: datetime | None = None) -> TrialBalance:
    """One pass over the accounts, and where `at` is given one search for each that has moved since."""
    rows = await connection.fetch(*((_sql.trial_balance,) if at is None else (_sql.trial_balance_at, at)))
    lines = (
        TrialLine(asset, type_, accounts, int(debit), int(credit)) for asset, type_, accounts, debit, credit in rows
    )
    return TrialBalance(at, tuple(lines))
