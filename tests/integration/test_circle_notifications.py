"""What the sandbox sends, over HTTP to an endpoint that checks it as the bridge does: signed, repeated, in any order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import SecretStr

from connectors.circle.client import CircleClient, CircleWallet
from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.tokens import USDC_TOKENS, native_token_id
from connectors.circle.webhooks import CircleWebhooks
from connectors.webhooks.source import Publish, RefusalCode, Refused
from topics.events import DepositNotified

AUTHORIZED = {"Authorization": f"Bearer {TEST_API_KEY}"}


class Endpoint:
    """Takes notifications as the bridge does, answers with `answers` in turn and 200 afterwards."""

    def __init__(self, webhooks: CircleWebhooks) -> None:
        self.webhooks = webhooks
        self.answers: list[int] = []
        self.taken: list[Publish] = []
        self.requests: list[tuple[dict[str, str], bytes]] = []

    async def post(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.requests.append((dict(request.headers), body))
        await self.webhooks.verify(request.headers, body)
        status = self.answers.pop(0) if self.answers else 200
        if status == 200:
            self.taken += [said for said in self.webhooks.translate(body) if isinstance(said, Publish)]
        return web.Response(status=status)

    async def head(self, _: web.Request) -> web.Response:
        return web.Response()

    def deposits(self) -> list[tuple[str, str]]:
        """(amount in base units, evidence) in order of arrival."""
        events = [said.event for said in self.taken]
        return [(str(e.amount), str(e.evidence)) for e in events if isinstance(e, DepositNotified)]


class Setup:
    """A sandbox, our client, an endpoint that is subscribed, and one customer's wallet on Solana."""

    def __init__(self, circle: CircleSandbox, endpoint: Endpoint, wallet: CircleWallet, http: aiohttp.ClientSession):
        self.circle, self.endpoint, self.wallet, self.http = circle, endpoint, wallet, http

    async def control(self, path: str, **body: Any) -> Any:
        async with self.http.post(f"{self.circle.base_url}/_control/{path}", json=body) as reply:
            assert reply.status == 200, await reply.text()
            return await reply.json()

    async def look(self, path: str) -> Any:
        async with self.http.get(f"{self.circle.base_url}/_control/{path}") as reply:
            return await reply.json()

    async def inject(self, amount: str, **more: Any) -> dict[str, Any]:
        answer = await self.control("transfers", walletId=self.wallet.id, amount=amount, **more)
        transaction: dict[str, Any] = answer["transaction"]
        return transaction


async def until(condition: Callable[[], bool], timeout_s: float = 100) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(config: SandboxConfig) -> AsyncIterator[Setup]:
    async with (
        CircleSandbox(config) as circle,
        CircleClient(circle.base_url, SecretStr(TEST_API_KEY), SecretStr(TEST_ENTITY_SECRET)) as client,
        aiohttp.ClientSession() as http,
    ):
        endpoint = Endpoint(CircleWebhooks(client.notification_public_key, "testnet", USDC_TOKENS))
        app = web.Application()
        app.router.add_route("POST", "/webhooks/circle", endpoint.post)
        app.router.add_route("HEAD", "/webhooks/circle", endpoint.head)
        async with TestServer(app) as server:
            await subscribe(http, circle.base_url, str(server.make_url("/webhooks/circle")))
            wallet_set = await client.create_wallet_set(str(uuid4()), "customers")
            made = await client.create_wallets(str(uuid4()), wallet_set, ["SOL-DEVNET"], [("alice", "user_1")])
            yield Setup(circle, endpoint, made[0], http)


async def subscribe(http: aiohttp.ClientSession, base_url: str, endpoint: str) -> str:
    body = {"endpoint": endpoint, "notificationTypes": ["transactions.*"]}
    url = f"{base_url}/v2/notifications/subscriptions"
    async with http.post(url, json=body, headers=AUTHORIZED) as reply:
        assert reply.status == 200, await reply.text()
        return str((await reply.json())["data"]["id"])


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    config = SandboxConfig(  # an attempt that a busy machine cuts off would be one more, and would come later
        rsa_bits=2048, rate_limits=False, retry_delays_s=(0.02,) * 10, delivery_timeout_s=100
    )
    async with running(config) as made:
        yield made


