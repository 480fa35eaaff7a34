"""deposits.notified -> ledger: debit usdc_balance, credit system_buffer_usdc -> deposits.credited | .finalized | .parked

Decides:  whether a reported transfer is ours and in a supported token, which deposit it is, whom to credit and when (policy.py).
Key:      destination address, so one wallet's deposits stay in order.
Repeats:  harmless; the deposit's id is the n-th equal transfer of a transaction, whoever reports it.
Refuses:  unknown_wallet, unsupported_token, unknown_chain, bad_address, bad_tx_hash, transfer_changed, too_many_transfers
          ->  deposits.notified.dlq

On chains that we do not read ourselves the custodian's COMPLETE is finality: what finalize_deposits.py does elsewhere, the
mirror or the parking, is done here. So is the reversal, when the custodian says that a transfer has failed and its list says
so too: what is said of it later credits nothing, and what is final is not taken back. A credit is never taken back for its
sender's sake: where the deny-list's evidence comes after it, people are told and correct it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from agents.deposits.deposit import (
    CUSTODIAN,
    ENDED,
    EQUAL_MAX,
    SCANNER,
    Deposit,
    Report,
    Status,
    about,
    credited,
    deposit_id,
    finalized,
    parked,
    report_id,
)
from agents.deposits.evidence import TAKEN_BACK, has_failed, is_final, is_news, listed, look_again, proven, rank
from agents.deposits.facts import Facts, Loader, Named, fold, named, sender_of, takes_back
from agents.deposits.figures import count_credits
from agents.deposits.lookups import Lookups
from agents.deposits.policy import DepositPolicy, Held
from agents.deposits.reversal import cancel, reverse
from agents.outcome import Alert, Done, Emit, Outcome, Rejected, Retry, Stage
from chain.assets import is_supported
from chain.errors import ChainError
from ledger.accounts import shard_of
from ledger.errors import ClosedAccount, LimitExceeded, PostingRefused
from ledger.posting import Transaction
from ledger.rows import Row, Table
from ledger.tables import DEPOSIT_REPORTS, DEPOSITS
from topics.catalog import (
    DEPOSITS_CREDITED,
    DEPOSITS_FINALIZED,
    DEPOSITS_NOTIFIED,
    DEPOSITS_PARKED,
    WITHDRAWALS_SETTLED,
)
from topics.envelope import Received
from topics.events import DepositNotified, Evidence

__all__ = ["DepositPolicy", "Facts", "decide", "fold", "stage"]

NAME: Final = "credit_deposits"
_PENDING, _CREDITED = Status.PENDING.value, Status.CREDITED.value
_NOT_CREDITED = frozenset({Status.PENDING, Status.REVERSED, Status.VANISHED})


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, DepositNotified)
    names = named(event)
    if isinstance(names, ChainError):
        return Rejected(names.code, str(names))
    if not is_supported(event.chain, event.asset):
        return Rejected("unsupported_token", f"{event.asset} on {event.chain}")
    if (event.chain, names.to) not in facts.owners:
        if event.source not in (SCANNER, CUSTODIAN):
            return Rejected("unknown_wallet", f"{names.to} on {event.chain}")
        if (event.chain, sender_of(event)) in facts.ours:
            return Done()  # between wallets of ours: the mirror stays as it is
    failed = event.evidence is Evidence.FAILED
    if failed and not takes_back(event, facts.policy):
        return Done()
    known = facts.reports.get(names.report_id)
    if known is not None and known.group_id != names.group_id and event.source == SCANNER:
        # two endpoints have other logs in one place: the chain judges each of them
        names = names._replace(report_id=report_id(SCANNER, f"{event.transfer_id}:{names.group_id}"))
        known = facts.reports.get(names.report_id)
    if known is None:
        n = rank(event, facts.groups.get(names.group_id, ()))
        if n >= EQUAL_MAX:
            return Rejected("too_many_transfers", f"{EQUAL_MAX} equal transfers of one transaction at most")
        key = deposit_id(names.group_id, n)
    elif known.group_id != names.group_id:
        return Rejected("transfer_changed", f"{event.source} reported {event.transfer_id} with other contents before")
    elif not is_news(event.evidence, Evidence(known.evidence)):
        return Done()
    else:
        key = known.deposit_id
    report = Report(
        names.report_id, event.source, event.transfer_id, names.group_id, key, event.evidence.value,
        event.block_hash if event.source == SCANNER else None, facts.now,
    )  # fmt: skip
    before = facts.deposits.get(key)
    if failed and not has_failed(event, names, facts):
        return look_again(received, event)
    further = key != names.group_id and (before is None or before.status == _PENDING)
    if further and facts.looked is not None and is_final(event, facts.policy):
        n = before.n if before is not None else n
        if not listed(event, n, names, facts):
            return look_again(received, event)
    if before is None:
        return _vanished(event, n, names, report, facts) if failed else _first(event, n, names, report, facts)
    if failed:
        return _taken_back(before, report, facts, reported=known is not None)
    done = _advance(event, before, names, report, facts, reported=known is not None)
    if known is not None and known.evidence == Evidence.FAILED:
        done = done._replace(alerts=(*done.alerts, _contradicted(before, report)))
    return done


def ahead(received: Received) -> None:
    assert isinstance(received.event, DepositNotified)
    named(received.event)


def _first(event: DepositNotified, n: int, names: Named, report: Report, facts: Facts) -> Done:
    """A deposit that nobody has reported before. Nearly all are credited here: it is made once, as it will be."""
    policy, now, chain, amount = facts.policy, facts.now, event.chain, event.amount
    user_id, sender = facts.owners.get((chain, names.to)), sender_of(event)
    final = is_final(event, policy)
    sure = n == 0 or event.source == SCANNER or (final and listed(event, n, names, facts))
    plain = sure and not (policy.limited or facts.denied or facts.closed)  # as good as always: no further question
    why = None
    if not plain or user_id is None or amount < policy.minimum:
        why = _why_not(chain, amount, user_id, sender, sure, facts)
    waits = final or why is not None
    counted = None if waits or chain not in policy.outstanding_max else amount
    number = event.block_number
    if event.block_hash is None and chain in policy.chains_read:
        number = None  # to finality a number without a block is what was missed before
    deposit = Deposit(
        report.deposit_id, n, chain, names.tx_hash, names.to, event.asset, amount, user_id,
        _PENDING if waits else _CREDITED, 0 if waits else 1, shard_of(names.to, policy.buffer_shards),
        event.block_hash, number, event.log_index, None if waits else now, None, now, sender,
        None if why is None else why.value, counted,
    )  # fmt: skip
    if waits:
        return _told(None, report, facts, *_judged(event, deposit, sure, facts), reported=False)
    posting, emit = credited(deposit, policy.outstanding_max.get(chain))
    return _told(None, report, facts, deposit, (posting,), (emit,), reported=False)


def _advance(
    event: DepositNotified, before: Deposit, names: Named, report: Report, facts: Facts, *, reported: bool
) -> Done:
    """What this evidence makes of a known deposit."""
    after = before if before.status in ENDED else _placed(event, before, facts)
    if after.user_id is None and after.status in _NOT_CREDITED:
        after = after._replace(user_id=facts.owners.get((event.chain, names.to)))
    if after.sender is None and event.sender is not None:
        after = after._replace(sender=sender_of(event))
    if after != before:
        after = after._replace(updated_at=facts.now)
    if after.status in _NOT_CREDITED:
        made = _judged(event, after, proven(event, after, names, facts), facts)
    elif after.status == _CREDITED and is_final(event, facts.policy):
        made = _final(_Made(after), facts)
    else:
        made = _Made(after)
    return _told(before, report, facts, *made, reported=reported)


def _vanished(event: DepositNotified, n: int, names: Named, report: Report, facts: Facts) -> Done:
    """It failed before anything else was heard of it. What is said of it before comes too late to credit it."""
    now = facts.now
    deposit = Deposit(
        report.deposit_id, n, event.chain, names.tx_hash, names.to, event.asset, event.amount,
        facts.owners.get((event.chain, names.to)), Status.VANISHED.value, 0,
        shard_of(names.to, facts.policy.buffer_shards), event.block_hash, event.block_number, event.log_index,
        None, now, now, sender_of(event),
    )  # fmt: skip
    return Done(inserts=((DEPOSIT_REPORTS, report), (DEPOSITS, deposit)))


def _taken_back(before: Deposit, report: Report, facts: Facts, *, reported: bool) -> Done:
    """What becomes of a deposit that failed; one that is final stays."""
    if before.status in (Status.CREDITED, Status.ORPHANED):
        assert before.user_id is not None
        step = reverse(before, facts.purses[before.user_id].copy(), facts.now)
        gone = cancel(step.cancelled, facts.now, NAME)
        postings, emits = (*gone.postings, *step.postings), (*gone.emits, *step.emits)
        done = _told(before, report, facts, step.deposit, postings, emits, reported=reported)
        return done._replace(
            inserts=(*done.inserts, *gone.inserts), upserts=(*done.upserts, *gone.upserts), alerts=step.alerts
        )
    after = before
    if before.status == _PENDING:
        after = before._replace(status=Status.VANISHED.value, finalized_at=facts.now, updated_at=facts.now)
    done = _told(before, report, facts, after, (), (), reported=reported)
    return done._replace(alerts=(_contradicted(before, report),)) if before.status in ENDED else done


def _contradicted(deposit: Deposit, report: Report) -> Alert:
    """Another end of a transfer than the custodian told before: the first one stands."""
    said = {"status": deposit.status, "transfer_id": report.transfer_id, "evidence": report.evidence}
    return Alert("deposit_contradicted", about(deposit) | said)


class _Made(NamedTuple):
    """What becomes of a deposit."""

    deposit: Deposit
    postings: tuple[Transaction, ...] = ()
    emits: tuple[Emit, ...] = ()


def _refused(refusal: PostingRefused) -> Outcome:
    """The customer's account is closed, or another worker counted towards a customer's first counter at the same moment: the
    facts of the next attempt know. No function of the event's own: one for each credit would cost a third of the decision."""
    if isinstance(refusal, ClosedAccount | LimitExceeded):
        return Retry(refusal.code, 0.0)
    return Rejected(refusal.code, str(refusal))


