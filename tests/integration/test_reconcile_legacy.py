"""The ledger against a legacy table: every customer and account that differs is named, in pages, whichever side lacks the row."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest

from chain.errors import RpcRefused
from ledger import reconciling_legacy
from ledger.accounts import AccountType, buffer, fiat_buffer, fiat_exposure, spendable
from ledger.legacy import Legacy
from ledger.posting import Transaction, credit, debit
from ledger.reconciling import Comparison, Difference, Found, GapCode, commit
from ledger.reconciling_legacy import compare_legacy
from ledger.rows import Changes, Connection
from stablerail import reconcile as reconciling
from stablerail.config import Settings, load_settings
from stablerail.reconcile import _away, reconcile
from tests.integration.test_shadow import through
from tests.support import ledger_rig
from tests.support.ledger_rig import AT, owner
from tests.support.payouts import store
from tests.support.proxies import PostgresProxy
from tests.support.proxies.postgres import sql_contains
from topics.events import Chain

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection

USDC, FIAT = AccountType.USDC_BALANCE, AccountType.FIAT_EXPOSURE


def legacy(digits: int = 6) -> Legacy:
    return Legacy("stablerail.balances", "who", "text", {USDC: "cash", FIAT: "power"}, False, digits)


async def legacy_of(dsn: str, rows: Sequence[tuple[str, int, int]]) -> Connection:
    """The table, of millionths, and a connection that may write it."""
    connection = await owner(dsn)
    await connection.execute(
        'CREATE TABLE balances (who text COLLATE "C" PRIMARY KEY, cash numeric NOT NULL, power numeric NOT NULL)'
    )
    await connection.execute("GRANT SELECT ON balances TO stablerail_app")
    await connection.executemany("INSERT INTO balances VALUES ($1, $2::int / 1e6, $3::int / 1e6)", rows)
    return connection


def settings_of(dsn: str, **more: Any) -> Settings:
    given = {"legacy_table": "stablerail.balances", "legacy_user_column": "who", **more}
    columns = {"usdc_balance": "cash", "fiat_exposure": "power"}
    return load_settings(env_file=None, database_url=dsn, legacy_columns=columns, **given)


async def funded(connection: Connection, user: str) -> None:
    """Five millionths of USDC, three of USD."""
    legs = (debit(spendable(user), 5), credit(buffer(), 5), debit(fiat_exposure(user), 3), credit(fiat_buffer(), 3))
    await store(connection, Changes(), [Transaction(uuid.uuid4().hex, "credit", user, legs)])


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciling, "LOOK_PAUSE_S", 0.01)


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
        seen = [done async for done in compare_legacy(connection, legacy(), found)]
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


async def test_what_is_no_balance_is_a_difference_and_the_run_is_stored(dsn: str, connection: Connection) -> None:
    await funded(connection, "ada")
    writer = await legacy_of(dsn, [("ada", 5, 3), ("bob", 0, 0), ("cyd", 0, 0), ("dan", 0, 0)])
    for user, value in (("bob", "NaN"), ("cyd", "Infinity"), ("dan", "1e40")):
        await writer.execute(f"UPDATE balances SET cash = '{value}' WHERE who = $1", user)
    await writer.close()
    found = Found()
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        assert [done async for done in compare_legacy(connection, legacy(), found)][-1] == 4
    run, _ = await commit(connection, found, AT, AT, "ann")
    assert run.differences == 3
    assert {(one.user_id, one.other) for one in found.kept} == {("bob", None), ("cyd", None), ("dan", None)}


@pytest.mark.parametrize("page", [1, 5_000])
async def test_customers_may_have_any_number_that_the_table_keeps(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    """Ids that are made of the time have nineteen digits by now."""
    monkeypatch.setattr(reconciling_legacy, "PAGE", page)
    users = ["-9223372036854775808", "7", "1900000000000000001", "9223372036854775807"]
    beyond = ["9223372036854775808", "-9223372036854775809", "99999999999999999999"]
    for user in users + beyond:
        await funded(connection, user)
    writer = await owner(dsn)
    await writer.execute("CREATE TABLE balances (who bigint PRIMARY KEY, cash numeric, power numeric)")
    await writer.execute("GRANT SELECT ON balances TO stablerail_app")
    await writer.executemany("INSERT INTO balances VALUES ($1, 5e-6, 3e-6)", [(int(user),) for user in users])
    await writer.execute("UPDATE balances SET cash = 0 WHERE who > 7")
    await writer.close()
    table, found = replace(legacy(), user_type="bigint"), Found()
    async for _ in compare_legacy(connection, table, found):
        pass
    differ = [(one.user_id, one.other) for one in found.kept if one.account.endswith("USDC")]
    assert set(differ) == {*((user, 0) for user in users[2:]), *((user, None) for user in beyond)}
    assert len(differ) == len(set(differ))


async def test_a_server_that_hangs_is_a_gap(
    dsn: str, databases: Callable[[], str], connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciling, "ANSWER_S", 0.2, raising=False)
    elsewhere = databases()
    await (await legacy_of(elsewhere, [("ada", 5, 3)])).close()
    server = urlsplit(elsewhere)
    with PostgresProxy(server.hostname or "", server.port or 0) as proxy:
        held = proxy.hold(sql_contains('FROM "stablerail"."balances"'), "reply")
        found = Found()
        async with asyncio.timeout(30):
            await reconcile(settings_of(dsn, legacy_url=through(elsewhere, proxy)), found)
        assert held.is_hit
        held.drop()
    assert [(one.comparison, one.code) for one in found.gaps] == [(Comparison.LEGACY, GapCode.AWAY)]


def test_what_an_endpoint_said_is_kept_without_what_no_text_holds() -> None:
    gap = _away(Comparison.CHAIN, Chain.MATIC, RpcRefused("node", "eth_call", -32_000, "a\0b"))
    assert "ab" in gap.reason
    assert "\0" not in gap.reason


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

    real = Legacy.page

    async def meanwhile(self: Legacy, *arguments: Any) -> Any:
        await writes()
        return await real(self, *arguments)

    monkeypatch.setattr(Legacy, "page", meanwhile)
    found = Found()
    told: list[int] = []
    await reconcile(settings_of(dsn), found, lambda _what, done, _total: told.append(done))
    assert written == 6
    assert max(told) == 5
    mirror = [one for one in found.kept if one.comparison is Comparison.MIRROR]
    assert found.kept == mirror == []
    assert found.results()[Comparison.LEGACY] == (5, 0, 0)
    await writer.close()


async def test_a_table_elsewhere_is_looked_at_again_and_digits_that_it_has_not_are_no_difference(
    dsn: str, databases: Callable[[], str], connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in ("ada", "bob", "cyd"):
        await funded(connection, user)
    there = await legacy_of(databases(), [("ada", 5, 3), ("bob", 4, 3)])
    await there.execute("UPDATE balances SET cash = cash + 0.5 / 1e6 WHERE who = 'bob'")

    async def told(looks: int, digits: int = 6) -> list[Difference]:
        found = Found()
        async for _ in compare_legacy(connection, legacy(digits), found, elsewhere=there, looks=looks, pause_s=0.01):
            pass
        return found.kept

    cyd = [
        Difference(Comparison.LEGACY, "cyd", f"cyd.{type}", units, None)
        for type, units in (("fiat_exposure:USD", 3), ("usdc_balance:USDC", 5))
    ]
    half = Difference(Comparison.LEGACY, "bob", "bob.usdc_balance:USDC", 5, 4)
    assert await told(3) == [half, *cyd], "half a base unit is one that is missing"

    real = Legacy.read

    async def arrives(self: Legacy, *arguments: Any) -> Any:
        await there.execute("INSERT INTO balances VALUES ('cyd', 5 / 1e6, 3 / 1e6) ON CONFLICT DO NOTHING")
        return await real(self, *arguments)

    monkeypatch.setattr(Legacy, "read", arrives)
    assert await told(3) == [half]
    await there.execute("UPDATE balances SET cash = 0, power = 0")
    assert len(await told(1)) == 6
    assert await told(1, 2) == [], "of less than a cent"
    await there.close()


async def test_a_legacy_table_that_cannot_be_read_is_a_gap_and_the_rest_is_compared(
    dsn: str, databases: Callable[[], str], connection: Connection
) -> None:
    await funded(connection, "ada")

    async def gap(**settings: Any) -> tuple[GapCode, str]:
        found = Found()
        await reconcile(settings_of(dsn, **settings), found)
        assert Comparison.MIRROR in found.results()
        ((comparison, about, code, reason),) = found.gaps
        assert (comparison, about) == (Comparison.LEGACY, "")
        return code, reason

    code, reason = await gap()
    assert (code, "STABLERAIL_LEGACY_TABLE: there is no table" in reason) == (GapCode.NOT_CONFIGURED, True)
    writer = await legacy_of(dsn, [])
    await writer.execute("REVOKE ALL ON balances FROM stablerail_app")
    assert await gap() == (GapCode.NOT_CONFIGURED, "permission denied for table balances")
    await writer.close()
    code, reason = await gap(legacy_url="postgresql://x:secret@127.0.0.1:1/x")
    assert (code, "secret" in reason) == (GapCode.AWAY, False)
    elsewhere = databases()
    writer = await legacy_of(elsewhere, [("ada", 4, 3)])
    await writer.close()
    found = Found()
    await reconcile(settings_of(dsn, legacy_url=elsewhere), found)
    assert found.kept == [Difference(Comparison.LEGACY, "ada", "ada.usdc_balance:USDC", 5, 4)]
    assert found.gaps == []
    await connection.execute("INSERT INTO shadow_outbox (owner, type, amount) VALUES ('ada', 'usdc_balance', 1)")
    found = Found()
    await reconcile(settings_of(dsn, legacy_url=elsewhere), found)
    assert found.kept == [], "on its way"
