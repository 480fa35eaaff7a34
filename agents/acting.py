"""Calls to partners: intend, perform, conclude.

| phase | what | why there |
| --- | --- | --- |
| intend | rows in calls and call_members, in the event's own commit | a slow partner never holds a partition |
| take | a lease on an open call, then the relay | nobody is called before the intent can be rebuilt; one performer per call |
| perform | the stored request with its one key, within rate, time-out and breaker | repeated while no conclusion is stored: a lost reply is UNKNOWN |
| conclude | pure; its rows, messages and the call's end in one commit | the call row is locked: only one performer concludes |

Refused definitely ends a call; anything else (time-out, 5xx, 429, a reply that makes no sense) is asked again later with
the same key.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal, Protocol
from uuid import UUID

import asyncpg
import orjson
import structlog
from aiolimiter import AsyncLimiter
from purgatory import AsyncCircuitBreakerFactory
from purgatory.domain.model import OpenedState

from agents.intents import CONCLUDED, idempotency_key
from agents.outcome import Done, Outcome, Rejected, Retry, Stage
from agents.services import Services
from connectors.errors import ConnectorError, RateLimited, Refused
from ledger.commit import TRANSIENT, Sealed, lock_writer, seal
from ledger.record import Message
from ledger.rows import Changes, Connection
from ledger.sql import load
from ledger.tables import CALLS
from topics.envelope import value_of

_log = structlog.get_logger()
_sql = load("agents", "acting.sql")
_AGAIN: Final[tuple[type[Exception], ...]] = (*TRANSIENT, asyncpg.InterfaceError)


CREDENTIALS_REFUSED: Final = (401, 403)
"""Our mistake, not the event's: the call waits until an operator has put the key right."""


@dataclass(frozen=True)
class CallPolicy:
    """How a partner is called. Seconds."""

    timeout_s: float = 15.0
    lease_s: float = 60.0
    """Longer than the time-out: while it runs nobody else performs the call."""
    rate_per_s: float = 5.0
    concurrency_max: int = 5
    poll_s: float = 1.0
    retry_first_s: float = 1.0
    retry_max_s: float = 300.0
    breaker_failures_max: int = 5
    breaker_open_s: float = 30.0


@dataclass(frozen=True, slots=True)
class StoredCall:
    """A call as it was intended."""

    id: str
    idempotency_key: UUID
    request: dict[str, Any]
    event: dict[str, Any]
    """The event that caused it, as JSON."""
    context: dict[str, Any]
    traceparent: str | None
    attempts: int


class Performer(Protocol):
    """Asks the partner. Raises connectors.errors; a reply is JSON-able."""

    async def __call__(self, call: StoredCall) -> dict[str, Any]: ...


Conclude = Callable[[StoredCall, dict[str, Any] | Refused, datetime], Outcome]


