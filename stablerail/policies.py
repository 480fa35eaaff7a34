"""Settings in, rules out: what the stages of a movement are made with."""

from __future__ import annotations

from agents.acting import CallPolicy
from agents.deposits.policy import DepositPolicy
from agents.withdrawals.custodian import Source
from agents.withdrawals.limits import WithdrawalPolicy
from agents.withdrawals.raising import RaisePolicy
from chain.assets import Network, usdc
from chain.fees import GWEI, POLICIES, FeePolicy
from ledger.accounts import AccountType
from ledger.orders import Shards
from stablerail.config import Settings
from topics.events import Chain


def deposit_policy(settings: Settings) -> DepositPolicy:
    return DepositPolicy(
        minimum=settings.deposit_minimum,
        chains_read=frozenset(chain.value for chain in settings.read_chains),
        buffer_shards=settings.shards_of(AccountType.SYSTEM_BUFFER_USDC),
        at_finality=frozenset(chain.value for chain in settings.deposit_at_finality),
        instant_max={chain.value: amount for chain, amount in settings.deposit_instant_max.items()},
        outstanding_max={chain.value: amount for chain, amount in settings.deposit_outstanding_max.items()},
    )


def withdrawal_policy(settings: Settings) -> WithdrawalPolicy:
    return WithdrawalPolicy(
        tokens={chain.value: settings.usdc_contracts[chain] for chain in settings.withdrawal_chains},
        minimum=settings.withdrawal_minimum,
        maximum=settings.withdrawal_maximum,
        user_day=settings.withdrawal_user_day_maximum,
        network_day=settings.withdrawal_network_day_maximum,
        custodian={chain.value: usdc_of(settings, chain) for chain in settings.circle_withdrawal_wallets},
    )


def usdc_of(settings: Settings, chain: Chain) -> str | None:
    """USDC's canonical contract or mint, where it is known."""
    if chain in settings.usdc_contracts:
        return settings.usdc_contracts[chain].lower()
    return usdc(Network(settings.network), chain)


def custodian_sources(settings: Settings) -> dict[str, Source]:
    """Where withdrawals of the rail `circle` leave from, by chain."""
    return {
        chain.value: Source(wallet_id, settings.circle_usdc_token_ids[chain], settings.circle_fee_level)
        for chain, wallet_id in settings.circle_withdrawal_wallets.items()
    }


def fee_policy(settings: Settings, chain: Chain) -> FeePolicy:
    """The network's bounds, with what is set over them."""
    bounds = POLICIES[chain]
    floor, cap = settings.withdrawal_tip_floors_gwei.get(chain), settings.withdrawal_fee_caps_gwei.get(chain)
    return FeePolicy(
        bounds.priority_floor if floor is None else floor * GWEI, bounds.max_fee_cap if cap is None else cap * GWEI
    )


def raise_policy(settings: Settings) -> RaisePolicy:
    return RaisePolicy(
        settings.withdrawal_speed_up_blocks, 1 + settings.withdrawal_speed_ups_max, settings.withdrawal_stuck_after_s
    )


def order_shards(settings: Settings) -> Shards:
    return Shards(
        settings.shards_of(AccountType.SYSTEM_BUFFER_USDC), settings.shards_of(AccountType.SYSTEM_BUFFER_FIAT)
    )


def call_policy(settings: Settings) -> CallPolicy:
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
