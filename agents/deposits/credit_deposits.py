"""deposits.notified -> ledger: debit usdc_balance, credit system_buffer_usdc -> deposits.credited

Decides:  whether a reported transfer is ours, large enough and in a supported token, which deposit it is, whom to credit.
Key:      destination address, so one wallet's deposits stay in order.
Repeats:  harmless; the deposit's id is the n-th equal transfer of a transaction, whoever reports it.
Refuses:  unknown_wallet, unsupported_token, below_minimum, unknown_chain, bad_address, bad_tx_hash, transfer_changed,
          too_many_transfers
          ->  deposits.notified.dlq

On chains that we do not read ourselves the custodian's COMPLETE is finality: the mirror is posted here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from agents.deposits.deposit import (
    EQUAL_MAX,
    SCANNER,
    Deposit,
    Report,
    Status,
    credited,
    deposit_id,
    finalized,
    group_of,
    report_id,
)
from agents.deposits.figures import count_credits
from agents.outcome import Done, Emit, Outcome, Rejected, Stage
from chain.addresses import check_address, check_tx_hash
from chain.assets import is_supported
from chain.errors import ChainError
from ledger.accounts import shard_of
from ledger.posting import Transaction
from ledger.rows import Connection, Row, Table, uuids
from ledger.sql import load as load_sql
from ledger.tables import DEPOSIT_REPORTS, DEPOSITS
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_FINALIZED, DEPOSITS_NOTIFIED
from topics.envelope import Received
from topics.events import DepositNotified, Evidence

_sql = load_sql("agents.deposits", "deposits.sql")

_PENDING, _CREDITED, _REVERSED = Status.PENDING.value, Status.CREDITED.value, Status.REVERSED.value
_RANK = {Evidence.SEEN: 0, Evidence.CONFIRMED: 1, Evidence.COMPLETE: 2}
WALLETS_CACHED_MAX = 200_000
"""Wallets never change: a bounded cache saves their query. What is not known is asked again."""


@dataclass(frozen=True)
class DepositPolicy:
    minimum: int
    """Base units."""
    chains_read: frozenset[str]
    """Chains whose finality we judge ourselves."""
    buffer_shards: int = 1


@dataclass
class Facts:
    """What a batch knows, folded as it is decided."""

    now: datetime
    policy: DepositPolicy
    owners: Mapping[tuple[str, str], str]
    """(chain, address) -> user id."""
    reports: dict[str, Report] = field(default_factory=dict)
    groups: dict[str, list[Report]] = field(default_factory=dict)
    deposits: dict[str, Deposit] = field(default_factory=dict)

    def add(self, report: Report) -> None:
        """A report as it now is."""
        group = self.groups.setdefault(report.group_id, [])
        known = self.reports.get(report.id)
        if known is not None:
            group.remove(known)
        self.reports[report.id] = report
        group.append(report)


def fold(facts: Facts, done: Done) -> None:
    for rows in (done.inserts, done.upserts):
        for _, row in rows:
            if isinstance(row, Deposit):
                facts.deposits[row.id] = row
            elif isinstance(row, Report):
                facts.add(row)


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, DepositNotified)
    named = _named(event)
    if isinstance(named, ChainError):
        return Rejected(named.code, str(named))
    if not is_supported(event.chain, event.asset):
        return Rejected("unsupported_token", f"{event.asset} on {event.chain}")
    if event.amount < facts.policy.minimum:
        return Rejected("below_minimum", f"{event.amount} of at least {facts.policy.minimum} base units")
    user_id = facts.owners.get((event.chain, named.to))
    if user_id is None:
        return Rejected("unknown_wallet", f"{named.to} on {event.chain}")
    known = facts.reports.get(named.report_id)
    if known is None:
        n = _rank(event, facts.groups.get(named.group_id, ()))
        if n >= EQUAL_MAX:
            return Rejected("too_many_transfers", f"{EQUAL_MAX} equal transfers of one transaction at most")
        key = deposit_id(named.group_id, n)
    elif known.group_id != named.group_id:
        return Rejected("transfer_changed", f"{event.source} reported {event.transfer_id} with other contents before")
    elif _RANK[event.evidence] <= _RANK[Evidence(known.evidence)]:
        return Done()
    else:
        key = known.deposit_id
    report = Report(
        named.report_id, event.source, event.transfer_id, named.group_id, key, event.evidence.value,
        event.block_hash if event.source == SCANNER else None, facts.now,
    )  # fmt: skip
    before = facts.deposits.get(key)
    if before is None:
        return _first(event, n, named, user_id, report, facts)
    return _advance(event, before, report, facts, reported=known is not None)


class _Named(NamedTuple):
    """What an event names, in canonical spelling."""

    to: str
    tx_hash: str
    group_id: str
    report_id: str


def ahead(received: Received) -> None:
    assert isinstance(received.event, DepositNotified)
    _named(received.event)


def _named(event: DepositNotified) -> _Named | ChainError:
    return _identify(event.source, event.transfer_id, event.chain, event.to, event.tx_hash, event.asset, event.amount)


@lru_cache(maxsize=20_000)
def _identify(
    source: str, transfer_id: str, chain: str, to: str, tx_hash: str, asset: str, amount: int
) -> _Named | ChainError:
    """Remembered: it is asked ahead, for the facts and for the decision."""
    try:
        address, canonical = check_address(chain, to), check_tx_hash(chain, tx_hash)
    except ChainError as error:
        return error.with_traceback(None)  # remembered without the frames of whoever asked first
    return _Named(
        address, canonical, group_of(chain, canonical, address, asset, amount), report_id(source, transfer_id)
    )


def _first(event: DepositNotified, n: int, named: _Named, user_id: str, report: Report, facts: Facts) -> Done:
    """A deposit that nobody has reported before."""
    now, policy = facts.now, facts.policy
    creditable = _creditable(event, n, _PENDING, policy)
    deposit = Deposit(
        report.deposit_id, n, event.chain, named.tx_hash, named.to, event.asset, event.amount, user_id,
        _CREDITED if creditable else _PENDING, 1 if creditable else 0,
        shard_of(named.to, policy.buffer_shards),
        event.block_hash, event.block_number, event.log_index, now if creditable else None, None, now,
    )  # fmt: skip
    postings: tuple[Transaction, ...] = ()
    emits: tuple[Emit, ...] = ()
    if creditable:
        posting, emit = credited(deposit)
        postings, emits = (posting,), (emit,)
        if _is_final(event, policy):
            deposit, postings, emits = _finalize(deposit, postings, emits, now)
    return Done(postings, ((DEPOSIT_REPORTS, report), (DEPOSITS, deposit)), (), emits)


def _advance(event: DepositNotified, before: Deposit, report: Report, facts: Facts, *, reported: bool) -> Done:
    """What this evidence makes of a known deposit."""
    now, policy = facts.now, facts.policy
    postings: tuple[Transaction, ...] = ()
    emits: tuple[Emit, ...] = ()
    after = before if before.status == Status.FINALIZED else _placed(event, before, now)
    if after.status in (_PENDING, _REVERSED) and _creditable(event, after.n, after.status, policy):
        after = after._replace(status=_CREDITED, generation=after.generation + 1, credited_at=now, updated_at=now)
        posting, emit = credited(after)
        postings, emits = (posting,), (emit,)
    if after.status == _CREDITED and _is_final(event, policy):
        after, postings, emits = _finalize(after, postings, emits, now)
    told: tuple[tuple[Table, Row], ...] = ((DEPOSIT_REPORTS, report),)
    changed: tuple[tuple[Table, Row], ...] = ((DEPOSITS, after),) if after != before else ()
    if reported:
        return Done(postings, (), (*told, *changed), emits)
    return Done(postings, told, changed, emits)


def _is_final(event: DepositNotified, policy: DepositPolicy) -> bool:
    """Whether this is the end: the custodian's last word on a chain that we do not read."""
    return event.evidence is Evidence.COMPLETE and event.chain not in policy.chains_read


