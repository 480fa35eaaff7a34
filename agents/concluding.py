"""The commits of an acting stage: calls are made of waiting members, put off, concluded, split.

| commit | what | why there |
| --- | --- | --- |
| intend | waiting members become calls, with leases; the rows that say so | the next thing is the journal, then the partner |
| end | every call that has ended meanwhile: its rows and messages, and the calls made of its parts | one commit for all that waited |

A call's row is locked first, and only who still has the lease that it took ends the call or counts an attempt.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any
from uuid import UUID

import orjson
import structlog

from agents.deeds import Deeds
from agents.intents import OPEN, Again, Conclusion, Ended, Member, StoredCall, form
from agents.outcome import Done, Rejected, Stage
from connectors.errors import ConnectorCode, Refused
from ledger.audit_logs import Log
from ledger.commit import Sealed, lock_writer, seal
from ledger.record import Message
from ledger.rows import Changes, Connection
from ledger.sql import load
from ledger.tables import CALL_MEMBERS, CALLS
from topics.envelope import value_of

_log = structlog.get_logger()
_sql = load("agents", "acting.sql")


@dataclass(frozen=True)
class CallPolicy:
    """How a partner is called. Seconds."""

    timeout_s: float = 15.0
    lease_s: float = 60.0
    """Longer than the time-out and the wait for the partner's rate: while it runs nobody else performs the call."""
    rate_per_s: float = 10.0
    """Of all workers together."""
    concurrency_max: int = 5
    members_max: int = 200
    """In one call."""
    poll_s: float = 1.0
    retry_first_s: float = 60.0
    retry_max_s: float = 1_800.0
    attempts_max: int = 5
    breaker_failures_max: int = 5
    breaker_open_s: float = 30.0

    def wait_s(self, call: str, attempts: int, said_s: float | None = None) -> float:
        """After so many attempts of the call: doubled each time, give or take a tenth, which the call's id decides. What the
        partner said it is instead, and up to a tenth more, but no longer than `retry_max_s`: what stands before it may say anything."""
        drawn = hashlib.blake2b(f"{call} {attempts}".encode(), digest_size=2).digest()
        tenth = int.from_bytes(drawn) / 655_350
        if said_s is not None:
            return min(said_s, self.retry_max_s) * (1 + tenth)
        doubled: float = min(self.retry_first_s * 2 ** min(max(attempts - 1, 0), 20), self.retry_max_s)
        return doubled * (0.9 + 2 * tenth)


@dataclass
class _Commit:
    """What one commit writes, gathered."""

    changes: Changes = field(default_factory=Changes)
    messages: list[Message] = field(default_factory=list)
    logs: list[Log] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)
    released: list[UUID] = field(default_factory=list)

    def add(self, done: Done, traces: Mapping[str, str | None]) -> None:
        assert not done.postings, "a conclusion moves no money yet"
        assert not done.calls, "a conclusion's further calls are its parts"
        for table, row in done.inserts:
            self.changes.insert(table, row)
        for table, row in done.upserts:
            self.changes.upsert(table, row)
        for table, row in done.updates:
            self.changes.update(table, row)
        for topic, key, event, event_id in done.emits:
            trace = traces.get(event_id)
            self.messages.append(Message(topic.name, key.encode(), value_of(event), event_id, event.ce_type(), trace))
        self.logs += done.logs
        self.done.append(done)


