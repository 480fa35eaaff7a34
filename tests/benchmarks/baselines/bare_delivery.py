"""Baseline `bare`: the product's own delivery and settle of `credit_deposits`, driven by a bare aiokafka `getmany` loop.

What Faust costs is the difference to the worker: agents, streams, its consumer thread, sensors, web, table manager.
Offsets are committed twice a second, as the worker does.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from functools import partial
from typing import Any

import uvloop
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition

from agents.crash import Stop
from agents.delivery import Delivery
from agents.deposits import credit_deposits
from agents.intake import Delivered
from agents.transport import Run, runs
from stablerail.config import load_settings
from stablerail.metrics import Metrics
from stablerail.policies import deposit_policy
from stablerail.telemetry import configure_logging
from stablerail.wiring import services

COMMIT_S = 0.5
POLL_RECORDS = int(os.environ.get("BENCH_POLL_RECORDS", "2000"))


class _Owner(ConsumerRebalanceListener):  # type: ignore[misc]
    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery

    async def on_partitions_revoked(self, revoked: Any) -> None:
        self._delivery.revoked({(tp.topic, tp.partition) for tp in revoked})

    async def on_partitions_assigned(self, assigned: Any) -> None:
        self._delivery.assigned({(tp.topic, tp.partition) for tp in assigned})


async def main() -> None:
    gc.set_threshold(100_000, 50, 100)  # as the worker has it: the default costs half of the rate
    settings = load_settings(env_file=None)
    configure_logging(settings.log_format, settings.log_level)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    shared = services(settings, Metrics(), Stop())
    await shared.emitter.start()
    delivery = Delivery(credit_deposits.stage(deposit_policy(settings)), shared)
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap,
        group_id=f"{settings.topic_prefix}baseline",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        session_timeout_ms=int(settings.kafka_session_timeout_s * 1000),
    )
    consumer.subscribe([delivery.stage.source.named(settings.topic_prefix)], listener=_Owner(delivery))
    await consumer.start()
    settled: dict[TopicPartition, int] = {}

    def ack(run: Run) -> None:
        settled[TopicPartition(run.topic, run.partition)] = run.last_offset + 1

    async def commit() -> None:
        while True:
            await asyncio.sleep(COMMIT_S)
            if settled:
                offsets = dict(settled)
                settled.clear()
                await consumer.commit(offsets)

    async def consume() -> None:
        while True:
            polled = await consumer.getmany(timeout_ms=200, max_records=POLL_RECORDS)
            for records in polled.values():
                for run in runs(records):
                    await delivery.offer(Delivered(run, partial(ack, run)))

    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work) for work in (delivery.work(), commit(), consume())]
    waiting: asyncio.Task[Any] = asyncio.create_task(stopping.wait())
    done, _ = await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await consumer.stop()
    await shared.relay.close()
    await shared.emitter.stop()
    for task in done:
        await task


if __name__ == "__main__":
    uvloop.run(main())
