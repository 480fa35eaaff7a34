"""What runs where: settings in, stages out. The one file that knows every agent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import structlog

from agents.acting import Acting
from agents.chains.watch_chain import WatchChain, Watched
from agents.crash import Stop
from agents.delivery import Delivery
from agents.deposits import credit_deposits, finalize_deposits
from agents.deposits.finalize_deposits import ChainReader
from agents.deposits.lookups import Lookups, circle_listing
from agents.deposits.poll_circle import MINT, W3S, PollCircle, Polled, Product
from agents.emitter import Emitter
from agents.investing import release_orders, reserve_orders, settle_fills
from agents.looking import look_again_and_again
from agents.onboarding import freeze_wallets, provision_wallets, request_wallets
from agents.onboarding.circle_wallets import CircleWallets
from agents.onboarding.wallet_calls import WalletDeeds
from agents.outcome import Stage
from agents.recovery import store_dead_letters
from agents.recovery.maintain import Maintain, Retentions
from agents.recovery.redrive_dead_letters import RedriveDeadLetters
from agents.services import Services
from agents.treasury import fund_broker
from agents.treasury.reconcile_daily import ReconcileDaily
from agents.treasury.tell_legacy import TellLegacy
from agents.withdrawals import (
    accept_withdrawals,
    broadcast_transactions,
    raise_fees,
    settle_transfers,
    settle_withdrawals,
    sign_transactions,
    top_up_lanes,
    track_confirmations,
    transfer_by_custodian,
)
from agents.withdrawals.desks import Desk, Desks
from agents.withdrawals.key_ring import KeyRing
from agents.withdrawals.look import ChainWriter
from agents.withdrawals.poll_transfers import PollTransfers
from agents.withdrawals.top_ups import TopUpPolicy
from agents.withdrawals.transfer_calls import CircleTransfers, TransferDeeds
from chain.broadcaster import Broadcaster
from chain.hot_wallet import HotWallet
from chain.rpc import Rpc
from chain.scan import ScanSettings
from chain.signer import Signer
from connectors.circle.client import MINT_URLS, CircleClient, MintClient
from ledger.accounts import AccountType
from ledger.rows import Connection
from stablerail import order_figures
from stablerail.buffers import Buffers
from stablerail.config import Settings
from stablerail.connections import opener, relay_of, rpcs
from stablerail.custody import CustodyCheck, custody_of
from stablerail.hot_wallets import gas_account, hot_wallet, load_lane_key
from stablerail.invariants import Invariants
from stablerail.metrics import Metrics
from stablerail.policies import (
    call_policy,
    custodian_sources,
    deposit_policy,
    fee_policy,
    order_shards,
    raise_policy,
    withdrawal_policy,
)
from stablerail.reconcile import reconcile
from stablerail.shadow import elsewhere_for, mirror_for
from stablerail.topics_admin import admin, retentions
from stablerail.withdrawal_views import WithdrawalViews
from topics.events import Chain
from topics.trace import Spans

_log = structlog.get_logger()


def services(settings: Settings, metrics: Metrics, stop: Stop, spans: Spans | None = None) -> Services:
    """What every stage of a process runs on."""
    emitter = Emitter(settings.kafka_bootstrap, settings.topic_prefix, spans=spans)

    async def publish(records: Any, untold: int) -> None:
        await emitter.journal(records, untold)
        metrics.relayed(len(records), sum(len(record) for _, record in records))

    return Services(
        connect=opener(settings, mirror_for(settings, metrics)),
        relay=relay_of(settings, publish),
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
    mounts: list[Callable[[Any], None]] = field(default_factory=list)
    """What is Faust's own, put on the app before it starts: tables, their agents and pages."""
    measures: list[Callable[[], None]] = field(default_factory=list)
    """Called once a second."""


def watched_rpcs(settings: Settings, chain: Chain, movement: Movement, metrics: Metrics) -> tuple[Rpc, ...]:
    """The endpoints of a chain for the movement's life; how they do is measured."""
    endpoints = rpcs(settings, chain)
    movement.closing.extend(rpc.close for rpc in endpoints)

    def measure() -> None:
        for place, rpc in enumerate(endpoints, 1):
            metrics.rpc_endpoint(chain, f"{place} {rpc.endpoint}", rpc.health.state)

    movement.measures.append(measure)
    return endpoints


