"""What the KYC vendor's word does to a customer: the last one counts, whichever arrives last."""

from __future__ import annotations

from datetime import UTC, datetime

from agents.onboarding.wallet_requests import APPROVED, REJECTED, Facts, Standing
from agents.outcome import Done, Emit
from ledger.audit_logs import Log
from ledger.tables import KYC_STANDINGS
from topics.catalog import WALLETS_FROZEN
from topics.events import KycApproved, KycRejected, WalletsFrozen


def heard(event: KycApproved | KycRejected, facts: Facts, actor: str) -> Done | None:
    """The rows, log and news of it; None where a later word is known. `wallets.frozen` is told where withdrawals begin or
    cease to be allowed, of a customer who was promised wallets."""
    rejected = isinstance(event, KycRejected)
    at = event.rejected_at if isinstance(event, KycRejected) else event.approved_at
    known = facts.standings.get(event.user_id)
    if known is not None and _later(known.decided_at, at):
        return None
    now = Standing(
        event.user_id, REJECTED if rejected else APPROVED, event.vendor, event.vendor_event_id, at, facts.now
    )
    was_rejected = known is not None and known.standing == REJECTED
    row = ((KYC_STANDINGS, now),)
    # the first word is inserted: one that the other stage hears at this moment is noticed
    done = Done(inserts=row) if known is None else Done(upserts=row)
    if was_rejected == rejected or not facts.chains(event.user_id):
        return done
    reason = "kyc_rejected" if rejected else "kyc_approved"
    news = WalletsFrozen(user_id=event.user_id, frozen=rejected, reason=reason, vendor_event_id=event.vendor_event_id)
    log = Log(
        actor, "wallets.frozen" if rejected else "wallets.unfrozen", "customer", event.user_id,
        {"standing": known.standing} if known else None, {"standing": now.standing, "vendor": event.vendor},
    )  # fmt: skip
    return done._replace(emits=(Emit(WALLETS_FROZEN, event.user_id, news, news.identity()),), logs=(log,))


def _later(one: str, other: str) -> bool:
    """Whether the first time is after the second; times that cannot be read follow the order of arrival."""
    times = _time(one), _time(other)
    return times[0] is not None and times[1] is not None and times[0] > times[1]


def _time(text: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
