"""What `credit_deposits` knows when it decides: what an event names, and the rows of a batch, loaded and folded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Final, NamedTuple

from agents.deposits.deposit import CUSTODIAN, Deposit, Place, Report, Status, group_of, report_id
from agents.deposits.policy import DepositPolicy, outstanding_of
from agents.deposits.reversal import Purse, lock_purses
from agents.outcome import Done
from chain.addresses import EVM_CHAINS, check_address, check_tx_hash
from chain.errors import ChainError
from ledger.accounts import shard_of, spendable
from ledger.rows import Connection, uuids
from ledger.sql import load as load_sql
from ledger.store import lock_counters
from topics.envelope import Received
from topics.events import DepositNotified, Evidence

_sql = load_sql("agents.deposits", "deposits.sql")

WALLETS_CACHED_MAX: Final = 200_000
"""Wallets never change: a bounded cache saves their query. What is not known is asked again."""

_SETTLED: Final = frozenset({Status.CREDITED, Status.ORPHANED, Status.FINALIZED, Status.PARKED})


class Named(NamedTuple):
    """What an event names, in canonical spelling."""

    to: str
    tx_hash: str
    group_id: str
    report_id: str


@dataclass
class Facts:
    """What a batch knows, folded as it is decided."""

    now: datetime
    policy: DepositPolicy
    owners: Mapping[Place, str]
    """Wallets and whose they are, a user id."""
    reports: dict[str, Report] = field(default_factory=dict)
    groups: dict[str, list[Report]] = field(default_factory=dict)
    deposits: dict[str, Deposit] = field(default_factory=dict)
    denied: frozenset[Place] = frozenset()
    """Of the senders."""
    ours: frozenset[Place] = frozenset()
    """Of the senders to wallets without an owner: those that are wallets of ours too."""
    closed: frozenset[str] = frozenset()
    """Users of events that are here again: those whose account takes nothing any more."""
    looked: Mapping[str, Mapping[str, Evidence]] | None = field(default_factory=dict)
    """What the custodian lists of groups that may hold several transfers (lookups.py); None: there is nobody to ask."""
    outstanding: dict[str, int] = field(default_factory=dict)
    """User id -> credited and not final, of those with a bound."""
    purses: dict[str, Purse] = field(default_factory=dict)
    """Of the customers who may lose a deposit."""

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
                if facts.policy.outstanding_max:
                    _count(facts, row)
                if facts.purses:
                    _pay(facts, row)
                facts.deposits[row.id] = row
            elif isinstance(row, Report):
                facts.add(row)


def _count(facts: Facts, row: Deposit) -> None:
    before = facts.deposits.get(row.id)
    change = (row.counted or 0) - ((before.counted or 0) if before else 0)
    if change and row.user_id is not None:
        facts.outstanding[row.user_id] = facts.outstanding.get(row.user_id, 0) + change


def _pay(facts: Facts, row: Deposit) -> None:
    """What a deposit has given to its customer's purse, or taken from it."""
    before, purse = facts.deposits.get(row.id), facts.purses.get(row.user_id or "")
    if purse is None:
        return
    if row.generation > (before.generation if before else 0):
        purse.spendable += row.amount
    elif row.status == Status.REVERSED and before is not None and before.status != Status.REVERSED:
        purse.take(row.amount)


def takes_back(event: DepositNotified, policy: DepositPolicy) -> bool:
    """Whether it is the word that a transfer will never come, of whom we believe it: the custodian, where we do not read the
    chain."""
    return event.evidence is Evidence.FAILED and event.source == CUSTODIAN and event.chain not in policy.chains_read


def named(event: DepositNotified) -> Named | ChainError:
    return _identify(event.source, event.transfer_id, event.chain, event.to, event.tx_hash, event.asset, event.amount)


@lru_cache(maxsize=20_000)
def _identify(
    source: str, transfer_id: str, chain: str, to: str, tx_hash: str, asset: str, amount: int
) -> Named | ChainError:
    """Remembered: it is asked ahead, for the facts and for the decision."""
    try:
        address, canonical = check_address(chain, to), check_tx_hash(chain, tx_hash)
    except ChainError as error:
        return error.with_traceback(None)  # remembered without the frames of whoever asked first
    return Named(address, canonical, group_of(chain, canonical, address, asset, amount), report_id(source, transfer_id))


def sender_of(event: DepositNotified) -> str | None:
    """Where it came from, as the deny-list spells it. What is no address is on no list, and refuses nobody's deposit."""
    sender = event.sender
    return sender if sender is None or event.chain not in EVM_CHAINS else sender.lower()


