"""What the journal's end says that a database must have: looked at once by each process, before it acts."""

from __future__ import annotations

from typing import Final

from aiokafka import AIOKafkaConsumer, TopicPartition

from agents import lenient_records
from ledger.assembly import Assembly
from ledger.errors import JournalBroken
from ledger.rebuild_batch import Journaled
from topics.catalog import JOURNAL

MESSAGES: Final = 50
"""From the end. The last may be repeats, late ones of a database that was lost, or parts of a record that never got whole."""
FETCH_BYTES: Final = 16 * 1024 * 1024
"""Above a batch of the journal."""
FETCH_WAIT_MS: Final = 10


async def last_record(bootstrap: str, prefix: str) -> Journaled | None:
    """The highest record among the journal's last messages, whole; None: there is none, or no such topic. What is not a record of
    ours is passed over: `stablerail verify --kafka` names it. Raises KafkaError when no broker answers."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap.replace(";", ","),
        group_id=None,
        enable_auto_commit=False,
        max_partition_fetch_bytes=FETCH_BYTES,
        fetch_max_wait_ms=FETCH_WAIT_MS,
    )
    lenient_records.install()
    place = TopicPartition(JOURNAL.named(prefix), 0)
    try:
        await consumer.start()
        if place.topic not in await consumer.topics():
            return None
        consumer.assign([place])
        begin = (await consumer.beginning_offsets([place]))[place]
        end = (await consumer.end_offsets([place]))[place]
        consumer.seek(place, max(begin, end - MESSAGES))
        assembly, found = Assembly(), None
        while await consumer.position(place) < end:
            for message in (await consumer.getmany(place, timeout_ms=1_000)).get(place, ()):
                try:
                    one = assembly.take(message.offset, message.key, message.value, message.headers)
                except JournalBroken:
                    continue
                if one is not None and (found is None or one.seq > found.seq):
                    found = one
        return found
    finally:
        await consumer.stop()
