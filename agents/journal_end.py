"""What the journal's end says that a database must have: looked at by each process before it acts, and when it connects anew."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

from aiokafka import AIOKafkaConsumer, TopicPartition

from agents import lenient_records
from ledger.assembly import Assembly
from ledger.errors import JournalBroken
from ledger.links import Placed, links_of
from ledger.record import proof_of
from topics.catalog import JOURNAL

MESSAGES: Final = 50
"""From the end. The last may be repeats, late ones of a database that was lost, or parts of a record that never got whole."""
FETCH_BYTES: Final = 16 * 1024 * 1024
"""Above a batch of the journal."""
FETCH_WAIT_MS: Final = 10


async def last_records(bootstrap: str, prefix: str) -> list[Placed]:
    """Those of the journal's last messages that are whole records and say which places in their chains they have; none where there is
    no such topic. What is not a record of ours is passed over, whatever its key says: `stablerail verify --kafka` names it.
    Raises KafkaError when no broker answers."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap.replace(";", ","),
        group_id=None,
        enable_auto_commit=False,
        max_partition_fetch_bytes=FETCH_BYTES,
        fetch_max_wait_ms=FETCH_WAIT_MS,
    )
    lenient_records.install()
    place = TopicPartition(JOURNAL.named(prefix), 0)
    assembly = Assembly()
    found: list[Placed] = []
    try:
        await consumer.start()
        if place.topic not in await consumer.topics():
            return found
        consumer.assign([place])
        begin = (await consumer.beginning_offsets([place]))[place]
        end = (await consumer.end_offsets([place]))[place]
        consumer.seek(place, max(begin, end - MESSAGES))
        while await consumer.position(place) < end:
            for message in (await consumer.getmany(place, timeout_ms=1_000)).get(place, ()):
                with suppress(JournalBroken):
                    one = assembly.take(message.offset, message.key, message.value, message.headers)
                    if one is not None:
                        proof = proof_of(one.packed)
                        found.append(Placed(one.seq, proof.at, links_of(proof)))
                # a large one took a while to read, and a process that reconnects has others at work
                await asyncio.sleep(0)
        return found
    finally:
        await consumer.stop()
