"""What a topic still holds, and what a file of dead letters holds, as messages to be replayed."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition

from agents.recovery.replay import BYTES_MAX, EVENTS_MAX, Given
from topics.catalog import Topic


class InputRefused(Exception):
    """What was asked for is not there, or is no input of the stage; nothing was done."""

    code = "input_refused"


class BadRange(InputRefused):
    code = "bad_range"


class BadFile(InputRefused):
    code = "bad_file"


READ_S_MAX: Final = 30.0
"""A broker that has what it says it has brings the next of it within milliseconds."""


@dataclass(frozen=True, slots=True)
class Range:
    """A part of a topic; what is None is no bound."""

    since: datetime | None = None
    until: datetime | None = None
    """Before it, by the broker's time of the message."""
    partition: int | None = None
    first: int | None = None
    last: int | None = None
    """Offsets, both included."""
    key: bytes | None = None

    def __str__(self) -> str:
        said = {
            "from": self.since and self.since.isoformat(), "to": self.until and self.until.isoformat(),
            "partition": self.partition, "from-offset": self.first, "to-offset": self.last,
            "key": self.key and self.key.decode(errors="replace"),
        }  # fmt: skip
        return ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)


@dataclass(frozen=True, slots=True)
class Span:
    """Offsets of one partition: `first` up to `end`, which is not in it."""

    partition: TopicPartition
    first: int
    end: int


class OldInput:
    """The messages of a range, as they are when `spans` is asked; what comes later is no part of it."""

    def __init__(self, consumer: AIOKafkaConsumer, topic: Topic, prefix: str, wanted: Range) -> None:
        """`consumer`: started, of no group, with no topic."""
        self._consumer = consumer
        self._topic = topic
        self._name = topic.named(prefix)
        self._wanted = wanted

    async def spans(self) -> list[Span]:
        """Those that are not empty. Raises BadRange with what there is."""
        wanted = self._wanted
        if self._name not in await self._consumer.topics():
            raise BadRange(f"the broker has no topic {self._name}")
        await self._consumer.end_offsets([TopicPartition(self._name, 0)])  # the client learns of the topic
        numbers = self._consumer.partitions_for_topic(self._name)
        if wanted.partition is not None and wanted.partition not in numbers:
            raise BadRange(f"{self._name} has partitions 0 to {max(numbers)}")
        chosen = [TopicPartition(self._name, n) for n in sorted(numbers) if wanted.partition in (None, n)]
        begins = await self._consumer.beginning_offsets(chosen)
        ends = await self._consumer.end_offsets(chosen)
        if wanted.partition is not None:
            begin, end = begins[chosen[0]], ends[chosen[0]]
            for offset in (wanted.first, wanted.last):
                if offset is not None and not begin <= offset < end:
                    held = f"offsets {begin} to {end - 1}" if end > begin else "nothing"
                    raise BadRange(f"partition {wanted.partition} of {self._name} holds {held}, not {offset}")
        firsts, untils = await self._at(chosen, wanted.since), await self._at(chosen, wanted.until)
        found = []
        for tp in chosen:
            first = max(begins[tp], wanted.first or 0, firsts.get(tp, ends[tp]) if wanted.since else 0)
            end = min(ends[tp], wanted.last + 1 if wanted.last is not None else ends[tp], untils.get(tp, ends[tp]))
            if first < end:
                found.append(Span(tp, first, end))
        return found

    async def _at(self, partitions: Sequence[TopicPartition], time: datetime | None) -> dict[TopicPartition, int]:
        """The first offset at or after the time, of the partitions that have one."""
        if time is None:
            return {}
        found = await self._consumer.offsets_for_times(dict.fromkeys(partitions, int(time.timestamp() * 1000)))
        return {tp: place.offset for tp, place in found.items() if place is not None}

    async def batches(self, spans: Sequence[Span], read: Callable[[int], None]) -> AsyncIterator[list[Given]]:
        """The messages, partition by partition, so that each key's stay in order. `read` is told how many were read."""
        for span in spans:
            self._consumer.assign([span.partition])
            self._consumer.seek(span.partition, span.first)
            at = span.first
            batch = _Batch()
            while at < span.end:
                polled = await self._consumer.getmany(timeout_ms=int(READ_S_MAX * 1000), max_records=EVENTS_MAX)
                records = polled.get(span.partition, [])
                before, at = at, await self._consumer.position(span.partition)
                if at == before:
                    raise BadRange(
                        f"the broker did not bring offset {at} of {span.partition} within {READ_S_MAX:.0f} s"
                    )
                for record in records:
                    if record.offset >= span.end or self._wanted.key not in (None, record.key):
                        continue
                    if (full := batch.add(_given(record))) is not None:
                        yield full
                read(min(at, span.end) - before)
            if batch.given:
                yield batch.given


class _Batch:
    """Messages up to what one rehearsal takes."""

    def __init__(self) -> None:
        self.given: list[Given] = []
        self._bytes = 0

    def add(self, one: Given) -> list[Given] | None:
        """The full batch, which the message was too much for."""
        size = len(one.value or b"")
        full = None
        if self.given and (len(self.given) == EVENTS_MAX or self._bytes + size > BYTES_MAX):
            full, self.given, self._bytes = self.given, [], 0
        self.given.append(one)
        self._bytes += size
        return full


def _given(record: Any) -> Given:
    headers = [(name, value) for name, value in record.headers]
    return Given(
        record.topic, record.partition, record.offset, record.timestamp, record.key, record.value, headers
    )  # fmt: skip


def batches_of(given: Iterable[Given]) -> Iterable[list[Given]]:
    batch = _Batch()
    for one in given:
        if (full := batch.add(one)) is not None:
            yield full
    if batch.given:
        yield batch.given


def letters(lines: Iterable[bytes], topic: Topic, prefix: str, key: bytes | None = None) -> list[Given]:
    """The events of dead letters, as `stablerail dlq list --format json` writes them, a line each. Raises BadFile."""
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            one = _letter(number, line, topic, prefix)
            if key in (None, one.key):
                found.append(one)
    return found


def _letter(number: int, line: bytes, topic: Topic, prefix: str) -> Given:
    try:
        letter = orjson.loads(line)
        origin = letter["origin"]
        if origin == topic.name:
            headers = [
                (bytes.fromhex(name).decode(errors="surrogateescape"), bytes.fromhex(value))
                for name, value in letter["headers"]
                if value is not None
            ]
            partition, offset = (letter.get(name) or 0 for name in ("partition", "offset"))
            if not all(type(part) is int and part >= 0 for part in (partition, offset)):
                raise ValueError("partition and offset are numbers")
            return Given(
                topic.named(prefix), partition, offset, 0, _bytes(letter["key"]), _bytes(letter["value"]), headers
            )
    except (orjson.JSONDecodeError, binascii.Error, KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"[:200]
        raise BadFile(f"line {number} is no dead letter as `dlq list --format json` writes it: {why}") from None
    raise BadFile(f"line {number} is an event of {origin}; the stage reads {topic.name}")


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text, validate=True)
