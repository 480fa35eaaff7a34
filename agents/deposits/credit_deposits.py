"""deposits.notified -> ledger: debit usdc_balance, credit system_buffer_usdc -> deposits.credited

Decides:  whether a reported transfer is ours and in a supported token, which deposit it is, whom to credit and when (policy.py).
Key:      destination address, so one wallet's deposits stay in order.
Repeats:  harmless; the deposit's id is the n-th equal transfer of a transaction, whoever reports it.
Refuses:  unknown_wallet, unsupported_token, unknown_chain, bad_address, bad_tx_hash, transfer_changed, too_many_transfers
          ->  deposits.notified.dlq

On chains that we do not read ourselves the custodian's COMPLETE is finality: what finalize_deposits.py does elsewhere, the
mirror or the parking, is done here. A credit is never taken back for its sender's sake: where the deny-list's evidence comes
after it, people are told and correct it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from agents.deposits.deposit import (
    CUSTODIAN,
    ENDED,
    EQUAL_MAX,
    SCANNER,
    Deposit,
    Report,
    Status,
    credited,
    deposit_id,
    finalized,
    parked,
)
from agents.deposits.facts import Facts, Loader, Named, fold, named, sender_of
from agents.deposits.policy import DepositPolicy, Held
from agents.outcome import Alert, Done, Emit, Outcome, Rejected, Stage
from chain.assets import is_supported
from chain.errors import ChainError
from ledger.accounts import shard_of
from ledger.errors import ClosedAccount, LimitExceeded, PostingRefused
from ledger.posting import Transaction
from ledger.rows import Row, Table
from ledger.tables import DEPOSIT_REPORTS, DEPOSITS
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_FINALIZED, DEPOSITS_NOTIFIED, DEPOSITS_PARKED
from topics.envelope import Received
from topics.events import DepositNotified, Evidence

__all__ = ["DepositPolicy", "Facts", "decide", "fold", "stage"]

_PENDING, _CREDITED = Status.PENDING.value, Status.CREDITED.value
_NOT_CREDITED = frozenset({Status.PENDING, Status.REVERSED, Status.VANISHED})
_TAKEN_BACK = frozenset({Status.REVERSED, Status.VANISHED})
_RANK = {Evidence.SEEN: 0, Evidence.CONFIRMED: 1, Evidence.COMPLETE: 2}


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
    known = facts.reports.get(names.report_id)
    if known is None:
        n = _rank(event, facts.groups.get(names.group_id, ()))
        if n >= EQUAL_MAX:
            return Rejected("too_many_transfers", f"{EQUAL_MAX} equal transfers of one transaction at most")
        key = deposit_id(names.group_id, n)
    elif known.group_id != names.group_id:
        return Rejected("transfer_changed", f"{event.source} reported {event.transfer_id} with other contents before")
    elif _RANK[event.evidence] <= _RANK[Evidence(known.evidence)]:
        return Done()
    else:
        key = known.deposit_id
    report = Report(
        names.report_id, event.source, event.transfer_id, names.group_id, key, event.evidence.value,
        event.block_hash if event.source == SCANNER else None, facts.now,
    )  # fmt: skip
    before = facts.deposits.get(key)
    if before is None:
        return _settled(event, None, _first(event, n, names, key, facts), report, facts, reported=False)
    return _advance(event, before, names, report, facts, reported=known is not None)


def ahead(received: Received) -> None:
    assert isinstance(received.event, DepositNotified)
    named(received.event)


def _first(event: DepositNotified, n: int, names: Named, key: str, facts: Facts) -> Deposit:
    """A deposit that nobody has reported before."""
    return Deposit(
        key, n, event.chain, names.tx_hash, names.to, event.asset, event.amount,
        facts.owners.get((event.chain, names.to)), _PENDING, 0, shard_of(names.to, facts.policy.buffer_shards),
        event.block_hash, event.block_number, event.log_index, None, None, facts.now, sender_of(event),
    )  # fmt: skip


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
    return _settled(event, before, after, report, facts, reported=reported)


class _Made(NamedTuple):
    """What becomes of a deposit."""

    deposit: Deposit
    postings: tuple[Transaction, ...] = ()
    emits: tuple[Emit, ...] = ()


def _settled(
    event: DepositNotified, before: Deposit | None, deposit: Deposit, report: Report, facts: Facts, *, reported: bool
) -> Done:
    """The decision: the deposit judged, with its report."""

    def done(made: _Made) -> Done:
        told: tuple[tuple[Table, Row], ...] = ((DEPOSIT_REPORTS, report),)
        row: tuple[tuple[Table, Row], ...] = ((DEPOSITS, made.deposit),) if made.deposit != before else ()
        alerts = _alerts(before, made.deposit, facts)
        if before is None:
            return Done(made.postings, (*told, *row), (), made.emits, (), None, alerts)
        if reported:
            return Done(made.postings, (), (*told, *row), made.emits, (), None, alerts)
        return Done(made.postings, told, row, made.emits, (), None, alerts)

    def refused(refusal: PostingRefused) -> Outcome:
        """The customer's account is closed; or another worker counted towards a customer's first counter at this moment."""
        if isinstance(refusal, ClosedAccount) and _is_final(event, facts.policy):
            return done(_parked(deposit, Held.ACCOUNT_CLOSED, facts))
        if isinstance(refusal, ClosedAccount):
            return done(_waiting(deposit, Held.ACCOUNT_CLOSED, facts))
        if isinstance(refusal, LimitExceeded):
            return done(_waiting(deposit, Held.ABOVE_OUTSTANDING_LIMIT, facts))
        return Rejected(refusal.code, str(refusal))

    if deposit.status in _NOT_CREDITED:
        made = _judged(event, deposit, facts)
        return done(made)._replace(if_refused=refused) if made.deposit.status != _PENDING else done(made)
    if deposit.status == _CREDITED and _is_final(event, facts.policy):
        return done(_final(_Made(deposit), facts))
    return done(_Made(deposit))


def _judged(event: DepositNotified, deposit: Deposit, facts: Facts) -> _Made:
    """What this evidence makes of a deposit that is not credited."""
    policy, chain, amount = facts.policy, deposit.chain, deposit.amount
    proven = _proven(event, deposit, policy)
    if not proven and deposit.status in _TAKEN_BACK:
        return _Made(deposit)
    why = policy.parks(amount, deposit.user_id, denied=(chain, deposit.sender) in facts.denied)
    if proven and _is_final(event, policy):
        return _parked(deposit, why, facts) if why else _final(_credited(deposit, facts), facts)
    if why is None and not proven:
        why = Held.UNPROVEN
    if why is None:
        why = policy.waits(chain, amount, facts.outstanding.get(deposit.user_id or "", 0))
    if why is not None:
        return _waiting(deposit, why, facts)
    bound = policy.outstanding_max.get(chain)
    return _credited(deposit._replace(held=None, counted=amount if bound is not None else None), facts, bound)


def _waiting(deposit: Deposit, why: Held, facts: Facts) -> _Made:
    if (deposit.status, deposit.held) == (_PENDING, why.value):
        return _Made(deposit)
    return _Made(deposit._replace(status=_PENDING, held=why.value, updated_at=facts.now))


def _credited(deposit: Deposit, facts: Facts, bound: int | None = None) -> _Made:
    after = deposit._replace(
        status=_CREDITED, generation=deposit.generation + 1, credited_at=facts.now, finalized_at=None,
        updated_at=facts.now,
    )  # fmt: skip
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
    about = {"deposit_id": after.id, "chain": after.chain, "tx_hash": after.tx_hash}
    alerts: tuple[Alert, ...] = ()
    new = after.sender is not None and (before is None or before.sender is None)
    if new and (after.chain, after.sender) in facts.denied:
        late = after.status in (Status.CREDITED, Status.ORPHANED, Status.FINALIZED)
        alerts = (Alert("deposit_denied_after_credit" if late else "deposit_denied", about),)
    if after.status == Status.PARKED and after.held == Held.UNKNOWN_OWNER and after != before:
        alerts = (*alerts, Alert("deposit_of_unknown_owner", about))
    return alerts


def _is_final(event: DepositNotified, policy: DepositPolicy) -> bool:
    """Whether this is the end: the custodian's last word on a chain that we do not read."""
    return event.evidence is Evidence.COMPLETE and event.chain not in policy.chains_read


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


def _proven(event: DepositNotified, deposit: Deposit, policy: DepositPolicy) -> bool:
    """The first of a group is believed on anyone's word, at once. A further one needs the chain's own logs; where we
    cannot read the chain, the custodian's COMPLETE. One that was taken back needs our reader to have seen it mined again."""
    if event.source == SCANNER:
        return True
    return deposit.status not in _TAKEN_BACK and (deposit.n == 0 or _is_final(event, policy))


def _rank(event: DepositNotified, reports: Sequence[Report]) -> int:
    """Which of the group's transfers a new report is: the source's next one. The reader counts within one block's hash,
    because a transaction that is mined again is reported anew."""
    return sum(
        1
        for report in reports
        if report.source == event.source and (event.source != SCANNER or report.block_hash == event.block_hash)
    )


def stage(policy: DepositPolicy) -> Stage[Facts]:
    return Stage(
        name="credit_deposits",
        source=DEPOSITS_NOTIFIED,
        ahead=ahead,
        load=Loader(policy).load,
        decide=decide,
        fold=fold,
        emits=(DEPOSITS_CREDITED, DEPOSITS_FINALIZED, DEPOSITS_PARKED),
    )
