"""A call for wallets that Circle may know already: after a restore nothing says how often it was taken."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from pydantic import SecretStr

from agents.intents import Member, StoredCall
from agents.onboarding import circle_wallets
from agents.onboarding.circle_wallets import CircleWallets
from connectors.circle.client import CircleClient, CircleWallet
from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.gate import Fault
from connectors.errors import ConnectorError, Refused, Unavailable, Unknown
from ledger.rows import Connection
from tests.support.ledger_rig import owner
from tests.support.migrated import migrate

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
CHAINS = ["ETH", "SOL"]
CREATE = "POST /v1/w3s/developer/wallets"
WALLET_SET_KEY, KEY = uuid.uuid4(), uuid.uuid4()
REFUSED = {"path": "/v1/w3s/developer/wallets", "method": "POST", "kind": "status", "status": 400}


@pytest.fixture
async def circle() -> AsyncIterator[CircleSandbox]:
    async with CircleSandbox(SandboxConfig(rate_limits=False, rsa_bits=2048)) as it:
        yield it


async def nobody() -> Connection:
    raise AssertionError("the wallet set is of the settings")


async def performed(circle: CircleSandbox, call: StoredCall, kind: type[CircleClient] = CircleClient) -> dict[str, Any]:
    async with kind(circle.base_url, SecretStr(TEST_API_KEY), SecretStr(TEST_ENTITY_SECRET)) as client:
        wallet_set = await client.create_wallet_set(str(WALLET_SET_KEY), "customers")
        return await CircleWallets(client, "testnet", wallet_set, nobody, lambda: NOW).perform(call)


def call_of(users: int, age: timedelta) -> StoredCall:
    """As the journal gives it back: it was never taken, as far as anybody knows."""
    ids = [f"user-{n:03}" for n in range(users)]
    members = tuple(
        Member(str(uuid.uuid4()), ",".join(CHAINS), {"user_id": id, "chains": CHAINS}, {}, {}, None, NOW) for id in ids
    )
    return StoredCall("call", KEY, {"user_ids": ids, "chains": CHAINS}, members, NOW - age)


def each_once(circle: CircleSandbox, users: int) -> bool:
    found = Counter((wallet.ref_id, wallet.blockchain) for wallet in circle.sandbox.state.wallets.values())
    return len(found) == users * len(CHAINS) and set(found.values()) == {1}


async def test_circle_has_forgotten_the_key_of_a_call_from_before_the_restore_and_makes_nothing_again(
    circle: CircleSandbox,
) -> None:
    first = await performed(circle, call_of(3, timedelta(0)))
    circle.sandbox.state.answers.clear()
    calls = circle.sandbox.gate.calls[CREATE]
    again = await performed(circle, call_of(3, timedelta(hours=25)))
    assert circle.sandbox.gate.calls[CREATE] == calls
    assert sorted(w["id"] for w in again["wallets"]) == sorted(w["id"] for w in first["wallets"])
    assert each_once(circle, 3)


async def test_what_circle_refuses_is_looked_up_where_the_call_is_older_than_any_new_one(circle: CircleSandbox) -> None:
    await performed(circle, call_of(3, timedelta(0)))
    circle.sandbox.gate.faults.append(Fault(**REFUSED))  # type: ignore[arg-type]
    again = await performed(circle, call_of(3, timedelta(minutes=2)))
    assert "400" in again["refused"]
    assert len(again["wallets"]) == 3 * len(CHAINS)

    circle.sandbox.gate.faults.append(Fault(**REFUSED))  # type: ignore[arg-type]
    with pytest.raises(Refused):
        await performed(circle, call_of(3, timedelta(seconds=10)))


async def test_a_key_that_circle_says_it_knows_is_looked_up_however_new_the_call_is(circle: CircleSandbox) -> None:
    await performed(circle, call_of(3, timedelta(0)))
    circle.sandbox.gate.faults.append(Fault(**REFUSED | {"status": 409}))  # type: ignore[arg-type]
    again = await performed(circle, call_of(3, timedelta(seconds=10)))
    assert "409" in again["refused"]
    assert len(again["wallets"]) == 3 * len(CHAINS)


async def test_without_the_database_no_second_wallet_set_is_made_and_nothing_is_asked(
    circle: CircleSandbox, database: str
) -> None:
    """Whether there is one already is not known."""
    await migrate(database)
    stored = await owner(database)
    servers = [database, urlsplit(database)._replace(netloc="127.0.0.1:1").geturl()]

    async def connect() -> Connection:
        connection: Connection = await asyncpg.connect(servers.pop(), server_settings={"search_path": "stablerail"})
        return connection

    async with CircleClient(circle.base_url, SecretStr(TEST_API_KEY), SecretStr(TEST_ENTITY_SECRET)) as client:
        wallets = CircleWallets(client, "testnet", None, connect, lambda: NOW)
        made = await client.create_wallet_set(str(WALLET_SET_KEY), "customers")
        await stored.execute("INSERT INTO wallet_sets VALUES ('testnet', $1, $2)", made, NOW)
        await stored.close()
        calls = circle.sandbox.gate.calls.copy()
        with pytest.raises(Unavailable, match="no database: ConnectionRefusedError") as away:
            await wallets.perform(call_of(1, timedelta(0)))
        assert not away.value.sent, "the attempt is no attempt"
        assert circle.sandbox.gate.calls == calls
        await wallets.perform(call_of(1, timedelta(0)))
    assert each_once(circle, 1)
    assert {wallet.wallet_set_id for wallet in circle.sandbox.state.wallets.values()} == {made}


async def test_look_ups_do_not_wait_for_each_other(circle: CircleSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred, one after the other, would not fit into a call's time."""
    monkeypatch.setattr(circle_wallets, "LOOKUP_PAUSE_S", 0.001)
    await performed(circle, call_of(20, timedelta(0)))
    together = asyncio.Barrier(10)

    class Slow(CircleClient):
        async def list_wallets(self, ref_id: str) -> list[CircleWallet]:
            await together.wait()  # for nine others, for ever if they come later
            return await super().list_wallets(ref_id)

    async with asyncio.timeout(20):
        again = await performed(circle, call_of(20, timedelta(hours=25)), Slow)
    assert len(again["wallets"]) == 20 * len(CHAINS)
    assert each_once(circle, 20)


@pytest.mark.parametrize(("status", "expected"), [(403, Refused), (400, Unknown), (503, Unavailable)])
async def test_a_look_up_that_fails_ends_the_attempt_and_is_no_refusal_of_the_call(
    circle: CircleSandbox, status: int, expected: type[ConnectorError]
) -> None:
    await performed(circle, call_of(3, timedelta(0)))
    circle.sandbox.gate.faults.append(
        Fault(path="/v1/w3s/wallets", method="GET", kind="status", status=status, times=9)
    )
    with pytest.raises(expected):
        await performed(circle, call_of(3, timedelta(hours=25)))
