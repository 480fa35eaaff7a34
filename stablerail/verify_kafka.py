"""`stablerail verify --kafka`: what the topics of the last while hold, against what the database says of it.

| step | what it finds | invariant |
| --- | --- | --- |
| journal | a record that cannot be read, a sequence number with two contents, a chain's position that is missing, repeated or not as the database has it | 9 |
| messages | a message of a record that is not in its topic, or that was told in another order than its owner's commits say | 9 |
| inputs | an event below the offset that every group has committed, without a row in the inbox of a stage whose event it is | 10 |
| lag | events that a group has left in its topic for too long | 13 |

Nothing that is older than the window is read, so it may be asked of a deployment of any age while it works: commits of the last minute,
and what waits in the outbox, are not judged. Digests are held of what is compared, never the messages.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition

from agents import lenient_records
from agents.item import position_uid
from agents.withdrawals import sign_transactions, transfer_by_custodian
from ledger.commit import NO_TOPIC
from ledger.errors import JournalBroken
from ledger.links import links_of
from ledger.record import CommitRecord, Message, unpack
from ledger.rows import Connection
from ledger.sql import load
from ledger.verify import DRAINED, EMITTED, SETTLED, Result
from stablerail.config import Settings
from stablerail.movements import MOVEMENTS
from stablerail.topics_admin import admin
from topics.catalog import JOURNAL, TOPICS, Topic, by_name
from topics.envelope import Received, read
from topics.errors import EventRefused

_sql = load("stablerail", "verify_kafka.sql")

SETTLING: Final = timedelta(minutes=1)
"""A younger commit may still be on its way to its topics."""
SLACK: Final = timedelta(minutes=10)
"""Clocks of workers and brokers differ, and a broker that is away makes its records late."""
LAG_MAX: Final = timedelta(minutes=10)
"""What a group has not committed for so long waits for somebody."""
FETCH_MS: Final = 500
FETCH_WAIT_MS: Final = 10
"""The consumer fetches on at a topic's end, and what else is asked of the broker waits behind that."""
FETCH_BYTES_MAX: Final = 16 * 1024 * 1024
"""Above a batch of the journal."""
ASKED_MAX: Final = 5_000
"""Ids in one question to the inbox."""

TAKES: Final[Mapping[str, Callable[[Any], bool]]] = {
    sign_transactions.NAME: sign_transactions.takes,
    transfer_by_custodian.NAME: transfer_by_custodian.takes,
}
"""Of the stages that do not take every event of their topic (`Stage.takes`)."""

ChainKey = tuple[str, str, int]
Place = tuple[str, int, str, str, bytes | None]
"""stage, partition, topic it consumes, topic it tells, key: within it the order of commits is that of messages."""


@dataclass
class _Found:
    rows_max: int
    checked: int = 0
    offending: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        if len(self.offending) < self.rows_max:
            self.offending.append(text)

    def result(self, number: int, name: str) -> Result:
        return Result(number, name, self.checked, tuple(self.offending))


@dataclass
class _Expected:
    """What the journal of the window says that was told."""

    messages: dict[str, dict[bytes, str]] = field(default_factory=lambda: defaultdict(dict))
    """Topic -> digest -> where it was said."""
    orders: dict[Place, list[bytes]] = field(default_factory=lambda: defaultdict(list))


async def verify_kafka(
    settings: Settings, connection: Connection, window: timedelta, rows_max: int, now: datetime | None = None
) -> list[Result]:
    """9, 10 and 13 as far as the topics tell. Raises KafkaError when no broker answers."""
    now = now or datetime.now(UTC)
    lenient_records.install()
    async with _consumer(settings) as consumer, admin(settings.kafka_bootstrap) as client:
        prefix = settings.topic_prefix
        checks = _Checks(prefix, await _partitions(client, prefix), connection, now - window, now, rows_max)
        groups = [f"{settings.group_prefix}{prefix}{movement}" for movement in MOVEMENTS]
        committed = {group: await client.list_consumer_group_offsets(group) for group in groups}
        expected = await checks.journal(consumer)
        await checks.told(consumer, expected)
        await checks.settled(consumer, committed)
        await checks.drained(consumer, committed)
    return [
        checks.emitted.result(9, EMITTED),
        checks.inputs.result(10, SETTLED),
        checks.lag.result(13, DRAINED),
    ]


@asynccontextmanager
async def _consumer(settings: Settings) -> AsyncIterator[Any]:
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap,
        group_id=None,
        enable_auto_commit=False,
        max_partition_fetch_bytes=FETCH_BYTES_MAX,
        fetch_max_wait_ms=FETCH_WAIT_MS,
    )
    try:
        await consumer.start()
        yield consumer
    finally:
        await consumer.stop()


