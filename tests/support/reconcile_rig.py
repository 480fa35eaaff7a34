"""Customers with wallets at Circle's sandbox on two chains, one that we read and one that we do not; deposits, an order, a
withdrawal: everything that moves the ledger and the mirror, on a real PostgreSQL and a real chain.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from agents.withdrawals.withdrawal import Status
from chain.rpc import Rpc
from connectors.circle.client import CircleClient, CircleWallet
from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.control import InjectedTransfer, inject_transfer
from connectors.circle.sandbox.tokens import USDC_TOKENS, usdc_token_id
from connectors.circle.transactions import notified
from ledger import corrections, funds
from ledger.accounts import SYSTEM, Account, AccountType, spendable
from ledger.posting import credit, debit
from ledger.reconciling import Found
from ledger.rows import Changes
from ledger.tables import CUSTODIAN_WALLETS, WALLET_SETS, WALLETS
from stablerail.config import Settings, load_settings
from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools
from stablerail.dev.usdc import deploy
from stablerail.reconcile import reconcile
from tests.support.deposit_rig import DEPTH, USDC, Shore, Till, now
from tests.support.ledger_rig import connect_to, owner
from topics.events import DepositNotified

CUSTOMERS = ("ada", "bob")


@dataclass
class Books:
    shore: Shore
    circle: CircleSandbox
    client: CircleClient
    wallets: dict[tuple[str, str], CircleWallet]
    """By customer ("treasury" is ours) and Circle's chain."""
    given: dict[str, str]
    """The settings, as the environment has them."""

    @property
    def settings(self) -> Settings:
        return load_settings(env_file=None, **self.given)

    def address(self, user: str, chain: str = "MATIC-AMOY") -> str:
        return self.wallets[user, chain].address

    async def compare(self, **changes: Any) -> Found:
        """What a run finds. `changes`: of the settings."""
        found = Found()
        await reconcile(load_settings(env_file=None, **{**self.given, **changes}), found)
        return found

    async def edit(self, statement: str, *arguments: Any) -> None:
        """As the database's owner, behind everybody's back."""
        connection = await owner(self.shore.dsn)
        await connection.execute(statement, *arguments)
        await connection.close()

    async def send(self, sender: str, to: str, amount: int) -> None:
        """From a wallet at Circle, mined at once."""
        await self.shore.anvil.wait_mined(await self.shore.usdc.transfer(to, amount, sender=sender))

    def receive_on_sol(self, user: str, amount: str) -> DepositNotified:
        """A transfer to the customer's wallet there, as Circle tells of it once it is complete."""
        given = {"wallet_id": self.wallets[user, "SOL-DEVNET"].id, "amount": amount}
        state, deliveries = self.circle.sandbox.state, self.circle.sandbox.deliveries
        one = inject_transfer(state, deliveries, InjectedTransfer.model_validate(given, by_name=True))
        said = notified(state.transactions[one.id].shown(), "testnet", USDC_TOKENS)
        assert isinstance(said, DepositNotified)
        return said


async def happened(books: Books) -> None:
    """Of every movement one: all is right, and some of it is not final."""
    shore, till = books.shore, books.shore.till
    await shore.pay((books.address("ada"), 100 * USDC), (books.address("bob"), 40 * USDC), (books.address("ada"), 7))
    await shore.pay((books.address("treasury"), 500 * USDC))
    await shore.final()
    await till.settle(shore.credit, books.receive_on_sol("ada", "30.5"))
    connection = till.connection
    await funds.credit_usdc(connection, "tests", "bob", 3 * USDC, now(), reference="a gift")
    await funds.reserve(connection, "tests", "ada", 20 * USDC, now(), order_id="o1")
    await funds.execute_investment(connection, "tests", 12 * USDC, now(), order_id="o1", fill_id="f1")
    await funds.move_to_fiat_exposure(connection, "tests", "ada", 2 * USDC, now(), reference="wish")
    goodwill = (debit(spendable("bob"), USDC), credit(Account(SYSTEM, AccountType.TREASURY_CAPITAL_USDC), USDC))
    await corrections.request(connection, uuid.uuid4().hex, goodwill, "he waited", "ann", now())
    await corrections.assign_suspense(connection, uuid.uuid4().hex, "ada", 7, "hers", "ann", now())
    for one in await connection.fetch("SELECT replace(id::text, '-', '') FROM corrections"):
        await corrections.approve(connection, one[0], "ben", now())
    await books.send(books.address("treasury"), "0x" + "9" * 40, 15 * USDC)
    await shore.anvil.mine(DEPTH)
    await till.withdrawal("bob", 15 * USDC, Status.COMPLETED)
    await till.withdrawal("bob", 5 * USDC)
    await shore.pay((books.address("bob"), 9 * USDC))
    await shore.scan()  # credited, and not final


@asynccontextmanager
async def books_of(dsn: str, tmp_path: Path, tools: Tools) -> AsyncIterator[Books]:
    connection = await connect_to(dsn)()
    with Anvil(tmp_path, tools) as anvil:
        usdc = await deploy(anvil, tools.contracts)
        config = SandboxConfig(rsa_bits=2048, rate_limits=False, rpc_url=anvil.rpc_url, usdc_address=usdc.address)
        key, secret = SecretStr(TEST_API_KEY), SecretStr(TEST_ENTITY_SECRET)
        async with (
            Rpc(anvil.rpc_url, anvil.chain_id) as rpc,
            CircleSandbox(config) as circle,
            CircleClient(circle.base_url, key, secret) as client,
        ):
            shore = Shore(Till(connection), anvil, usdc, rpc, dsn=dsn)
            within = await client.create_wallet_set(str(uuid.uuid4()), "customers")
            names = ["MATIC-AMOY", "SOL-DEVNET"]
            made = await client.create_wallets(str(uuid.uuid4()), within, names, [(n, n) for n in CUSTOMERS])
            made += await client.create_wallets(str(uuid.uuid4()), within, names[:1], [("treasury", "treasury")])
            changes = Changes()
            changes.insert(WALLET_SETS, ("testnet", within, now()))
            for one in made:
                chain = one.blockchain.partition("-")[0]
                if one.ref_id == "treasury":
                    changes.insert(CUSTODIAN_WALLETS, (chain, one.address, "circle", one.id, now()))
                else:
                    changes.insert(WALLETS, (chain, one.address, one.ref_id, one.id, now()))
                if chain == "MATIC":
                    shore.watched.add(one.address)
            await shore.till.commit(changes)
            given = {
                "database_url": dsn,
                "rpc_urls": json.dumps({"MATIC": [anvil.rpc_url]}),
                "chain_ids": json.dumps({"MATIC": anvil.chain_id}),
                "usdc_contracts": json.dumps({"MATIC": usdc.address}),
                "finality_depths_blocks": json.dumps({"MATIC": DEPTH}),
                "circle_api_url": circle.base_url,
                "circle_api_key": TEST_API_KEY,
                "circle_entity_secret": TEST_ENTITY_SECRET,
                "circle_usdc_token_ids": json.dumps({n.partition("-")[0]: usdc_token_id(n) for n in names}),
            }
            wallets = {(one.ref_id or "", one.blockchain): one for one in made}
            yield Books(shore, circle, client, wallets, given)
    await connection.close()
