"""What agents/transport.py relies on inside Faust 0.15.3, and the commit rule it puts in place of Faust's.

When an upgrade fails here: read the changed function, adapt the transport, run the experiments of
tests/integration/test_transport_on_kafka.py, then pin the new value.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import faust
import pytest
from aiokafka import AIOKafkaConsumer
from faust.transport.consumer import Consumer as BaseConsumer
from faust.transport.consumer import ThreadDelegateConsumer
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread
from faust.transport.drivers.aiokafka import Consumer as KafkaConsumer
from faust.transport.drivers.aiokafka import Transport as KafkaTransport
from faust.types import TP, ConsumerMessage
from hypothesis import given, settings
from hypothesis import strategies as st
from mode.threads import QueueServiceThread, ServiceThread

from agents import transport
from agents.transport import FETCH_WAIT_MS, Consumer, Run, Transport, batched_topic, register, runs

TOPIC = "deposits.notified"
A, B = TP(TOPIC, 0), TP(TOPIC, 1)

PARAMETERS = {
    (KafkaConsumer, "_getmany"): "self active_partitions timeout",
    (KafkaConsumer, "_to_message"): "self tp record",
    (KafkaConsumer, "_wait_next_records"): "self timeout",
    (KafkaConsumer, "_get_active_partitions"): "self",
    (KafkaConsumer, "on_buffer_drop"): "self tp",
    (KafkaConsumer, "ack"): "self message",
    (KafkaConsumer, "_new_offset"): "self tp",
    (KafkaConsumer, "_add_gap"): "self tp offset_from offset_to",
    (KafkaConsumer, "commit"): "self topics start_new_transaction",
    (KafkaConsumer, "on_partitions_revoked"): "self revoked",
    (KafkaConsumer, "perform_seek"): "self",
    (KafkaConsumer, "seek_wait"): "self partitions",
    (KafkaConsumer, "assignment"): "self",
    (KafkaConsumer, "_new_consumer_thread"): "self",
    (AIOKafkaConsumerThread, "_create_worker_consumer"): "self transport",
    (KafkaTransport, "create_consumer"): "self callback kwargs",
    (ConsumerMessage, "__init__"): (
        "self topic partition offset timestamp timestamp_type headers key value checksum serialized_key_size "
        "serialized_value_size tp time_in time_out time_total generation_id"
    ),
    (ConsumerMessage, "ack"): "self consumer n",
}

# First digits of the SHA-256 of the source: functions whose steps, not only their names, we count on.
BODIES = {
    BaseConsumer.__init__: "302410d59e",
    BaseConsumer.getmany: "4b168d8488",
    BaseConsumer._wait_next_records: "6218e1969a",
    BaseConsumer._drain_messages: "44a2500309",
    BaseConsumer.on_buffer_full: "c8961679e0",
    BaseConsumer.on_buffer_drop: "4b57e8a418",
    BaseConsumer.on_partitions_revoked: "d04b7ae72c",
    BaseConsumer.perform_seek: "0e8c130ff4",
    BaseConsumer._filter_tps_with_pending_acks: "f6f9239774",
    BaseConsumer._filter_committable_offsets: "dc5e9baf5d",
    BaseConsumer._should_commit: "5ce9417939",
    BaseConsumer._commit_offsets: "1a69799041",
    ThreadDelegateConsumer._getmany: "f9d47aa901",
    KafkaConsumer._new_consumer_thread: "0870ec53de",
    AIOKafkaConsumerThread._create_worker_consumer: "c2701bfc3e",
    ServiceThread.__init__: "8297987899",
    ServiceThread.start: "f11841038a",
    ServiceThread.stop: "32d026539c",
    ServiceThread._serve: "67809eae09",
    ServiceThread._shutdown_thread: "d7377862e7",
    ServiceThread._gather_remaining_tasks: "6f65b92dd1",
    QueueServiceThread.call_thread: "479edda75b",
    AIOKafkaConsumer.__init__: "01506f3161",
    AIOKafkaConsumer.seek_to_committed: "f6cd85c8b7",
    AIOKafkaConsumerThread._fetch_records: "39a2c6c79f",
    AIOKafkaConsumerThread._commit: "932852ce7a",
    AIOKafkaConsumerThread._seek_wait: "9d221e816d",
    ConsumerMessage.ack: "4751b72c4e",
    ConsumerMessage.on_final_ack: "45d670b6a8",
    faust.App._on_partitions_revoked: "d5c895bbe5",
    faust.App._on_partitions_assigned: "de932b7927",
    faust.App._stop_consumer: "55854a5de1",
    faust.Stream.noack: "921a6f5c67",
}


@pytest.mark.parametrize(("owner", "name"), PARAMETERS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_faust_still_has_the_methods_we_override_and_call(owner: type, name: str) -> None:
    assert " ".join(inspect.signature(getattr(owner, name)).parameters) == PARAMETERS[owner, name]


@pytest.mark.parametrize("function", BODIES, ids=lambda f: f.__qualname__)
def test_faust_still_does_what_we_read_in_its_source(function: Callable[..., Any]) -> None:
    assert hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:10] == BODIES[function]


def record(offset: int, size: int = 10, tp: TP = A) -> Any:
    return SimpleNamespace(
        topic=tp.topic, partition=tp.partition, offset=offset, timestamp=1_700_000_000_000, timestamp_type=0, headers=(),
        key=None, value=b"x" * size, checksum=None, serialized_key_size=-1, serialized_value_size=size,
    )  # fmt: skip


def test_records_are_cut_into_runs_within_both_limits() -> None:
    cut = list(runs([record(o) for o in (3, 4, 7, 8, 9)], records_max=2))
    assert [(r.first_offset, r.last_offset, len(r.records), r.size_bytes) for r in cut] == [
        (3, 4, 2, 20),
        (7, 8, 2, 20),
        (9, 9, 1, 10),
    ]
    cut = list(runs([record(0, 4), record(1, 4), record(2, 90), record(3, 4)], bytes_max=10))
    assert [(r.first_offset, r.last_offset) for r in cut] == [(0, 1), (2, 2), (3, 3)]
    assert list(runs([])) == []


def new_app(consumer: str = "batched://127.0.0.1:1") -> Any:
    register()
    register()
    return faust.App("contract", broker_consumer=consumer, broker_producer="kafka://127.0.0.1:1", set_as_current=False)


async def test_a_batched_topic_needs_the_batched_transport() -> None:
    with pytest.raises(TypeError, match="batched://"):
        batched_topic(new_app("kafka://127.0.0.1:1"), TOPIC)


async def test_an_event_carries_its_run_through_the_topics_decoder() -> None:
    app = new_app()
    topic = batched_topic(app, TOPIC)
    (run,) = runs([record(5), record(6)])
    event = await topic.decode(Broker(app).consumer._to_message(A, run), propagate=True)
    assert event.value is run
    assert (event.message.offset, event.message.tp, event.key) == (6, A, None)


class Broker:
    """A group of one on a log with holes: what aiokafka would do, and what an agent did."""

    def __init__(self, app: Any) -> None:
        app.consumer_generation_id = 1
        self.app = app
        app.topics._acking_topics.add(TOPIC)
        self.log = {tp: [o for o in range(60) if o % 7 not in (3, 4)] for tp in (A, B)}
        self.position: dict[TP, int] = {A: 0, B: 0}
        self.committed: dict[TP, int] = {}
        self.processed: dict[TP, set[int]] = {A: set(), B: set()}
        self.queue: list[Any] = []
        self.in_hand: list[Any] = []
        self.consumer = app.transport.create_consumer(
            callback=self.enqueue, on_partitions_revoked=self.revoked, on_partitions_assigned=self.revoked
        )
        self.consumer.assignment = lambda: {A, B}
        self.consumer._commit = self.commit
        self.consumer.seek_to_committed = self.seek_to_committed
        self.consumer._thread.seek_assigned = self.seek_assigned
        self.consumer._thread.getmany = self.getmany
        self.want = 0

    async def enqueue(self, message: Any) -> None:
        message.incref()
        self.queue.append(message)

    async def revoked(self, partitions: set[TP]) -> None:
        self.queue.clear()

    async def commit(self, offsets: Mapping[TP, int]) -> bool:
        self.committed.update(offsets)
        return True

    async def seek_to_committed(self) -> dict[TP, int | None]:
        # As aiokafka: a partition without a commit stays where it is.
        self.position.update(self.committed)
        return {tp: self.committed.get(tp) for tp in (A, B)}

    def seek_assigned(self, partitions: Mapping[TP, int]) -> None:
        self.position.update(partitions)

    async def getmany(self, wanted: set[TP], timeout: float) -> dict[TP, list[Any]]:
        """What the next fetch brings: `self.want` records of one partition."""
        (tp,) = wanted
        offsets = [o for o in self.log[tp] if o >= self.position[tp]][: self.want]
        if offsets:
            self.position[tp] = offsets[-1] + 1
        return {tp: [record(o, tp=tp) for o in offsets]}

    async def fetch(self, tp: TP, count: int) -> list[Any]:
        self.want = count
        found: dict[TP, list[Any]] = await self.consumer._getmany({tp}, 0.0)
        return found[tp]

    async def deliver(self, tp: TP, count: int) -> None:
        for run in await self.fetch(tp, count):
            await self.consumer._deliver(self.consumer._to_message(tp, run))

    async def lose(self, tp: TP, count: int) -> None:
        """A fetch that comes while the flow is stopped: Faust drops what it brought and goes back to the committed offsets."""
        await self.fetch(tp, count)
        await self.drop()

    def take(self) -> None:
        """The stream hands the next run to the agent, or skips one of an earlier generation."""
        if self.queue:
            message = self.queue.pop(0)
            if message.generation_id == self.app.consumer_generation_id:
                message.tracked = True
                self.in_hand.append(message)

    def finish(self, which: int) -> None:
        """The agent has processed a run it took, however long ago, and acknowledges it."""
        if self.in_hand:
            message = self.in_hand.pop(which % len(self.in_hand))
            self.processed[message.tp].update(r.offset for r in message.value.records)
            message.ack(self.consumer)

    def skip(self) -> None:
        """Faust's stream in pure Python acknowledges what it skips while the flow is stopped."""
        if self.queue:
            self.queue[0].ack(self.consumer)

    async def drop(self) -> None:
        """Faust empties the buffers and goes back to the committed offsets."""
        self.queue.clear()
        await self.consumer.perform_seek()

    async def rebalance(self) -> None:
        """A run is on its way meanwhile, and the agent finishes another one late."""
        (run,) = runs([record(self.log[A][-1] - 1)])
        late = self.consumer._to_message(A, run)
        await self.consumer.on_partitions_revoked({A, B})
        self.finish(0)
        self.app.consumer_generation_id += 1
        self.position = {tp: self.committed.get(tp, 0) for tp in (A, B)}
        await self.consumer.perform_seek()
        await self.consumer._deliver(late)

    def check(self) -> None:
        for tp, offset in self.committed.items():
            assert {o for o in self.log[tp] if o < offset} <= self.processed[tp], f"{tp} committed to {offset}"