def _told(
    before: Deposit | None,
    report: Report,
    facts: Facts,
    deposit: Deposit,
    postings: tuple[Transaction, ...],
    emits: tuple[Emit, ...],
    *,
    reported: bool,
) -> Done:
    """The decision, with its report. `reported`: the report is known, and this is better evidence of the same."""
    told: tuple[tuple[Table, Row], ...] = ((DEPOSIT_REPORTS, report),)
    row: tuple[tuple[Table, Row], ...] = ((DEPOSITS, deposit),)
    alerts = _alerts(before, deposit, facts) if facts.denied or deposit.user_id is None else ()
    if before is None:
        return Done(postings, told + row, (), emits, (), _refused, alerts)
    changed = row if deposit != before else ()
    if reported:
        return Done(postings, (), told + changed, emits, (), _refused, alerts)
    return Done(postings, told, changed, emits, (), _refused, alerts)


def _judged(event: DepositNotified, deposit: Deposit, sure: bool, facts: Facts) -> _Made:
    """What this evidence makes of a deposit that is not credited."""
    policy, chain, amount = facts.policy, deposit.chain, deposit.amount
    if not sure and deposit.status in TAKEN_BACK:
        return _Made(deposit)
    if sure and is_final(event, policy):
        parks = _parks(chain, amount, deposit.user_id, deposit.sender, facts)
        return _parked(deposit, parks, facts) if parks else _final(_credited(deposit, facts), facts)
    why = _why_not(chain, amount, deposit.user_id, deposit.sender, sure, facts)
    if why is not None:
        return _waiting(deposit, why, facts)
    bound = policy.outstanding_max.get(chain)
    return _credited(deposit._replace(held=None, counted=amount if bound is not None else None), facts, bound)


