"""What runs where: settings in, stages out. The one file that knows every agent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import asyncpg

from agents.acting import Acting, CallPolicy
from agents.chains.watch_chain import WatchChain, Watched
from agents.crash import Stop
from agents.delivery import Delivery
from agents.deposits import credit_deposits, finalize_deposits
from agents.deposits.credit_deposits import DepositPolicy
from agents.deposits.finalize_deposits import ChainReader
from agents.emitter import Emitter
from agents.onboarding import freeze_wallets, provision_wallets, request_wallets
from agents.onboarding.circle_wallets import CircleWallets
from agents.onboarding.wallet_calls import WalletDeeds
from agents.outcome import Stage
from agents.services import Services
from chain.rpc import Rpc
from chain.scan import ScanSettings
from connectors.circle.client import CircleClient
from ledger.accounts import AccountType
from ledger.errors import RoleRefused
from ledger.journal import Relay
from ledger.rows import Connection
from stablerail.config import Settings
from stablerail.metrics import Metrics

MOVEMENTS: Final = ("onboarding", "deposits", "chains")
"""Each is one Faust app with a consumer group of its own, and one Deployment in production."""

NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "onboarding": ("database_url", "circle_api_key", "circle_entity_secret"),
    "deposits": ("database_url",),
    "chains": ("database_url",),
}


def connector(settings: Settings, **server_settings: str) -> Callable[[], Awaitable[Connection]]:
    """Opens a connection in our schema and under our role, whose locks a frozen process cannot keep. It raises RoleRefused,
    and asyncpg's errors."""

    async def connect() -> Connection:
        try:
            return await _open()
        except (asyncpg.InvalidParameterValueError, asyncpg.InsufficientPrivilegeError) as error:
            role = settings.database_role
            remedy = f"run `stablerail migrate` as the owner; a login of its own needs: GRANT {role} TO the login"
            raise RoleRefused(f"{error}; {remedy}") from None

    async def _open() -> Connection:
        connection: Connection = await asyncpg.connect(
            settings.secret("database_url"),
            timeout=10,
            server_settings={
                "application_name": "stablerail",
                "search_path": settings.database_schema,
                "role": settings.database_role,
                "lock_timeout": f"{int(settings.database_lock_timeout_s * 1000)}ms",
                "idle_in_transaction_session_timeout": f"{int(settings.database_idle_timeout_s * 1000)}ms",
                "jit": "off",  # our statements are short; compiling them costs more than running them
                # a custom plan would parse every array literal once more, only to plan the same
                "plan_cache_mode": "force_generic_plan",
                **server_settings,
            },
        )
        return connection

    return connect


def services(settings: Settings, metrics: Metrics, stop: Stop) -> Services:
    """What every stage of a process runs on."""
    emitter = Emitter(settings.kafka_bootstrap, settings.topic_prefix)

    async def publish(records: Any) -> None:
        await emitter.journal(records)
        metrics.relayed(len(records), sum(len(record) for _, record in records))

    return Services(
        connect=connector(settings),
        relay=Relay(connector(settings, synchronous_commit="off"), publish),
        emitter=emitter,
        observer=metrics,
        stop=stop,
        events_max=settings.stage_batch_events_max,
        in_flight=settings.stage_batches_in_flight_max,
        fenced_s_max=3 * settings.kafka_session_timeout_s,
        fuse_ratio=settings.fuse_ratio_max,
        fuse_run=settings.fuse_run_events_max,
        fuse_window=settings.fuse_window_events,
    )


@dataclass
class Movement:
    """The parts of one movement in one process."""

    name: str
    deliveries: list[Delivery] = field(default_factory=list)
    workers: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    """Loops beside the stages: performers, watchers."""
    closing: list[Callable[[], Awaitable[None]]] = field(default_factory=list)


def rpcs(settings: Settings, chain: Any) -> tuple[Rpc, ...]:
    """The endpoints of a chain that we read."""
    return tuple(
        Rpc(url.get_secret_value(), settings.chain_ids[chain], settings.rpc_timeout_s)
        for url in settings.rpc_urls[chain]
    )


