"""kyc.approved -> kyc_standings, wallet_requests, wallet_provisioning_jobs -> wallets.requested, wallets.frozen

Decides:  which chains an approved customer still lacks a wallet on. A customer who was rejected before may withdraw again.
Key:      user id.
Repeats:  harmless; a chain that was requested is not requested again, whichever vendor approves. An approval that is older than
          a rejection does nothing.
Refuses:  reserved_user  ->  kyc.approved.dlq
"""

from __future__ import annotations

from agents.onboarding.kyc_standing import heard
from agents.onboarding.wallet_requests import REQUESTED, Facts, WalletRequest, fold, load, queued
from agents.outcome import Done, Emit, Outcome, Rejected, Stage
from ledger.accounts import may_own
from ledger.tables import WALLET_REQUESTS
from topics.catalog import KYC_APPROVED, WALLETS_FROZEN, WALLETS_REQUESTED
from topics.envelope import Received
from topics.events import Chain, KycApproved, WalletsRequested

NAME = "request_wallets"


def stage(chains: tuple[Chain, ...]) -> Stage[Facts]:
    """`chains`: those a new customer gets a wallet on."""

    def decide(received: Received, facts: Facts) -> Outcome:
        event = received.event
        assert isinstance(event, KycApproved)
        if not may_own(event.user_id):
            return Rejected("reserved_user", f"{event.user_id!r} is the company's own")
        done = heard(event, facts, NAME)
        if done is None:
            return Done()
        wanted = tuple(chain for chain in chains if (event.user_id, chain.value) not in facts.requests)
        if not wanted:
            return done
        request = WalletsRequested(user_id=event.user_id, chains=wanted)
        rows = tuple(
            (WALLET_REQUESTS, WalletRequest(event.user_id, chain.value, REQUESTED, facts.now, None)) for chain in wanted
        )
        return done._replace(
            inserts=(*done.inserts, *rows),
            upserts=(*done.upserts, *queued(facts, event.user_id)),
            emits=(*done.emits, Emit(WALLETS_REQUESTED, event.user_id, request, request.identity())),
        )

    return Stage(
        name=NAME,
        source=KYC_APPROVED,
        load=load,
        decide=decide,
        fold=fold,
        emits=(WALLETS_REQUESTED, WALLETS_FROZEN),
    )
