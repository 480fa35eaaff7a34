"""wallets.requested -> a call to Circle -> wallets -> wallets.provisioned

Decides:  which of the requested wallets are not there yet; one call for all chains of a customer.
Key:      user id.
Repeats:  harmless; the call has one idempotency key for life, and Circle answers it with the same wallets.
Refuses:  reserved_user, what Circle refuses definitely (partner_refused)  ->  wallets.requested.dlq
"""

from __future__ import annotations

from typing import Any

from agents.acting import Acting, StoredCall
from agents.onboarding.wallet_requests import READY, Facts, WalletRequest, fold, load
from agents.outcome import Call, Done, Emit, Outcome, Rejected, Retry, Stage
from chain.addresses import check_address
from chain.errors import ChainError
from connectors.circle.chains import Network, from_circle, to_circle
from connectors.circle.client import CircleClient
from connectors.errors import Refused
from ledger.accounts import may_own
from ledger.tables import WALLET_REQUESTS, WALLETS
from topics.catalog import WALLETS_PROVISIONED, WALLETS_REQUESTED
from topics.envelope import Received
from topics.events import Chain, ProvisionedWallet, WalletsProvisioned, WalletsRequested

WALLET_SET_NAME = "customers"


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, WalletsRequested)
    if not may_own(event.user_id):
        return Rejected("reserved_user", f"{event.user_id!r} is the company's own")
    missing = [
        chain.value
        for chain in dict.fromkeys(event.chains)
        if (known := facts.requests.get((event.user_id, chain.value))) is None or known.status != READY
    ]
    if not missing:
        return Done()
    request = {"user_id": event.user_id, "chains": missing}
    return Done(calls=(Call(item=",".join(missing), request=request, context={}),))


def conclude(call: StoredCall, reply: dict[str, Any] | Refused, now: Any) -> Outcome:
    """Circle's wallets, matched by refId and chain, never by position."""
    if isinstance(reply, Refused):
        return Rejected("partner_refused", str(reply))
    user_id = call.request["user_id"]
    found = {w["chain"]: w for w in reply["wallets"] if w["ref_id"] == user_id}
    wallets = []
    for chain in call.request["chains"]:
        wallet = found.get(chain)
        if wallet is None:
            return Retry("wallet_missing", 5.0)
        try:
            address = check_address(chain, wallet["address"])
        except ChainError as error:
            return Rejected("bad_address", f"Circle's wallet on {chain}: {error}")
        wallets.append(ProvisionedWallet(chain=Chain(chain), address=address, wallet_id=wallet["id"]))
    event = WalletsProvisioned(user_id=user_id, wallets=tuple(wallets))
    return Done(
        upserts=(
            *((WALLETS, (w.chain.value, w.address, user_id, w.wallet_id, now)) for w in wallets),
            *((WALLET_REQUESTS, WalletRequest(user_id, w.chain.value, READY, now, now)) for w in wallets),
        ),
        emits=(Emit(WALLETS_PROVISIONED, user_id, event, call.id),),
    )


class CircleWallets:
    """Performs the calls."""

    def __init__(self, client: CircleClient, network: Network, wallet_set_id: str | None) -> None:
        self._client = client
        self._network = network
        self._wallet_set_id = wallet_set_id

    async def perform(self, call: StoredCall) -> dict[str, Any]:
        """One create-wallets request with the call's key. Raises connectors.errors."""
        if self._wallet_set_id is None:
            # the same key on every start, so that an environment has one wallet set
            key = Acting.fixed_key(f"wallet set {WALLET_SET_NAME} {self._network}")
            self._wallet_set_id = await self._client.create_wallet_set(str(key), WALLET_SET_NAME)
        user_id = call.request["user_id"]
        wallets = await self._client.create_wallets(
            str(call.idempotency_key),
            self._wallet_set_id,
            [to_circle(Chain(chain), self._network) for chain in call.request["chains"]],
            [(user_id, user_id)],
        )
        return {
            "wallets": [
                {"id": w.id, "address": w.address, "ref_id": w.ref_id, "chain": chain.value}
                for w in wallets
                if (chain := from_circle(w.blockchain, self._network)) is not None
            ]
        }


def stage() -> Stage[Facts]:
    return Stage(
        name="provision_wallets",
        source=WALLETS_REQUESTED,
        load=load,
        decide=decide,
        fold=fold,
        partner="circle",
        operation="create_wallets",
        emits=(WALLETS_PROVISIONED,),
    )
