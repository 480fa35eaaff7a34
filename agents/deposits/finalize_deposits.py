"""chain.heads -> ledger: custody mirror, credit of what waited, parking, or the reversal -> deposits.finalized | .parked | .credited

Decides:  for every deposit that is deep enough under the new head, what the chain says of it now.
Key:      the chain.
Repeats:  harmless; a deposit that is further on is left alone.
Refuses:  nothing; what the endpoints cannot tell yet is asked again at the next head.

A deposit is final when two endpoints show it alike. A credited one that two do not show is first ORPHANED; it is reversed when,
at a later head, two, each past the deposit's depth, still have nothing (chain/evidence.py). A node that is behind is no
evidence. Where nobody named a block (it may not be mined yet, or not where we look), the depth is counted from the head at
which it was first missed. A transaction that moved and pays less often than before takes the deposits that it does not pay any
more along to its new block: they are judged by that block's depth. A reversal cancels withdrawals that are not signed, as far as it
needs them (reversal.py).

A pending deposit is judged in the same way: what the chain shows is credited and mirrored in one commit, or parked in suspense
where by now nobody is to be credited. What it does not show is in no block any more, and has VANISHED when it is missed again a
whole depth later: nobody has its money yet, so nothing hurries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, NamedTuple

import structlog

from agents.deposits.deposit import Deposit, Place, Status, about, credited, finalized, parked
from agents.deposits.facts import closed_of, denied_of, owners_of
from agents.deposits.figures import count_ends
from agents.deposits.policy import DepositPolicy, Held
from agents.deposits.reversal import Purse, cancel, lock_purses, reverse
from agents.looking import Kept
from agents.outcome import Alert, Done, Emit, Outcome, Stage
from agents.withdrawals.withdrawal import Withdrawal
from chain.evidence import Canonical, Finding, Moved, Undecided, find_transfers
from chain.rpc import Rpc
from chain.wire import QUANTITY_MAX
from ledger.commit import TRANSIENT
from ledger.posting import Transaction
from ledger.rows import Connection, Row, Table
from ledger.sql import load as load_sql
from ledger.tables import DEPOSITS
from topics.catalog import (
    CHAIN_HEADS,
    DEPOSITS_CREDITED,
    DEPOSITS_FINALIZED,
    DEPOSITS_PARKED,
    WITHDRAWALS_SETTLED,
)
from topics.envelope import Received
from topics.events import HeadSeen

_log = structlog.get_logger()
_sql = load_sql("agents.deposits", "deposits.sql")

NAME: Final = "finalize_deposits"
DUE_MAX: Final = 500
"""Deposits looked up under one head; the rest follows under the next."""
LOOKUPS_AT_ONCE: Final = 10
FAR_BLOCKS: Final = 1_000
FAR_S: Final = 600
"""A deposit so far above a head that is so much younger than its report is in no block that there is: it is looked for at once, not
when the chain gets there. An older head is of an endpoint that catches up."""


@dataclass(frozen=True)
class ChainReader:
    """A chain that we read ourselves."""

    rpcs: Sequence[Rpc]
    """All endpoints; two must agree before anything is final or taken back. A single one's word is all there is."""
    token: str
    depth_blocks: int


class Look(NamedTuple):
    """What the endpoints say of a deposit."""

    finding: Finding
    block_hash: str | None
    """Where the deposit was when they were asked: of one that is elsewhere by now it says nothing."""


@dataclass
class Facts:
    now: datetime
    looks: Mapping[str, Look]
    """By deposit id."""
    policy: DepositPolicy
    due: dict[str, list[Deposit]] = field(default_factory=dict)
    """Locked deposits by chain."""
    owners: Mapping[Place, str] = field(default_factory=dict)
    """Of the wallets of pending ones, as they are now."""
    denied: frozenset[Place] = frozenset()
    """Of the senders of pending ones, as they are now."""
    closed: frozenset[str] = frozenset()
    """Customers of pending ones whose account takes nothing any more."""
    purses: dict[str, Purse] = field(default_factory=dict)
    """Of the customers who may lose a deposit."""
    scanned: Mapping[str, int] = field(default_factory=dict)
    """Blocks that the scanner has read, by chain: the head of an event may be long past, in a replay or after an outage."""