def _parks(chain: str, amount: int, user_id: str | None, sender: str | None, facts: Facts) -> Held | None:
    denied = (chain, sender) in facts.denied
    return facts.policy.parks(amount, user_id, denied=denied, closed=user_id in facts.closed)


def _why_not(chain: str, amount: int, user_id: str | None, sender: str | None, sure: bool, facts: Facts) -> Held | None:
    """Why a deposit is not credited at once."""
    why = _parks(chain, amount, user_id, sender, facts)
    if why is None and not sure:
        return Held.UNPROVEN
    return why or facts.policy.waits(chain, amount, facts.outstanding.get(user_id or "", 0))


def _waiting(deposit: Deposit, why: Held, facts: Facts) -> _Made:
    if (deposit.status, deposit.held) == (_PENDING, why.value):
        return _Made(deposit)
    return _Made(deposit._replace(status=_PENDING, held=why.value, updated_at=facts.now))


def _credited(deposit: Deposit, facts: Facts, bound: int | None = None) -> _Made:
    after = deposit._replace(
        status=_CREDITED,
        generation=deposit.generation + 1,
        credited_at=facts.now,
        finalized_at=None,
        updated_at=facts.now,
    )
    posting, emit = credited(after, bound)
    return _Made(after, (posting,), (emit,))