class _Checks:
    def __init__(
        self,
        prefix: str,
        partitions: dict[str, int],
        connection: Connection,
        start: datetime,
        now: datetime,
        rows_max: int,
    ) -> None:
        """`partitions`: of each topic as the broker names it."""
        self._prefix, self._partitions = prefix, partitions
        self._connection = connection
        self._start, self._end = start, now - SETTLING
        self._now = now
        self.emitted, self.inputs, self.lag = (_Found(rows_max) for _ in range(3))

    # -- 9 -------------------------------------------------------------------------------------------------------------

    async def journal(self, consumer: Any) -> _Expected:
        """Compares the journal's links with the database's; what its records said that is to be told."""
        connection, found = self._connection, self.emitted
        waiting = {row[0] for row in await connection.fetch(_sql.waiting)}
        sealed: dict[tuple[ChainKey, int], bytes] = {
            ((stage, topic, partition), position): head
            for stage, topic, partition, position, head in await connection.fetch(_sql.links, self._start, self._end)
        }
        digests: dict[int, bytes] = {}
        last: dict[ChainKey, int] = {}
        expected = _Expected()
        async for seq, packed in self._records(consumer):
            digest = hashlib.blake2b(packed, digest_size=16).digest()
            if (known := digests.setdefault(seq, digest)) != digest:
                found.add(f"journal record {seq} has two contents")
            if known is not digest:
                continue  # a repeat
            try:
                record = unpack(packed)
                links = links_of(record)
            except JournalBroken as error:
                found.add(f"journal record {seq}: {error}")
                continue
            found.checked += 1
            judged = self._start <= record.at < self._end
            partitions = []
            for (stage, topic, partition), (_, position, head), *_ in links:
                key = (stage, topic, partition)
                partitions.append(partition)
                if last.setdefault(key, position - 1) != position - 1:
                    found.add(
                        f"journal record {seq}: {stage} {topic}[{partition}] position {position} follows {last[key]}"
                    )
                last[key] = position
                if judged and sealed.pop((key, position), None) != head:
                    found.add(
                        f"journal record {seq}: {stage} {topic}[{partition}] position {position} is not the database's"
                    )
            if judged and seq not in waiting:
                self._expect(expected, seq, record, partitions)
        for (stage, topic, partition), position in sorted(sealed):
            if not await connection.fetchval(_sql.is_waiting, stage, topic, partition):
                found.add(f"{stage} {topic}[{partition}] position {position} is not in the journal")
        return expected

    def _expect(self, expected: _Expected, seq: int, record: CommitRecord, partitions: Iterable[int]) -> None:
        partitions = list(partitions)
        for message in record.messages:
            topic = _declared(message.topic)
            if topic is None or topic.compacted or record.at < self._now - timedelta(milliseconds=topic.retention_ms):
                continue
            digest = _digest(message.key, message.value, _id_of(message))
            if digest in expected.messages[message.topic]:
                continue  # told before; the first one counts
            expected.messages[message.topic][digest] = f"journal record {seq}, key {message.key!r}"
            if record.topic != NO_TOPIC:
                for partition in partitions:
                    expected.orders[record.stage, partition, record.topic, message.topic, message.key].append(digest)

    async def told(self, consumer: Any, expected: _Expected) -> None:
        """Every message is in its topic, and those of an owner and key in the order of its commits."""
        first: dict[tuple[str, bytes], int] = {}
        for topic, wanted in expected.messages.items():
            async for record in self._read(consumer, topic):
                digest = _digest(record.key, record.value, dict(record.headers).get("ce_id"))
                if digest in wanted:
                    first.setdefault((topic, digest), record.offset)
            for digest, said in wanted.items():
                self.emitted.checked += 1
                if (topic, digest) not in first:
                    self.emitted.add(f"a message of {said} is not in {topic}")
        for (stage, partition, source, topic, key), digests in expected.orders.items():
            offsets = [first[topic, digest] for digest in digests if (topic, digest) in first]
            if offsets != sorted(offsets):
                self.emitted.add(
                    f"{stage} {source}[{partition}] told {topic} of key {key!r} in another order: {offsets}"
                )

    # -- 10, 13 --------------------------------------------------------------------------------------------------------

    async def settled(self, consumer: Any, committed: dict[str, Any]) -> None:
        """Every event below what all groups of the topic have committed is in the inbox of each of the stages that take it."""
        stages: dict[str, list[str]] = defaultdict(list)
        for stage, name in await self._connection.fetch(_sql.consumers):
            stages[name].append(stage)
        for name, readers in sorted(stages.items()):
            topic = _declared(name.removeprefix(self._prefix))
            if topic is None:
                continue
            asked: dict[str, tuple[Received | None, str]] = {}
            async for record in self._read(consumer, topic.name):
                ends = _committed(committed, TopicPartition(name, record.partition))
                if ends and record.offset < min(ends):
                    place = f"{name}[{record.partition}] offset {record.offset}"
                    asked[place] = (_received(topic, record), position_uid(record))
                if len(asked) == ASKED_MAX:
                    await self._ask(readers, asked)
                    asked = {}
            await self._ask(readers, asked)

    async def _ask(self, stages: list[str], asked: dict[str, tuple[Received | None, str]]) -> None:
        """`asked`: place -> what can be read there, and the id that it has of its place. The inbox knows an event by either id."""
        for stage in stages:
            takes = TAKES.get(stage)
            wanted = {
                place: {own, own if received is None else received.uid}
                for place, (received, own) in asked.items()
                if received is None or takes is None or takes(received.event)
            }
            uids = [uid for pair in wanted.values() for uid in pair]
            known = {row[0] for row in await self._connection.fetch(_sql.known, stage, uids)}
            self.inputs.checked += len(wanted)
            for place, pair in wanted.items():
                if known.isdisjoint(pair):
                    self.inputs.add(f"{stage} has no outcome of {place}")

    async def drained(self, consumer: Any, committed: dict[str, Any]) -> None:
        """No group has left an event in its topic for long."""
        until_ms = int((self._now - LAG_MAX).timestamp() * 1000)
        for group, offsets in committed.items():
            places = [place for place, offset in offsets.items() if offset.offset >= 0]
            if not places:
                continue
            begins, ends = await consumer.beginning_offsets(places), await consumer.end_offsets(places)
            young = await consumer.offsets_for_times(dict.fromkeys(places, until_ms))
            for place in places:
                old_until = young[place].offset if young.get(place) else ends[place]
                waiting = old_until - max(offsets[place].offset, begins[place])
                self.lag.checked += 1
                if waiting > 0:
                    self.lag.add(
                        f"{group}: {waiting} events of {place.topic}[{place.partition}] wait for over {LAG_MAX}"
                    )

    # -- reading -------------------------------------------------------------------------------------------------------

    async def _records(self, consumer: Any) -> AsyncIterator[tuple[int, bytes]]:
        """The journal's records of the window, whole."""
        parts: dict[int, list[bytes]] = {}
        async for raw in self._read(consumer, JOURNAL.name):
            headers = dict(raw.headers)
            try:
                number, count = int(headers.get("part", b"0")), int(headers.get("parts", b"1"))
            except (TypeError, ValueError):
                number, count = -1, 0
            if raw.key is None or len(raw.key) != 8 or raw.value is None or number < 0:
                self.emitted.add(f"journal offset {raw.offset} is no record of ours")
                continue
            seq = int.from_bytes(raw.key, "big")
            if number == 0:
                parts[seq] = []
            if len(parts.get(seq, ())) != number or seq not in parts:
                continue  # the window begins within it, or a part came twice
            parts[seq].append(raw.value)
            if number == count - 1:
                yield seq, b"".join(parts.pop(seq))

    async def _read(self, consumer: Any, topic: str) -> AsyncIterator[Any]:
        """The topic's records since the window's start, those that are there now; partition by partition."""
        name = f"{self._prefix}{topic}"
        places = [TopicPartition(name, number) for number in range(self._partitions.get(name, 0))]
        if not places:
            return
        since_ms = int((self._start - SLACK).timestamp() * 1000)
        starts = await consumer.offsets_for_times(dict.fromkeys(places, since_ms))
        ends = await consumer.end_offsets(places)
        for place in places:
            if starts.get(place) is None or starts[place].offset >= ends[place]:
                continue
            consumer.assign([place])
            consumer.seek(place, starts[place].offset)
            while await consumer.position(place) < ends[place]:
                for record in (await consumer.getmany(place, timeout_ms=FETCH_MS)).get(place, ()):
                    if record.offset < ends[place]:
                        yield record


async def _partitions(client: Any, prefix: str) -> dict[str, int]:
    """How many each declared topic has, of those that exist."""
    names = sorted({topic.named(prefix) for topic in TOPICS} & set(await client.list_topics()))
    found = await client.describe_topics(names) if names else ()
    return {one["topic"]: len(one["partitions"]) for one in found}


def _committed(committed: dict[str, Any], place: TopicPartition) -> list[int]:
    return [offsets[place].offset for offsets in committed.values() if place in offsets and offsets[place].offset >= 0]


def _received(topic: Topic, record: Any) -> Received | None:
    try:
        return read(topic, record.value, record.headers)
    except EventRefused:
        return None


def _declared(name: str) -> Topic | None:
    try:
        return by_name(name)
    except KeyError:
        return None


def _id_of(message: Message) -> bytes | None:
    return message.id.encode() if message.headers is None else dict(message.headers).get("ce_id")


def _digest(key: bytes | None, value: bytes | None, id: bytes | None) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in (key, value, id):
        digest.update(b"-" if part is None else len(part).to_bytes(4, "big") + part)
    return digest.digest()