def deposit_policy(settings: Settings) -> DepositPolicy:
    return DepositPolicy(
        minimum=settings.deposit_minimum,
        chains_read=frozenset(chain.value for chain in settings.read_chains),
        buffer_shards=settings.shards_of(AccountType.SYSTEM_BUFFER_USDC),
    )


async def build(name: str, settings: Settings, shared: Services, metrics: Metrics) -> Movement:
    """The movement's parts, connected to what they need. KeyError for an unknown name."""
    return await _BUILDERS[name](settings, shared, metrics)


async def _onboarding(settings: Settings, shared: Services, metrics: Metrics) -> Movement:
    assert settings.circle_api_key is not None
    assert settings.circle_entity_secret is not None
    movement = Movement("onboarding")
    movement.deliveries.append(Delivery(request_wallets.stage(settings.provisioned_chains), shared))
    movement.deliveries.append(Delivery(freeze_wallets.stage(), shared))
    provision = Delivery(provision_wallets.stage(), shared)
    movement.deliveries.append(provision)
    client = CircleClient(
        settings.circle_api_url, settings.circle_api_key, settings.circle_entity_secret, settings.call_timeout_s
    )
    await client.start()
    movement.closing.append(client.close)
    wallets = CircleWallets(client, settings.network, settings.circle_wallet_set_id, shared.connect, shared.clock)
    policy = _call_policy(settings)
    deeds = WalletDeeds(wallets, policy.members_max, policy.attempts_max, metrics)
    acting = Acting(provision.stage, deeds, shared, provision.wake, policy)
    movement.workers.append(acting.work)
    return movement


async def _deposits(settings: Settings, shared: Services, _metrics: Metrics) -> Movement:
    movement = Movement("deposits")
    readers: dict[str, ChainReader] = {}
    for chain in settings.read_chains:
        endpoints = rpcs(settings, chain)
        movement.closing.extend(rpc.close for rpc in endpoints)
        readers[chain.value] = ChainReader(
            endpoints, settings.usdc_contracts[chain].lower(), settings.finality_depths_blocks[chain]
        )
    stages: tuple[Stage[Any], ...] = (
        credit_deposits.stage(deposit_policy(settings)),
        finalize_deposits.stage(readers, shared.connect),
    )
    movement.deliveries.extend(Delivery(stage, shared) for stage in stages)
    return movement


async def _chains(settings: Settings, shared: Services, metrics: Metrics) -> Movement:
    movement = Movement("chains")

    def seen(chain: str, head: int, behind: int) -> None:
        metrics.chain_head(chain, head)
        metrics.scanner_lag(chain, behind)

    for chain in settings.read_chains:
        endpoints = rpcs(settings, chain)
        movement.closing.extend(rpc.close for rpc in endpoints)
        scan = ScanSettings(
            token=settings.usdc_contracts[chain].lower(),
            span_max_blocks=settings.scan_span_blocks,
            overlap_blocks=settings.scan_overlap_blocks,
            recent_max=max(128, 2 * settings.finality_depths_blocks[chain]),
        )
        watched = Watched(chain, settings.chain_ids[chain], endpoints, scan, settings.scan_interval_s)
        movement.workers.append(WatchChain(watched, shared, seen).work)
    return movement


def _call_policy(settings: Settings) -> CallPolicy:
    return CallPolicy(
        timeout_s=settings.call_timeout_s,
        lease_s=settings.call_lease_s,
        rate_per_s=settings.call_rate_per_s,
        concurrency_max=settings.call_concurrency_max,
        members_max=settings.call_members_max,
        poll_s=settings.call_poll_interval_s,
        retry_first_s=settings.call_retry_first_s,
        retry_max_s=settings.call_retry_max_s,
        attempts_max=settings.call_attempts_max,
        breaker_failures_max=settings.breaker_failures_max,
        breaker_open_s=settings.breaker_open_s,
    )


_BUILDERS: Final[dict[str, Callable[[Settings, Services, Metrics], Awaitable[Movement]]]] = {
    "onboarding": _onboarding,
    "deposits": _deposits,
    "chains": _chains,
}
