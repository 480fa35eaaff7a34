"""The ledger against a legacy table: every customer and account that differs is named, in pages, whichever side lacks the row."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from ledger import reconciling_legacy
from ledger.accounts import AccountType, buffer, fiat_buffer, fiat_exposure, spendable
from ledger.posting import Transaction, credit, debit
from ledger.reading import Reader
from ledger.reconciling import Comparison, Difference, Found
from ledger.reconciling_legacy import Held, compare_legacy
from ledger.rows import Changes, Connection
from stablerail.config import load_settings
from stablerail.reconcile import reconcile
from tests.support import ledger_rig
from tests.support.ledger_rig import owner
from tests.support.payouts import store

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection

USDC, FIAT = AccountType.USDC_BALANCE, AccountType.FIAT_EXPOSURE


@dataclass
class Table:
    """A table in whole units, whose key sorts otherwise than ours; it keeps six digits, or two."""

    types: tuple[AccountType, ...] = (USDC, FIAT)
    step: int = 1
    before_page: Callable[[], Awaitable[None]] | None = None
    before_read: Callable[[], Awaitable[None]] | None = None

    def shown(self, balance: int) -> int:
        return balance // self.step * self.step

    async def page(self, connection: Reader, after: str | None, limit: int) -> list[tuple[str, Held]]:
        if self.before_page is not None:
            await self.before_page()
        query = f'{SELECT} WHERE who < $1 ORDER BY who COLLATE "C" DESC LIMIT $2'
        return list(_held(await connection.fetch(query, after or "~", limit)).items())

    async def read(self, connection: Reader, users: Iterable[str]) -> dict[str, Held]:
        if self.before_read is not None:
            await self.before_read()
        return _held(await connection.fetch(f"{SELECT} WHERE who = ANY ($1::text[])", list(users)))


def _held(rows: Sequence[Any]) -> dict[str, Held]:
    return {who: {USDC: cash * 10**6, FIAT: power * 10**6} for who, cash, power in rows}


SELECT = "SELECT who, cash, power FROM balances"


async def legacy_of(dsn: str, rows: Sequence[tuple[str, int, int]]) -> Connection:
    """The table, of millionths, and a connection that may write it."""
    connection = await owner(dsn)
    await connection.execute(
        'CREATE TABLE balances (who text COLLATE "C" PRIMARY KEY, cash numeric NOT NULL, power numeric NOT NULL)'
    )
    await connection.execute("GRANT SELECT ON balances TO stablerail_app")
    await connection.executemany("INSERT INTO balances VALUES ($1, $2::int / 1e6, $3::int / 1e6)", rows)
    return connection


async def funded(connection: Connection, user: str) -> None:
    """Five millionths of USDC, three of USD."""
    legs = (debit(spendable(user), 5), credit(buffer(), 5), debit(fiat_exposure(user), 3), credit(fiat_buffer(), 3))
    await store(connection, Changes(), [Transaction(uuid.uuid4().hex, "credit", user, legs)])


@pytest.mark.parametrize("page", [1, 2, 5_000])
async def test_each_customer_whose_values_differ_is_named(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(reconciling_legacy, "PAGE", page)
    for user in ("ada", "bob", "cyd", "dan"):
        await funded(connection, user)
    writer = await legacy_of(dsn, [("ada", 5, 3), ("bob", 7, 0), ("eve", 0, 1), ("fay", 0, 0)])
    await writer.close()
    found = Found()
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        seen = [done async for done in compare_legacy(connection, Table(), found)]
    assert seen[-1] == 6
    assert sorted(found.kept, key=lambda one: one.account) == [
        Difference(Comparison.LEGACY, "bob", "bob.fiat_exposure:USD", 3, 0),
        Difference(Comparison.LEGACY, "bob", "bob.usdc_balance:USDC", 5, 7),
        Difference(Comparison.LEGACY, "cyd", "cyd.fiat_exposure:USD", 3, None),
        Difference(Comparison.LEGACY, "cyd", "cyd.usdc_balance:USDC", 5, None),
        Difference(Comparison.LEGACY, "dan", "dan.fiat_exposure:USD", 3, None),
        Difference(Comparison.LEGACY, "dan", "dan.usdc_balance:USDC", 5, None),
        Difference(Comparison.LEGACY, "eve", "eve.fiat_exposure:USD", None, 1),
    ]
    assert found.results() == {Comparison.LEGACY: (6, 7, 3 + 2 + 16 + 1)}


async def test_what_is_written_to_both_while_they_are_compared_is_no_difference(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciling_legacy, "PAGE", 1)
    users = [f"user-{n}" for n in range(5)]
    for user in users:
        await funded(connection, user)
    writer = await legacy_of(dsn, [(user, 5, 3) for user in users])
    written = 0

    async def writes() -> None:
        nonlocal written
        async with writer.transaction():
            for user in users:
                await funded(writer, user)
            await writer.execute("UPDATE balances SET cash = cash + 5 / 1e6, power = power + 3 / 1e6")
        written += 1

    settings = load_settings(env_file=None, database_url=dsn)
    found = Found()
    told: list[int] = []
    await reconcile(
        settings, found, lambda _what, done, _total: told.append(done),
        legacy=Table(before_page=writes),
    )  # fmt: skip
    assert written == 6
    assert max(told) == 5
    mirror = [one for one in found.kept if one.comparison is Comparison.MIRROR]
    assert found.kept == mirror == []
    assert found.results()[Comparison.LEGACY] == (5, 0, 0)
    await writer.close()


async def test_a_table_elsewhere_is_looked_at_again_and_digits_that_it_has_not_are_no_difference(
    dsn: str, databases: Callable[[], str], connection: Connection
) -> None:
    for user in ("ada", "bob", "cyd"):
        await funded(connection, user)
    there = await legacy_of(databases(), [("ada", 5, 3), ("bob", 4, 3)])
    await there.execute("UPDATE balances SET cash = cash + 0.5 / 1e6 WHERE who = 'bob'")

    async def told(legacy: Table, looks: int) -> list[Difference]:
        found = Found()
        async for _ in compare_legacy(connection, legacy, found, elsewhere=there, looks=looks, pause_s=0.01):
            pass
        return found.kept

    cyd = [
        Difference(Comparison.LEGACY, "cyd", f"cyd.{type}", units, None)
        for type, units in (("usdc_balance:USDC", 5), ("fiat_exposure:USD", 3))
    ]
    half = Difference(Comparison.LEGACY, "bob", "bob.usdc_balance:USDC", 5, 4)
    assert await told(Table(), 3) == [half, *cyd], "half a base unit is one that is missing"

    async def arrives() -> None:
        await there.execute("INSERT INTO balances VALUES ('cyd', 5 / 1e6, 3 / 1e6) ON CONFLICT DO NOTHING")

    assert await told(Table(before_read=arrives), 3) == [half]
    await there.execute("UPDATE balances SET cash = 0, power = 0")
    assert len(await told(Table(), 1)) == 6
    assert await told(Table(step=10_000), 1) == [], "of less than a cent"
    await there.close()
