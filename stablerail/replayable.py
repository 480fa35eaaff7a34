"""The stages that can be replayed, made without what a worker has beside them; and why the others are not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from agents.deposits import credit_deposits
from agents.deposits.lookups import Lookups
from agents.investing import release_orders, reserve_orders, settle_fills
from agents.onboarding import freeze_wallets, provision_wallets, request_wallets
from agents.outcome import Stage
from agents.treasury import fund_broker
from agents.withdrawals import accept_withdrawals, settle_withdrawals, transfer_by_custodian
from ledger.accounts import AccountType
from ledger.rows import Connection
from stablerail.config import Settings
from stablerail.policies import custodian_sources, deposit_policy, order_shards, withdrawal_policy
from stablerail.wiring import Movement, circle_client, lookups_of

Connect = Callable[[], Awaitable[Connection]]

_BY_ROWS: Final = "the rows say what it has to do, an event only wakes it, and every block does"
NOT_REPLAYED: Final[dict[str, str]] = {
    "finalize_deposits": _BY_ROWS,
    "sign_transactions": _BY_ROWS,
    "sign_waiting": _BY_ROWS,
    "track_confirmations": _BY_ROWS,
    "raise_fees": _BY_ROWS,
    "top_up_lanes": _BY_ROWS,
    "settle_transfers": "poll_transfers asks Circle about every transfer that has not ended, and says it again every hour",
    "broadcast_transactions": "what is signed and in no block is sent again by itself, a minute later",
}
"""Whatever a bug left undone of it is done when the bug is gone."""


STAGES: Final[dict[str, Callable[[Settings, Lookups | None], Stage[Any]]]] = {
    "request_wallets": lambda settings, _: request_wallets.stage(settings.provisioned_chains),
    "freeze_wallets": lambda _settings, _: freeze_wallets.stage(),
    "provision_wallets": lambda _settings, _: provision_wallets.stage(),
    "credit_deposits": lambda settings, lookups: credit_deposits.stage(deposit_policy(settings), lookups),
    "accept_withdrawals": lambda settings, _: accept_withdrawals.stage(withdrawal_policy(settings)),
    "transfer_by_custodian": lambda settings, _: transfer_by_custodian.stage(custodian_sources(settings)),
    "settle_withdrawals": lambda settings, _: settle_withdrawals.stage(
        settings.shards_of(AccountType.SYSTEM_BUFFER_USDC)
    ),
    "reserve_orders": lambda _settings, _: reserve_orders.stage(),
    "settle_fills": lambda settings, _: settle_fills.stage(order_shards(settings)),
    "release_cancelled_orders": lambda _settings, _: release_orders.stages()[0],
    "release_expired_orders": lambda _settings, _: release_orders.stages()[1],
    "fund_broker": lambda settings, _: fund_broker.stage(settings.shards_of(AccountType.SYSTEM_BUFFER_FIAT)),
}


async def made(name: str, settings: Settings, connect: Connect, movement: Movement) -> Stage[Any]:
    """The stage as its worker has it. `movement` takes what is to be closed. KeyError for what is not replayed."""
    make, lookups = STAGES[name], None
    if name == credit_deposits.NAME:
        lookups = lookups_of(settings, await circle_client(settings, movement), connect)
    return make(settings, lookups)
