"""Calls for wallets: how customers become calls, and what Circle's answer means for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, Protocol

from agents.deeds import Deeds
from agents.intents import Again, Conclusion, Ended, Member, Part, StoredCall
from agents.onboarding import wallet_requests
from agents.onboarding.circle_wallets import CircleWallets, users_of
from agents.onboarding.wallet_requests import (
    COMPLETED,
    FAILED,
    IN_PROGRESS,
    PENDING,
    READY,
    REQUESTED,
    RETRY,
    Facts,
    Job,
    WalletRequest,
    moved,
)
from agents.outcome import Done, Emit, Rejected
from chain.addresses import check_address
from chain.errors import ChainError
from connectors.errors import Refused
from ledger.audit_logs import Log
from ledger.rows import Connection, Row, Table
from ledger.tables import WALLET_JOBS, WALLET_REQUESTS, WALLET_SETS, WALLETS
from topics.catalog import WALLETS_PROVISIONED
from topics.events import Chain, ProvisionedWallet, WalletsProvisioned

NAME: Final = "provision_wallets"
MISSING: Final = "wallet_missing"


class Figures(Protocol):
    """Where the figures of jobs go."""

    def job_ended(self, status: Any, seconds: float) -> None: ...
    def job_attempt_failed(self, error_type: str, *, again: bool) -> None: ...
    def wallet_created(self, chain: str) -> None: ...
    def jobs_active(self, jobs: int, *, running: bool) -> None: ...


@dataclass
class _Changes:
    """What one call changes, gathered customer by customer."""

    facts: Facts
    call: StoredCall
    upserts: list[tuple[Table, Row]] = field(default_factory=list)
    logs: list[Log] = field(default_factory=list)
    emits: list[Emit] = field(default_factory=list)
    letters: list[tuple[Member, Rejected]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    def customer(self, member: Member, wallets: Sequence[ProvisionedWallet], failed: dict[str, Rejected]) -> None:
        """Some chains of a customer are ready, some failed for good; others may still be with Circle."""
        user_id: str = member.request["user_id"]
        at, chains = self.facts.now, self.facts.chains(user_id)
        for wallet in wallets:
            chain = wallet.chain.value
            chains[chain] = READY
            self.upserts.append((WALLETS, (chain, wallet.address, user_id, wallet.wallet_id, at)))
            self.upserts.append((WALLET_REQUESTS, self._request(user_id, chain, READY, at, None)))
        for chain, why in failed.items():
            chains[chain] = FAILED
            self.upserts.append((WALLET_REQUESTS, self._request(user_id, chain, FAILED, None, why.code)))
        self.letters += [(member, why) for why in dict.fromkeys(failed.values())]
        error = next((why.code for why in failed.values()), None)
        states = set(chains.values())
        state = IN_PROGRESS if states & {REQUESTED, PENDING} else FAILED if FAILED in states else COMPLETED
        known = self.facts.jobs.get(user_id)
        job, log = moved(
            self.facts, user_id, NAME, "attempted" if state == IN_PROGRESS else state, chains,
            state=state, attempts=(known.attempts if known else 0) + 1, next_attempt_at=None,
            error=error or (known.error if known and state != COMPLETED else None),
            finished_at=None if state == IN_PROGRESS else at,
        )  # fmt: skip
        self.upserts.append((WALLET_JOBS, job))
        self.logs.append(log)
        if wallets:
            event = WalletsProvisioned(user_id=user_id, wallets=tuple(wallets))
            self.emits.append(Emit(WALLETS_PROVISIONED, user_id, event, f"{self.call.id}:{member.event_id}"))

    def _request(self, user_id: str, chain: str, status: str, ready: datetime | None, error: str | None) -> Row:
        known = self.facts.requests.get((user_id, chain))
        since = known.requested_at if known else self.facts.now
        return WalletRequest(user_id, chain, status, since, ready, error)

    def conclusion(self, *, failed: bool = False) -> Conclusion:
        traces = {f"{self.call.id}:{member.event_id}": member.traceparent for member in self.call.members}
        done = Done(upserts=tuple(self.upserts), emits=tuple(self.emits), logs=tuple(self.logs))
        return Conclusion(done, tuple(self.letters), tuple(self.parts), traces, failed)


class WalletDeeds(Deeds[Facts]):
    """Calls for wallets: up to `members_max` customers that want the same chains."""

    def __init__(self, circle: CircleWallets | None, members_max: int, attempts_max: int, figures: Figures) -> None:
        self._circle = circle
        self._members_max = members_max
        self._attempts_max = attempts_max
        self._figures = figures

    def group(self, members: Sequence[Member]) -> list[Sequence[Member]]:
        same: dict[tuple[str, ...], list[list[Member]]] = {}
        groups: list[Sequence[Member]] = []
        for member in members:
            some = same.setdefault(tuple(member.request["chains"]), [])
            if not some or len(some[-1]) == self._members_max:
                some.append([])
                groups.append(some[-1])
            some[-1].append(member)
        return groups

    def request(self, members: Sequence[Member]) -> dict[str, Any]:
        return {"user_ids": [m.request["user_id"] for m in members], "chains": members[0].request["chains"]}

    async def perform(self, call: StoredCall) -> dict[str, Any]:
        assert self._circle is not None
        return await self._circle.perform(call)

    async def load(self, connection: Connection, ended: Sequence[Ended], at: datetime) -> Facts:
        users = {user for one in ended for user in users_of(one.call)}
        facts = await wallet_requests.load_users(connection, users, at)
        places = [
            (wallet["chain"], address)
            for one in ended
            if isinstance(one.answer, dict)
            for wallet in one.answer.get("wallets", ())
            if (address := _address(wallet)) is not None
        ]
        if places:
            facts.owners = await wallet_requests.load_owners(connection, places)
        return facts

    def fold(self, facts: Facts, done: Done) -> None:
        wallet_requests.fold(facts, done)
        for table, row in done.upserts:
            if table is WALLETS:
                facts.owners[row[0], row[1]] = row[2]

    def began(self, call: StoredCall, facts: Facts) -> Done:
        rows: list[tuple[Table, Row]] = []
        logs = []
        for user_id in users_of(call):
            job, log = moved(
                facts, user_id, NAME, "started", facts.chains(user_id), state=IN_PROGRESS, started_at=facts.now,
                next_attempt_at=None,
            )  # fmt: skip
            rows.append((WALLET_JOBS, job))
            logs.append(log)
        return Done(upserts=tuple(rows), logs=tuple(logs))

    def put_off(self, call: StoredCall, again: Again, due: datetime, facts: Facts) -> Done:
        rows: list[tuple[Table, Row]] = []
        logs = []
        for user_id in users_of(call):
            known = facts.jobs.get(user_id)
            job, log = moved(
                facts, user_id, NAME, "put_off", facts.chains(user_id), state=RETRY, next_attempt_at=due,
                error=again.code, attempts=(known.attempts if known else 0) + again.counted,
            )  # fmt: skip
            rows.append((WALLET_JOBS, job))
            logs.append(log)
        return Done(upserts=tuple(rows), logs=tuple(logs))

    def conclude(self, call: StoredCall, reply: dict[str, Any] | Refused, facts: Facts) -> Conclusion | Again:
        """Circle's wallets, matched by refId and chain. What a refusal is about is found by asking for less."""
        changes = _Changes(facts, call)
        if isinstance(reply, Refused):
            _split(changes, call.members, Rejected("partner_refused", str(reply)))
            return changes.conclusion()
        found = {(w["ref_id"], w["chain"]): w for w in reply["wallets"]}
        refused = reply.get("refused")
        lacking: list[Member] = []
        taken = dict(facts.owners)
        for member in call.members:
            wallets, failed = _wallets(member, found, taken)
            missing = [c for c in member.request["chains"] if c not in failed and c not in {w.chain for w in wallets}]
            if missing:
                lacking.append(_narrowed(member, missing))
            if wallets or failed:
                changes.customer(member, wallets, failed)
        if lacking and refused is None:
            if call.error != MISSING:
                return Again(MISSING)  # Circle may be slow to show what it has made
            _ask_for_less(changes, lacking, self._attempts_max)
        elif lacking:
            _split(changes, lacking, Rejected("partner_refused", str(refused)))
        if set_id := reply.get("wallet_set_made"):
            changes.upserts.append((WALLET_SETS, (reply["network"], set_id, facts.now)))
        return changes.conclusion()

    def give_up(self, call: StoredCall, code: str, facts: Facts) -> Conclusion:
        changes = _Changes(facts, call)
        why = Rejected(code, f"no answer at {call.attempts} attempts")
        for member in call.members:
            changes.customer(member, (), dict.fromkeys(member.request["chains"], why))
        return changes.conclusion(failed=True)

    def committed(self, done: Done) -> None:
        for table, row in done.upserts:
            if table is WALLETS:
                self._figures.wallet_created(row[0])
            elif table is WALLET_JOBS:
                self._count(Job(*row))

    def _count(self, job: Job) -> None:
        if job.state == RETRY and job.error:
            self._figures.job_attempt_failed(job.error, again=True)
        elif job.state in (COMPLETED, FAILED):
            if job.state == FAILED:
                self._figures.job_attempt_failed(job.error or "unknown", again=False)
            since = job.started_at or job.created_at
            status = "success" if job.state == COMPLETED else "failed"
            self._figures.job_ended(status, (job.updated_at - since).total_seconds())

    def performing(self, calls: int, members: int) -> None:
        self._figures.jobs_active(members, running=True)

    def stopped(self) -> None:
        self._figures.jobs_active(0, running=False)


