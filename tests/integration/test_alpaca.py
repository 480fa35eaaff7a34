"""Alpaca's sandbox read by our client, by the balance view, and by Alpaca's own SDK: a sandbox that it cannot read is wrong."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import asyncpg
import httpx
import pytest
from pydantic import SecretStr

from connectors.alpaca.client import AlpacaClient
from connectors.alpaca.sandbox import TEST_KEY_ID, TEST_SECRET, AlpacaSandbox
from connectors.errors import ConnectorError, RateLimited, Refused, Unavailable, Unknown
from ledger import funds
from ledger.accounts import pending_withdrawal, spendable
from ledger.book import post
from ledger.holds import hold
from ledger.rows import Connection
from stablerail.api import detail
from stablerail.api.app import create_api
from stablerail.config import load_settings
from stablerail.keys import Scope, create_key
from tests.support.ledger_rig import AT, connection, databases, dsn

__all__ = ["connection", "databases", "dsn"]

ADA = "0d969814-40d6-4b2b-99ac-2e37427f1ad2"
BOB = "5fc0795e-1f16-40cc-aa90-ede67c39d7a9"


@pytest.fixture
async def alpaca() -> AsyncIterator[AlpacaSandbox]:
    async with AlpacaSandbox() as sandbox:
        sandbox.state.hold(ADA, "MSFT", "-2", "400")
        sandbox.state.hold(ADA, "AAPL", "3.5", "150.25", "151")
        sandbox.state.open_account(BOB, cash="12.5")
        yield sandbox


def client_of(alpaca: AlpacaSandbox, secret: str = TEST_SECRET, timeout_s: float = 100.0) -> AlpacaClient:
    return AlpacaClient(alpaca.base_url, TEST_KEY_ID, SecretStr(secret), timeout_s)


async def hasten(client: AlpacaClient) -> None:
    """It is connected, and waits for no answer from here on: without a connection nothing would be unknown."""
    await client.positions(BOB)
    assert client._session is not None
    client._session._timeout = aiohttp.ClientTimeout(total=0.1)


async def test_alpacas_own_sdk_reads_the_sandbox(alpaca: AlpacaSandbox) -> None:
    with warnings.catch_warnings():  # the SDK's own imports are deprecated; of it only this test's part is used
        warnings.simplefilter("ignore", DeprecationWarning)
        from alpaca.broker.client import BrokerClient
        from alpaca.common.exceptions import APIError
        from alpaca.trading.enums import PositionSide

    def read() -> None:
        broker = BrokerClient(api_key=TEST_KEY_ID, secret_key=TEST_SECRET, url_override=alpaca.base_url)
        apple, microsoft = broker.get_all_positions_for_account(ADA)
        assert (apple.symbol, apple.qty, apple.avg_entry_price, apple.market_value) == (
            "AAPL",
            "3.5",
            "150.25",
            "528.5",
        )
        assert microsoft.side is PositionSide.SHORT
        assert broker.get_open_position_for_account(ADA, "AAPL").asset_id == apple.asset_id
        assert broker.get_all_positions_for_account(BOB) == []
        assert broker.get_trade_account_by_id(BOB).cash == "12.5"
        with pytest.raises(APIError) as unknown:
            broker.get_open_position_for_account(ADA, "TSLA")
        assert (unknown.value.status_code, unknown.value.code) == (404, 40410000)
        broker._session.close()

    await asyncio.to_thread(read)


async def test_positions_are_read_as_they_are_written_and_each_failure_has_its_name(alpaca: AlpacaSandbox) -> None:
    async with client_of(alpaca) as client:
        apple, microsoft = await client.positions(ADA)
        assert (apple.symbol, apple.qty, apple.cost_basis, apple.unrealized_pl) == ("AAPL", "3.5", "525.875", "2.625")
        assert (microsoft.side, microsoft.qty) == ("short", "2")
        assert await client.positions(BOB) == []
        for account, statuses, expected in (
            ("nobody", [], Refused), (ADA, [503], Unavailable), (ADA, [429], RateLimited), (ADA, [200], Unknown),
            (ADA, [302], Refused),
        ):  # fmt: skip
            alpaca.state.faults[:] = statuses
            with pytest.raises(expected):
                await client.positions(account)
    async with client_of(alpaca, secret="another secret") as stranger:
        with pytest.raises(Refused) as refused:
            await stranger.positions(ADA)
    assert refused.value.status == 401
    assert "another secret" not in repr(refused.value)
    async with client_of(alpaca) as hasty:
        await hasten(hasty)
        alpaca.state.faults[:] = [0]
        with pytest.raises(Unknown):
            await hasty.positions(ADA)
    async with AlpacaClient("http://127.0.0.1:1", TEST_KEY_ID, SecretStr(TEST_SECRET)) as lost:
        with pytest.raises(Unavailable):
            await lost.positions(ADA)


async def test_over_the_rate_the_sandbox_says_when_it_opens_again() -> None:
    async with AlpacaSandbox(calls_per_min=1) as sandbox, client_of(sandbox) as client:
        sandbox.state.open_account(ADA)
        assert await client.positions(ADA) == []
        with pytest.raises(RateLimited) as limited:
            await client.positions(ADA)
    assert limited.value.retry_after_s is not None
    assert limited.value.retry_after_s > 0


async def test_a_reply_that_is_none_of_alpacas_is_not_taken_for_positions(alpaca: AlpacaSandbox) -> None:
    alpaca.state.accounts[ADA].holdings["AAPL"].asset_class = None  # type: ignore[assignment]
    async with client_of(alpaca) as client:
        with pytest.raises(ConnectorError) as unreadable:
            await client.positions(ADA)
    assert unreadable.value.code == "partner_outcome_unknown"


# -- the balance view ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def view_of(dsn: str, broker: AlpacaClient | None) -> AsyncIterator[Callable[..., Any]]:
    """Asks for a customer's balances in detail."""
    settings = {"search_path": "stablerail"}
    async with asyncpg.create_pool(dsn, min_size=1, max_size=2, server_settings=settings) as pool:
        async with pool.acquire() as connection:
            made = await create_key(connection, [Scope.READ], "the tests")
        headers = {"Authorization": f"Bearer {made.token.get_secret_value()}"}
        transport = httpx.ASGITransport(create_api(load_settings(env_file=None), pool, broker=broker))
        async with httpx.AsyncClient(transport=transport, base_url="http://api", headers=headers) as client:

            async def view(user_id: str = "ada", **params: Any) -> httpx.Response:
                return await client.get(f"/v1/users/{user_id}/balances", params={"detail": "true", **params})

            yield view