async def test_a_transfer_is_told_confirmed_and_complete_and_is_believed(setup: Setup) -> None:
    transaction = await setup.inject("25.01")
    await until(lambda: len(setup.endpoint.taken) == 2)
    assert sorted(setup.endpoint.deposits()) == [("25010000", "complete"), ("25010000", "confirmed")]
    for said in setup.endpoint.taken:
        event = said.event
        assert isinstance(event, DepositNotified)
        assert (event.transfer_id, event.chain, event.asset) == (transaction["id"], "SOL", "USDC")
        assert (event.to, event.tx_hash) == (setup.wallet.address, transaction["txHash"])
        assert said.key == setup.wallet.address.encode()
    assert len({said.event_id for said in setup.endpoint.taken}) == 2
    records = (await setup.look("created"))["transactions"]
    assert [(t["id"], t["state"]) for t in records] == [(transaction["id"], "COMPLETE")]


async def test_a_notification_is_sent_again_until_it_is_taken(setup: Setup) -> None:
    setup.endpoint.answers = [503, 500, 404]
    await setup.inject("1", states=["COMPLETE"])
    await until(lambda: len(setup.endpoint.taken) == 1)
    assert len({json.loads(body)["notificationId"] for _, body in setup.endpoint.requests}) == 1
    await until(lambda: setup.circle.sandbox.deliveries.records[0].delivered)
    (record,) = (await setup.look("deliveries"))["deliveries"]
    assert (record["attempts"], record["delivered"]) == ([503, 500, 404, 200], True)


async def test_deliveries_can_be_duplicated_dropped_and_reordered(setup: Setup) -> None:
    await setup.control("deliveries", duplicate=1)
    await setup.inject("1", states=["COMPLETE"])
    await until(lambda: len(setup.endpoint.taken) == 2)
    assert setup.endpoint.taken[0] == setup.endpoint.taken[1]

    await setup.control("deliveries", drop=1)
    dropped = await setup.inject("2", states=["COMPLETE"])
    await setup.control("deliveries", reorder=4)
    await setup.inject("3")
    await setup.inject("4")
    await until(lambda: len(setup.endpoint.taken) == 6)
    later = [("4000000", "complete"), ("4000000", "confirmed"), ("3000000", "complete"), ("3000000", "confirmed")]
    assert setup.endpoint.deposits()[2:] == later
    records = (await setup.look("deliveries"))["deliveries"]
    assert [r["resourceId"] for r in records if r["dropped"]] == [dropped["id"]]


async def test_what_is_held_back_for_another_order_can_be_released(setup: Setup) -> None:
    await setup.control("deliveries", reorder=100)
    await setup.inject("1", states=["COMPLETE"])
    await setup.control("deliveries", reorder=0)
    await until(lambda: len(setup.endpoint.taken) == 1)


async def test_two_equal_transfers_of_one_transaction_are_two_transfers(setup: Setup) -> None:
    first = await setup.inject("5", states=["COMPLETE"])
    second = await setup.inject("5", states=["COMPLETE"], txHash=first["txHash"])
    await until(lambda: len(setup.endpoint.taken) == 2)
    events = [said.event for said in setup.endpoint.taken if isinstance(said.event, DepositNotified)]
    assert {e.tx_hash for e in events} == {first["txHash"]}
    assert {e.transfer_id for e in events} == {first["id"], second["id"]}


async def test_the_native_coin_is_told_but_is_no_usdc(setup: Setup) -> None:
    await setup.inject("1.5", states=["COMPLETE"], tokenId=native_token_id("SOL-DEVNET"))
    await until(lambda: len(setup.endpoint.taken) == 1)
    event = setup.endpoint.taken[0].event
    assert isinstance(event, DepositNotified)
    assert event.asset == f"circle:{native_token_id('SOL-DEVNET')}"


async def test_a_notification_of_another_sandbox_is_not_believed(setup: Setup) -> None:
    async with running(SandboxConfig(rsa_bits=2048)) as other:
        await other.inject("1000000", states=["COMPLETE"])
        await until(lambda: len(other.endpoint.requests) == 1)
        headers, body = other.endpoint.requests[0]
    with pytest.raises(Refused) as refused:
        await setup.endpoint.webhooks.verify(headers, body)
    assert refused.value.code is RefusalCode.UNKNOWN_KEY
    headers["X-Circle-Key-Id"] = setup.circle.sandbox.state.notification_key.id
    with pytest.raises(Refused) as refused:
        await setup.endpoint.webhooks.verify(headers, body)
    assert refused.value.code is RefusalCode.BAD_SIGNATURE