STEPS = st.one_of(
    st.tuples(st.just("deliver"), st.sampled_from([A, B]), st.integers(1, 9)),
    st.tuples(st.just("lose"), st.sampled_from([A, B]), st.integers(1, 9)),
    st.tuples(st.just("finish"), st.integers(0, 3)),
    *(st.just((name,)) for name in ("take", "take", "commit", "skip", "drop", "rebalance")),
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(STEPS, min_size=15, max_size=50))
def test_no_commit_passes_an_unprocessed_record_and_none_is_held_back_for_good(steps: list[Any]) -> None:
    async def scenario() -> None:
        broker = Broker(new_app())
        batched_topic(broker.app, TOPIC)
        for name, *args in steps:
            step = broker.consumer.commit if name == "commit" else getattr(broker, name)
            result = step(*args)
            if inspect.isawaitable(result):
                await result
            broker.check()
        for tp in (A, B):
            while broker.position[tp] <= broker.log[tp][-1]:
                await broker.deliver(tp, 5)
        while broker.queue or broker.in_hand:
            broker.take()
            broker.finish(0)
        await broker.consumer.commit()
        broker.check()
        assert broker.committed == {tp: broker.log[tp][-1] + 1 for tp in (A, B)}

    asyncio.run(scenario())


async def test_what_was_acknowledged_before_a_rebalance_is_committed_before_the_partition_goes() -> None:
    broker = Broker(new_app())
    batched_topic(broker.app, TOPIC)
    await broker.deliver(A, 3)
    broker.take()
    broker.finish(0)
    await broker.consumer.on_partitions_revoked({A, B})
    assert broker.committed == {A: broker.log[A][2] + 1}