class Acting:
    """The performers of one acting stage in one process. `work` never returns."""

    def __init__(
        self,
        stage: Stage[Any],
        perform: Performer,
        conclude: Conclude,
        services: Services,
        wake: asyncio.Event,
        policy: CallPolicy,
    ) -> None:
        self._stage = stage
        self._perform = perform
        self._conclude = conclude
        self._services = services
        self._wake = wake
        self._policy = policy
        self._holder = f"{socket.gethostname()}:{os.getpid()}"
        self._limiter = AsyncLimiter(max_rate=max(policy.rate_per_s, 1), time_period=1)
        self._breakers = AsyncCircuitBreakerFactory(
            default_threshold=policy.breaker_failures_max,
            default_ttl=policy.breaker_open_s,
            exclude=[Refused, RateLimited],
        )
        self._connection: Connection | None = None
        self._log = _log.bind(stage=stage.name, partner=stage.partner)

    @staticmethod
    def fixed_key(name: str) -> UUID:
        """An idempotency key that is the same for ever: for things that an environment has once."""
        return idempotency_key(name)

    async def work(self) -> None:
        """Takes calls and performs them until cancelled."""
        while True:
            self._wake.clear()
            try:
                calls = await self._take()
                if calls:
                    await self._services.relay.journal()
                    await asyncio.gather(*(self._one(call) for call in calls))
                    continue
            except _AGAIN as error:
                self._log.warning("calls.retry", error=type(error).__name__)
            except Exception as error:
                self._services.stop(f"{self._stage.name}: {error!r}", error)
                raise
            try:
                await asyncio.wait_for(self._wake.wait(), self._policy.poll_s)
            except TimeoutError:
                continue

    async def _take(self) -> list[StoredCall]:
        connection = await self._own_connection()
        now = self._services.clock()
        rows = await connection.fetch(
            _sql.take,
            self._stage.name,
            self._holder,
            now,
            now + timedelta(seconds=self._policy.lease_s),
            self._policy.concurrency_max,
        )
        return [_stored(row) for row in rows]

    async def _one(self, call: StoredCall) -> None:
        log = self._log.bind(call=call.id, attempt=call.attempts)
        started = asyncio.get_running_loop().time()
        reply: dict[str, Any] | Refused
        try:
            breaker = await self._breakers.get_breaker(self._stage.partner)
            async with self._limiter, breaker, asyncio.timeout(self._policy.timeout_s):
                reply = await self._perform(call)
        except Refused as error:
            if error.status in CREDENTIALS_REFUSED:
                self._services.unready[self._stage.name] = f"{self._stage.partner} refuses our credentials"
                await self._again(call, None, error.code)
                return
            reply = error
        except (ConnectorError, OpenedState, TimeoutError) as error:
            log.warning("call.again_later", error=getattr(error, "code", type(error).__name__))
            await self._again(call, getattr(error, "retry_after_s", None), type(error).__name__)
            self._observe("retry", started)
            return
        self._services.unready.pop(self._stage.name, None)
        self._observe("refused" if isinstance(reply, Refused) else "ok", started)
        now = self._services.clock()
        outcome = self._conclude(call, reply, now)
        if isinstance(outcome, Retry):
            log.warning("call.again_later", error=outcome.code)
            await self._again(call, outcome.after_s, outcome.code)
            return
        sealed = await self._conclude_call(call, outcome, now)
        if sealed is not None:
            await self._services.relay.journal([(sealed.seq, sealed.record)])
            await self._services.emitter.emit(sealed.messages, sealed.stage, sealed.at)
            self._services.relay.emitted([sealed.seq])
            log.info("call.concluded")

    def _observe(self, outcome: Literal["ok", "refused", "retry"], started: float) -> None:
        seconds = asyncio.get_running_loop().time() - started
        self._services.observer.call(self._stage.partner, outcome, seconds)

    async def _again(self, call: StoredCall, after_s: float | None, error: str) -> None:
        """Gives the lease back until later. When even that fails, the lease runs out by itself."""
        policy = self._policy
        wait_s = min(policy.retry_first_s * 2 ** min(call.attempts - 1, 20), policy.retry_max_s)
        wait_s = max(wait_s * random.uniform(0.9, 1.1), after_s or 0.0)  # noqa: S311  (jitter)
        until = self._services.clock() + timedelta(seconds=wait_s)
        connection = await self._services.connect()
        try:
            await connection.execute(_sql.again, call.id, until, error)
        finally:
            await connection.close()

    async def _conclude_call(self, call: StoredCall, outcome: Done | Rejected, now: datetime) -> Sealed | None:
        """One commit; None when another performer concluded first."""
        while True:
            connection = await self._services.connect()
            try:
                async with connection.transaction():
                    return await self._conclude_in(connection, call, outcome, now)
            except _AGAIN as error:
                self._log.warning("conclude.retry", error=type(error).__name__)
                await asyncio.sleep(0.2)
            finally:
                await connection.close()

    async def _conclude_in(
        self, connection: Connection, call: StoredCall, outcome: Done | Rejected, now: datetime
    ) -> Sealed | None:
        writer = f"{self._stage.name}.conclude"
        owners = await lock_writer(connection, writer)
        row = await connection.fetchrow(_sql.lock_open, call.id)
        if row is None:
            return None
        changes = Changes()
        messages: list[Message] = []
        if isinstance(outcome, Done):
            assert not outcome.postings, "a conclusion moves no money yet"
            assert not outcome.calls, "a conclusion makes no further call yet"
            for table, written in outcome.inserts:
                changes.insert(table, written)
            for table, written in outcome.upserts:
                changes.upsert(table, written)
            for table, written in outcome.updates:
                changes.update(table, written)
            messages = [
                Message(e.topic.name, e.key.encode(), value_of(e.event), e.id, e.event.ce_type(), call.traceparent)
                for e in outcome.emits
            ]
        else:
            messages = [self._dead_letter(call, outcome, now)]
        changes.upsert(CALLS, _concluded(row, now))
        sealed = await seal(
            connection,
            writer,
            owners,
            blocks=changes.blocks(),
            messages=messages,
            at=now,
            actor=self._stage.name,
            summary={"concluded": 1, "call": call.id},
        )
        await connection.execute(_sql.release, call.id)
        return sealed

    def _dead_letter(self, call: StoredCall, rejected: Rejected, now: datetime) -> Message:
        """The event's JSON (its own bytes were acknowledged with the intent) and why the partner ended it."""
        ours = {
            "stage": self._stage.name,
            "code": rejected.code,
            "reason": rejected.reason[:500],
            "topic": self._stage.source.name,
            "call": call.id,
            "attempts": str(call.attempts),
            "last_at": now.isoformat(),
        }
        headers = [("dlq_" + name, text.encode()) for name, text in ours.items()]
        return Message(self._stage.source.dlq.name, None, orjson.dumps(call.event), headers=headers)

    async def _own_connection(self) -> Connection:
        if self._connection is None or self._connection.is_closed():
            self._connection = await self._services.connect()
        return self._connection


def _stored(row: Any) -> StoredCall:
    call_id, key, request, context, attempts = row
    members = orjson.loads(context)
    return StoredCall(
        id=call_id,
        idempotency_key=UUID(str(key)),
        request=orjson.loads(request),
        event=members.pop("event"),
        traceparent=members.pop("traceparent"),
        context=members,
        attempts=attempts,
    )


def _concluded(row: Any, now: datetime) -> tuple[Any, ...]:
    key, stage, partner, operation, idempotency, request, fingerprint, created_at = row
    loaded = orjson.loads(request)
    return (key, stage, partner, operation, idempotency, loaded, fingerprint, CONCLUDED, created_at, now)
