"""Fetches that hold a header name that is not UTF-8, and what agents/lenient_records.py relies on in aiokafka."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException, KafkaError
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import TopicPartition

from agents import lenient_records, transport
from agents.journal_end import last_records
from agents.recovery.old_input import Range
from stablerail.cli_replay import _input
from stablerail.config import load_settings
from stablerail.rebuild import open_journal
from stablerail.verify_kafka import verify_kafka
from tests.support.hostile import NotUtf8
from topics.catalog import JOURNAL

FOREIGN = "ce\\xff\\xfe"
NOBODY = "127.0.0.1:1"
SETTINGS = load_settings(env_file=None, kafka_bootstrap=NOBODY)


def batch(first: int, names: list[str], codec: int = 0) -> bytes:
    """Records of one batch, each with one header."""
    builder = _DefaultRecordBatchBuilderPy(2, codec, 0, -1, -1, -1, 1_000_000)
    for offset, name in enumerate(names):
        builder.append(offset, 1_700_000_000_000, b"k", b"v%d" % (first + offset), [(name, b"\xff"), ("ok", None)])
    built = bytearray(builder.build())
    built[:8] = first.to_bytes(8, "big")
    return bytes(built)


def unpacked(raw: bytes, from_offset: int = 0) -> list[tuple[int, bytes, str]]:
    tp = TopicPartition("t", 0)
    found: Any = lenient_records.PartitionRecords(
        tp, lenient_records.Records(raw), [], from_offset, None, None, True, fetcher.READ_UNCOMMITTED
    )
    records = []
    for record in found:
        assert found.next_fetch_offset == record.offset + 1  # where aiokafka goes on when the caller takes no more
        assert record.headers[0][1:] == (b"\xff",)
        assert record.headers[1] == ("ok", None)
        records.append((record.offset, record.value, record.headers[0][0]))
    return records


def test_aiokafka_itself_still_stops_at_such_a_record() -> None:
    """When this fails, lenient_records may go."""
    raw = MemoryRecords(batch(0, ["a", NotUtf8()]))
    records = lenient_records._Strict(TopicPartition("t", 0), raw, [], 0, None, None, True, fetcher.READ_UNCOMMITTED)
    with pytest.raises((UnicodeDecodeError, CorruptRecordException)):
        list(records)


@pytest.mark.parametrize("codec", [0, 1, 2, 3, 4])
def test_every_record_around_and_including_a_foreign_header_name_is_delivered_once(codec: int) -> None:
    raw = batch(5, ["a", "b"]) + batch(7, ["c", NotUtf8(), "d"], codec) + batch(10, ["e"])
    assert unpacked(raw, 6) == [
        (6, b"v6", "b"),
        (7, b"v7", "c"),
        (8, b"v8", FOREIGN),
        (9, b"v9", "d"),
        (10, b"v10", "e"),
    ]


def test_a_damaged_fetch_is_still_refused() -> None:
    raw = bytearray(batch(0, ["a", NotUtf8()]))
    raw[-1] ^= 1
    with pytest.raises(CorruptRecordException):
        unpacked(bytes(raw))


def test_aiokafkas_fetcher_uses_what_is_replaced() -> None:
    lenient_records.install()
    lenient_records.install()
    used = fetcher.Fetcher._proc_fetch_request.__code__.co_names
    assert {"MemoryRecords", "PartitionRecords"} <= set(used)
    assert fetcher.Fetcher._proc_fetch_request.__globals__["PartitionRecords"] is lenient_records.PartitionRecords
    assert lenient_records._Strict is not lenient_records.PartitionRecords


async def worker() -> None:
    transport.register()
    raise KafkaError


async def rebuild() -> None:
    async with open_journal(NOBODY, ""):
        pass


async def replay() -> None:
    async with _input(JOURNAL, SETTINGS, Range(), None):
        pass


async def looking_at_the_journals_end() -> None:
    await last_records(NOBODY, "")


async def verify() -> None:
    await verify_kafka(SETTINGS, Any, timedelta(days=1), 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("begin", [worker, rebuild, replay, looking_at_the_journals_end, verify])
async def test_whoever_reads_topics_reads_them_so(
    begin: Callable[[], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher, "MemoryRecords", MemoryRecords)
    monkeypatch.setattr(fetcher, "PartitionRecords", lenient_records._Strict)
    with pytest.raises(KafkaError):
        await begin()
    assert fetcher.MemoryRecords is lenient_records.Records
    assert fetcher.PartitionRecords is lenient_records.PartitionRecords