def _address(wallet: dict[str, Any]) -> str | None:
    try:
        return check_address(wallet["chain"], wallet["address"])
    except ChainError:
        return None


def _wallets(
    member: Member, found: dict[tuple[str, str], dict[str, Any]], taken: dict[tuple[str, str], str]
) -> tuple[list[ProvisionedWallet], dict[str, Rejected]]:
    """The customer's good wallets, and the chains whose wallet must not be used."""
    user_id: str = member.request["user_id"]
    good: list[ProvisionedWallet] = []
    failed: dict[str, Rejected] = {}
    for chain in member.request["chains"]:
        wallet = found.get((user_id, chain))
        if wallet is None:
            continue
        try:
            address = check_address(chain, wallet["address"])
        except ChainError as error:
            failed[chain] = Rejected("bad_address", f"Circle's wallet on {chain}: {error}")
            continue
        if taken.setdefault((chain, address), user_id) != user_id:
            failed[chain] = Rejected("address_taken", f"Circle's wallet on {chain} has another customer's address")
            continue
        good.append(ProvisionedWallet(chain=Chain(chain), address=address, wallet_id=wallet["id"]))
    return good, failed


def _narrowed(member: Member, chains: Sequence[str]) -> Member:
    """The same customer with fewer chains."""
    request = {"user_id": member.request["user_id"], "chains": list(chains)}
    return replace(member, item=",".join(chains), request=request)