class Concluder:
    """Makes the commits on a connection that the caller gives; a commit that failed has done nothing."""

    def __init__(self, stage: Stage[Any], deeds: Deeds[Any], policy: CallPolicy, holder: str) -> None:
        self._stage = stage
        self._deeds = deeds
        self._policy = policy
        self._holder = holder

    async def intend(
        self, connection: Connection, calls_max: int, at: datetime
    ) -> tuple[list[StoredCall], Sealed | None]:
        """At most so many calls of what waits, leased to us."""
        if not await connection.fetchval(_sql.any_waiting, self._stage.name):
            return [], None
        writer = f"{self._stage.name}.intend"
        async with connection.transaction():
            owners = await lock_writer(connection, writer)
            wanted = calls_max * self._policy.members_max
            rows = await connection.fetch(_sql.waiting, self._stage.name, wanted)
            members = [member_of(*row) for row in rows]
            groups = self._deeds.group(members)[:calls_max] if members else []
            calls = [form(self._stage.name, group, self._deeds.request(group), at) for group in groups]
            if not calls:
                return [], None
            made = _Commit()
            facts = await self._deeds.load(connection, [Ended(call, {}) for call in calls], at)
            for call in calls:
                self._open(made.changes, call, None)
                self._add(made, self._deeds.began(call, facts), facts)
            until = at + timedelta(seconds=self._policy.lease_s)
            await connection.execute(_sql.lease, [UUID(call.id) for call in calls], self._holder, until)
            sealed = await seal(
                connection, writer, owners, blocks=made.changes.blocks(), messages=made.messages, at=at,
                actor=self._stage.name, summary={"calls": len(calls), "members": sum(len(c.members) for c in calls)},
                logs=made.logs,
            )  # fmt: skip
        return calls, sealed

    async def end(
        self, connection: Connection, ended: Sequence[Ended], at: datetime
    ) -> tuple[Sealed | None, list[Done]]:
        """Everything these ends cause. Nothing for a call that another performer has ended, or has taken since."""
        writer = f"{self._stage.name}.conclude"
        async with connection.transaction():
            owners = await lock_writer(connection, writer)
            ids = [UUID(one.call.id) for one in ended]
            rows = await connection.fetch(_sql.lock_open, ids)
            counted: dict[str, int] = dict(tuple(row) for row in rows)
            held = {tuple(row) for row in await connection.fetch(_sql.held, ids, self._holder)}
            # also an answer: who took the call since has perhaps got another, and a refusal would be the older one
            live = [one for one in ended if one.call.id in counted and (one.call.id, one.call.takes) in held]
            if not live:
                return None, []
            made = _Commit()
            facts = await self._deeds.load(connection, live, at)
            summary: dict[str, int] = {}
            for one in live:
                call = replace(one.call, attempts=counted[one.call.id])
                kind = await self._end_one(connection, made, call, one.answer, facts, at)
                summary[kind] = summary.get(kind, 0) + 1
            sealed = await seal(
                connection, writer, owners, blocks=made.changes.blocks(), messages=made.messages, at=at,
                actor=self._stage.name, summary=summary, logs=made.logs,
            )  # fmt: skip
            await connection.execute(_sql.release, made.released)
        return sealed, made.done

    async def _end_one(
        self,
        connection: Connection,
        made: _Commit,
        call: StoredCall,
        answer: dict[str, Any] | Refused | Again,
        facts: Any,
        at: datetime,
    ) -> str:
        """Which end it was."""
        conclusion = answer if isinstance(answer, Again) else self._judge(call, answer, facts)
        if isinstance(conclusion, Again):
            call = replace(call, attempts=call.attempts + conclusion.counted)
            if not conclusion.counted or call.attempts < self._policy.attempts_max:
                await self._put_off(connection, made, call, conclusion, facts, at)
                return "again"
            conclusion = self._deeds.give_up(call, conclusion.code, facts)
        self._add(made, conclusion.done, facts, conclusion.traces)
        made.messages += [self._letter(call, member, why, at) for member, why in conclusion.letters]
        for part in conclusion.parts:
            child = form(self._stage.name, part.members, self._deeds.request(part.members), at, call)
            due = at + timedelta(seconds=part.after_s) if part.after_s else None
            self._open(made.changes, replace(child, attempts=part.attempts), due)
        error = next((why.code for _, why in conclusion.letters), None)
        made.changes.upsert(CALLS, call.row(self._stage, conclusion.state, at, None, error))
        made.released.append(UUID(call.id))
        return conclusion.state

    def _judge(self, call: StoredCall, answer: dict[str, Any] | Refused, facts: Any) -> Conclusion | Again:
        """An answer that the deeds cannot read is an attempt, as other nonsense is. It must not end the worker, nor keep back the
        ends that share the commit. The next attempt has the same key: what the partner made is not made again."""
        try:
            return self._deeds.conclude(call, answer, facts)
        except Exception as error:
            # not the error's own text: it may quote the reply
            where = " ".join(f"{one.name}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__))
            _log.error("call.unreadable", stage=self._stage.name, call=call.id, error=type(error).__name__, where=where)
            return Again(str(ConnectorCode.UNKNOWN))

    async def _put_off(
        self, connection: Connection, made: _Commit, call: StoredCall, again: Again, facts: Any, at: datetime
    ) -> None:
        wait_s = self._policy.wait_s(call.id, call.attempts, again.after_s)
        due = at + timedelta(seconds=wait_s)
        self._add(made, self._deeds.put_off(call, again, due, facts), facts)
        made.changes.upsert(CALLS, call.row(self._stage, OPEN, None, due, again.code))
        await connection.execute(_sql.put_off, UUID(call.id), self._holder, due, again.code)

    def _add(
        self, made: _Commit, done: Done, facts: Any, traces: Mapping[str, str | None] = MappingProxyType({})
    ) -> None:
        made.add(done, traces)
        self._deeds.fold(facts, done)

    def _open(self, changes: Changes, call: StoredCall, due: datetime | None) -> None:
        changes.insert(CALLS, call.row(self._stage, OPEN, None, due, None))
        for member in call.members:
            changes.upsert(CALL_MEMBERS, member.row(self._stage.name, call.id))

    def _letter(self, call: StoredCall, member: Member, rejected: Rejected, at: datetime) -> Message:
        """The event's JSON (its own bytes were acknowledged with the intent) and why the partner ended it."""
        ours = {
            "stage": self._stage.name,
            "event": member.event_id,
            "code": rejected.code,
            "reason": rejected.reason[:500],
            "topic": self._stage.source.name,
            "call": call.id,
            "item": member.item,
            "attempts": str(max(call.attempts, 1)),
            "last_at": at.isoformat(),
        }
        headers = [("dlq_" + name, text.encode()) for name, text in ours.items()]
        return Message(self._stage.source.dlq.name, None, orjson.dumps(member.event), headers=headers)


def member_of(event_id: str, item: str, request: str, context: str, queued_at: datetime) -> Member:
    """As a row has it."""
    known = orjson.loads(context)
    event, trace = known.pop("event"), known.pop("traceparent")
    return Member(event_id, item, orjson.loads(request), known, event, trace, queued_at)


async def stored_calls(connection: Connection, takes: dict[UUID, int]) -> list[StoredCall]:
    """The calls of these ids, with how often each was taken."""
    found: dict[str, list[Member]] = {}
    for call, *rest in await connection.fetch(_sql.members, list(takes)):
        found.setdefault(call, []).append(member_of(*rest))
    rows = await connection.fetch(_sql.calls, list(takes))
    return [
        StoredCall(
            key, UUID(str(idempotency)), orjson.loads(request), tuple(found.get(key, ())), created_at, generation,
            attempts, takes[UUID(key)], parent, error,
        )
        for key, idempotency, request, created_at, generation, attempts, parent, error in rows
    ]  # fmt: skip