async def build(name: str, settings: Settings, shared: Services, metrics: Metrics) -> Movement:
    """The movement's parts, connected to what they need. KeyError for an unknown name."""
    return await _BUILDERS[name](settings, shared, metrics)


async def _onboarding(settings: Settings, shared: Services, metrics: Metrics) -> Movement:
    movement = Movement("onboarding")
    movement.deliveries.append(Delivery(request_wallets.stage(settings.provisioned_chains), shared))
    movement.deliveries.append(Delivery(freeze_wallets.stage(), shared))
    provision = Delivery(provision_wallets.stage(), shared)
    movement.deliveries.append(provision)
    client = await circle_client(settings, movement)
    assert client is not None
    wallets = CircleWallets(client, settings.network, settings.circle_wallet_set_id, shared.connect, shared.clock)
    policy = call_policy(settings)
    deeds = WalletDeeds(wallets, policy.members_max, policy.attempts_max, metrics)
    acting = Acting(provision.stage, deeds, shared, provision.wake, policy)
    movement.workers.append(acting.work)
    return movement


async def _deposits(settings: Settings, shared: Services, metrics: Metrics) -> Movement:
    movement = Movement("deposits")
    readers = _readers(settings, movement, metrics)
    policy = deposit_policy(settings)
    circle = await circle_client(settings, movement)
    lookups = lookups_of(settings, circle, shared.connect)
    stages: tuple[Stage[Any], ...] = (
        credit_deposits.stage(policy, lookups),
        finalize_deposits.stage(readers, policy, shared.connect),
    )
    movement.deliveries.extend(Delivery(stage, shared) for stage in stages)
    mint = await _mint_client(settings, movement)

    def poll(client: CircleClient | MintClient, product: Product) -> None:
        polled = Polled(
            settings.network,
            dict.fromkeys(settings.circle_usdc_token_ids.values(), "USDC"),
            settings.circle_poll_interval_s,
            timedelta(seconds=settings.circle_poll_overlap_s),
            product=product,
        )
        read = partial(metrics.circle_polled, product.source)
        movement.workers.append(PollCircle(client, polled, shared, read).work)

    if circle is None:
        _log.warning("circle.not_polled", reason="circle_api_key or circle_entity_secret is not set")
    else:
        poll(circle, W3S)
    if mint is not None:
        poll(mint, MINT)
    elif settings.circle_mint_topic_arns:
        _log.warning("circle.not_polled", reason="circle_mint_api_key is not set")
    return movement


def _readers(
    settings: Settings,
    movement: Movement,
    metrics: Metrics,
    known: Mapping[Chain, tuple[Rpc, ...]] = MappingProxyType({}),
) -> dict[str, ChainReader]:
    """Of every chain that we read; `known`: endpoints that the movement has already."""
    readers: dict[str, ChainReader] = {}
    for chain in settings.read_chains:
        endpoints = known.get(chain) or watched_rpcs(settings, chain, movement, metrics)
        readers[chain.value] = ChainReader(
            endpoints, settings.usdc_contracts[chain].lower(), settings.finality_depths_blocks[chain]
        )
    return readers


def lookups_of(
    settings: Settings, circle: CircleClient | None, connect: Callable[[], Awaitable[Connection]]
) -> Lookups | None:
    if circle is None:
        return None
    tokens = dict.fromkeys(settings.circle_usdc_token_ids.values(), "USDC")
    listing = circle_listing(circle, settings.network, tokens)
    return Lookups(listing, deposit_policy(settings).chains_read, connect)