class _Step(NamedTuple):
    """What becomes of one deposit."""

    deposit: Deposit
    postings: tuple[Transaction, ...] = ()
    emits: tuple[Emit, ...] = ()
    cancelled: tuple[Withdrawal, ...] = ()
    alerts: tuple[Alert, ...] = ()


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, HeadSeen)
    purses = {user: purse.copy() for user, purse in facts.purses.items()}
    head = max(event.number, facts.scanned.get(event.chain, 0))  # what is missed is given the whole depth from here
    steps = [
        step
        for deposit in facts.due.get(event.chain, ())
        if (step := _judge(deposit, facts.looks[deposit.id], head, facts, purses)) is not None
    ]
    upserts: list[tuple[Table, Row]] = []
    inserts: list[tuple[Table, Row]] = []
    postings: list[Transaction] = []
    emits: list[Emit] = []
    for step in steps:
        cancelled = cancel(step.cancelled, facts.now, NAME)
        upserts += cancelled.upserts
        inserts += cancelled.inserts
        postings += cancelled.postings
        emits += cancelled.emits
        upserts.append((DEPOSITS, step.deposit))
        postings += step.postings
        emits += step.emits
    return Done(
        tuple(postings), tuple(inserts), tuple(upserts), tuple(emits), alerts=tuple(a for s in steps for a in s.alerts)
    )


def _judge(deposit: Deposit, look: Look, head: int, facts: Facts, purses: dict[str, Purse]) -> _Step | None:
    """None: nothing changes. `purses` change with what is taken and given."""
    finding = look.finding
    if look.block_hash != deposit.block_hash:
        return None  # a report has placed it meanwhile: it is asked about again when that block is deep
    if isinstance(finding, Undecided) or deposit.status not in (Status.PENDING, Status.CREDITED, Status.ORPHANED):
        return None
    pending = deposit.status == Status.PENDING
    if isinstance(finding, Canonical | Moved) and len(finding.log_indexes) > deposit.n:
        placed = deposit._replace(
            status=deposit.status if pending else Status.CREDITED.value,
            block_hash=finding.block_hash,
            block_number=finding.block_number,
            log_index=finding.log_indexes[deposit.n],
            updated_at=facts.now,
        )
        if isinstance(finding, Moved):
            return _Step(placed)
        return _settle_pending(placed, facts, purses) if pending else _finalize(placed, facts)
    if isinstance(finding, Moved):  # with fewer equal transfers than were reported: judged when that block is deep
        moved_to = deposit._replace(
            status=deposit.status if pending else Status.ORPHANED.value,
            block_hash=finding.block_hash,
            block_number=finding.block_number,
            log_index=None,
            updated_at=facts.now,
        )
        return _Step(moved_to)
    if deposit.status == Status.CREDITED:
        since = head if deposit.block_number is None else min(deposit.block_number, head)
        return _Step(deposit._replace(status=Status.ORPHANED.value, block_number=since, updated_at=facts.now))
    missed_before = deposit.block_hash is None and deposit.block_number is not None  # in no block, but since a block
    if pending and not missed_before:
        return _Step(deposit._replace(block_hash=None, block_number=head, log_index=None, updated_at=facts.now))
    if pending:
        return _Step(deposit._replace(status=Status.VANISHED.value, finalized_at=facts.now, updated_at=facts.now))
    return _reverse(deposit, facts, purses)


def _finalize(deposit: Deposit, facts: Facts) -> _Step:
    after, posting, emit = finalized(
        deposit._replace(status=Status.FINALIZED.value, finalized_at=facts.now, updated_at=facts.now)
    )
    return _Step(after, (posting,), (emit,))


def _settle_pending(deposit: Deposit, facts: Facts, purses: dict[str, Purse]) -> _Step:
    """It is final, and was not credited: now or never."""
    place = (deposit.chain, deposit.recipient)
    deposit = deposit._replace(user_id=deposit.user_id or facts.owners.get(place))
    denied, closed = (deposit.chain, deposit.sender) in facts.denied, deposit.user_id in facts.closed
    why = facts.policy.parks(deposit.amount, deposit.user_id, denied=denied, closed=closed)
    if why is not None:
        return _park(deposit, why, facts.now)
    after = deposit._replace(
        status=Status.CREDITED.value, generation=deposit.generation + 1, credited_at=facts.now, updated_at=facts.now
    )
    credit, told = credited(after)
    if (purse := purses.get(after.user_id or "")) is not None:
        purse.spendable += after.amount
    final = _finalize(after, facts)
    return _Step(final.deposit, (credit, *final.postings), (told, *final.emits))


def _park(deposit: Deposit, why: Held, now: datetime) -> _Step:
    after = deposit._replace(status=Status.PARKED.value, held=why.value, finalized_at=now, updated_at=now)
    posting, emit = parked(after)
    alerts: tuple[Alert, ...] = ()
    if why is Held.UNKNOWN_OWNER:
        alerts = (Alert("deposit_of_unknown_owner", about(after)),)
    elif why is Held.DENIED and deposit.held != Held.DENIED:
        alerts = (Alert("deposit_denied", about(after)),)
    return _Step(after, (posting,), (emit,), alerts=alerts)


def _reverse(deposit: Deposit, facts: Facts, purses: dict[str, Purse]) -> _Step:
    assert deposit.user_id is not None
    return _Step(*reverse(deposit, purses[deposit.user_id], facts.now))


