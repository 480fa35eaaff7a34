"""Calls to partners: intend, perform, conclude.

| phase | what | why there |
| --- | --- | --- |
| want | rows of call_members, in the event's own commit | a slow partner never holds a partition |
| intend | what waits becomes calls, each with one key; a lease (concluding.py) | one request for many, as many as the partner takes |
| journal | the relay | nobody is called before the intent can be rebuilt |
| gate | the partner's gate, asked before calls are taken | after a restore nobody is called until our calls were compared with the partner |
| renew | the lease, where it is still ours, directly before the request | who stood still since the take must not ask |
| perform | the stored request, within the partner's rate, time-out and breaker | repeated while no end is stored: a lost reply is UNKNOWN |
| end | pure; rows, messages and the calls' end in one commit (concluding.py) | the call's row is locked: one performer ends it |

No answer (time-out, 5xx, 429, no connection, a reply that makes no sense) is an attempt: the same call again, later and later,
until the attempts are used up; then its members are dead letters, and an operator may open it again with its key. A 429 that
says when is no attempt: nothing was done. A definite refusal is split until what is at fault stands alone. While the breaker is
open nobody is asked and nothing is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Final, TypeVar
from uuid import UUID

import structlog

from agents.breaker import Breaker
from agents.concluding import CallPolicy, Concluder, stored_calls
from agents.deeds import Deeds
from agents.intents import Again, Ended, StoredCall
from agents.outcome import Done, Stage
from agents.services import Services, tell
from connectors.errors import ConnectorCode, ConnectorError, RateLimited, Refused
from ledger.commit import TRANSIENT, Sealed, lost_not_cancelled
from ledger.rows import Connection
from ledger.sql import load

__all__ = ["Acting", "CallPolicy"]

_log = structlog.get_logger()
_sql = load("agents", "acting.sql")

RATE_MARGIN: Final = 1.1
"""Requests arrive less evenly than they leave."""
END_MEMBERS_MAX: Final = 2_000
"""In one commit."""
RETRY_WAIT_S: Final = 0.2
REFUSES_US: Final = "partner_refuses_us"
"""Alert: the partner refuses what is ours, whatever is asked for: nothing is done until people have put it right."""

T = TypeVar("T")


class Acting:
    """The performers of one acting stage in one process. `work` never returns."""

    def __init__(
        self, stage: Stage[Any], deeds: Deeds[Any], services: Services, wake: asyncio.Event, policy: CallPolicy
    ) -> None:
        self._stage = stage
        self._deeds = deeds
        self._services = services
        self._wake = wake
        self._policy = policy
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._commits = Concluder(stage, deeds, policy, self._holder)
        self._breaker = Breaker(
            policy.breaker_failures_max,
            policy.breaker_open_s,
            services.clock,
            lambda state: services.observer.breaker(stage.partner, int(state)),
        )
        self._in_flight: dict[str, StoredCall] = {}
        """Taken, and its end not committed."""
        self._asking: set[str] = set()
        """Those that are with the partner."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Queue[Ended] = asyncio.Queue()
        self._renewing = asyncio.Lock()
        self._connections: dict[str, Connection] = {}
        self._log = _log.bind(stage=stage.name, partner=stage.partner)

    async def work(self) -> None:
        """Takes calls and performs them until cancelled."""
        self._start(self._conclude())
        self._show()
        try:
            while True:
                self._wake.clear()
                if not await self._begin_some():
                    await self._until_woken()
        except Exception as error:
            self._services.stop(f"{self._stage.name}: {error!r}", error)
            raise
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._deeds.stopped()

    async def _until_woken(self) -> None:
        with contextlib.suppress(TimeoutError):
            # wait_for would swallow a cancellation that meets the wake
            async with asyncio.timeout(self._policy.poll_s):
                await self._wake.wait()

    def _start(self, work: Any) -> None:
        async def watched() -> None:
            try:
                await work
            except Exception as error:
                self._services.stop(f"{self._stage.name}: {error!r}", error)
                raise

        task = asyncio.create_task(watched())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- taking ------------------------------------------------------------------------------------------------------

    async def _begin_some(self) -> int:
        """As many calls as may leave now: those that are due, then new ones of what waits."""
        free = self._policy.concurrency_max - len(self._asking)
        behind = len(self._in_flight) - len(self._asking) >= 4 * self._policy.concurrency_max
        wanted = 0 if behind else self._breaker.admits(max(free, 0), len(self._asking))
        if not wanted:
            return 0
        try:
            with lost_not_cancelled():
                calls = await self._take(wanted)
                waits = await self._slots(len(calls)) if calls else []
        except TRANSIENT as error:
            self._log.warning("calls.retry", error=type(error).__name__)
            await self._drop("take")  # what was leased and not asked is taken again when the lease has run out
            return 0
        for call, wait_s in zip(calls, waits, strict=True):
            self._in_flight[call.id] = call
            self._asking.add(call.id)
            self._start(self._one(call, wait_s))
        self._show()
        return len(calls)

    async def _take(self, wanted: int) -> list[StoredCall]:
        connection = await self._connection("take")
        if await connection.fetchval(_sql.is_closed, self._stage.partner):
            return []
        now = self._services.clock()
        until = now + timedelta(seconds=self._policy.lease_s)
        ours = [UUID(key) for key in self._in_flight]
        rows = await connection.fetch(_sql.take, self._stage.name, self._holder, now, until, wanted, ours)
        calls = await stored_calls(connection, {UUID(str(key)): takes for key, takes in rows}) if rows else []
        sealed = None
        if len(calls) < wanted:
            new, sealed = await self._commits.intend(connection, wanted - len(calls), now)
            calls += new
        if calls:
            await self._told(sealed)
        return calls

    async def _slots(self, calls: int) -> list[float]:
        """In how many seconds each call may leave: the partner's rate, kept by all workers in one row."""
        apart_s = RATE_MARGIN / self._policy.rate_per_s
        connection = await self._connection("take")
        name = f"{self._stage.partner} {self._stage.operation}"
        first_s: float = await connection.fetchval(_sql.slots, name, calls, apart_s)
        return [max(first_s + number * apart_s, 0.0) for number in range(calls)]

    # -- performing --------------------------------------------------------------------------------------------------

    async def _one(self, call: StoredCall, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        try:
            answer = await self._ask(call) if await self._renewed(call) else None
        finally:
            self._asking.discard(call.id)
            self._show()
        if answer is None:  # nobody was asked: neither an end nor an attempt
            self._log.warning("call.lease_lost", call=call.id)
            self._in_flight.pop(call.id, None)
        else:
            self._ended.put_nowait(Ended(call, answer))
        self._wake.set()

    async def _renewed(self, call: StoredCall) -> bool:
        """Whether the call is still ours; its lease then runs anew. Since the take the journal or this process may have stood
        still, and another performer may have ended the call: a transfer that was given back would be paid. Nothing is awaited
        between this and `perform`, whose time-out is shorter than the lease."""

        async def renew(connection: Connection) -> bool:
            loop, clock = asyncio.get_running_loop(), self._services.clock
            started, now = loop.time(), clock()
            until = now + timedelta(seconds=self._policy.lease_s)
            ours = await connection.fetchval(_sql.renew, UUID(call.id), self._holder, call.takes, until)
            # the reply may be late; one of the clocks may have stood still with the machine
            late_s = max(loop.time() - started, (clock() - now).total_seconds())
            return ours is not None and late_s < self._policy.lease_s

        async with self._renewing:  # one connection for all
            return await self._persist("renew", renew)

    async def _ask(self, call: StoredCall) -> dict[str, Any] | Refused | Again:
        log = self._log.bind(call=call.id, attempt=call.attempts + 1, members=len(call.members))
        started = asyncio.get_running_loop().time()
        probing = not self._breaker.closed
        try:
            async with asyncio.timeout(self._policy.timeout_s):
                reply = await self._deeds.perform(call)
        except Refused as error:
            self._breaker.succeeded()
            self._observe("refused", started)
            if error.ours:
                # our mistake, not the event's: the call waits until an operator has put it right
                self._services.unready[self._stage.name] = f"{self._stage.partner} refuses {error.ours}"
                self._services.observer.alert(self._stage.name, REFUSES_US)
                log.critical(REFUSES_US, what=error.ours, partner_code=error.partner_code, status=error.status)
                return Again(error.code, counted=False)
            self._services.unready.pop(self._stage.name, None)
            log.warning("call.refused", error=error.code, partner_code=error.partner_code, status=error.status)
            return error
        except (ConnectorError, TimeoutError) as error:
            code = str(getattr(error, "code", ConnectorCode.UNKNOWN))
            log.warning("call.again_later", error=code)
            self._observe("retry", started)
            if not isinstance(error, RateLimited):
                self._breaker.failed()
            after_s = error.retry_after_s if isinstance(error, RateLimited) else None
            return Again(code, after_s, counted=not probing and after_s is None)
        self._breaker.succeeded()
        self._services.unready.pop(self._stage.name, None)
        self._observe("ok", started)
        return reply

    def _observe(self, outcome: Any, started: float) -> None:
        self._services.observer.call(self._stage.partner, outcome, asyncio.get_running_loop().time() - started)

    def _show(self) -> None:
        asking = [self._in_flight[key] for key in self._asking]
        self._deeds.performing(len(asking), sum(len(call.members) for call in asking))

    # -- ending ------------------------------------------------------------------------------------------------------

    async def _conclude(self) -> None:
        """One commit after the other, each of all calls that have ended meanwhile."""
        while True:
            ended = [await self._ended.get()]
            members = len(ended[0].call.members)
            while not self._ended.empty() and members < END_MEMBERS_MAX:
                ended.append(self._ended.get_nowait())
                members += len(ended[-1].call.members)

            async def commit(connection: Connection, some: list[Ended] = ended) -> tuple[Sealed | None, list[Done]]:
                return await self._commits.end(connection, some, self._services.clock())

            sealed, done = await self._persist("end", commit)
            for one in done:
                self._deeds.committed(one)
                for alert in one.alerts:
                    self._services.observer.alert(self._stage.name, alert.code)
                    self._log.warning(alert.code, **alert.about)
            await self._told(sealed)
            for one_ended in ended:
                self._in_flight.pop(one_ended.call.id, None)
            self._wake.set()

    async def _persist(self, name: str, action: Callable[[Connection], Awaitable[T]]) -> T:
        """On the connection of this name, until it is done."""
        while True:
            try:
                with lost_not_cancelled():
                    return await action(await self._connection(name))
            except TRANSIENT as error:
                self._log.warning("calls.retry", at=name, error=type(error).__name__)
                await self._drop(name)
                await asyncio.sleep(RETRY_WAIT_S)

    async def _told(self, sealed: Sealed | None) -> None:
        """In the journal, and told."""
        if sealed is None:
            await self._services.relay.journal()
            return
        await tell(self._services, sealed)

    async def _connection(self, name: str) -> Connection:
        known = self._connections.get(name)
        if known is None or known.is_closed():
            known = self._connections[name] = await self._services.connect()
        return known

    async def _drop(self, name: str) -> None:
        """After an error in doubt: the next action gets a connection of its own."""
        known = self._connections.pop(name, None)
        if known is not None:
            known.terminate()
