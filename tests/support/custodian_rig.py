"""The rail `circle` in the test's process on real Kafka, PostgreSQL and anvil: withdrawals in, USDC out of a wallet at Circle's
sandbox, whose webhooks arrive as the bridge would publish them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import SecretStr

from agents.acting import Acting, CallPolicy
from agents.deposits.finalize_deposits import ChainReader
from agents.outcome import Stage
from agents.services import Services
from agents.sweeper import Sweeper
from agents.withdrawals import accept_withdrawals, settle_transfers, transfer_by_custodian
from agents.withdrawals.custodian import Source
from agents.withdrawals.limits import WithdrawalPolicy
from agents.withdrawals.poll_transfers import PollTransfers
from agents.withdrawals.transfer_calls import CircleTransfers, TransferDeeds
from chain.rpc import Rpc
from connectors.circle.client import CircleClient, CircleWallet
from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.control import InjectedTransfer, inject_transfer
from connectors.circle.sandbox.state import Plan, Transaction
from connectors.circle.sandbox.tokens import USDC_TOKENS, usdc_token_id
from connectors.circle.webhooks import translate
from connectors.webhooks.source import Publish
from ledger.record import unpack
from stablerail.dev.anvil import Node
from stablerail.dev.usdc import Usdc
from tests.support import withdrawals
from tests.support.in_process import NEVER_S, Ground, ground, running, until
from topics.catalog import TRANSFERS_NOTIFIED, WITHDRAWALS_ACCEPTED, WITHDRAWALS_REQUESTED, WITHDRAWALS_SETTLED
from topics.envelope import headers_of, value_of
from topics.money import SCALE

TOPICS = (WITHDRAWALS_REQUESTED, WITHDRAWALS_ACCEPTED, TRANSFERS_NOTIFIED, WITHDRAWALS_SETTLED)
TRANSFER = "POST /v1/w3s/developer/transactions/transfer"
PATH = "/v1/w3s/developer/transactions/transfer"
DEPTH = 1
POLICY = CallPolicy(
    timeout_s=20, poll_s=0.05, rate_per_s=1_000, members_max=1, attempts_max=10**9, breaker_failures_max=10**9
)


@dataclass
class Rig:
    at: Ground
    circle: CircleSandbox
    client: CircleClient
    anvil: Node
    usdc: Usdc
    rpc: Rpc
    rpcs: tuple[Rpc, Rpc]
    """Two endpoints of the same node."""
    wallets: dict[str, CircleWallet] = field(default_factory=dict)
    """By chain: where withdrawals leave from."""
    review_attempts: int = 1_000

    @property
    def sources(self) -> dict[str, Source]:
        return {
            chain: Source(wallet.id, usdc_token_id(wallet.blockchain), "MEDIUM")
            for chain, wallet in self.wallets.items()
        }

    @property
    def accept(self) -> Stage[Any]:
        tokens = {"MATIC": self.usdc.address.lower(), "SOL": None}
        day = 10**9 * SCALE
        return accept_withdrawals.stage(WithdrawalPolicy({}, SCALE, 10**6 * SCALE, day, day, tokens))

    # -- a worker ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def worker(
        self, policy: CallPolicy = POLICY, *, polls: bool = True, abandoned_s: float = NEVER_S
    ) -> AsyncIterator[Services]:
        """A process of the movement, as far as this rail goes; leaving it is its end, whatever it was at. `abandoned_s`: of the
        sweeper; without it nobody tells what a worker that died had committed and not told: the tests move the time, and what
        leaves just now is not to look abandoned."""
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(self.at.process())
            reader = ChainReader([self.rpc], self.usdc.address.lower(), DEPTH)
            ask = transfer_by_custodian.stage(self.sources)
            settle = settle_transfers.stage({"MATIC": reader}, services.connect, services.clock, 1)
            deliveries = [
                await stack.enter_async_context(running(stage, services, self.at))
                for stage in (self.accept, ask, settle)
            ]
            deeds = TransferDeeds(CircleTransfers(self.client, services.clock), self.review_attempts)
            loops = [
                Acting(ask, deeds, services, deliveries[1].wake, policy).work,
                Sweeper(services, interval_s=0.05, abandoned_s=abandoned_s).work,
            ]
            if polls:
                poller = PollTransfers(self.client, "testnet", USDC_TOKENS, self.sources, 0.2, services)
                loops.append(poller.work)
            tasks = [asyncio.create_task(loop()) for loop in loops]
            try:
                yield services
                assert services.stop.reason is None, services.stop.reason
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    @asynccontextmanager
    async def deciding(self) -> AsyncIterator[None]:
        """A process that decides what is asked of Circle, and asks for nothing."""
        async with (
            self.at.process() as services,
            running(self.accept, services, self.at),
            running(transfer_by_custodian.stage(self.sources), services, self.at),
        ):
            yield

    # -- customers ---------------------------------------------------------------------------------------------------

    async def ask(self, user: str, plan: Plan | None = None, *, to: str | None = None, **fields: Any) -> str:
        """The user, who has 100 USDC, wants 25 sent by Circle; the withdrawal's id."""
        await withdrawals.fund(self.at, user, 100 * SCALE)
        to = to or new_address()
        if plan is not None:
            self.circle.sandbox.state.plans[to] = plan
        return await withdrawals.tell(self.at, "k", user, rail="circle", to=to, **fields)

    async def statuses(self) -> dict[str, tuple[str, str | None]]:
        """(status, code), by user."""
        rows = await self.at.observer.fetch("SELECT user_id, status, code FROM withdrawals")
        return {user: (status, code) for user, status, code in rows}

    async def became(self, wanted: dict[str, tuple[str, str | None]], *, step_s: float = 0.0) -> None:
        """Waits until the users' withdrawals stand so; each look mines a block and moves the time by `step_s`."""

        async def as_wanted() -> bool:
            self.at.clock.forward(step_s)
            await self.anvil.mine()
            found = await self.statuses()
            return {user: found.get(user) for user in wanted} == wanted

        try:
            await until(as_wanted, "the withdrawals stand as wanted")
        except AssertionError:
            raise AssertionError(f"{await self.statuses()}\nwanted {wanted}") from None

    async def transfers(self) -> dict[str, tuple[str | None, str]]:
        """(transfer id, state) in our books, by user."""
        rows = await self.at.observer.fetch(
            "SELECT w.user_id, t.transfer_id, t.state FROM custodian_transfers t JOIN withdrawals w ON w.id = t.withdrawal_id"
        )
        return {user: (key, state) for user, key, state in rows}

    async def standing(self, id: str) -> str:
        """All that is known of a withdrawal, for a test that failed."""
        asked = {
            "withdrawal": "SELECT * FROM withdrawals WHERE id = $1::text::uuid",
            "transfer": "SELECT * FROM custodian_transfer_history WHERE withdrawal_id = $1::text::uuid ORDER BY version",
            "call": "SELECT c.*, l.holder, l.until, l.attempts AS takes, l.last_error FROM calls c"
            " LEFT JOIN leases l ON l.call_id = c.id WHERE c.request ->> 'withdrawal_id' = $1",
            "scheduled": "SELECT stage, event_id, attempt, code, available_at FROM schedule WHERE key = $1::text::bytea",
        }
        lines = [f"{id} at {self.at.clock().isoformat()}"]
        for name, query in asked.items():
            lines += [f"{name}: {dict(row)}" for row in await self.at.observer.fetch(query, id)]
        for seq, at, journaled, packed in await self.at.observer.fetch("SELECT seq, at, journaled, record FROM outbox"):
            record = unpack(packed)
            keys = [message.topic for message in record.messages if message.key == id.encode()]
            lines += [f"not told: {keys} of commit {seq}, {record.stage}, {at}, journaled {journaled}"] if keys else []
        for one in self.at_circle().get(id, []):
            lines.append(f"at circle: {one.shown()}")
            told = [sent.shown() for sent in self.circle.sandbox.deliveries.records if sent.resource_id == one.id]
            lines += [f"notification: {sent}" for sent in told]
            if one.tx_hash is not None and one.blockchain == "MATIC-AMOY":
                lines.append(f"on chain: {await self.anvil.rpc('eth_getTransactionByHash', one.tx_hash)}")
                sent = await self.anvil.rpc("eth_getTransactionCount", one.source_address, "latest")
                lines.append(f"mined of the wallet's transactions: {int(sent, 16)}")
        return "\n".join(lines)

    # -- Circle ------------------------------------------------------------------------------------------------------

    def at_circle(self) -> dict[str | None, list[Transaction]]:
        """Circle's transfers out, by reference."""
        found: dict[str | None, list[Transaction]] = {}
        for one in self.circle.sandbox.state.transactions.values():
            if one.transaction_type == "OUTBOUND":
                found.setdefault(one.ref_id, []).append(one)
        return found

    @property
    def calls(self) -> int:
        """For transfers, that Circle heard."""
        return self.circle.sandbox.gate.calls[TRANSFER]

    async def notify(self, body: Any) -> None:
        """As the bridge publishes a notification."""
        said = translate(body, "testnet", USDC_TOKENS)
        assert isinstance(said, Publish), said
        if said.topic is not TRANSFERS_NOTIFIED:
            return  # what funds our own wallet
        headers = headers_of(said.event.ce_type(), event_id=said.event_id, source=said.source, time=self.at.clock())
        await self.at.send(said.topic, said.key, value_of(said.event), headers)

    async def paid(self) -> Counter[tuple[str, int]]:
        """What left the wallet on chain: (to, base units)."""
        head = (await self.rpc.head()).number
        logs = await self.rpc.logs(self.usdc.address.lower(), None, 0, head)
        sender = self.wallets["MATIC"].address
        return Counter((log.to, log.amount) for log in logs if log.sender == sender)


