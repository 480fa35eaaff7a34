"""A Faust transport that brings runs of records: `register()`, then `broker_consumer="batched://host:port"`.

Faust spends 50 to 70 µs on every event. Here one Faust event carries a `Run`: consecutive raw records of one partition,
as one poll brought them. Agents, group membership, rebalance, commit timer, tables and web stay Faust's; topics not made
with `batched_topic` (changelogs) keep its own path. Use with `agent_supervisor=CrashingSupervisor`, `stream_wait_empty=False`
and `stream_buffer_maxsize=16` (it counts runs):

    async def stage(stream):
        async for event in stream.noack().events():
            await settle(event.value.records)
            ack(app, event)

    app.agent(batched_topic(app, "deposits.notified"))(stage)

Promised: an offset is committed only when every run delivered before it in this assignment was acknowledged, whatever the
    order of the acks. Offsets are not compared, so holes (compaction, transaction markers) never hold the commit back.
    What was acknowledged before a rebalance is committed before the partition goes; later acks of such runs have no effect.
Rebalance: receivers of `app.on_rebalance_complete` are awaited before the first run of an assignment arrives; those of
    `app.on_partitions_assigned` run beside it and hold nothing back. Runs in hand when a partition goes come again elsewhere.
Lost: `event.key`, `take`, typed models and `group_by` mean nothing here; sensors count runs. Without `noack()` Faust
    acknowledges when the agent raises. `consumer.pause_partitions` loses what is being fetched.

Pinned to Faust 0.15.3, whose underscore methods it overrides: tests/unit/test_transport_contract.py says on which it relies.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol, cast

from faust.transport.drivers import TRANSPORTS
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread
from faust.transport.drivers.aiokafka import Consumer as KafkaConsumer
from faust.transport.drivers.aiokafka import Transport as KafkaTransport
from faust.types import TP, ConsumerMessage
from faust.types.tuples import ack_lock
from mode.utils.futures import maybe_async

from agents import lenient_records

SCHEME: Final = "batched"

RUN_RECORDS_MAX: Final = 500
RUN_BYTES_MAX: Final = 4 * 1024 * 1024

# Bounds the wait for room in full buffers should a rebalance empty them without telling.
ROOM_WAIT_S: Final = 1.0
# While one partition's buffer is full a poll of the others is short: the full one may have room any moment.
CROWDED_POLL_S: Final = 0.02
# aiokafka has one fetch per broker in the air: a busy partition waits while it waits for idle ones, 1.5 s in Faust.
FETCH_WAIT_MS: Final = 20
# Fifty requests a second cost a tenth of the throughput while buffers are full, as only idle partitions are asked for then; and
# a twentieth of a core of a worker that has nothing to do: its fetch asks for all it has, and is answered when anything comes.
LONG_FETCH_WAIT_MS: Final = 250
# A rebalance must not hang on a coordinator that is gone; what stays uncommitted is delivered again.
REVOKE_COMMIT_S: Final = 2.0


class Record(Protocol):
    """What we use of `aiokafka.ConsumerRecord`, with key and value as bytes."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]
    serialized_key_size: int
    serialized_value_size: int


@dataclass(frozen=True, slots=True)
class Run:
    """Records of one partition in offset order, never empty; offsets may have holes. `size_bytes`: keys and values."""

    topic: str
    partition: int
    records: list[Record]
    first_offset: int
    last_offset: int
    size_bytes: int


def register() -> None:
    """Make `batched://` known to Faust. Call before the app's transport is first used; calling again is harmless."""
    lenient_records.install()
    TRANSPORTS.aliases[SCHEME] = f"{__name__}:Transport"


def batched_topic(app: Any, name: str, **options: Any) -> Any:
    """The Faust topic `name` whose events carry a `Run`; TypeError when the app's consumer is not on this transport."""
    transport = app.transport
    if not isinstance(transport, Transport):
        raise TypeError(f"topic {name!r} needs broker_consumer={SCHEME}://..., the app uses {app.conf.broker_consumer}")
    transport.batched.add(name)
    return app.topic(name, key_serializer="raw", value_serializer="raw", key_type=bytes, value_type=bytes, **options)


def ack(app: Any, event: Any) -> None:
    """Acknowledge an event's run, once all it caused is durable; Faust commits it within `broker_commit_interval`."""
    message = event.message
    if message.ack(app.consumer):
        app.sensors.on_message_out(message.tp, message.offset, message)


