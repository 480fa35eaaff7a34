"""What the worker of withdrawals shows: lanes and nonces, how many are open and how they ended."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

from aiokafka import AIOKafkaProducer

from agents.withdrawals.watch_nonces import take
from ledger.rows import Changes, Connection
from stablerail.dev.kafka import Kafka
from stablerail.metrics import Metrics
from stablerail.topics_admin import admin, create_missing
from stablerail.withdrawal_views import WithdrawalViews
from tests.integration.test_withdrawals_settled import SIGNER, Desk, confirmed
from tests.integration.test_worker_process import Program
from tests.support import ledger_rig
from tests.support.ledger_rig import AT
from tests.support.payouts import store
from topics.catalog import TRANSACTIONS_CONFIRMED, TRANSACTIONS_SIGNED
from topics.envelope import headers_of, value_of
from topics.events import TransactionSigned

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection

LANE = f"MATIC:{SIGNER}"


def signed(nonce: int) -> TransactionSigned:
    return TransactionSigned(
        chain="MATIC", signer=SIGNER, nonce=nonce, n=1, tx_hash=f"0x{nonce:064x}", withdrawal_id="w"
    )  # fmt: skip


def test_the_highest_nonce_wins_in_any_order_and_no_bytes_stop_the_view() -> None:
    messages = [(value_of(signed(nonce)), []) for nonce in range(5)] * 2
    for seed in range(20):
        table: dict[str, int] = {}
        for value, headers in Random(seed).sample(messages, len(messages)):
            take(table, b"{", [("ce_type", b"\xff")])
            take(table, value, headers)
            take(table, None, [])
        assert table == {LANE: 5}


async def test_a_page_says_of_when_it_is_and_when_the_database_is_away(connection: Connection) -> None:
    desk, now = Desk(connection), [AT]

    async def connect() -> Connection:
        return connection

    views = WithdrawalViews("", connect, Metrics(), lambda: now[0])
    for shown in (views.withdrawals_html(), views.nonces_html()):
        assert "the database was not read yet" in shown
        assert "<td" not in shown, "nothing is known, not even that there is none"
    await views.look(connection)
    assert "None is open." in views.withdrawals_html()
    assert "No lane has signed yet." in views.nonces_html()
    await desk.open("a", "broadcast")
    await connection.execute("UPDATE lanes SET status = 'paused', reason = '<script>'")
    await views.look(connection)
    for shown in (views.withdrawals_html(), views.nonces_html()):
        assert f"as of {AT:%H:%M:%S} UTC" in shown
        assert "does not answer" not in shown
    assert "paused: &lt;script&gt;" in views.nonces_html()
    now[0] += timedelta(seconds=11)
    for shown in (views.withdrawals_html(), views.nonces_html()):
        assert f"as of {AT:%H:%M:%S} UTC; the database does not answer" in shown


async def test_the_worker_shows_lanes_and_open_withdrawals_and_counts_ends(
    dsn: str, connection: Connection, kafka: Kafka, topic_prefix: str, tmp_path: Path
) -> None:
    desk = Desk(connection)
    _, final = await desk.open("a", "confirmed")
    _, open_one = await desk.open("b", "broadcast")
    await connection.execute("UPDATE lanes SET status = 'paused', reason = 'low_gas', chain_nonce = 1")
    await store(connection, Changes())
    environment = {
        "STABLERAIL_DATABASE_URL": dsn,
        "STABLERAIL_KAFKA_BOOTSTRAP": kafka.bootstrap,
        "STABLERAIL_TOPIC_PREFIX": topic_prefix,
    }
    async with admin(kafka.bootstrap) as client:
        await create_missing(client, topic_prefix, 1)
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, acks="all")
    await producer.start()

    async def tell(topic: Any, event: Any) -> None:
        headers = headers_of(event.ce_type(), event_id=event.identity(), source="test", time=AT)
        name = topic.named(topic_prefix)
        await producer.send_and_wait(name, value_of(event), key=LANE.encode(), headers=headers)

    def shown(told: int) -> Any:
        async def so() -> bool:
            status, body = await worker.get("/nonces", json_wanted=True)
            return status == 200 and [lane["told"] for lane in json.loads(body)["lanes"]] == [told]

        return so

    worker = Program(tmp_path, environment, "withdrawals")
    try:
        for nonce in (0, 1, 0):
            await tell(TRANSACTIONS_SIGNED, signed(nonce))
        await worker.until(shown(2), "the nonce")
        _, body = await worker.get("/nonces", json_wanted=True)
        (lane,) = json.loads(body)["lanes"]
        assert lane.pop("oldest_age_s") > 0
        assert lane == {
            "chain": "MATIC", "signer": SIGNER, "next_nonce": 2, "chain_nonce": 1, "status": "paused", "reason": "low_gas",
            "in_flight": 1, "unmined": 1, "told": 2,
        }  # fmt: skip
        _, page = await worker.get("/nonces")
        assert "paused: low_gas" in page
        _, body = await worker.get("/withdrawals", json_wanted=True)
        (row,) = json.loads(body)["withdrawals"]
        assert (row["chain"], row["status"], row["withdrawals"]) == ("MATIC", "broadcasting", 2)
        await tell(TRANSACTIONS_CONFIRMED, confirmed(final))

        async def counted() -> bool:
            _, metrics = await worker.get("/metrics")
            wanted = {
                'stablerail_withdrawals_ended_total{outcome="completed"} 1.0',
                'stablerail_withdrawals_ended_total{outcome="failed"} 0.0',
                'stablerail_withdrawal_seconds_count{outcome="completed"} 1.0',
                'stablerail_withdrawals_open{chain="MATIC",state="broadcasting"} 1.0',
                f'stablerail_lane_paused{{chain="MATIC",reason="low_gas",signer="{SIGNER}"}} 1.0',
                f'stablerail_lane_in_flight{{chain="MATIC",signer="{SIGNER}"}} 1.0',
            }
            return wanted <= set(metrics.splitlines())

        await worker.until(counted, "the end is counted")
        worker.child.kill()
        worker = Program(tmp_path, environment, "withdrawals")
        await worker.until(shown(2), "the nonce that the one before it knew")
        await tell(TRANSACTIONS_SIGNED, signed(open_one.nonce + 6))
        await worker.until(shown(open_one.nonce + 7), "the next nonce")
        assert await asyncio.to_thread(worker.child.stop, timeout_s=100) == 0
    finally:
        worker.child.kill()
        await producer.stop()
