"""How a stage's batches are delivered: commit, then journal, emit and acknowledge, two batches in flight.

    events of Faust ─▶ [committer] ─▶ [finisher]
                        own, settle     journal (group commit) ─▶ emit ─▶ acknowledge

| phase | what | why there |
| --- | --- | --- |
| own | epochs bumped for newly assigned partitions; what a crash left is journaled and emitted | before any new event of them |
| gather | all that waits, up to a limit, of all partitions, as one batch (intake.py) | low load has low latency, high load has high throughput |
| prepare | what a stage does outside; some do it while the batch before commits | a chain is slow, a transaction must not be |
| settle | stage.py; a known transient failure is tried again in place | nothing is acknowledged meanwhile |
| split | a batch that fails otherwise is halved until one event stands alone | its neighbours go on |
| crash | its failure is counted, the process stops; the third time it is a dead letter `bug` | an exception that left a Faust agent would acknowledge it |
| finish | journal, emit, acknowledge in order | nothing is told before it can be rebuilt, nothing acknowledged before it is told |
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import asyncpg
import structlog

from agents.crash import Crashes
from agents.fuse import Fuse, FuseBlown
from agents.intake import Delivered, Intake
from agents.item import Item
from agents.outcome import Rejected, Stage
from agents.services import Services, tell_left
from agents.stage import REUSED, Settled, SplitBatch, settle
from ledger import journal
from ledger.commit import TRANSIENT, Sealed, claim_owners, lost_not_cancelled
from ledger.errors import ACopy, DatabaseBehind, Fenced, RecordTooLarge
from ledger.rows import Connection
from ledger.sql import load
from topics.envelope import Received, trace_id

_log = structlog.get_logger()
_sql = load("ledger", "sql/journal.sql")

CONFLICTS_MAX: Final = 20
"""Unique conflicts of one batch before they count as a bug: real ones end when the other writer has committed."""
RETRY_WAIT_S_MAX: Final = 2.0
LOGGED_MAX: Final = 20
"""Refused events of one batch that are logged one by one; the counters have all of them."""


Key = tuple[str, int]
"""(topic, partition), the topic as the broker names it."""


@dataclass(slots=True)
class _Gathered:
    """The runs of the next batch."""

    runs: list[Delivered]
    prepared: asyncio.Task[tuple[Any] | None] | None = None
    """What `prepare` finds for all their events; None: it is still to be done."""


@dataclass(slots=True)
class _Batch:
    sealed: list[Sealed]
    acks: list[Callable[[], Any]]
    positions: dict[Key, int]
    runs: int
    """That were gathered, ours or not any more."""
    events: int
    commit_s: float


class Delivery:
    """One stage in one process. `offer`, `assigned` and `revoked` come from the transport's side; `work` never returns."""

    def __init__(self, stage: Stage[Any], services: Services) -> None:
        self.stage = stage
        self._services = services
        self._intake = Intake(stage, services)
        self._gathered: asyncio.Queue[_Gathered] = asyncio.Queue(maxsize=1)
        self._finishing: asyncio.Queue[_Batch] = asyncio.Queue()
        self._slots = asyncio.Semaphore(services.in_flight)
        self._assigned: set[Key] = set()
        self._terms: Counter[Key] = Counter()
        self._epochs: dict[Key, int] = {}
        self._connection: Connection | None = None
        self._in_doubt = False
        self._fenced: asyncio.TimerHandle | None = None
        self._crashes = Crashes(stage.name)
        self._fuse = Fuse(services.fuse_ratio, services.fuse_run, services.fuse_window)
        self._log = _log.bind(stage=stage.name)
        self.messages_emitted = 0
        self.positions: dict[Key, int] = {}
        """The last settled offset of each partition."""
        self.wake = asyncio.Event()
        """Set after every commit: performers of an acting stage wait for it."""

    # -- from the transport ------------------------------------------------------------------------------------------

    def assigned(self, keys: set[Key]) -> None:
        """These partitions (all that we now have) are ours; those that are new are owned before their first event."""
        self.revoked(self._assigned - keys)
        self._assigned = set(keys)
        if self._fenced is not None:
            self._fenced.cancel()
            self._fenced = None
        self._intake.nudge()

    def revoked(self, keys: set[Key]) -> None:
        """These partitions may be another's: their next assignment bumps the epoch again."""
        self._assigned -= keys
        # what is still queued of them would go before what is dropped of them now; it all comes again, in order
        self._terms.update(keys)
        for key in keys:
            self._epochs.pop(key, None)

    @property
    def oldest_ms(self) -> int | None:
        """Broker time of the oldest record in hand; None when there is none."""
        return self._intake.oldest_ms

    def held(self) -> set[Key]:
        """The partitions assigned to us."""
        return set(self._assigned)

    async def offer(self, delivered: Delivered) -> None:
        """A run of records; waits while enough are queued."""
        key = (delivered.run.topic, delivered.run.partition)
        delivered.term = self._terms[key]
        if not await self._intake.take(delivered):
            delivered.ack()  # the transport commits no offset before all that was delivered earlier is acknowledged
            self._passed({key: delivered.run.records[-1].offset})

    def _passed(self, positions: Mapping[Key, int]) -> None:
        """An earlier batch may end after a run of others' events was acknowledged."""
        self.positions.update({key: max(offset, self.positions.get(key, offset)) for key, offset in positions.items()})

    def _expect_rebalance(self) -> None:
        """Fenced means that the group has moved on without us; if Kafka does not tell us so soon, start afresh."""
        if self._fenced is None:
            stop, name = self._services.stop, self.stage.name
            self._fenced = asyncio.get_running_loop().call_later(
                self._services.fenced_s_max, stop, f"{name}: fenced, and no rebalance came"
            )

    # -- the two loops -----------------------------------------------------------------------------------------------

    async def work(self) -> None:
        """Runs until cancelled. Anything unexpected stops the process: nothing unfinished is acknowledged."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_endless(self._commit_forever()))
                if self.stage.prepares_ahead:
                    group.create_task(_endless(self._prepare_forever(group)))
                group.create_task(_endless(self._finish_forever()))
        except* Exception as errors:
            self._services.stop(f"{self.stage.name}: {errors.exceptions[0]!r}", errors.exceptions[0])

    async def drained(self) -> None:
        """Returns when nothing is in flight; no batch starts after it (graceful stop)."""
        for _ in range(self._services.in_flight):
            await self._slots.acquire()

    async def _commit_forever(self) -> None:
        while True:
            ahead = self.stage.prepares_ahead
            gathered = await self._gathered.get() if ahead else _Gathered(await self._intake.gather())
            # before it is in flight: a graceful stop waits for no node, and whose partitions they are is asked after it
            prepared = await gathered.prepared if gathered.prepared is not None else None
            await self._slots.acquire()
            try:
                batch = await self._commit(gathered.runs, prepared)
            except BaseException:
                self._slots.release()
                raise
            self._finishing.put_nowait(batch)

    async def _prepare_forever(self, group: asyncio.TaskGroup) -> None:
        """Of a stage that prepares ahead: the next two batches are prepared while this one commits. Begun in their order; what must
        come one after the other the stage sees to."""
        while True:
            gathered = _Gathered(await self._intake.gather())
            received = _readable([item for delivered in gathered.runs for item in delivered.items])
            gathered.prepared = group.create_task(self._prepared(received))
            await self._gathered.put(gathered)

    async def _prepared(self, received: Sequence[Received]) -> tuple[Any] | None:
        # what fails here is done again where failures are handled
        with contextlib.suppress(Exception):
            return (await self.stage.prepare(received),)
        return None

    async def _commit(self, gathered: Sequence[Delivered], prepared: tuple[Any] | None) -> _Batch:
        await self._own()
        runs = [d for d in gathered if self._is_ours(d)]
        items = [item for d in runs for item in d.items]
        started = asyncio.get_running_loop().time()
        sealed = await self._settle_all(items, prepared)
        commit_s = asyncio.get_running_loop().time() - started
        positions = {(d.run.topic, d.run.partition): d.run.records[-1].offset for d in runs}
        # a run of a partition that we lost meanwhile is not ours to acknowledge: it comes again, here or elsewhere
        acks = [d.ack for d in runs if self._is_ours(d)]
        return _Batch(sealed, acks, positions, len(gathered), len(items), commit_s)

    def _is_ours(self, delivered: Delivered) -> bool:
        key = (delivered.run.topic, delivered.run.partition)
        return key in self._epochs and delivered.term == self._terms[key]

    async def _finish_forever(self) -> None:
        relay, emitter, clock = self._services.relay, self._services.emitter, asyncio.get_running_loop().time
        while True:
            batches = [await self._finishing.get()]
            while not self._finishing.empty():
                batches.append(self._finishing.get_nowait())
            started = clock()
            records = [(s.seq, s.record) for batch in batches for s in batch.sealed]
            if records:
                await relay.journal(records, marked=False)
            journal_s = clock() - started
            for batch in batches:
                started = clock()
                for sealed in batch.sealed:
                    await emitter.emit(sealed.messages, sealed.stage, sealed.at)
                    relay.emitted([sealed.seq])
                emit_s = clock() - started
                for ack in batch.acks:
                    ack()
                self._passed(batch.positions)
                self.messages_emitted += sum(len(sealed.messages) for sealed in batch.sealed)
                self._intake.finished(batch.runs)
                self._slots.release()
                if batch.sealed:
                    self.wake.set()
                if batch.events:
                    self._services.observer.batch(
                        self.stage.name,
                        batch.events,
                        commit_s=batch.commit_s,
                        journal_s=journal_s,
                        emit_s=emit_s,
                        ack_s=clock() - started - emit_s,
                    )

    # -- owning ------------------------------------------------------------------------------------------------------

    async def _own(self) -> None:
        """Claims assigned partitions that have no epoch of ours yet, and finishes what their last owner left."""
        new = sorted(self._assigned - self._epochs.keys())
        if not new:
            return
        terms = {key: self._terms[key] for key in new}

        async def claim(connection: Connection) -> tuple[dict[Key, int], Sealed]:
            async with connection.transaction():
                return await claim_owners(connection, self.stage.name, new, self._services.clock())

        epochs, sealed = await self._persist(claim)
        await self._services.relay.journal([(sealed.seq, sealed.record)])
        await self._drain(new)
        self._services.relay.emitted([sealed.seq])
        # one that went meanwhile may have come back, and have been another's in between: it is claimed again
        still = {key for key in new if key in self._assigned and self._terms[key] == terms[key]}
        self._epochs.update({key: epochs[key] for key in still})
        self._log.info("stage.owns", partitions=[partition for _, partition in new])

    async def _drain(self, keys: Sequence[Key]) -> None:
        """Emits what the partitions' last owners left."""
        for topic in {topic for topic, _ in keys}:
            partitions = [partition for name, partition in keys if name == topic]

            async def left(last: int, topic: str = topic, partitions: list[int] = partitions) -> Any:
                given = (self.stage.name, topic, partitions, last, journal.BYTES_AT_ONCE)
                return await self._persist(lambda connection: connection.fetch(_sql.left_by_partitions, *given))

            await tell_left(self._services, left)

    # -- settling ----------------------------------------------------------------------------------------------------

    async def _settle_all(self, items: Sequence[Item], prepared: tuple[Any] | None) -> list[Sealed]:
        """Settles the items in order, in one transaction when that is possible, in smaller ones when it is not. What was
        prepared ahead is used once: what is settled again is prepared again."""
        size = self._services.events_max  # the last run may have brought more than there was room for
        todo = [list(items[start : start + size]) for start in range(0, len(items), size)]
        sealed: list[Sealed] = []
        while todo:
            part = [item for item in todo.pop(0) if (item.topic, item.partition) in self._epochs]
            if not part:
                continue
            try:
                ahead, prepared = prepared, None
                settled = await self._settle(part, ahead)
            except Fenced as error:
                # another worker owns them: its business now, also what we have read of them
                self._log.warning("stage.fenced", partitions=[partition for _, partition in error.lost])
                for key in error.lost:
                    # no epoch: Kafka took it from us meanwhile, and may have given it back
                    if self._epochs.pop(key, None) is not None:
                        self._assigned.discard(key)
                        self._expect_rebalance()
                todo.insert(0, part)
                continue
            except FuseBlown as error:
                self._log.critical("stage.fuse_blown", reason=str(error))
                self._services.observer.fuse(self.stage.name, blown=True)
                self._services.unready[self.stage.name] = f"fuse: {error}"
                # who ends the worker need not wait for it; parts of it that are committed are told
                if sealed:
                    self._finishing.put_nowait(_Batch(sealed, [], {}, 0, 0, 0.0))
                else:
                    self._slots.release()
                await asyncio.Event().wait()  # consumes no more; an operator restarts the worker
            except (ACopy, DatabaseBehind):
                raise  # no event's fault: nothing is counted, split or settled in such a database
            except Exception as error:
                if len(part) > 1 and not self._services.stop.stopping:
                    if not isinstance(error, SplitBatch | RecordTooLarge):
                        self._log.warning("batch.split", events=len(part), error=type(error).__name__)
                    middle = len(part) // 2
                    todo[:0] = [part[:middle], part[middle:]]
                    continue
                await self._isolate(part[0], error)
                todo.insert(0, part)
                continue
            self._count(settled)
            if settled.sealed is not None:
                sealed.append(settled.sealed)
        return sealed

    def _count(self, settled: Settled) -> None:
        observer, name = self._services.observer, self.stage.name
        for (kind, code), events in settled.outcomes.items():
            observer.event_settled(name, "reused" if code == REUSED else kind, events)
            if code:
                observer.refused(name, code, events)
            if kind == "rejected":
                observer.dead_letter(self.stage.source.dlq.name, code, events)
        if settled.sealed is not None:
            self.stage.figures(observer, *settled.decided)
        for alert in settled.alerts:
            observer.alert(name, alert.code)
            self._log.warning(alert.code, **alert.about)
        for item, outcome in settled.told[:LOGGED_MAX]:
            received = item.received
            self._log.info(
                "event.refused" if isinstance(outcome, Rejected) else "event.later",
                code=outcome.code,
                event_id=received.id if received else None,
                trace_id=trace_id(received.traceparent) if received else None,
                partition=item.partition,
                offset=item.offset,
            )

    async def _settle(self, items: Sequence[Item], ahead: tuple[Any] | None) -> Settled:
        """One transaction, tried again in place while the failure is a known transient one."""
        conflicts = 0
        epochs = {(i.topic, i.partition): self._epochs[(i.topic, i.partition)] for i in items}
        prepared = await self.stage.prepare(_readable(items)) if ahead is None else ahead[0]

        async def once(connection: Connection) -> Settled:
            nonlocal conflicts
            try:
                now = self._services.clock()
                settled = await settle(
                    connection,
                    self.stage,
                    items,
                    epochs,
                    now,
                    prepared,
                    careful=conflicts > 0,
                    approve=self._fuse.check,
                )
            except asyncpg.UniqueViolationError:
                conflicts += 1
                if conflicts > CONFLICTS_MAX:
                    raise RuntimeError("the same unique conflict again and again") from None
                raise
            self._fuse.record(settled.refused)
            return settled

        settled: Settled = await self._persist(once)
        return settled

    async def _isolate(self, item: Item, error: Exception) -> None:
        """One event's failure that is no known one: counted, then the process stops; the third time it is refused."""

        async def count(connection: Connection) -> int:
            return await self._crashes.count(connection, item, error, self._services.clock())

        times = await self._persist(count)
        self._log.error(
            "event.crashed", offset=item.offset, partition=item.partition, times=times, exc_info=error,
            event_id=item.received.id if item.received else None,
            trace_id=trace_id(item.received.traceparent) if item.received else None,
        )  # fmt: skip
        if times < Crashes.MAX:
            self._services.unready[self.stage.name] = "bug"
            raise error
        item.refusal = Rejected("bug", f"{type(error).__name__} at {times} attempts")

    async def _persist(self, action: Callable[[Connection], Awaitable[Any]]) -> Any:
        """Runs a database action until it is done: transient failures wait and run again on a good connection."""
        wait_s = 0.02
        while True:
            try:
                if self._connection is None or self._connection.is_closed():
                    self._in_doubt = self._in_doubt or self._connection is not None
                    with lost_not_cancelled():
                        self._connection = await self._services.connect()
                with lost_not_cancelled():
                    result = await action(self._connection)
                # remembered when the action is refused: fenced from one partition, we keep the others
                if self._in_doubt:
                    self._in_doubt = False
                    await self._recover()
                return result
            except TRANSIENT as error:
                connection = self._connection
                if isinstance(error, asyncpg.InternalClientError) and connection:
                    connection.terminate()
                if isinstance(error, asyncpg.InterfaceError) and connection and not connection.is_closed():
                    raise
                self._log.warning("database.retry", error=type(error).__name__)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, RETRY_WAIT_S_MAX)

    async def _recover(self) -> None:
        """After a lost connection a commit may have happened without our hearing of it: finish it before going on. Called
        when an action has locked the same rows again: before that, the server may still be at the commit."""
        await self._services.relay.journal()
        await self._drain(sorted(self._epochs))


def _readable(items: Sequence[Item]) -> list[Received]:
    return [item.received for item in items if item.received is not None and item.refusal is None]


async def _endless(loop: Coroutine[Any, Any, None]) -> None:
    """A loop that ends by itself would leave a process that looks well and does nothing: that is an error."""
    with lost_not_cancelled():
        await loop
    raise RuntimeError("a loop ended")