def fold(facts: Facts, done: Done) -> None:
    """What one head settled, the next head of the batch leaves alone."""
    after = {row.id: row for _, row in done.upserts if isinstance(row, Deposit)}
    for chain, due in facts.due.items():
        for deposit in due:
            row = after.get(deposit.id)
            purse = None if row is None else facts.purses.get(row.user_id or "")
            if row is None or purse is None:
                continue
            if row.status == Status.REVERSED:
                purse.take(row.amount)
            elif row.status == Status.FINALIZED and deposit.status == Status.PENDING:
                purse.spendable += row.amount
        facts.due[chain] = [deposit for deposit in due if deposit.id not in after]


class FinalizeDeposits:
    def __init__(
        self, chains: Mapping[str, ChainReader], policy: DepositPolicy, connect: Callable[[], Awaitable[Connection]]
    ) -> None:
        self._chains = chains
        self._policy = policy
        self._reading = Kept(connect)

    async def prepare(self, events: Sequence[Received]) -> Mapping[str, Look]:
        """Before the transaction: asks every endpoint about every deposit that is due under the newest heads."""
        heads: dict[str, tuple[int, int]] = {}
        """(number, time) of the newest."""
        for received in events:
            event = received.event
            assert isinstance(event, HeadSeen)
            if event.chain in self._chains:
                heads[event.chain] = max((event.number, event.timestamp_s), heads.get(event.chain, (0, 0)))
        looks: dict[str, Look] = {}
        limit = asyncio.Semaphore(LOOKUPS_AT_ONCE)
        for chain, (head, head_s) in heads.items():
            reader = self._chains[chain]

            async def look(
                rows: Sequence[Row],
                tx_hash: str,
                block_hash: str | None,
                reader: ChainReader = reader,
                head: int = head,
            ) -> None:
                transfers = [(recipient, int(amount)) for _, _, _, recipient, amount in rows]
                async with limit:
                    findings = await find_transfers(
                        reader.rpcs, tx_hash, block_hash, reader.token, transfers, head, reader.depth_blocks
                    )
                looks.update((row[0], Look(finding, block_hash)) for row, finding in zip(rows, findings, strict=True))

            try:
                async with self._reading.open() as connection:
                    far = min(head + FAR_BLOCKS, QUANTITY_MAX), float(head_s - FAR_S)
                    due = await connection.fetch(_sql.due, chain, head - reader.depth_blocks, DUE_MAX, *far)
            except TRANSIENT as error:
                _log.warning("finality.later", error=type(error).__name__)  # the next head asks again
                return looks
            together: dict[tuple[str, str | None], list[Row]] = {}
            for row in map(tuple, due):
                together.setdefault((row[1], row[2]), []).append(row)
            await asyncio.gather(*(look(rows, *key) for key, rows in together.items()))
        return looks

    async def load(
        self, connection: Connection, _events: Sequence[Received], looks: Mapping[str, Look], at: datetime
    ) -> Facts:
        facts = Facts(at, looks, self._policy)
        for row in await connection.fetch(_sql.locked, list(looks)):
            deposit = Deposit.read(row)
            facts.due.setdefault(deposit.chain, []).append(deposit)
        rows = await connection.fetch(_sql.scanned, list(facts.due))
        facts.scanned = dict(tuple(row) for row in rows)
        found = [deposit for due in facts.due.values() for deposit in due]
        pending = [deposit for deposit in found if deposit.status == Status.PENDING]
        if pending:
            facts.owners = await owners_of(connection, [(d.chain, d.recipient) for d in pending if d.user_id is None])
            facts.denied = await denied_of(connection, [(d.chain, d.sender) for d in pending if d.sender])
            users = {d.user_id for d in pending if d.user_id} | set(facts.owners.values())
            facts.closed = await closed_of(connection, users)
        losers = {
            d.user_id for d in found if d.status == Status.ORPHANED and _may_be_gone(looks[d.id].finding) and d.user_id
        }
        if losers:
            facts.purses = await lock_purses(connection, losers, found, facts.owners, at)
        return facts


def _may_be_gone(finding: Finding) -> bool:
    return not isinstance(finding, Undecided | Moved)


def stage(
    chains: Mapping[str, ChainReader], policy: DepositPolicy, connect: Callable[[], Awaitable[Connection]]
) -> Stage[Facts]:
    """`connect` opens a connection for reading what is due."""
    agent = FinalizeDeposits(chains, policy, connect)
    return Stage(
        name=NAME,
        source=CHAIN_HEADS,
        prepare=agent.prepare,
        load=agent.load,
        decide=decide,
        fold=fold,
        figures=count_ends,
        emits=(DEPOSITS_CREDITED, DEPOSITS_FINALIZED, DEPOSITS_PARKED, WITHDRAWALS_SETTLED),
    )
