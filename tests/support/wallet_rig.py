"""Onboarding in the test's process on real Kafka and PostgreSQL with Circle's sandbox: approvals in, wallets out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from pydantic import SecretStr

from agents.acting import Acting, CallPolicy
from agents.onboarding import freeze_wallets, provision_wallets, request_wallets
from agents.onboarding.circle_wallets import CircleWallets
from agents.onboarding.wallet_calls import WalletDeeds
from agents.services import Services
from connectors.circle.chains import from_circle
from connectors.circle.client import CircleClient
from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from stablerail.metrics import Metrics
from tests.support.in_process import Ground, ground, read_topic, running, until
from topics.catalog import KYC_APPROVED, KYC_REJECTED, WALLETS_FROZEN, WALLETS_PROVISIONED, WALLETS_REQUESTED
from topics.envelope import value_of
from topics.events import Chain, KycApproved, KycRejected

CHAINS = (Chain.ETH, Chain.SOL, Chain.APTOS, Chain.MATIC)
CREATE = "POST /v1/w3s/developer/wallets"
POLICY = CallPolicy(timeout_s=20, poll_s=0.05, rate_per_s=1_000, breaker_failures_max=1_000)


@dataclass
class Rig:
    at: Ground
    circle: CircleSandbox

    async def approve(self, *users: str) -> None:
        sends = []
        for user in users:
            event = KycApproved(
                user_id=user, vendor="sumsub", applicant_id=user, vendor_event_id=user, approved_at="now"
            )
            topic = KYC_APPROVED.named(self.at.prefix)
            sends.append(await self.at.producer.send(topic, value_of(event), key=user.encode()))
        await asyncio.gather(*sends)

    async def reject(self, user: str) -> None:
        event = KycRejected(
            user_id=user,
            vendor="sumsub",
            applicant_id=user,
            vendor_event_id=f"red:{user}",
            rejected_at="now",
            final=True,
        )
        await self.at.send(KYC_REJECTED, user.encode(), value_of(event))

    @asynccontextmanager
    async def worker(self, policy: CallPolicy = POLICY, chains: Sequence[Chain] = CHAINS) -> AsyncIterator[Services]:
        """A process of the movement; leaving it is its end, whatever it was at."""
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(self.at.process())
            await stack.enter_async_context(running(request_wallets.stage(tuple(chains)), services, self.at))
            await stack.enter_async_context(running(freeze_wallets.stage(), services, self.at))
            delivery = await stack.enter_async_context(running(provision_wallets.stage(), services, self.at))
            await stack.enter_async_context(self.performing(services, policy, delivery.wake))
            yield services

    @asynccontextmanager
    async def performing(
        self, services: Services, policy: CallPolicy = POLICY, wake: asyncio.Event | None = None
    ) -> AsyncIterator[Acting]:
        """The performers alone."""
        key, secret = SecretStr(TEST_API_KEY), SecretStr(TEST_ENTITY_SECRET)
        async with CircleClient(self.circle.base_url, key, secret, timeout_s=POLICY.timeout_s) as client:
            circle = CircleWallets(client, "testnet", None, services.connect, services.clock)
            metrics = services.observer
            assert isinstance(metrics, Metrics)
            deeds = WalletDeeds(circle, policy.members_max, policy.attempts_max, metrics)
            acting = Acting(provision_wallets.stage(), deeds, services, wake or asyncio.Event(), policy)
            task = asyncio.create_task(acting.work())
            try:
                yield acting
                assert services.stop.reason is None, services.stop.reason
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    @property
    def calls(self) -> int:
        """For wallets, that Circle heard."""
        return self.circle.sandbox.gate.calls[CREATE]

    def at_circle(self) -> Counter[tuple[str, str]]:
        """(user, chain) -> wallets in Circle's own record."""
        found: Counter[tuple[str, str]] = Counter()
        for wallet in self.circle.sandbox.state.wallets.values():
            chain = from_circle(wallet.blockchain, "testnet")
            assert chain is not None
            assert wallet.ref_id is not None
            found[wallet.ref_id, chain.value] += 1
        return found

    async def in_database(self) -> Counter[tuple[str, str]]:
        return Counter(tuple(row) for row in await self.at.observer.fetch("SELECT user_id, chain FROM wallets"))

    async def jobs(self) -> Counter[str]:
        rows = await self.at.observer.fetch("SELECT state, count(*) FROM wallet_provisioning_jobs GROUP BY state")
        return Counter(dict(tuple(row) for row in rows))

    async def job(self, user: str) -> Any:
        return await self.at.observer.fetchrow("SELECT * FROM wallet_provisioning_jobs WHERE user_id = $1", user)

    async def chains(self, user: str) -> dict[str, str]:
        query = "SELECT chain, coalesce(error, status) FROM wallet_requests WHERE user_id = $1"
        return dict(tuple(row) for row in await self.at.observer.fetch(query, user))

    async def ended(self, jobs: Counter[str], what: str, *, timeout_s: float = 100, step_s: float = 0.0) -> None:
        """Waits until the jobs stand so; each look moves the time by `step_s`."""

        async def as_wanted() -> bool:
            self.at.clock.forward(step_s)
            return await self.jobs() == jobs

        await until(as_wanted, what, timeout_s)

    async def letters(self) -> list[tuple[str, str]]:
        """(user, code) of each dead letter of wallets.requested."""
        found = []
        for record in await read_topic(self.at.bootstrap, WALLETS_REQUESTED.dlq, self.at.prefix):
            headers = dict(record.headers)
            found.append((headers["dlq_item"].decode(), headers["dlq_code"].decode()))
        return found


@asynccontextmanager
async def wallet_rig(dsn: str, bootstrap: str, prefix: str) -> AsyncIterator[Rig]:
    topics = [KYC_APPROVED, KYC_REJECTED, WALLETS_REQUESTED, WALLETS_PROVISIONED, WALLETS_FROZEN]
    async with (
        CircleSandbox(SandboxConfig(rate_limits=False, rsa_bits=2048)) as circle,
        ground(dsn, bootstrap, prefix, topics) as at,
    ):
        yield Rig(at, circle)


def with_policy(**changes: Any) -> CallPolicy:
    return replace(POLICY, **changes)