async def test_what_circle_signs_for_another_of_its_customers_is_refused(setup: Setup) -> None:
    """Its key is one for all of them, and their transfers may have our references."""
    (ours,) = setup.circle.sandbox.state.subscriptions
    fetch_key = setup.endpoint.webhooks._fetch_key
    mine, other = (
        CircleWebhooks(fetch_key, "testnet", USDC_TOKENS, subscriptions=[known])
        for known in (ours.upper(), str(uuid4()))
    )
    await setup.inject("25.01", states=["COMPLETE"])
    await until(lambda: len(setup.endpoint.requests) == 1)
    await mine.verify(*setup.endpoint.requests[0])
    with pytest.raises(Refused) as refused:
        await other.verify(*setup.endpoint.requests[0])
    assert refused.value.code is RefusalCode.UNKNOWN_TOPIC
    url = f"{setup.circle.base_url}/v2/notifications/subscriptions/{ours}/test"
    async with setup.http.post(url, headers=AUTHORIZED) as reply:
        assert reply.status == 200
    await until(lambda: len(setup.endpoint.requests) == 2)
    await other.verify(*setup.endpoint.requests[1])  # it does nothing, and comes before the id is known


async def test_the_test_notification_is_sent_and_ignored(setup: Setup) -> None:
    (subscription_id,) = setup.circle.sandbox.state.subscriptions
    url = f"{setup.circle.base_url}/v2/notifications/subscriptions/{subscription_id}/test"
    async with setup.http.post(url, headers=AUTHORIZED) as reply:
        assert reply.status == 200
    await until(lambda: len(setup.endpoint.requests) == 1)
    assert json.loads(setup.endpoint.requests[0][1])["notificationType"] == "webhooks.test"
    assert setup.endpoint.taken == []


async def test_a_deleted_subscription_gets_nothing_more(setup: Setup) -> None:
    setup.endpoint.answers = [503] * 3
    await setup.inject("1", states=["COMPLETE"])
    await until(lambda: len(setup.endpoint.requests) > 0)
    (subscription_id,) = setup.circle.sandbox.state.subscriptions
    url = f"{setup.circle.base_url}/v2/notifications/subscriptions/{subscription_id}"
    async with setup.http.delete(url, headers=AUTHORIZED) as reply:
        assert reply.status == 204
    await setup.inject("2", states=["COMPLETE"])
    assert len(setup.circle.sandbox.deliveries.records) == 1


async def test_only_the_bearer_of_the_key_is_served_and_control_can_be_off() -> None:
    async with CircleSandbox(SandboxConfig(rsa_bits=2048, control=False)) as circle, aiohttp.ClientSession() as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TEST_API_KEY}):
            async with http.get(f"{circle.base_url}/v1/w3s/wallets", headers=headers) as reply:
                assert (reply.status, "message" in await reply.json()) == (401, True)
        async with http.get(f"{circle.base_url}/_control/created") as reply:
            assert reply.status == 404


@pytest.mark.parametrize(
    ("params", "found"),
    [
        ({"pageSize": "2"}, [4, 3]),
        ({"pageSize": "2", "order": "ASC"}, [0, 1]),
        ({"pageSize": "2", "pageAfter": "3"}, [2, 1]),
        ({"pageSize": "2", "pageBefore": "1"}, [3, 2]),
        ({"pageSize": "2", "pageAfter": "0"}, []),
        ({"pageAfter": "3", "pageBefore": "1"}, None),
        ({"pageSize": "0"}, None),
        ({"pageAfter": "00000000-0000-4000-8000-000000000000"}, None),
        ({"from": "2999-01-01T00:00:00Z"}, []),
        ({"to": "2999-01-01T00:00:00Z", "txHash": "1"}, [1]),
        ({"state": "CONFIRMED"}, []),
        ({"destinationAddress": "nobody"}, []),
        ({"txType": "INBOUND", "blockchain": "SOL-DEVNET", "pageSize": "500"}, [4, 3, 2, 1, 0]),
    ],
)
async def test_lists_are_paged_and_filtered_as_circle_says(
    setup: Setup, params: dict[str, str], found: list[int] | None
) -> None:
    made = [await setup.inject(str(n + 1), states=["COMPLETE"]) for n in range(5)]
    cursors = {n: made[int(params[n])]["id"] for n in ("pageAfter", "pageBefore") if len(params.get(n, "")) == 1}
    hashes = {"txHash": made[int(params["txHash"])]["txHash"]} if "txHash" in params else {}
    url = f"{setup.circle.base_url}/v1/w3s/transactions"
    async with setup.http.get(url, params=params | cursors | hashes, headers=AUTHORIZED) as reply:
        answer = await reply.json()
        assert reply.status == (400 if found is None else 200)
    if found is not None:
        assert [t["id"] for t in answer["data"]["transactions"]] == [made[n]["id"] for n in found]
