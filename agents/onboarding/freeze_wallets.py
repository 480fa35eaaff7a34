"""kyc.rejected -> kyc_standings -> wallets.frozen

Decides:  whether this is the vendor's last word; then the customer withdraws nothing, while deposits are credited as ever.
Key:      user id.
Repeats:  harmless; an older word than the one that is known changes nothing, so approval and rejection may overtake each other.
Refuses:  reserved_user  ->  kyc.rejected.dlq
"""

from __future__ import annotations

from agents.onboarding.kyc_standing import heard
from agents.onboarding.wallet_requests import Facts, fold, load
from agents.outcome import Done, Outcome, Rejected, Stage
from ledger.accounts import may_own
from topics.catalog import KYC_REJECTED, WALLETS_FROZEN
from topics.envelope import Received
from topics.events import KycRejected

NAME = "freeze_wallets"


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, KycRejected)
    if not may_own(event.user_id):
        return Rejected("reserved_user", f"{event.user_id!r} is the company's own")
    return heard(event, facts, NAME) or Done()


def stage() -> Stage[Facts]:
    return Stage(
        name=NAME,
        source=KYC_REJECTED,
        load=load,
        decide=decide,
        fold=fold,
        emits=(WALLETS_FROZEN,),
    )