def _finalize(
    deposit: Deposit, postings: tuple[Transaction, ...], emits: tuple[Emit, ...], now: datetime
) -> tuple[Deposit, tuple[Transaction, ...], tuple[Emit, ...]]:
    after = deposit._replace(status=Status.FINALIZED.value, finalized_at=now, updated_at=now)
    posting, emit = finalized(after)
    return after, (*postings, posting), (*emits, emit)


def _placed(event: DepositNotified, deposit: Deposit, now: datetime) -> Deposit:
    """Where the deposit is on its chain: our own reader knows best, others fill a gap. A reader that sees it again
    after it was missed takes it back from ORPHANED."""
    if event.source != SCANNER and (deposit.block_hash is not None or event.block_hash is None):
        return deposit
    place = (event.block_hash, event.block_number, event.log_index)
    status = deposit.status
    if event.source == SCANNER and status == Status.ORPHANED:
        status = Status.CREDITED.value
    if place == (deposit.block_hash, deposit.block_number, deposit.log_index) and status == deposit.status:
        return deposit
    return deposit._replace(
        block_hash=place[0], block_number=place[1], log_index=place[2], status=status, updated_at=now
    )


def _creditable(event: DepositNotified, n: int, status: str, policy: DepositPolicy) -> bool:
    """The first of a group is credited on anyone's word, at once. A further one needs the chain's own logs; where we
    cannot read the chain, the custodian's COMPLETE. A reversed one needs our reader to have seen it mined again."""
    if event.source == SCANNER:
        return True
    return status != _REVERSED and (n == 0 or _is_final(event, policy))