async def _withdrawals(settings: Settings, shared: Services, metrics: Metrics) -> Movement:
    movement = Movement("withdrawals")
    writers: dict[str, ChainWriter] = {}
    desks = Desks()
    broadcasters: dict[str, Broadcaster] = {}
    chains: dict[Chain, tuple[Rpc, ...]] = {}
    for chain in settings.withdrawal_chains:
        chains[chain] = endpoints = watched_rpcs(settings, chain, movement, metrics)
        token = settings.usdc_contracts[chain].lower()
        writers[chain.value] = ChainWriter(endpoints, token, settings.finality_depths_blocks[chain])
        broadcasters[chain.value] = Broadcaster(endpoints)

    def desk(chain: Chain, signer: Signer) -> Desk:
        token = settings.usdc_contracts[chain].lower()
        return Desk(
            chain,
            settings.chain_ids[chain],
            signer,
            token,
            HotWallet(chains[chain], signer.address, token),
            fee_policy(settings, chain),
            settings.withdrawal_in_flight_max,
        )

    top_ups = {chain: one for chain, one in settings.gas_top_ups.items() if chain in chains}
    if chains:
        signer = await asyncio.to_thread(hot_wallet, settings)
        for chain in chains:
            desks.put(desk(chain, signer))
        if top_ups:
            giver = await asyncio.to_thread(gas_account, settings, signer)
            for chain in top_ups:
                desks.put(replace(desk(chain, giver), gives_gas=True))
        ring = KeyRing(desks, shared.connect, partial(load_lane_key, settings), desk, chains)
        movement.workers.append(ring.work)
    views = WithdrawalViews(settings.topic_prefix, shared.connect, metrics, shared.clock)
    movement.mounts.append(views.mount)
    movement.workers.append(views.work)
    policies = {chain: TopUpPolicy(**dict(limits)) for chain, limits in top_ups.items()}
    # in the order of the flow
    stages: tuple[Stage[Any], ...] = (
        accept_withdrawals.stage(withdrawal_policy(settings)),
        *sign_transactions.stages(desks),
        broadcast_transactions.stage(broadcasters, shared.connect),
        track_confirmations.stage(writers, shared.connect, shared.clock),
        raise_fees.stage(desks, dict.fromkeys(settings.withdrawal_chains, raise_policy(settings))),
        top_up_lanes.stage(desks, policies, metrics.gas_account),
        settle_withdrawals.stage(settings.shards_of(AccountType.SYSTEM_BUFFER_USDC)),
    )
    movement.deliveries.extend(Delivery(stage, shared) for stage in stages)
    readers = _readers(settings, movement, metrics, chains)
    await _by_custodian(settings, shared, movement, readers)
    return movement


async def _investing(settings: Settings, shared: Services, metrics: Metrics) -> Movement:
    movement = Movement("investing")

    async def look(connection: Connection) -> None:
        await order_figures.look(connection, metrics, settings.order_open_max_s, shared.clock())

    movement.workers.append(partial(look_again_and_again, shared.connect, look, order_figures.LOOK_S, "orders.unseen"))
    stages = (reserve_orders.stage(), settle_fills.stage(order_shards(settings)), *release_orders.stages())
    movement.deliveries.extend(Delivery(stage, shared) for stage in stages)
    return movement


TRANSFERS_PER_S: Final = 5.0
"""What Circle allows."""
FOR_EVER: Final = 10**9
"""Attempts: whether a transfer was made is for Circle to say, never for a count."""


async def _by_custodian(
    settings: Settings, shared: Services, movement: Movement, readers: Mapping[str, ChainReader]
) -> None:
    """The stages of the rail `circle`; whoever performs only where Circle's credentials are set."""
    sources = custodian_sources(settings)
    if sources:
        settings.require("circle_api_key", "circle_entity_secret")
    transfer = Delivery(transfer_by_custodian.stage(sources), shared)
    shards = settings.shards_of(AccountType.SYSTEM_BUFFER_USDC)
    settle = Delivery(settle_transfers.stage(readers, shared.connect, shared.clock, shards), shared)
    movement.deliveries += [transfer, settle]
    circle = await circle_client(settings, movement)
    if circle is None:
        return
    rate = min(settings.call_rate_per_s, TRANSFERS_PER_S)
    policy = replace(call_policy(settings), members_max=1, rate_per_s=rate, attempts_max=FOR_EVER)
    deeds = TransferDeeds(CircleTransfers(circle, shared.clock), settings.call_attempts_max)
    movement.workers.append(Acting(transfer.stage, deeds, shared, transfer.wake, policy).work)
    tokens = dict.fromkeys(settings.circle_usdc_token_ids.values(), "USDC")
    poll = PollTransfers(circle, settings.network, tokens, sources, settings.circle_transfer_poll_s, shared)
    movement.workers.append(poll.work)


