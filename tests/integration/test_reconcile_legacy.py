"""The ledger against a legacy table: every customer and account that differs is named, in pages, whichever side lacks the row."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import pytest

from ledger import reconciling_legacy
from ledger.accounts import AccountType, buffer, fiat_buffer, fiat_exposure, spendable
from ledger.posting import Transaction, credit, debit
from ledger.reconciling import Comparison, Difference, Found
from ledger.reconciling_legacy import Balances, compare_legacy
from ledger.rows import Changes, Connection
from tests.support import ledger_rig
from tests.support.payouts import store

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection

USDC, FIAT = AccountType.USDC_BALANCE, AccountType.FIAT_EXPOSURE


@dataclass
class Table:
    """In memory, in an order of its own."""

    rows: dict[str, dict[AccountType, int]]
    types: Sequence[AccountType] = (USDC, FIAT)

    async def pages(self, limit: int) -> AsyncIterator[Balances]:
        users = sorted(self.rows, reverse=True)
        for start in range(0, len(users), limit):
            yield {user: self.rows[user] for user in users[start : start + limit]}

    async def balances(self, users: Sequence[str]) -> Balances:
        return {user: self.rows[user] for user in users if user in self.rows}


@pytest.mark.parametrize("page", [1, 2, 5_000])
async def test_each_customer_whose_values_differ_is_named(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(reconciling_legacy, "PAGE", page)
    for user in ("ada", "bob", "cyd", "dan"):
        legs = (debit(spendable(user), 5), credit(buffer(), 5), debit(fiat_exposure(user), 3), credit(fiat_buffer(), 3))
        await store(connection, Changes(), [Transaction(uuid.uuid4().hex, "credit", user, legs)])
    legacy = Table({"ada": {USDC: 5, FIAT: 3}, "bob": {USDC: 7, FIAT: 0}, "eve": {USDC: 0, FIAT: 1}, "fay": {USDC: 0}})
    found = Found()
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        seen = [done async for done in compare_legacy(connection, legacy, found)]
    assert seen[-1] == 4
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