def runs(
    records: Sequence[Record], records_max: int = RUN_RECORDS_MAX, bytes_max: int = RUN_BYTES_MAX
) -> Iterator[Run]:
    """Cut one partition's records into runs within both limits; a record larger than `bytes_max` stands alone."""
    start, size = 0, 0
    for i, record in enumerate(records):
        # aiokafka gives -1 for an absent key or value.
        own = max(record.serialized_key_size, 0) + max(record.serialized_value_size, 0)
        if i > start and (i - start >= records_max or size + own > bytes_max):
            yield _run(records[start:i], size)
            start, size = i, 0
        size += own
    if records:
        yield _run(records[start:], size)


def _run(records: Sequence[Record], size_bytes: int) -> Run:
    first, last = records[0], records[-1]
    return Run(last.topic, last.partition, list(records), first.offset, last.offset, size_bytes)


class _InTheLoop:
    """What Faust takes for the consumer's thread: a task of the loop that everything else runs in.

    A hop between two loops, there and back, is a twelfth of a deposit's way to its balance. The thread would also send heartbeats
    for a worker whose loop stands still: such a one is to lose its partitions.
    """

    def __init__(self, service: ConsumerThread) -> None:
        self._service = service
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._service._serve())

    def stop(self) -> None:
        """It has ended when its service says so."""


