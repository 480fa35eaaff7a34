"""wallets.requested -> calls to Circle, each for many customers -> wallets, wallet_requests, jobs -> wallets.provisioned

Decides:  which of the requested wallets nobody has been asked for yet, and claims them.
Key:      user id.
Repeats:  harmless; a chain of a customer is claimed once, a call has one idempotency key for life, and what Circle made is
          matched by our reference (refId) and chain, never by position.
Refuses:  reserved_user, what Circle refuses definitely (partner_refused), bad_address, address_taken, wallet_missing, no answer
          at all attempts (partner_unavailable, partner_outcome_unknown, partner_rate_limited)  ->  wallets.requested.dlq
"""

from __future__ import annotations

from agents.onboarding.wallet_calls import NAME
from agents.onboarding.wallet_requests import PENDING, REQUESTED, Facts, WalletRequest, fold, load, queued
from agents.outcome import Call, Done, Outcome, Rejected, Stage
from ledger.accounts import may_own
from ledger.rows import Row, Table
from ledger.tables import WALLET_REQUESTS
from topics.catalog import WALLETS_PROVISIONED, WALLETS_REQUESTED
from topics.envelope import Received
from topics.events import WalletsRequested


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, WalletsRequested)
    user_id = event.user_id
    if not may_own(user_id):
        return Rejected("reserved_user", f"{user_id!r} is the company's own")
    wanted: list[str] = []
    new: list[tuple[Table, Row]] = []
    rows: list[tuple[Table, Row]] = []
    for chain in dict.fromkeys(event.chains):
        known = facts.requests.get((user_id, chain.value))
        if known is None or known.status == REQUESTED:
            since = known.requested_at if known else facts.now
            wanted.append(chain.value)
            row = (WALLET_REQUESTS, WalletRequest(user_id, chain.value, PENDING, since, None))
            (new if known is None else rows).append(row)
    if not wanted:
        return Done()
    call = Call(item=",".join(wanted), request={"user_id": user_id, "chains": wanted}, context={})
    return Done(inserts=tuple(new), upserts=(*rows, *queued(facts, user_id)), calls=(call,))


def stage() -> Stage[Facts]:
    return Stage(
        name=NAME,
        source=WALLETS_REQUESTED,
        load=load,
        decide=decide,
        fold=fold,
        partner="circle",
        operation="create_wallets",
        emits=(WALLETS_PROVISIONED,),
    )
