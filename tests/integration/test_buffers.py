"""Levels of the buffers: told by every commit that moved one, kept in a Faust table that no order or repeat can hurt."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from aiokafka import AIOKafkaProducer

from agents.stage import settle
from agents.treasury.watch_buffers import Row, levels, take, totals
from ledger.accounts import Account, AccountType, buffer
from ledger.book import post
from ledger.corrections import approve, request
from ledger.posting import Transaction, credit, debit
from ledger.record import Message, unpack
from ledger.rows import Connection
from stablerail.dev.kafka import Kafka
from stablerail.topics_admin import admin, create_missing
from tests.integration.test_worker_process import Program
from tests.support import ledger_rig
from tests.support.ledger_rig import AT, STAGE, balance, items, own, owner, record
from topics.catalog import BUFFERS_LEVELS
from topics.envelope import headers_of, value_of
from topics.events import BufferLevel

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection

BUFFER = "system_buffer_usdc"


def level(balance: int, version: int, shard: str = "") -> BufferLevel:
    account = buffer(shard)
    return BufferLevel(
        account=str(account), account_type=BUFFER, asset="USDC", shard=shard, balance=balance, account_version=version
    )


def of(messages: Sequence[Message]) -> list[BufferLevel]:
    return [
        BufferLevel.model_validate_json(message.value or b"")
        for message in messages
        if message.topic == BUFFERS_LEVELS.name
    ]


async def test_a_commit_that_moved_a_buffer_tells_its_level_once_and_others_tell_none(connection: Connection) -> None:
    epochs = await own(connection, 0)

    async def run(*records: Any) -> list[BufferLevel]:
        settled = await settle(connection, STAGE, items(*records), epochs, AT, None)
        assert settled.sealed is not None
        assert of(unpack(settled.sealed.record).messages) == of(settled.sealed.messages)
        return of(settled.sealed.messages)

    # "cross" moves the buffer, "credit" does not
    assert await run(record(0, "ada", 5, "cross", note="bob"), record(1, "ada", 7, "cross", note="cyd")) == [
        level(-24, 2)
    ]
    assert await run(record(2, "ada", 5, "credit"), record(3, "ada", 5, "refuse")) == []
    assert await run(record(4, "ada", 1, "cross", note="bob"), record(5, "ada", 10**9, "spend")) == [level(-26, 3)]
    assert await balance(connection, buffer()) == -26


async def test_people_who_correct_a_buffer_and_programs_that_post_tell_its_level_too(connection: Connection) -> None:
    funding = Account("system", AccountType.TREASURY_CAPITAL_USDC)
    legs = (debit(buffer(), 900), credit(funding, 900))
    batch = await post(connection, "treasury", [Transaction(uuid.uuid4().hex, "funding", "", legs)], AT)
    assert batch.sealed is not None
    assert of(batch.sealed.messages) == [level(900, 1)]
    wanted = uuid.uuid4().hex
    await request(connection, wanted, (credit(buffer(), 100), debit(funding, 100)), "too much", "ann", AT)
    await approve(connection, wanted, "bob", AT)
    last = await connection.fetchval("SELECT record FROM outbox ORDER BY seq DESC LIMIT 1")
    assert of(unpack(last).messages) == [level(800, 2)]


def test_the_highest_version_wins_in_any_order_and_bytes_that_are_none_change_nothing() -> None:
    told = [level(balance, version, shard) for shard in ("0", "1") for version, balance in enumerate((-5, -9, 4), 1)]
    for seed in range(50):
        table: dict[str, Row] = {}
        for event in Random(seed).choices(told, k=30) + told:
            take(table, value_of(event), [])
            take(table, b"\xff" + value_of(event), [])
        whole, *shards = levels(table, {BUFFER: 10})
        assert [(one.balance, one.version, one.low) for one in shards] == [(4, 3, False)] * 2
        assert (whole.account, whole.balance, whole.version, whole.low) == (BUFFER, 8, None, True)
        assert totals(levels(table, {})) == [replace(whole, threshold=None)]


async def test_the_levels_outlive_the_worker_that_shows_them(
    kafka: Kafka, dsn: str, topic_prefix: str, tmp_path: Path
) -> None:
    environment = {
        "STABLERAIL_KAFKA_BOOTSTRAP": kafka.bootstrap,
        "STABLERAIL_DATABASE_URL": dsn,
        "STABLERAIL_TOPIC_PREFIX": topic_prefix,
        "STABLERAIL_BUFFER_ALERT_THRESHOLD": "1000",
    }
    async with admin(kafka.bootstrap) as client:
        await create_missing(client, topic_prefix, 1)
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap)
    await producer.start()

    async def tell(*events: BufferLevel) -> None:
        for event in events:
            headers = headers_of(event.ce_type(), event_id=event.identity(), source="test", time=AT)
            name = BUFFERS_LEVELS.named(topic_prefix)
            await producer.send_and_wait(name, value_of(event), key=event.account.encode(), headers=headers)

    def shown(*wanted: tuple[str, str, int | None, bool]) -> Callable[[], Awaitable[bool]]:
        async def look() -> bool:
            status, body = await worker.get("/buffers", json_wanted=True)
            if status != 200:
                return False
            found = [(b["account"], b["balance"], b["version"], b["low"]) for b in json.loads(body)["buffers"]]
            return found == list(wanted)

        return look

    worker = Program(tmp_path, environment, "treasury")
    try:
        await tell(level(1_500_000_000, 8), level(999_000_000, 9), level(1_400_000_000, 7))
        await producer.send_and_wait(BUFFERS_LEVELS.named(topic_prefix), b"no level", key=b"x")
        await tell(level(999_000_000, 9))
        one = str(buffer())
        await worker.until(shown((one, "999.000000", 9, True)), "the level")
        _, page = await worker.get("/buffers")
        assert all(text in page for text in (one, "999.000000 USDC", "1000.000000", "low"))

        async def measured() -> bool:
            _, metrics = await worker.get("/metrics")
            wanted = {
                f'stablerail_buffer_level{{account="{BUFFER}"}} 999.0',
                f'stablerail_buffer_threshold{{account="{BUFFER}"}} 1000.0',
                'stablerail_reconcile_differences{comparison="mirror"} 0.0',  # this worker has made the day's run
            }
            return wanted <= set(metrics.splitlines())

        async def measured_again() -> bool:
            return "stablerail_reconcile_differences{" in (await worker.get("/metrics"))[1]

        await worker.until(measured, "the gauge")
        worker.child.kill()
        worker = Program(tmp_path, environment, "treasury")
        await worker.until(shown((one, "999.000000", 9, True)), "the level that the one before it knew")
        await tell(level(2_000_000_000, 10), level(5_000_000, 8))
        await worker.until(shown((one, "2000.000000", 10, False)), "the next level")
        await worker.until(measured_again, "the run of the one before it")
        assert await asyncio.to_thread(worker.child.stop, timeout_s=100) == 0
        database = await owner(dsn)
        assert await database.fetchval("SELECT count(*) FROM reconciliations") == 1, "a restart makes no second run"
        await database.close()
    finally:
        worker.child.kill()
        await producer.stop()
