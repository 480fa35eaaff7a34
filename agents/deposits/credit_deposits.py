"""deposits.notified -> ledger: debit usdc_balance, credit system_buffer_usdc -> deposits.credited

Decides:  whether a reported transfer is ours, large enough and in a supported token, which deposit it is, whom to credit.
Key:      destination address, so one wallet's deposits stay in order.
Repeats:  harmless; the deposit's id is the n-th equal transfer of a transaction, whoever reports it.
Refuses:  unknown_wallet, unsupported_token, below_minimum, unknown_chain, bad_address, bad_tx_hash, transfer_changed
          ->  deposits.notified.dlq

On chains that we do not read ourselves the custodian's COMPLETE is finality: the mirror is posted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

from agents.deposits.deposit import (
    SCANNER,
    Deposit,
    Report,
    Status,
    credited,
    deposit_id,
    finalized,
    group_of,
)
from agents.outcome import Done, Outcome, Rejected, Stage
from chain.addresses import check_address, check_tx_hash
from chain.assets import is_supported
from chain.errors import ChainError
from ledger.accounts import shard_of
from ledger.rows import Connection, Row, Table, texts, uuids
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
    owners: dict[tuple[str, str], str]
    """(chain, address) -> user id."""
    reports: dict[tuple[str, str], Report] = field(default_factory=dict)
    groups: dict[str, list[Report]] = field(default_factory=dict)
    deposits: dict[str, Deposit] = field(default_factory=dict)

    def add(self, report: Report) -> None:
        """A report as it now is."""
        known = self.reports.get((report.source, report.transfer_id))
        self.reports[(report.source, report.transfer_id)] = report
        group = self.groups.setdefault(report.group_id, [])
        if known is not None:
            group.remove(known)
        group.append(report)


def fold(facts: Facts, done: Done) -> None:
    for table, row in (*done.inserts, *done.upserts):
        if table is DEPOSITS:
            facts.deposits[row[0]] = Deposit(*row)
        elif table is DEPOSIT_REPORTS:
            facts.add(Report(*row))


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, DepositNotified)
    try:
        to, tx_hash, group_id = _identify(event.chain, event.to, event.tx_hash, event.asset, event.amount)
    except ChainError as error:
        return Rejected(error.code, str(error))
    if not is_supported(event.chain, event.asset):
        return Rejected("unsupported_token", f"{event.asset} on {event.chain}")
    if event.amount < facts.policy.minimum:
        return Rejected("below_minimum", f"{event.amount} of at least {facts.policy.minimum} base units")
    user_id = facts.owners.get((event.chain, to))
    if user_id is None:
        return Rejected("unknown_wallet", f"{to} on {event.chain}")
    known = facts.reports.get((event.source, event.transfer_id))
    if known is not None and known.group_id != group_id:
        return Rejected("transfer_changed", f"{event.source} reported {event.transfer_id} with other contents before")
    if known is not None and _RANK[event.evidence] <= _RANK[Evidence(known.evidence)]:
        return Done()
    n = _rank(event, facts.groups.get(group_id, ())) if known is None else _n_of(known, facts)
    key = deposit_id(group_id, n)
    report = Report(
        event.source,
        event.transfer_id,
        group_id,
        key,
        event.evidence.value,
        event.block_hash,
        event.block_number,
        event.log_index,
        facts.now,
    )
    before = facts.deposits.get(key)
    if before is None:
        shard = shard_of(to, facts.policy.buffer_shards)
        before = Deposit(
            key, group_id, n, event.chain, tx_hash, to, event.asset, event.amount, user_id, _PENDING,
            0, shard, event.block_hash, event.block_number, event.log_index, None, None, facts.now,
        )  # fmt: skip
        fresh = True
    else:
        fresh = False
    return _advance(event, before, report, facts, fresh=fresh, reported=known is not None)


@lru_cache(maxsize=20_000)
def _identify(chain: str, to: str, tx_hash: str, asset: str, amount: int) -> tuple[str, str, str]:
    """-> canonical address and hash, group id. Raises ChainError. Remembered: a batch asks twice."""
    address, canonical = check_address(chain, to), check_tx_hash(chain, tx_hash)
    return address, canonical, group_of(chain, canonical, address, asset, amount)


def _advance(
    event: DepositNotified, deposit: Deposit, report: Report, facts: Facts, *, fresh: bool, reported: bool
) -> Done:
    """What this evidence makes of the deposit."""
    postings, emits = [], []
    after = deposit
    if not fresh and deposit.status != Status.FINALIZED:
        after = _placed(event, deposit, facts.now)
    if after.status in (_PENDING, _REVERSED) and _creditable(event, after, facts.policy):
        after = after._replace(
            status=_CREDITED, generation=after.generation + 1, credited_at=facts.now, updated_at=facts.now
        )
        posting, emit = credited(after)
        postings.append(posting)
        emits.append(emit)
    if (
        after.status == _CREDITED
        and event.evidence is Evidence.COMPLETE
        and event.chain not in facts.policy.chains_read
    ):
        after = after._replace(status=Status.FINALIZED.value, finalized_at=facts.now, updated_at=facts.now)
        posting, emit = finalized(after)
        postings.append(posting)
        emits.append(emit)
    rows: list[tuple[Table, Row]] = [] if reported else [(DEPOSIT_REPORTS, report)]
    changed: list[tuple[Table, Row]] = [(DEPOSIT_REPORTS, report)] if reported else []
    if fresh:
        rows.append((DEPOSITS, after))
    elif after != deposit:
        changed.append((DEPOSITS, after))
    return Done(postings=tuple(postings), inserts=tuple(rows), upserts=tuple(changed), emits=tuple(emits))


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


def _creditable(event: DepositNotified, deposit: Deposit, policy: DepositPolicy) -> bool:
    """The first of a group is credited on anyone's word, at once. A further one needs the chain's own logs; where we
    cannot read the chain, the custodian's COMPLETE. A reversed one needs our reader to have seen it mined again."""
    if event.source == SCANNER:
        return True
    if deposit.status == Status.REVERSED:
        return False
    return deposit.n == 0 or (event.evidence is Evidence.COMPLETE and event.chain not in policy.chains_read)