async def some_money(connection: Connection) -> None:
    """A balance, an order half filled, another hold."""
    await funds.credit_usdc(connection, "tests", "ada", 100_000_000, AT, reference="d1")
    await funds.reserve(connection, "tests", "ada", 30_000_000, AT, order_id="o1")
    await funds.execute_investment(connection, "tests", 12_000_000, AT, order_id="o1", fill_id="f1")
    held = hold(
        "a" * 32, "fee_hold", "w1", source=spendable("ada"), pending=pending_withdrawal("ada"), amount=5_000_000
    )
    await post(connection, "tests", [held], AT)


async def test_the_view_tells_what_is_held_what_it_sums_to_and_the_positions(
    connection: Connection, dsn: str, alpaca: AlpacaSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    await some_money(connection)
    async with client_of(alpaca) as broker, view_of(dsn, broker) as view:
        found = (await view(alpaca_account_id=ADA)).json()
        usd, usdc = found["balances"]
        assert (usd["asset"], usd["total"], usd["accounts"]) == ("USD", "12.000000", {"fiat_exposure": "12.000000"})
        assert (usdc["available"], usdc["pending"], usdc["total"]) == ("65.000000", "23.000000", "88.000000")
        holds = {(h["kind"], h["account"], h["asset"], h["amount"], h["remaining"]) for h in found["holds"]}
        assert holds == {
            ("order_reserved", "pending_investment", "USDC", "30.000000", "18.000000"),
            ("fee_hold", "pending_withdrawal", "USDC", "5.000000", "5.000000"),
        }
        positions = [(p["symbol"], p["side"], p["qty"], p["market_value"]) for p in found["positions"]]
        assert positions == [("AAPL", "long", "3.5", "528.5"), ("MSFT", "short", "2", "-800")]
        assert found["gaps"] == []
        assert (await view("nobody")).status_code == 404
        monkeypatch.setattr(detail, "HOLDS_MAX", 1)
        cut = (await view(alpaca_account_id=ADA)).json()
        assert (len(cut["holds"]), cut["gaps"]) == (1, [{"part": "holds", "code": "more"}])
        plain = (await view(detail="false")).json()
        assert plain == {"user_id": "ada", "balances": found["balances"]}


async def test_whatever_the_broker_does_the_rest_of_the_view_is_told_with_the_gap(
    connection: Connection, dsn: str, alpaca: AlpacaSandbox
) -> None:
    await some_money(connection)
    async with client_of(alpaca) as broker, view_of(dsn, broker) as view:
        whole = (await view(alpaca_account_id=ADA)).json()
        gaps: dict[str, dict[str, Any]] = {}
        for name, params, statuses in (
            ("no_account", {}, []),
            ("unknown_account", {"alpaca_account_id": "00000000-0000-4000-8000-000000000000"}, []),
            ("partner_unavailable", {"alpaca_account_id": ADA}, [500]),
            ("partner_rate_limited", {"alpaca_account_id": ADA}, [429]),
            ("partner_refused", {"alpaca_account_id": ADA}, [403]),
        ):
            alpaca.state.faults[:] = statuses
            answer = await view(**params)
            assert answer.status_code == 200
            gaps[name] = answer.json()
    async with view_of(dsn, None) as view:
        gaps["not_configured"] = (await view(alpaca_account_id=ADA)).json()
    async with client_of(alpaca) as hasty, view_of(dsn, hasty) as view:
        await hasten(hasty)
        alpaca.state.faults[:] = [0]
        gaps["partner_outcome_unknown"] = (await view(alpaca_account_id=ADA)).json()
    for name, found in gaps.items():
        assert found == {**whole, "positions": None, "gaps": [{"part": "positions", "code": name}]}