async def circle_client(settings: Settings, movement: Movement) -> CircleClient | None:
    """A client for the movement's life; None without credentials."""
    if settings.circle_api_key is None or settings.circle_entity_secret is None:
        return None
    client = CircleClient(
        settings.circle_api_url, settings.circle_api_key, settings.circle_entity_secret, settings.call_timeout_s
    )
    await client.start()
    movement.closing.append(client.close)
    return client


async def _mint_client(settings: Settings, movement: Movement) -> MintClient | None:
    """As `circle_client`."""
    if settings.circle_mint_api_key is None:
        return None
    url = settings.circle_mint_api_url or MINT_URLS[settings.network]
    client = MintClient(url, settings.circle_mint_api_key, settings.call_timeout_s)
    await client.start()
    movement.closing.append(client.close)
    return client


async def _chains(settings: Settings, shared: Services, metrics: Metrics) -> Movement:
    movement = Movement("chains")
    metrics.discrepancy_threshold(settings.discrepancy_alert_threshold)

    def seen(chain: str, head: int, behind: int, answering: int) -> None:
        metrics.chain_head(chain, head)
        metrics.scanner_lag(chain, behind)
        metrics.rpc_endpoints(chain, answering)

    for chain in settings.read_chains:
        endpoints = watched_rpcs(settings, chain, movement, metrics)
        scan = ScanSettings(
            token=settings.usdc_contracts[chain].lower(),
            span_max_blocks=settings.scan_span_blocks,
            overlap_blocks=settings.scan_overlap_blocks,
            recent_max=max(128, 2 * settings.finality_depths_blocks[chain]),
        )
        watched = Watched(chain, settings.chain_ids[chain], endpoints, scan, settings.scan_interval_s)
        watcher = WatchChain(watched, shared, seen)
        custody = CustodyCheck(
            custody_of(settings, chain, endpoints),
            shared.connect,
            settings.custody_check_interval_s,
            watcher.leads,
            metrics.custody_discrepancy,
        )
        movement.workers += [watcher.work, watcher.listen, custody.work]
    return movement


async def _treasury(settings: Settings, shared: Services, metrics: Metrics) -> Movement:
    buffers = Buffers(settings, metrics)
    funded = fund_broker.stage(settings.shards_of(AccountType.SYSTEM_BUFFER_FIAT))
    metrics.discrepancy_threshold(settings.discrepancy_alert_threshold)
    reconciles = ReconcileDaily(shared, partial(reconcile, settings), metrics.reconciled)
    movement = Movement(
        "treasury",
        deliveries=[Delivery(funded, shared)],
        workers=[reconciles.work],
        mounts=[buffers.mount],
        measures=[buffers.measure],
    )
    elsewhere = elsewhere_for(settings, metrics)
    if elsewhere is not None:
        movement.workers.append(TellLegacy(shared, elsewhere).work)
        movement.closing.append(elsewhere.close)
    return movement


async def _recovery(settings: Settings, shared: Services, metrics: Metrics) -> Movement:
    movement = Movement("recovery")
    movement.deliveries.extend(Delivery(stage, shared) for stage in store_dead_letters.stages())
    movement.workers.append(RedriveDeadLetters(shared, metrics.letters_open).work)
    movement.workers.append(Invariants(settings, shared, metrics.invariants).work)
    margin = timedelta(days=settings.retention_margin_days)
    told = (metrics.maintained, metrics.maintained_at)
    movement.workers.append(Maintain(shared, settings.topic_prefix, margin, broker_retentions(settings), *told).work)
    return movement


def broker_retentions(settings: Settings) -> Retentions:
    async def ask() -> Mapping[str, int]:
        async with admin(settings.kafka_bootstrap.replace(";", ",")) as client:
            return await retentions(client, settings.topic_prefix)

    return ask


_BUILDERS: Final[dict[str, Callable[[Settings, Services, Metrics], Awaitable[Movement]]]] = {
    "onboarding": _onboarding,
    "deposits": _deposits,
    "chains": _chains,
    "withdrawals": _withdrawals,
    "investing": _investing,
    "treasury": _treasury,
    "recovery": _recovery,
}
