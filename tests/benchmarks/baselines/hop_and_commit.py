"""Baseline of latency: one bare Kafka hop and one bare commit. Nothing is decoded, decided or told.

poll -> for each message one INSERT in a transaction of its own (fsync) -> next
"""

from __future__ import annotations

import asyncio
import os
import signal

import asyncpg
import uvloop
from aiokafka import AIOKafkaConsumer


async def main() -> None:
    bootstrap, prefix = os.environ["STABLERAIL_KAFKA_BOOTSTRAP"], os.environ["STABLERAIL_TOPIC_PREFIX"]
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    connection = await asyncpg.connect(os.environ["STABLERAIL_DATABASE_URL"])
    await connection.execute("CREATE SCHEMA bare; CREATE TABLE bare.credited (transfer_id text PRIMARY KEY)")
    insert = await connection.prepare("INSERT INTO bare.credited VALUES ($1)")
    consumer = AIOKafkaConsumer(
        f"{prefix}deposits.notified",
        bootstrap_servers=bootstrap,
        group_id=f"{prefix}baseline",
        auto_offset_reset="earliest",
    )
    await consumer.start()
    try:
        while not stopping.is_set():
            for records in (await consumer.getmany(timeout_ms=200)).values():
                for record in records:
                    # the id stands in a header, as `circle:…` of no length that matters
                    await insert.fetch(next(value for name, value in record.headers if name == "ce_id").decode())
    finally:
        await consumer.stop()
        await connection.close()


if __name__ == "__main__":
    uvloop.run(main())