class ConsumerThread(AIOKafkaConsumerThread):
    """Faust's thread around aiokafka without the thread, and with a shorter fetch: Faust has no setting for either."""

    async def call_thread(self, fun: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        return await maybe_async(fun(*args, **kwargs))

    async def _gather_remaining_tasks(self) -> None:
        """The loop has others'."""

    def _create_worker_consumer(self, transport: KafkaTransport) -> Any:
        consumer: Any = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = FETCH_WAIT_MS
        return consumer

    def seek_assigned(self, positions: Mapping[TP, int]) -> None:
        """Moves those of the partitions that are still ours. Faust's own seek then waits for positions, a minute and a half of
        one that goes away meanwhile."""
        consumer = self._ensure_consumer()
        assigned = consumer.assignment()
        for tp, offset in positions.items():
            if tp in assigned:
                consumer.seek(tp, offset)

    def fetch_wait(self, wait_ms: int) -> None:
        """How long the broker may hold the next fetch that finds nothing."""
        if self._consumer is not None and self._consumer._fetcher is not None:
            self._consumer._fetcher._fetch_max_wait_ms = wait_ms


class Consumer(KafkaConsumer):
    """Faust's Kafka consumer with runs for the batched topics, and acks counted by delivery instead of by offset."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batched = cast(Transport, self.transport).batched
        # What was delivered in this assignment and is not yet committable, oldest first. For a batched partition Faust's
        # own `_acked[tp]` holds at most one number: the last offset that may be committed.
        self._delivered: dict[TP, deque[Any]] = {}
        # Where reading began of partitions without a committed offset: nothing else says where to go back to.
        self._began: dict[TP, int] = {}
        self._room = asyncio.Event()
        self._fetch_wait_ms = FETCH_WAIT_MS
        self._deliver_one = self.callback
        self.callback = self._deliver

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(
            self, loop=self.loop, beacon=self.beacon, thread_loop=self.loop, Worker=cast(Any, _InTheLoop)
        )

    async def _getmany(self, active_partitions: set[TP] | None, timeout: float) -> Mapping[TP, list[Any]]:
        # A copy: Faust hands its live set to the consumer, where an emptied set means "every partition", and
        # then drops what came from a paused one although its position has moved.
        wanted = set(active_partitions or ())
        if self.app.rebalancing:
            # Until positions are back at the committed offsets only changelogs are read; Faust empties buffers then.
            wanted = {tp for tp in wanted if tp.topic not in self._batched}
            self._fetch_wait_ms = FETCH_WAIT_MS
        if not wanted:
            await asyncio.sleep(CROWDED_POLL_S)
            return {}
        crowded = bool(self._buffered_partitions)
        if crowded:
            timeout = min(timeout, CROWDED_POLL_S)
        cast(ConsumerThread, self._thread).fetch_wait(LONG_FETCH_WAIT_MS if crowded else self._fetch_wait_ms)
        records = await super()._getmany(wanted, timeout)
        self._fetch_wait_ms = FETCH_WAIT_MS if records or crowded else LONG_FETCH_WAIT_MS
        found: dict[TP, list[Any]] = {}
        for tp, some in records.items():
            found[tp] = list(runs(some)) if tp.topic in self._batched else some
            if not some or tp.topic not in self._batched:
                continue
            if some[0].offset < (self._read_offset[tp] or 0):
                self._begin_anew(tp, some[0].offset)
            if not self._committed_offset[tp]:
                self._began[tp] = min(some[0].offset, self._began.get(tp, some[0].offset))
        return found

    def _begin_anew(self, tp: TP, offset: int) -> None:
        """A log that lost its end gives the offsets that we have read to other records: Faust would drop them, and commit none."""
        self.log.error("%s lost its end: read up to offset %s, now from %s", tp, self._read_offset[tp], offset)
        with ack_lock:
            self._delivered.pop(tp, None)
            self._acked[tp].clear()
            self._began.pop(tp, None)
            self._committed_offset[tp] = self._read_offset[tp] = None

    def _to_message(self, tp: TP, record: Any) -> Any:
        if not isinstance(record, Run):
            return super()._to_message(tp, record)
        last: Any = record.records[-1]
        return ConsumerMessage(
            record.topic, record.partition, record.last_offset, last.timestamp / 1000, last.timestamp_type,
            headers=None, key=None, value=cast(Any, record), checksum=None, serialized_key_size=0,
            serialized_value_size=record.size_bytes, tp=tp, generation_id=self.app.consumer_generation_id,
        )  # fmt: skip

    async def _deliver(self, message: Any) -> None:
        if message.topic in self._batched:
            if message.generation_id != self.app.consumer_generation_id:
                return  # fetched before a rebalance: the stream would skip it, and the new assignment brings it again
            self._delivered.setdefault(message.tp, deque()).append(message)
        await self._deliver_one(message)

    async def _wait_next_records(self, timeout: float) -> Any:
        if self.flow_active and not self._get_active_partitions() and self._buffered_partitions:
            self._room.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._room.wait(), ROOM_WAIT_S)
            if not self._get_active_partitions():
                return {}, self._get_active_partitions()
        return await super()._wait_next_records(timeout)

    def lag(self, tp: TP) -> int:
        """Records of a batched partition that the group has not committed, as far as its end is known; 0 of one that is not ours."""
        first = self._committed_offset.get(tp) or self._began.get(tp)
        if first is None or tp not in self.assignment():
            return 0
        return max((self.highwater(tp) or 0) - first, 0)

    def on_buffer_drop(self, tp: TP) -> None:
        super().on_buffer_drop(tp)
        self._room.set()

    def ack(self, message: Any) -> bool:
        if message.topic not in self._batched:
            return bool(super().ack(message))
        # `tracked`: a stream took it. Faust also acknowledges what it skips unseen while it stops or rebalances.
        with ack_lock:
            if message.acked or not message.tracked:
                return False
            message.acked = True
            self._unacked_messages.discard(message)
            self._n_acked += 1
            delivered = self._delivered.get(message.tp)
            while delivered and delivered[0].acked:
                self._acked[message.tp][:] = [delivered.popleft().offset]
            return True

    def _new_offset(self, tp: TP) -> int | None:
        if tp.topic not in self._batched:
            return super()._new_offset(tp)
        with ack_lock:
            return self._acked[tp].pop() + 1 if self._acked[tp] else None

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        if tp.topic not in self._batched:
            await super()._add_gap(tp, offset_from, offset_to)

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        # Faust forgets uncommitted acks here; committing them first, a planned rebalance repeats only what is in hand.
        try:
            await asyncio.wait_for(self.commit(), REVOKE_COMMIT_S)
        except TimeoutError:
            self.log.warning("no commit before the rebalance within %s s", REVOKE_COMMIT_S)
        for tp in revoked:
            self._delivered.pop(tp, None)
        self._buffered_partitions.difference_update(revoked)
        await super().on_partitions_revoked(revoked)

    async def perform_seek(self) -> None:
        """Back to the committed offsets: what was fetched and not committed comes again, and old acks count no more."""
        self._delivered.clear()
        await super().perform_seek()
        # aiokafka does not move a partition that has no committed offset, and Faust drops what it fetched around a rebalance
        assigned = self.assignment()
        if unmoved := {tp: at for tp, at in self._began.items() if tp in assigned and not self._committed_offset[tp]}:
            cast(ConsumerThread, self._thread).seek_assigned(unmoved)
            self._read_offset.update({tp: at or None for tp, at in unmoved.items()})


class Transport(KafkaTransport):
    """Faust's Kafka transport with our consumer, and the names of the topics whose events carry runs."""

    Consumer: ClassVar[type[Any]] = Consumer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batched: set[str] = set()