def _rank(event: DepositNotified, reports: Sequence[Report]) -> int:
    """Which of the group's transfers a new report is: the source's next one. The reader counts within one block's hash,
    because a transaction that is mined again is reported anew."""
    return sum(
        1
        for report in reports
        if report.source == event.source and (event.source != SCANNER or report.block_hash == event.block_hash)
    )


def _n_of(report: Report, facts: Facts) -> int:
    return facts.deposits[report.deposit_id].n


class CreditDeposits:
    """Loads the facts; the wallets it has seen stay with it."""

    def __init__(self, policy: DepositPolicy) -> None:
        self._policy = policy
        self._owners: dict[tuple[str, str], str] = {}

    async def load(self, connection: Connection, events: Sequence[Received], _prepared: Any, at: datetime) -> Facts:
        wallets: set[tuple[str, str]] = set()
        groups: set[str] = set()
        transfers: set[tuple[str, str]] = set()
        for received in events:
            event = received.event
            assert isinstance(event, DepositNotified)
            try:
                to, _, group_id = _identify(event.chain, event.to, event.tx_hash, event.asset, event.amount)
            except ChainError:
                continue  # decide refuses it
            wallets.add((event.chain, to))
            groups.add(group_id)
            transfers.add((event.source, event.transfer_id))
        await self._learn(connection, wallets)
        facts = Facts(at, self._policy, {key: self._owners[key] for key in wallets if key in self._owners})
        pairs = list(transfers)
        rows = await connection.fetch(
            _sql.reports, uuids(groups), texts([s for s, _ in pairs]), texts([t for _, t in pairs])
        )
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
            self._owners.clear()
            unknown = list(wallets)
        rows = await connection.fetch(_sql.wallets, [c for c, _ in unknown], [a for _, a in unknown])
        self._owners.update({(chain, address): user_id for chain, address, user_id in rows})


def stage(policy: DepositPolicy) -> Stage[Facts]:
    return Stage(
        name="credit_deposits",
        source=DEPOSITS_NOTIFIED,
        load=CreditDeposits(policy).load,
        decide=decide,
        fold=fold,
        emits=(DEPOSITS_CREDITED, DEPOSITS_FINALIZED),
    )