async def test_the_lag_is_what_the_group_has_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker(new_app())
    batched_topic(broker.app, TOPIC)
    consumer = broker.consumer
    monkeypatch.setattr(consumer, "highwater", lambda tp: broker.log[tp][-1] + 1)
    assert (consumer.lag(A), consumer.lag(TP("another", 0))) == (0, 0), "nothing is known of them"
    await broker.deliver(A, 3)
    assert consumer.lag(A) == 59, "none of it is settled yet"
    broker.take()
    broker.finish(0)
    await consumer.commit()
    assert consumer.lag(A) == 59 - 3

    broker.log[A], broker.position[A] = list(range(2)), 0  # the log lost its end
    consumer._read_offset[A] = 2  # Faust notes it
    assert consumer.lag(A) == 0
    await broker.deliver(A, 2)
    assert consumer.lag(A) == 2
    broker.take()
    broker.finish(0)
    await consumer.commit()
    assert consumer.lag(A) == 0

    broker.committed[A] = 1  # another had it meanwhile
    await consumer.perform_seek()
    assert consumer.lag(A) == 1


async def test_room_in_a_full_buffer_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "ROOM_WAIT_S", 100_000.0)  # nobody looks again because this time is over
    broker = Broker(new_app())
    batched_topic(broker.app, TOPIC)
    consumer = broker.consumer
    polled: list[set[TP]] = []

    async def getmany(active_partitions: set[TP], timeout: float) -> dict[TP, list[Any]]:
        polled.append(active_partitions)
        return {A: [record(0)]}

    consumer._thread.getmany = getmany
    consumer._set_active_tps({A, B})
    consumer.on_buffer_full(A)
    consumer.on_buffer_full(B)
    waiting = asyncio.create_task(consumer._wait_next_records(1.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    consumer.on_buffer_drop(A)
    records, _ = await asyncio.wait_for(waiting, 100)
    assert polled == [{A}]
    assert [run.last_offset for run in records[A]] == [0]


async def test_a_fetch_does_not_wait_long_for_idle_partitions() -> None:
    consumer = Broker(new_app()).consumer
    kafka = consumer._thread._create_worker_consumer(consumer.transport)
    assert kafka._fetch_max_wait_ms == FETCH_WAIT_MS
    await kafka.stop()


async def test_topics_that_are_not_batched_keep_fausts_own_path() -> None:
    app = new_app()
    batched_topic(app, TOPIC)
    consumer = Broker(app).consumer
    assert isinstance(app.transport, Transport)
    assert isinstance(consumer, Consumer)
    changelog = TP("contract-levels-changelog", 0)
    plain = consumer._to_message(changelog, record(4, tp=changelog))
    assert not isinstance(plain.value, Run)
    consumer._committed_offset[changelog] = 4
    consumer._acked[changelog] = [5, 6]
    assert consumer._new_offset(changelog) == 7