def _rank(event: DepositNotified, reports: Sequence[Report]) -> int:
    """Which of the group's transfers a new report is: the source's next one. The reader counts within one block's hash,
    because a transaction that is mined again is reported anew."""
    return sum(
        1
        for report in reports
        if report.source == event.source and (event.source != SCANNER or report.block_hash == event.block_hash)
    )


class CreditDeposits:
    """Loads the facts; the wallets it has seen stay with it."""

    def __init__(self, policy: DepositPolicy) -> None:
        self._policy = policy
        self._owners: dict[tuple[str, str], str] = {}

    async def load(self, connection: Connection, events: Sequence[Received], _prepared: Any, at: datetime) -> Facts:
        wallets: set[tuple[str, str]] = set()
        groups: list[str] = []
        reports: list[str] = []
        for received in events:
            event = received.event
            assert isinstance(event, DepositNotified)
            named = _named(event)
            if isinstance(named, ChainError):
                continue  # decide refuses it
            wallets.add((event.chain, named.to))
            groups.append(named.group_id)
            reports.append(named.report_id)
        await self._learn(connection, wallets)
        facts = Facts(at, self._policy, self._owners)
        rows = await connection.fetch(_sql.reports, uuids(groups), uuids(reports))
        if rows:
            for row in rows:
                facts.add(Report(*row))
            ids = {report.deposit_id for report in facts.reports.values()}
            for row in await connection.fetch(_sql.locked, list(ids)):
                deposit = Deposit(*row)
                facts.deposits[deposit.id] = deposit._replace(amount=int(deposit.amount))
        return facts

    async def _learn(self, connection: Connection, wallets: set[tuple[str, str]]) -> None:
        unknown = [key for key in wallets if key not in self._owners]
        if not unknown:
            return
        if len(self._owners) + len(unknown) > WALLETS_CACHED_MAX:
            self._owners = {}
            unknown = list(wallets)
        rows = await connection.fetch(_sql.wallets, [c for c, _ in unknown], [a for _, a in unknown])
        self._owners.update({(chain, address): user_id for chain, address, user_id in rows})


def stage(policy: DepositPolicy) -> Stage[Facts]:
    return Stage(
        name="credit_deposits",
        source=DEPOSITS_NOTIFIED,
        ahead=ahead,
        load=CreditDeposits(policy).load,
        decide=decide,
        fold=fold,
        figures=count_credits,
        emits=(DEPOSITS_CREDITED, DEPOSITS_FINALIZED),
    )