class Loader:
    """Loads the facts; the wallets it has seen stay with it."""

    def __init__(self, policy: DepositPolicy) -> None:
        self._policy = policy
        self._owners: dict[Place, str] = {}

    async def load(
        self,
        connection: Connection,
        events: Sequence[Received],
        looked: Mapping[str, Mapping[str, Evidence]] | None,
        at: datetime,
    ) -> Facts:
        wallets: set[Place] = set()
        refused: set[Place] = set()
        senders: list[tuple[Place, Place]] = []
        groups: list[str] = []
        reports: list[str] = []
        failed = False
        for received in events:
            event = received.event
            assert isinstance(event, DepositNotified)
            names = named(event)
            if isinstance(names, ChainError):
                continue  # decide refuses it
            wallet = (event.chain, names.to)
            wallets.add(wallet)
            if received.attempt > 1:
                refused.add(wallet)
            groups.append(names.group_id)
            reports.append(names.report_id)
            failed = failed or takes_back(event, self._policy)
            sender = sender_of(event)
            if sender is not None:
                senders.append(((event.chain, sender), wallet))
        await self._learn(connection, wallets)
        facts = Facts(at, self._policy, self._owners, looked=looked)
        if senders:
            facts.denied = await denied_of(connection, [sender for sender, _ in senders])
            ownerless = [sender for sender, wallet in senders if wallet not in self._owners]
            if ownerless:
                facts.ours = await _places(connection, _sql.ours, ownerless)
        rows = await connection.fetch(_sql.reports, uuids(groups), uuids(reports))
        if rows:
            for row in rows:
                facts.add(Report(*row))
            ids = {report.deposit_id for report in facts.reports.values()}
            for row in await connection.fetch(_sql.locked, list(ids)):
                deposit = Deposit.read(row)
                facts.deposits[deposit.id] = deposit
            known = {(d.chain, d.sender) for d in facts.deposits.values() if d.sender and d.status not in _SETTLED}
            if known:  # said by an earlier report; this one may be silent
                facts.denied |= await denied_of(connection, known)
        if failed:
            await self._lock_purses(connection, facts, events)
        again = {self._owners[wallet] for wallet in refused if wallet in self._owners}
        if again:
            facts.closed = await closed_of(connection, again)
        bounds = self._policy.outstanding_max
        bounded = {self._owners[wallet] for wallet in wallets if wallet[0] in bounds and wallet in self._owners}
        if bounded:
            # locked before they are counted towards, so that what is decided is what the ledger will say
            counters = await lock_counters(connection, [outstanding_of(user) for user in bounded])
            facts.outstanding = {user: counters.get(outstanding_of(user), 0) for user in bounded}
        return facts

    async def _lock_purses(self, connection: Connection, facts: Facts, events: Sequence[Received]) -> None:
        """The purses of those who may lose a deposit, locked with all that the whole batch may post: else two batches could
        wait for each other."""
        policy, due, losers = self._policy, list(facts.deposits.values()), set[str]()
        for received in events:
            event = received.event
            assert isinstance(event, DepositNotified)
            names = named(event)
            if isinstance(names, ChainError):
                continue  # decide refuses it
            user = self._owners.get((event.chain, names.to))
            due.append(
                Deposit(
                    names.group_id, 0, event.chain, names.tx_hash, names.to, event.asset, event.amount, user,
                    Status.PENDING.value, 1, shard_of(names.to, policy.buffer_shards),
                    None, None, None, None, None, facts.now,
                    counted=event.amount if user is not None and event.chain in policy.outstanding_max else None,
                )
            )  # fmt: skip
            if takes_back(event, policy):
                known = facts.reports.get(names.report_id)
                deposit = None if known is None else facts.deposits.get(known.deposit_id)
                losers.update(one for one in (user, deposit and deposit.user_id) if one)
        facts.purses = await lock_purses(connection, losers, due, self._owners, facts.now)

    async def _learn(self, connection: Connection, wallets: set[Place]) -> None:
        unknown = [key for key in wallets if key not in self._owners]
        if not unknown:
            return
        if len(self._owners) + len(unknown) > WALLETS_CACHED_MAX:
            self._owners = {}
            unknown = list(wallets)
        self._owners.update(await owners_of(connection, unknown))


async def owners_of(connection: Connection, wallets: Sequence[Place]) -> dict[Place, str]:
    """Of these wallets, those that have an owner."""
    rows = await connection.fetch(_sql.wallets, [c for c, _ in wallets], [a for _, a in wallets])
    return {(chain, address): user_id for chain, address, user_id in rows}


async def closed_of(connection: Connection, users: Iterable[str]) -> frozenset[str]:
    """Of these customers, those whose balance is closed."""
    rows = await connection.fetch(_sql.closed, [spendable(user).id for user in users])
    return frozenset(row[0] for row in rows)


async def denied_of(connection: Connection, places: Iterable[Place]) -> frozenset[Place]:
    """Of these addresses, those on the deny-list."""
    return await _places(connection, _sql.denied, places)


async def _places(connection: Connection, query: str, places: Iterable[Place]) -> frozenset[Place]:
    asked = list(places)
    rows = await connection.fetch(query, [c for c, _ in asked], [a for _, a in asked])
    return frozenset((chain, address) for chain, address in rows)