def new_address() -> str:
    return "0x" + (uuid4().hex + uuid4().hex)[:40]


@asynccontextmanager
async def custodian_rig(
    dsn: str,
    bootstrap: str,
    prefix: str,
    anvil: Node,
    usdc: Usdc,
    *,
    webhooks: bool = True,
    poll_s: float = 0.02,
    rsa_bits: int = 2048,
) -> AsyncIterator[Rig]:
    """With 10,000 USDC in the wallet on MATIC, and 1,000 in the one on SOL."""
    config = SandboxConfig(
        rsa_bits=rsa_bits, rate_limits=False, rpc_url=anvil.rpc_url, usdc_address=usdc.address, poll_s=poll_s,
        confirmations=DEPTH, retry_delays_s=(0.05,) * 100,
    )  # fmt: skip
    rig: Rig

    async def hear(request: web.Request) -> web.Response:
        await rig.notify(await request.read())
        return web.Response()

    app = web.Application()
    app.router.add_route("POST", "/circle", hear)
    key, secret = SecretStr(TEST_API_KEY), SecretStr(TEST_ENTITY_SECRET)
    async with (
        TestServer(app) as server,
        CircleSandbox(replace(config, endpoint=str(server.make_url("/circle")) if webhooks else None)) as circle,
        CircleClient(circle.base_url, key, secret, timeout_s=20) as client,
        Rpc(anvil.rpc_url, anvil.chain_id) as rpc,
        Rpc(anvil.rpc_url, anvil.chain_id) as other,
        ground(dsn, bootstrap, prefix, TOPICS) as at,
    ):
        rig = Rig(at, circle, client, anvil, usdc, rpc, (rpc, other))
        within = await client.create_wallet_set(str(uuid4()), "treasury")
        names = {"MATIC": "MATIC-AMOY", "SOL": "SOL-DEVNET"}
        made = await client.create_wallets(str(uuid4()), within, list(names.values()), [("out", "treasury")])
        rig.wallets = {chain: next(w for w in made if w.blockchain == name) for chain, name in names.items()}
        state, deliveries = circle.sandbox.state, circle.sandbox.deliveries
        funding = {"wallet_id": rig.wallets["SOL"].id, "amount": "1000"}
        inject_transfer(state, deliveries, InjectedTransfer.model_validate(funding, by_name=True))
        await anvil.wait_mined(await usdc.transfer(rig.wallets["MATIC"].address, 10_000 * SCALE))
        yield rig
