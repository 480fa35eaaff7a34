"""What an operator may do to wallet provisioning: run a customer's job now, and give everybody a wallet on another chain.

Neither calls anybody: they queue, in one commit with its log, and the performers do the rest. So both may be repeated, and cut
off anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from agents.concluding import stored_calls
from agents.intents import OPEN, Member, StoredCall
from agents.onboarding import provision_wallets
from agents.onboarding.circle_wallets import users_of
from agents.onboarding.wallet_calls import NAME
from agents.onboarding.wallet_requests import FAILED, PENDING, Facts, WalletRequest, fold, load_users, queued
from agents.outcome import Done
from ledger.audit_logs import Log
from ledger.book import TRIES_MAX
from ledger.commit import OVERTAKEN, Sealed, lock_writer, seal
from ledger.rows import Changes, Connection, Row, Table
from ledger.sql import load
from ledger.tables import CALL_MEMBERS, CALLS, WALLET_REQUESTS
from topics.events import Chain, WalletsRequested

_sql = load("agents.onboarding", "control.sql")

WRITER: Final = "wallets"
PAGE: Final = 500


@dataclass(frozen=True, slots=True)
class Triggered:
    """What runs now for the customer."""

    user_id: str
    chains: tuple[str, ...]
    sealed: Sealed


async def trigger(connection: Connection, user_id: str, actor: str, at: datetime) -> Triggered | None:
    """Everything of the customer that failed or waits for its next attempt is due now. None for an unknown customer.

    A call that was never answered is opened again as it was, with its key and for all its members: the partner may have acted.
    What the partner refused is asked in a new one.
    """
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        ids = [row[0] for row in await connection.fetch(_sql.calls_of, NAME, user_id)]
        calls = await stored_calls(connection, dict.fromkeys(ids, 1))
        states = {UUID(str(key)): state for key, state in await connection.fetch(_sql.states, ids)}
        facts = await load_users(connection, {user_id, *(user for call in calls for user in users_of(call))}, at)
        if user_id not in facts.jobs and not facts.chains(user_id):
            return None
        before = facts.chains(user_id)
        rows: list[tuple[Table, Row]] = []
        due: list[str] = []
        for call in calls:
            if states[UUID(call.id)] == OPEN:
                due += [c for m in call.members if m.request["user_id"] == user_id for c in m.request["chains"]]
                rows.append((CALLS, call.row(provision_wallets.stage(), OPEN, None, None, call.error)))
            else:
                rows += _opened(facts, call)
        for one in rows:
            fold(facts, Done(upserts=(one,)))
        failed = [chain for chain, status in facts.chains(user_id).items() if status == FAILED]
        rows += wanted(facts, user_id, failed, f"trigger {facts.jobs[user_id].version if user_id in facts.jobs else 0}")
        now_due = [chain for chain, status in before.items() if chain in due or status == FAILED]
        log = Log(actor, "wallet_job.triggered", "wallet_job", user_id, {"chains": before}, {"due": now_due})
        sealed = await _commit(connection, owners, rows, at, actor, [log])
        await connection.execute(_sql.due_now, ids, at)
    return Triggered(user_id, tuple(now_due), sealed)


def _opened(facts: Facts, call: StoredCall) -> list[tuple[Table, Row]]:
    """A call that was given up, once more: its members wait for it again."""
    rows: list[tuple[Table, Row]] = []
    again = StoredCall(
        call.id, call.idempotency_key, call.request, call.members, call.created_at, call.generation,
        parent_id=call.parent_id,
    )  # fmt: skip
    rows.append((CALLS, again.row(provision_wallets.stage(), OPEN, None, None, None)))
    for member in call.members:
        user = member.request["user_id"]
        for chain in member.request["chains"]:
            known = facts.requests.get((user, chain))
            if known is not None and known.status == FAILED:
                rows.append((WALLET_REQUESTS, known._replace(status=PENDING, error=None)))
        rows += queued(facts, user)
    return rows


def wanted(facts: Facts, user_id: str, chains: Sequence[str], cause: str) -> list[tuple[Table, Row]]:
    """The rows by which performers will ask for these wallets. `cause` tells this wish from every other of the customer's."""
    if not chains:
        return []
    event = WalletsRequested(user_id=user_id, chains=tuple(Chain(chain) for chain in chains))
    name = hashlib.blake2b(f"{cause}\0{user_id}".encode(), digest_size=16, person=b"wanted").hexdigest()
    member = Member(
        name, ",".join(chains), {"user_id": user_id, "chains": list(chains)}, {}, event.model_dump(mode="json"), None,
        facts.now,
    )  # fmt: skip
    rows: list[tuple[Table, Row]] = [(CALL_MEMBERS, member.row(NAME, None))]
    for chain in chains:
        known = facts.requests.get((user_id, chain))
        since = known.requested_at if known else facts.now
        rows.append((WALLET_REQUESTS, WalletRequest(user_id, chain, PENDING, since, None)))
    return [*rows, *queued(facts, user_id)]


async def backfill(connection: Connection, chain: Chain, actor: str, clock: Any) -> AsyncIterator[tuple[int, int]]:
    """Queues a wallet on the chain for every customer who was never promised one: (done so far, still to do) after each
    commit. Rejected customers are left out."""
    done, after, tries = 0, "", 0
    while True:
        try:
            async with connection.transaction():
                users = await _backfill_page(connection, chain, after, actor, clock())
        except OVERTAKEN:  # one of them was promised a wallet meanwhile: the same page again
            tries += 1
            if tries == TRIES_MAX:
                raise
            continue
        if not users:
            return
        done, after, tries = done + len(users), users[-1], 0
        yield done, await connection.fetchval(_sql.count_without_chain, chain.value)


async def _backfill_page(connection: Connection, chain: Chain, after: str, actor: str, at: datetime) -> list[str]:
    """In a transaction. The customers of the page."""
    owners = await lock_writer(connection, WRITER)
    users: list[str] = [row[0] for row in await connection.fetch(_sql.without_chain, chain.value, after, PAGE)]
    if users:
        facts = await load_users(connection, set(users), at)
        rows: list[tuple[Table, Row]] = []
        for user in users:
            if (user, chain.value) not in facts.requests:
                rows += wanted(facts, user, [chain.value], f"backfill {chain}")
        log = Log(actor, "wallets.backfilled", "chain", chain.value, after={"customers": len(users)})
        await _commit(connection, owners, rows, at, actor, [log], new=WALLET_REQUESTS)
    return users


async def _commit(
    connection: Connection,
    owners: Any,
    rows: Sequence[tuple[Table, Row]],
    at: datetime,
    actor: str,
    logs: list[Log],
    new: Table | None = None,
) -> Sealed:
    """`new`: whose rows are not there. One that is by then was made by another since, and is not written over."""
    changes = Changes()
    for table, row in rows:
        (changes.insert if table is new else changes.upsert)(table, row)
    return await seal(
        connection, WRITER, owners, blocks=changes.blocks(), messages=[], at=at, actor=actor,
        summary={log.action: 1 for log in logs}, logs=logs,
    )  # fmt: skip
