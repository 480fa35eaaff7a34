"""Circle's official Python SDK, unchanged, against the sandbox: a sandbox that it cannot read is wrong."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from circle.web3 import configurations, utils
from circle.web3 import developer_controlled_wallets as dcw
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.control import InjectedTransfer, inject_transfer
from connectors.circle.sandbox.tokens import usdc_token_id
from tests.support.patience import PATIENCE_S


@pytest.fixture(autouse=True)
def fresh_sdk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The SDK keeps its client and keys in module globals."""
    for name in ("CONF_CLIENT", "CIRCLE_PUBLIC_KEY", "API_KEY", "ENTITY_SECRET"):
        monkeypatch.setattr(utils, name, None)
    yield
    if utils.CONF_CLIENT is not None:
        utils.CONF_CLIENT.rest_client.pool_manager.clear()


@pytest.fixture
async def circle() -> AsyncIterator[CircleSandbox]:
    config = SandboxConfig(entity_secret=None, retry_delays_s=(0.01,), delivery_timeout_s=PATIENCE_S)
    async with CircleSandbox(config) as sandbox:
        yield sandbox


@pytest.fixture
async def endpoint() -> AsyncIterator[str]:
    async def ok(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/hook", ok)
    app.router.add_head("/hook", ok)
    async with TestServer(app) as server:
        yield str(server.make_url("/hook"))


def wallets_client(base_url: str, directory: Path) -> Any:
    """Both clients as Circle's README makes them, with a host of our own; the entity secret is registered first."""
    utils.API_KEY = TEST_API_KEY
    utils.init_configurations_client(host=base_url)
    registered = utils.register_entity_secret_ciphertext(TEST_API_KEY, TEST_ENTITY_SECRET, str(directory), base_url)
    assert base64.b64decode(registered["data"]["recoveryFile"])
    return utils.init_developer_controlled_wallets_client(
        api_key=TEST_API_KEY, entity_secret=TEST_ENTITY_SECRET, host=base_url
    )


async def test_wallets_balances_and_transactions_through_circles_sdk(circle: CircleSandbox, tmp_path: Path) -> None:
    client = await asyncio.to_thread(wallets_client, circle.base_url, tmp_path)
    await asyncio.to_thread(make_and_read_wallets, client)
    parts = circle.sandbox
    wallet = next(w for w in parts.state.wallets.values() if w.blockchain == "SOL-DEVNET")
    for amount in ("25.01", "0.99"):
        inject_transfer(parts.state, parts.deliveries, InjectedTransfer(walletId=wallet.id, amount=amount))
    await asyncio.to_thread(read_transactions, client, wallet.id)
    await asyncio.to_thread(make_and_read_a_transfer, client, wallet)
    client.rest_client.pool_manager.clear()


def make_and_read_wallets(client: Any) -> None:
    sets, wallets = dcw.WalletSetsApi(client), dcw.WalletsApi(client)
    made_set = sets.create_wallet_set(dcw.CreateWalletSetRequest(name="customers")).data.wallet_set.actual_instance
    assert sets.get_wallet_set(made_set.id).data.wallet_set.actual_instance == made_set
    assert [s.actual_instance.id for s in sets.get_wallet_sets().data.wallet_sets] == [made_set.id]
    request = dcw.CreateWalletRequest(
        walletSetId=made_set.id,
        blockchains=[dcw.Blockchain(name) for name in ("ETH-SEPOLIA", "SOL-DEVNET", "APTOS-TESTNET", "MATIC-AMOY")],
        accountType=dcw.AccountType.EOA,
        count=2,
        metadata=[dcw.WalletMetadata(name=name, refId=f"user_{name}") for name in ("a", "b")],
    )
    made = [w.actual_instance for w in wallets.create_wallet(request).data.wallets]
    assert len(made) == 8
    request.entity_secret_ciphertext = "#REFILL_PLACEHOLDER"  # its word for "make a new one"
    assert [w.actual_instance for w in wallets.create_wallet(request).data.wallets] == made
    pages = []
    cursor = None
    while page := [w.actual_instance for w in wallets.get_wallets(page_size=3, page_after=cursor).data.wallets]:
        pages.append(page)
        cursor = page[-1].id
    assert [w for page in pages for w in page] == made[::-1]
    assert [len(page) for page in pages] == [3, 3, 2]
    assert {w.actual_instance.ref_id for w in wallets.get_wallets(ref_id="user_b").data.wallets} == {"user_b"}
    assert wallets.get_wallet(made[0].id).data.wallet.actual_instance == made[0]
    with pytest.raises(dcw.exceptions.NotFoundException):
        wallets.get_wallet("00000000-0000-4000-8000-000000000000")
    request.blockchains = [dcw.Blockchain("SOL")]
    with pytest.raises(dcw.exceptions.ApiException, match="409"):
        wallets.create_wallet(request.model_copy(update={"entity_secret_ciphertext": "#REFILL_PLACEHOLDER"}))


def read_transactions(client: Any, wallet_id: str) -> None:
    transactions = dcw.TransactionsApi(client)
    found = transactions.list_transactions(wallet_ids=wallet_id, order="ASC").data.transactions
    assert [(t.amounts, t.state.value) for t in found] == [(["25.01"], "COMPLETE"), (["0.99"], "COMPLETE")]
    assert transactions.get_transaction(found[0].id).data.transaction == found[0]
    assert transactions.list_transactions(state=dcw.TransactionState.SENT).data.transactions == []
    balances = dcw.WalletsApi(client).list_wallet_balance(wallet_id).data.token_balances
    assert [(b.amount, b.token.symbol, b.token.decimals) for b in balances] == [("26.00", "USDC", 6)]
    listed = dcw.WalletsApi(client).get_wallets_with_balances(
        dcw.Blockchain.SOL_MINUS_DEVNET, token_address=balances[0].token.token_address, amount__gte="0.000001"
    )
    (holder,) = [one.actual_instance for one in listed.data.wallets]
    assert (holder.id, holder.token_balances[0].amount) == (wallet_id, "26.00")
    token = dcw.TokenLookupApi(client).get_token_id(usdc_token_id("SOL-DEVNET")).data.token
    assert token == balances[0].token


def make_and_read_a_transfer(client: Any, wallet: Any) -> None:
    transactions = dcw.TransactionsApi(client)
    request = dcw.CreateTransferTransactionForDeveloperRequest(
        walletId=wallet.id,
        tokenId=usdc_token_id("SOL-DEVNET"),
        destinationAddress="9WzDXwBbmkg8ZTbNMqUxvQRAyrZzDsGYdLVL9zYtAWWM",
        amounts=["25"],
        feeLevel=dcw.FeeLevel.MEDIUM,
        refId="a withdrawal",
    )
    made = transactions.create_developer_transaction_transfer(request).data
    assert made.state.value == "INITIATED"
    request.entity_secret_ciphertext = "#REFILL_PLACEHOLDER"
    assert transactions.create_developer_transaction_transfer(request).data == made
    (found,) = transactions.list_transactions(tx_type=dcw.TransactionType.OUTBOUND).data.transactions
    assert (found.id, found.state.value, found.ref_id, found.amounts) == (made.id, "COMPLETE", "a withdrawal", ["25"])
    assert transactions.get_transaction(made.id).data.transaction == found
    balances = dcw.WalletsApi(client).list_wallet_balance(wallet.id).data.token_balances
    assert [balance.amount for balance in balances] == ["1.00"]


async def test_subscriptions_and_the_signing_key_through_circles_sdk(circle: CircleSandbox, endpoint: str) -> None:
    def manage() -> None:
        utils.API_KEY = TEST_API_KEY
        api = configurations.WebhookSubscriptionsApi(utils.init_configurations_client(host=circle.base_url))
        request = configurations.CreateSubscriptionRequest(endpoint=endpoint, notificationTypes=["transactions.*"])
        made = api.create_subscription(request).data
        assert (made.endpoint, made.enabled, made.restricted) == (endpoint, True, True)
        assert api.get_subscriptions().data == [made]
        update = configurations.UpdateSubscriptionRequest(name="off", enabled=False)
        changed = api.update_subscription(made.id, update).data
        assert (changed.name, changed.enabled) == ("off", False)
        assert api.get_subscription(made.id).data == changed
        api.delete_subscription(made.id)
        assert api.get_subscriptions().data == []
        request.endpoint = endpoint + "/nowhere"
        with pytest.raises(configurations.exceptions.BadRequestException, match="HEAD"):
            api.create_subscription(request)
        key = circle.sandbox.state.notification_key
        shown = api.get_notification_signature(key.id).data
        assert shown.algorithm == "ECDSA_SHA_256"
        public = serialization.load_der_public_key(base64.b64decode(shown.public_key))
        assert isinstance(public, ec.EllipticCurvePublicKey)
        public.verify(base64.b64decode(key.sign(b"body")), b"body", ec.ECDSA(hashes.SHA256()))

    await asyncio.to_thread(manage)


async def test_the_sdk_gets_a_ciphertext_of_circles_size(circle: CircleSandbox) -> None:
    def cipher() -> str:
        utils.API_KEY = TEST_API_KEY
        utils.init_configurations_client(host=circle.base_url)
        return str(utils.generate_entity_secret_ciphertext(TEST_API_KEY, TEST_ENTITY_SECRET))

    assert len(await asyncio.to_thread(cipher)) == 684
