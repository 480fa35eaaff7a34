"""Kafka records that ordinary clients do not make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy


class NotUtf8(str):
    """A header name that goes over the wire as bytes that are no UTF-8."""

    def __new__(cls) -> NotUtf8:
        return super().__new__(cls, "ce??")

    def encode(self, *_: Any, **__: Any) -> bytes:
        return b"ce\xff\xfe"


async def send_raw(
    producer: AIOKafkaProducer,
    topic: str,
    partition: int,
    records: Sequence[tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]],
) -> int:
    """Sends (key, value, headers) in one batch as they are; the first offset."""
    batch = producer.create_batch()
    batch._builder = _DefaultRecordBatchBuilderPy(2, 0, 0, -1, -1, -1, 2**24)
    for key, value, headers in records:
        assert batch.append(key=key, value=value, timestamp=None, headers=headers) is not None
    offset: int = (await (await producer.send_batch(batch, topic, partition=partition))).offset
    return offset
