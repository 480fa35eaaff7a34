"""Opening postings: the ledger is given what the legacy table has and it does not.

| posting | debit | credit |
| --- | --- | --- |
| opening | the customer's account | treasury_capital_usdc, treasury_capital_fiat |

Against capital, not against the buffer: the customers' money of before is covered by what the company holds outside this
ledger, so it is brought in by the company, and what it can still extend at once stays what it is.

An account is opened once: the transaction's id is made of the account's, so a backfill that was stopped begins again and finds
what it did. The amount is what the table has more than the ledger, both seen at once; postings that go to both meanwhile
do not change it. A balance that is higher in the ledger, or no amount of ours, is left to a person.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from decimal import Decimal
from typing import Final, NamedTuple

from ledger import book, store
from ledger.accounts import SYSTEM, USD, Account, AccountType, asset_of
from ledger.commit import OVERTAKEN, Sealed, lock_writer, seal
from ledger.posting import Transaction, credit, debit
from ledger.rows import Connection, numbers, uuids
from ledger.shadow import Difference, Mirror, whole
from ledger.shadow_phases import Progress
from ledger.sql import load

_sql = load("ledger", "sql/shadow.sql")

WRITER: Final = "backfill"
PAGE: Final = 500
"""Customers in one commit: with four accounts each 2,000 postings, as a stage's largest batch."""
CAPITAL: Final = Account(SYSTEM, AccountType.TREASURY_CAPITAL_USDC)
CAPITAL_FIAT: Final = Account(SYSTEM, AccountType.TREASURY_CAPITAL_FIAT)


class Opened(NamedTuple):
    """What a page came to."""

    customers: int
    opened: int
    refused: list[Difference]
    sealed: Sealed | None


class Totals(NamedTuple):
    customers: int
    opened: int
    refused: int
    examples: list[Difference]


def opening_id(account: Account) -> str:
    return hashlib.blake2b(account.id.encode(), digest_size=16, person=b"opening").hexdigest()


async def backfill(
    connection: Connection, mirror: Mirror, at: datetime, *, actor: str, progress: Progress = lambda _: None
) -> Totals:
    """Opens every customer's accounts, a page in memory. `connection` has no mirror: the table has the money already."""
    after: str | None = None
    customers = opened = refused = 0
    examples: list[Difference] = []
    while True:
        users = await mirror.page(connection, after, PAGE)
        page = await open_page(connection, mirror, users, at, actor=actor)
        customers, opened, refused = customers + len(users), opened + page.opened, refused + len(page.refused)
        examples += page.refused[: 10 - len(examples)]
        progress(len(users))
        if len(users) < PAGE:
            return Totals(customers, opened, refused, examples)
        after = users[-1]


async def open_page(connection: Connection, mirror: Mirror, users: list[str], at: datetime, *, actor: str) -> Opened:
    """One commit. Tried again while another writer is faster."""
    tries = 1
    while True:
        try:
            return await _open_page(connection, mirror, users, at, actor)
        except OVERTAKEN:
            if tries == book.TRIES_MAX:
                raise
        tries += 1


async def _open_page(connection: Connection, mirror: Mirror, users: list[str], at: datetime, actor: str) -> Opened:
    legacy = mirror.legacy
    look = await mirror.look(connection, users)
    wanted: dict[str, tuple[Account, int, int]] = {}
    refused: list[Difference] = []
    for user, types in look.legacy.items():
        for type, value in types.items():
            account = Account(user, type)
            held = look.ledger.get(user, {}).get(type, 0)
            if not _is_ours(value, legacy.step):
                refused.append(Difference(user, AccountType(type), held, value))
            elif opening := int(value) - legacy.shown(held):
                wanted[opening_id(account)] = (account, int(value), opening)
    known = await store.read_posted(connection, wanted)
    fresh = {id: one for id, one in wanted.items() if id not in known}
    refused += [_refused(*one) for one in fresh.values() if one[2] < 0]
    fresh = {id: one for id, one in fresh.items() if one[2] > 0}
    if not fresh:
        return Opened(len(users), 0, refused, None)
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        results, fold = await book.settle(connection, [_opening(*one) for one in fresh.items()], at)
        done = [
            one
            for one, result in zip(fresh.values(), results, strict=True)
            if isinstance(result, store.Posted) and not result.existed
        ]
        pairs = zip(fresh.values(), results, strict=True)
        refused += [_refused(*one) for one, result in pairs if not isinstance(result, store.Posted)]
        sealed = await seal(
            connection, WRITER, owners, blocks=store.blocks_of(fold, owners[0].batch), messages=[], at=fold.at,
            actor=actor, summary={"opened": len(done)},
        )  # fmt: skip
        await connection.execute(
            _sql.mark_opening,
            uuids(account.id for account, _, _ in done),
            numbers(value for _, value, _ in done),
            numbers(opening for _, _, opening in done),
        )
    return Opened(len(users), len(done), refused, sealed)


def _is_ours(value: Decimal, step: int) -> bool:
    # a table's number may have more digits than decimals are divided with
    return value.is_finite() and value >= 0 and value == whole(value) and whole(value) % step == 0


def _refused(account: Account, there: int, opening: int) -> Difference:
    return Difference(account.owner, AccountType(account.type), there - opening, Decimal(there))


def _opening(id: str, one: tuple[Account, int, int]) -> Transaction:
    account, _, opening = one
    capital = CAPITAL_FIAT if asset_of(AccountType(account.type)) == USD else CAPITAL
    return Transaction(
        id, "opening", f"opening {account.owner}"[:200], (debit(account, opening), credit(capital, opening))
    )
