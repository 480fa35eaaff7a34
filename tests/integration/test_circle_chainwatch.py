"""The sandbox on a real chain with Circle's real USDC: every transfer to a wallet is told, first confirmed, then complete."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import aiohttp
import pytest
from pydantic import SecretStr

from connectors.circle.client import CircleClient, CircleWallet
from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.rpc import Rpc
from connectors.circle.sandbox.state import Transaction
from stablerail.dev.anvil import Anvil
from stablerail.dev.usdc import Usdc

AUTHORIZED = {"Authorization": f"Bearer {TEST_API_KEY}"}


@pytest.fixture
async def circle(anvil: Anvil, usdc: Usdc) -> AsyncIterator[CircleSandbox]:
    config = SandboxConfig(
        rsa_bits=2048, rpc_url=anvil.rpc_url, usdc_address=usdc.address, poll_s=0.02, confirmations=3
    )
    async with CircleSandbox(config) as sandbox:
        yield sandbox


async def wallet_of(base_url: str) -> CircleWallet:
    async with CircleClient(base_url, SecretStr(TEST_API_KEY), SecretStr(TEST_ENTITY_SECRET)) as client:
        wallet_set = await client.create_wallet_set(str(uuid4()), "customers")
        return (await client.create_wallets(str(uuid4()), wallet_set, ["MATIC-AMOY"], [("alice", "user_1")]))[0]


async def until(condition: Callable[[], bool], timeout_s: float = 100) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def seen(circle: CircleSandbox) -> list[Transaction]:
    return list(circle.sandbox.state.transactions.values())


async def test_a_transfer_on_chain_is_confirmed_then_complete(circle: CircleSandbox, anvil: Anvil, usdc: Usdc) -> None:
    wallet = await wallet_of(circle.base_url)
    tx_hash = await usdc.transfer(wallet.address, 25_010_000)
    receipt = await anvil.wait_mined(tx_hash)
    await until(lambda: len(seen(circle)) == 1)
    (transaction,) = seen(circle)
    assert (transaction.state, transaction.amounts, transaction.tx_hash) == ("CONFIRMED", ["25.01"], tx_hash)
    assert (transaction.block_hash, transaction.block_height) == (receipt["blockHash"], int(receipt["blockNumber"], 16))
    assert transaction.source_address == usdc.payer.lower()
    await anvil.mine(2)
    await until(lambda: seen(circle)[0].state == "COMPLETE")
    url = f"{circle.base_url}/v1/w3s/wallets/{wallet.id}/balances"
    async with aiohttp.ClientSession(headers=AUTHORIZED) as http, http.get(url) as reply:
        (balance,) = (await reply.json())["data"]["tokenBalances"]
    assert (balance["amount"], balance["token"]["tokenAddress"]) == ("25.01", usdc.address.lower())


async def test_each_log_of_a_transaction_is_one_transfer(circle: CircleSandbox, anvil: Anvil, usdc: Usdc) -> None:
    wallet = await wallet_of(circle.base_url)
    tx_hash = await usdc.transfer_many([(wallet.address, 5_000_000), (usdc.owner, 1), (wallet.address, 5_000_000)])
    await anvil.wait_mined(tx_hash)
    await until(lambda: len(seen(circle)) == 2)
    assert [(t.amounts, t.tx_hash) for t in seen(circle)] == [(["5"], tx_hash)] * 2


async def test_a_transfer_mined_again_after_a_reorganisation_keeps_its_record(
    circle: CircleSandbox, anvil: Anvil, usdc: Usdc
) -> None:
    wallet = await wallet_of(circle.base_url)
    tx_hash = await usdc.transfer(wallet.address, 7_000_000)
    await anvil.wait_mined(tx_hash)
    await until(lambda: len(seen(circle)) == 1)
    first = seen(circle)[0]
    raw = await anvil.rpc("eth_getRawTransactionByHash", tx_hash)
    await anvil.rpc("anvil_reorg", 1, [[raw, 0]])
    moved = await anvil.wait_mined(tx_hash)
    assert moved["blockHash"] != first.block_hash
    await anvil.mine(3)
    await until(lambda: seen(circle)[0].state == "COMPLETE")
    (transaction,) = seen(circle)
    assert (transaction.id, transaction.block_hash) == (first.id, moved["blockHash"])


async def test_a_transfer_that_vanished_is_never_complete(circle: CircleSandbox, anvil: Anvil, usdc: Usdc) -> None:
    wallet = await wallet_of(circle.base_url)
    lost = await usdc.transfer(wallet.address, 7_000_000)
    await anvil.wait_mined(lost)
    await until(lambda: len(seen(circle)) == 1)
    await anvil.rpc("anvil_reorg", 1, [])
    await anvil.rpc("anvil_dropTransaction", lost)
    await anvil.mine(3)
    kept = await usdc.transfer(wallet.address, 8_000_000)
    await anvil.wait_mined(kept)
    await anvil.mine(3)
    await until(lambda: len(seen(circle)) == 2 and seen(circle)[1].state == "COMPLETE")
    assert [(t.tx_hash, t.state) for t in seen(circle)] == [(lost, "CONFIRMED"), (kept, "COMPLETE")]


async def test_transfers_that_leave_a_wallet_at_once_are_all_mined_whatever_the_node_counts(
    anvil: Anvil, usdc: Usdc, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, to = "0x" + uuid4().hex + "00000000", "0x" + uuid4().hex + "11111111"
    await anvil.wait_mined(await usdc.transfer(sender, 100))
    rpc = Rpc(anvil.rpc_url, usdc.address)
    ask = rpc._ask

    async def behind(method: str, params: list[Any], parse: Callable[[Any], Any]) -> Any:
        return 0 if method == "eth_getTransactionCount" else await ask(method, params, parse)

    monkeypatch.setattr(rpc, "_ask", behind)
    try:
        for tx_hash in await asyncio.gather(*(rpc.send_usdc(sender, to, 1) for _ in range(20))):
            assert (await anvil.wait_mined(tx_hash))["status"] == "0x1"
        assert await rpc.usdc_balance(to) == 20
    finally:
        await rpc.close()


async def test_the_sandbox_runs_as_a_process_of_its_own(anvil: Anvil, usdc: Usdc) -> None:
    arguments = ["--rpc-url", anvil.rpc_url, "--usdc", usdc.address, "--confirmations", "1", "--control"]
    command = [sys.executable, "-m", "connectors.circle.sandbox", *arguments]
    child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env={**os.environ})
    try:
        assert child.stdout is not None
        async with asyncio.timeout(100):
            base_url = json.loads(await child.stdout.readline())["base_url"]
        wallet = await wallet_of(base_url)
        tx_hash = await usdc.transfer(wallet.address, 1_000_000)
        async with aiohttp.ClientSession() as http, asyncio.timeout(100):
            found: list[str] = []
            while found != [tx_hash]:
                await asyncio.sleep(0.05)
                async with http.get(f"{base_url}/_control/created") as reply:
                    made = (await reply.json())["transactions"]
                found = [t["txHash"] for t in made if t["state"] == "COMPLETE"]
        child.terminate()
        async with asyncio.timeout(100):
            assert await child.wait() == 0
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