def _split(changes: _Changes, members: Sequence[Member], why: Rejected) -> None:
    """Calls for less, after a refusal: half of the chains, then half of the customers, until one of one stands alone."""
    groups: dict[tuple[str, ...], list[Member]] = {}
    for member in members:
        groups.setdefault(tuple(member.request["chains"]), []).append(member)
    for chains, some in groups.items():
        if len(some) < len(changes.call.members) or len(chains) < len(changes.call.request["chains"]):
            changes.parts.append(Part(tuple(some)))
        elif len(chains) > 1:
            half = len(chains) // 2
            for part in (chains[:half], chains[half:]):
                changes.parts.append(Part(tuple(_narrowed(member, part) for member in some)))
        elif len(some) > 1:
            half = len(some) // 2
            changes.parts += [Part(tuple(some[:half])), Part(tuple(some[half:]))]
        else:
            changes.customer(some[0], (), {chains[0]: why})


def _ask_for_less(changes: _Changes, lacking: Sequence[Member], attempts_max: int) -> None:
    """What Circle does not show twice it has not made: a call of its own, for nothing but that."""
    attempts = changes.call.attempts + 1
    groups: dict[tuple[str, ...], list[Member]] = {}
    for member in lacking:
        groups.setdefault(tuple(member.request["chains"]), []).append(member)
    for chains, some in groups.items():
        if attempts < attempts_max:
            changes.parts.append(Part(tuple(some), attempts))
            continue
        why = Rejected(MISSING, f"Circle says it has made wallets and does not show them, at {attempts} attempts")
        for member in some:
            changes.customer(member, (), dict.fromkeys(chains, why))
