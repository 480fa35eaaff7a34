"""Records whose header names are not UTF-8 can be read.

Kafka takes any bytes as the name of a header. aiokafka decodes names strictly while it unpacks a fetch: one such record
raises in every poll, nothing around it is delivered, and its partition stands still for ever. Here the fetch is unpacked
again in Python, with the foreign bytes of a name written as `\\xff`; values and keys are untouched. Other fetches go the
compiled way as before.

Pinned to aiokafka 0.14.0; tests/unit/test_lenient_records.py says on what it relies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy

_Compiled: Any = MemoryRecords
_Strict: Any = fetcher.PartitionRecords


def install() -> None:
    """Makes aiokafka's consumers of this process read such records. Calling again is harmless."""
    fetcher.MemoryRecords = Records
    fetcher.PartitionRecords = PartitionRecords


class Records:
    """The batches of one fetch from one partition, with the bytes they came in."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        inner = _Compiled(raw)
        self.has_next = inner.has_next
        self.next_batch = inner.next_batch
        self.size_in_bytes = inner.size_in_bytes


class PartitionRecords(_Strict):  # type: ignore[misc]
    """Goes on leniently, from the first record not yet delivered, when the strict way fails; real damage fails again."""

    _records: Any

    def _unpack_records(self) -> Iterator[Any]:
        try:
            yield from super()._unpack_records()
        except (UnicodeDecodeError, CorruptRecordException):
            delivered_to = self.next_fetch_offset
            self._records = LenientRecords(self._records.raw)
            # the first batches of the fetch set `next_fetch_offset` back
            yield from (record for record in super()._unpack_records() if record.offset >= delivered_to)


class LenientRecords(_MemoryRecordsPy):  # type: ignore[misc]
    def next_batch(self) -> Any:
        batch, found = self._next_slice, super().next_batch()
        return LenientBatch(batch) if found is not None and found.magic >= 2 else found


class LenientBatch(_DefaultRecordBatchPy):  # type: ignore[misc]
    _buffer: bytearray

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer = _Bytes(self._buffer)


class _Bytes(bytearray):
    """Its slices decode what is not UTF-8 as escapes."""

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return _Bytes(found) if isinstance(found, bytearray) else found

    def decode(self, encoding: str = "utf-8", errors: str = "backslashreplace") -> str:
        return super().decode(encoding, errors)