def _final(made: _Made, facts: Facts) -> _Made:
    after = made.deposit._replace(status=Status.FINALIZED.value, finalized_at=facts.now, updated_at=facts.now)
    after, posting, emit = finalized(after)
    return _Made(after, (*made.postings, posting), (*made.emits, emit))


def _parked(deposit: Deposit, why: Held, facts: Facts) -> _Made:
    after = deposit._replace(status=Status.PARKED.value, held=why.value, finalized_at=facts.now, updated_at=facts.now)
    posting, emit = parked(after)
    return _Made(after, (posting,), (emit,))


def _alerts(before: Deposit | None, after: Deposit, facts: Facts) -> tuple[Alert, ...]:
    """A denied sender, when it is first known; money whose owner nobody knows, when it is final."""
    alerts: tuple[Alert, ...] = ()
    if (before is None or before.sender is None) and (after.chain, after.sender) in facts.denied:
        late = after.status in (Status.CREDITED, Status.ORPHANED, Status.FINALIZED)
        alerts = (Alert("deposit_denied_after_credit" if late else "deposit_denied", about(after)),)
    if after.user_id is None and after.status == Status.PARKED and after != before and after.held == Held.UNKNOWN_OWNER:
        alerts = (*alerts, Alert("deposit_of_unknown_owner", about(after)))
    return alerts


def _placed(event: DepositNotified, deposit: Deposit, facts: Facts) -> Deposit:
    """Where the deposit is on its chain: our own reader knows best, others fill a gap. A reader that sees it again
    after it was missed takes it back from ORPHANED."""
    if event.source != SCANNER and (deposit.block_hash is not None or event.block_hash is None):
        return deposit
    status = deposit.status
    if event.source == SCANNER and status == Status.ORPHANED:
        status = _CREDITED
    return deposit._replace(
        block_hash=event.block_hash, block_number=event.block_number, log_index=event.log_index, status=status
    )


def stage(policy: DepositPolicy, lookups: Lookups | None = None) -> Stage[Facts]:
    """Without `lookups` what only a vendor counts on chains that we do not read stays pending."""

    async def nobody(_events: Sequence[Received]) -> None:
        return None

    return Stage(
        name=NAME,
        source=DEPOSITS_NOTIFIED,
        ahead=ahead,
        prepare=nobody if lookups is None else lookups.prepare,
        load=Loader(policy).load,
        decide=decide,
        fold=fold,
        figures=count_credits,
        bystanders=frozenset({"unsupported_token"}),  # whoever sends customers other tokens, for cents
        emits=(DEPOSITS_CREDITED, DEPOSITS_FINALIZED, DEPOSITS_PARKED, WITHDRAWALS_SETTLED),
    )
