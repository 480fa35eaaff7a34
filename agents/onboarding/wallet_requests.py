"""The rows of wallet provisioning: which wallets a customer was promised (`wallet_requests`), and the job that makes them.

    chain:  requested ─▶ pending ─▶ ready | failed        job:  queued ─▶ in_progress ⇄ retry ─▶ completed | failed

A chain is claimed once, by the commit that makes it pending: whoever asks again for it finds it claimed. The job is one row per
customer; a chain added later, and an operator's trigger, queue it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from agents.outcome import Done
from ledger.audit_logs import Log
from ledger.rows import Connection, Row, Table
from ledger.sql import load as load_sql
from ledger.tables import KYC_STANDINGS, WALLET_JOBS, WALLET_REQUESTS
from topics.envelope import Received
from topics.events import Chain, KycApproved, KycRejected, WalletsRequested

_sql = load_sql("agents.onboarding", "onboarding.sql")

REQUESTED = "requested"
PENDING = "pending"
READY = "ready"
FAILED = "failed"

APPROVED = "approved"
REJECTED = "rejected"

QUEUED = "queued"
IN_PROGRESS = "in_progress"
RETRY = "retry"
COMPLETED = "completed"


class WalletRequest(NamedTuple):
    user_id: str
    chain: str
    status: str
    requested_at: datetime
    ready_at: datetime | None
    error: str | None = None


class Job(NamedTuple):
    user_id: str
    state: str
    attempts: int
    """Ended ones, since it was last queued."""
    error: str | None
    """Of the last attempt that failed."""
    created_at: datetime
    started_at: datetime | None
    next_attempt_at: datetime | None
    finished_at: datetime | None
    updated_at: datetime
    version: int


class Standing(NamedTuple):
    """The KYC vendor's last word on a customer."""

    user_id: str
    standing: str
    vendor: str
    vendor_event_id: str
    decided_at: str
    """In the vendor's words."""
    changed_at: datetime


@dataclass
class Facts:
    now: datetime
    requests: dict[tuple[str, str], WalletRequest] = field(default_factory=dict)
    """(user id, chain) -> its row."""
    jobs: dict[str, Job] = field(default_factory=dict)
    standings: dict[str, Standing] = field(default_factory=dict)
    owners: dict[tuple[str, str], str] = field(default_factory=dict)
    """(chain, address) -> whose it is already."""

    def chains(self, user_id: str) -> dict[str, str]:
        """Chain -> status."""
        return {c.value: row.status for c in Chain if (row := self.requests.get((user_id, c.value))) is not None}


async def load(connection: Connection, events: Sequence[Received], _prepared: Any, at: datetime) -> Facts:
    """The rows of the events' customers, locked."""
    users = {r.event.user_id for r in events if isinstance(r.event, KycApproved | KycRejected | WalletsRequested)}
    facts = await load_users(connection, users, at)
    if any(not isinstance(r.event, WalletsRequested) for r in events):
        rows = [Standing(*row) for row in await connection.fetch(_sql.standings, sorted(users))]
        facts.standings = {row.user_id: row for row in rows}
    return facts


async def load_users(connection: Connection, users: set[str], at: datetime) -> Facts:
    known = sorted(users)
    requests = [WalletRequest(*row) for row in await connection.fetch(_sql.requests, known)]
    jobs = [Job(*row) for row in await connection.fetch(_sql.jobs, known)]
    return Facts(at, {(row.user_id, row.chain): row for row in requests}, {job.user_id: job for job in jobs})


async def load_owners(connection: Connection, places: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """(chain, address) -> user id, of those that are somebody's."""
    rows = await connection.fetch(_sql.owners, [chain for chain, _ in places], [address for _, address in places])
    return {(chain, address): user for chain, address, user in rows}


def fold(facts: Facts, done: Done) -> None:
    for table, row in (*done.inserts, *done.upserts):
        if table is WALLET_REQUESTS:
            facts.requests[(row[0], row[1])] = WalletRequest(*row)
        elif table is WALLET_JOBS:
            facts.jobs[row[0]] = Job(*row)
        elif table is KYC_STANDINGS:
            facts.standings[row[0]] = Standing(*row)


def queued(facts: Facts, user_id: str) -> tuple[tuple[Table, Row], ...]:
    """The customer's job, to be done (again); nothing when it is under way."""
    job = facts.jobs.get(user_id)
    if job is None:
        new = Job(user_id, QUEUED, 0, None, facts.now, None, None, None, facts.now, 1)
        return ((WALLET_JOBS, new),)
    if job.state not in (COMPLETED, FAILED):
        return ()
    again = job._replace(
        state=QUEUED, attempts=0, error=None, started_at=None, next_attempt_at=None, finished_at=None,
        updated_at=facts.now, version=job.version + 1,
    )  # fmt: skip
    return ((WALLET_JOBS, again),)


def moved(facts: Facts, user_id: str, actor: str, what: str, chains: dict[str, str], **changes: Any) -> tuple[Job, Log]:
    """The customer's job changed, and the log of it. `chains`: their states after this commit."""
    before = facts.jobs.get(user_id) or Job(user_id, QUEUED, 0, None, facts.now, None, None, None, facts.now, 0)
    after = before._replace(**changes, updated_at=facts.now, version=before.version + 1)
    failed = changes.get("error")
    log = Log(
        actor, f"wallet_job.{what}", "wallet_job", user_id, _shown(before, facts.chains(user_id)), _shown(after, chains),
        "refused" if failed else "done", failed,
    )  # fmt: skip
    return after, log


def _shown(job: Job, chains: dict[str, str]) -> dict[str, Any]:
    return {"state": job.state, "attempts": job.attempts, "chains": chains}
