"""The database rebuilt from the journal topic alone, after the whole product ran and a worker was killed."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zstandard
from aiokafka import AIOKafkaProducer

from agents.sweeper import Sweeper
from ledger.errors import JournalBroken
from ledger.record import unpack
from ledger.verify import verify
from stablerail.config import load_settings
from stablerail.dev.anvil import Anvil
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from stablerail.dev.stack import Stack
from stablerail.dev.usdc import Usdc
from stablerail.verify_kafka import SETTLING, verify_kafka
from tests.support.in_process import ground, read_topic, until
from tests.support.invariants import end_database
from tests.support.rebuild import OUTSIDE, apply, assemble, connect, differences, rebuild, tables_outside
from tests.support.warm import WarmStack
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_FINALIZED, DEPOSITS_NOTIFIED, JOURNAL, WALLETS_PROVISIONED
from topics.envelope import value_of
from topics.events import DepositNotified, Evidence

SCHEMA = "stablerail"
WORKERS = ("onboarding", "deposits", "chains")
CUSTOMERS = ("ann", "bob", "eve")
USDC_UNIT = 1_000_000


@dataclass(frozen=True)
class Ran:
    """What a run of the product left behind."""

    bootstrap: str
    prefix: str
    dsn: str
    records: list[tuple[int, bytes]]


@pytest.fixture(scope="module")
def ran(
    kafka: Kafka, postgres: Postgres, anvil: Anvil, usdc: Usdc, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ran]:
    prefix, name = f"t{uuid.uuid4().hex[:10]}.", f"test_{uuid.uuid4().hex[:12]}"
    dsn = postgres.create_database(name)
    directory = tmp_path_factory.mktemp("rebuild")
    yield asyncio.run(_run(kafka, dsn, anvil, usdc, prefix, directory))
    end_database(postgres, name)


async def _run(kafka: Kafka, dsn: str, anvil: Anvil, usdc: Usdc, prefix: str, directory: Path) -> Ran:
    """Approvals, deposits by webhook and scanner, refused events, a deposits worker killed in the middle."""
    parts = {
        "STABLERAIL_KAFKA_BOOTSTRAP": kafka.bootstrap,
        "STABLERAIL_DATABASE_URL": dsn,
        "STABLERAIL_TOPIC_PREFIX": prefix,
        "STABLERAIL_WORKER_SHUTDOWN_TIMEOUT_S": "10",
        "STABLERAIL_RPC_URLS": json.dumps({"MATIC": [anvil.rpc_url]}),
        "STABLERAIL_CHAIN_IDS": json.dumps({"MATIC": anvil.chain_id}),
        "STABLERAIL_USDC_CONTRACTS": json.dumps({"MATIC": usdc.address}),
    }
    stack = WarmStack(directory, parts)
    observer = producer = None
    try:
        await stack.prepare()
        stack.start_sandboxes()
        stack.start(("bridge", *WORKERS))
        await stack.wait_ready(("bridge", *WORKERS), 100)
        await asyncio.to_thread(stack.wait_listening, ("circle", "sumsub"))
        await stack.subscribe()
        observer = await connect(dsn, SCHEMA)
        producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, acks="all")
        await producer.start()
        wallets = await _onboard(stack, observer)
        await _refused(producer, prefix, wallets["ann"])
        for user, amount in (("ann", 25), ("bob", 3), ("bob", 3)):
            await usdc.transfer(wallets[user], amount * USDC_UNIT)
        await _deposits(observer, anvil, 1)
        stack.children["deposits"].kill()
        await usdc.transfer_many([(wallets["eve"], 7 * USDC_UNIT), (wallets["eve"], 7 * USDC_UNIT)])
        await usdc.transfer(wallets["ann"], USDC_UNIT // 2)  # below the minimum
        stack.start(("deposits",))
        await _deposits(observer, anvil, 5)
        await _quiet(stack, dsn, kafka.bootstrap, prefix)
        records = list(assemble(await read_topic(kafka.bootstrap, JOURNAL, prefix)))
        return Ran(kafka.bootstrap, prefix, dsn, records)
    finally:
        if producer is not None:
            await producer.stop()
        if observer is not None:
            await observer.close()
        await asyncio.to_thread(stack.stop)


async def _onboard(stack: Stack, observer: Any) -> dict[str, str]:
    """Each customer's wallet on the chain that we read."""
    await asyncio.gather(*(stack.approve(user) for user in CUSTOMERS))
    await stack.approve("ann")  # the vendor says it again

    async def found() -> dict[str, str]:
        rows = await observer.fetch("SELECT user_id, address FROM wallets WHERE chain = 'MATIC'")
        return dict(tuple(row) for row in rows) if len(rows) == len(CUSTOMERS) else {}

    wallets: dict[str, str] = await until(found, "every customer has wallets", 100)
    return wallets


async def _refused(producer: Any, prefix: str, wallet: str) -> None:
    """Not JSON; and texts that an array literal, JSON and a header each treat specially."""
    topic = DEPOSITS_NOTIFIED.named(prefix)
    await producer.send_and_wait(topic, b"\xff\x00 {not json}", key=b"\x00\xff", headers=[("odd", b'\xfe,"{}\\')])
    event = DepositNotified(
        source='other,"{}\\ producer', transfer_id='NULL', chain="MATIC", tx_hash="0x" + "ab" * 32, to=wallet,
        asset="USDC", amount=2 * USDC_UNIT, evidence=Evidence.SEEN,
    )  # fmt: skip
    await producer.send_and_wait(topic, value_of(event), key=wallet.encode())
    changed = event.model_copy(update={"amount": 3 * USDC_UNIT})
    await producer.send_and_wait(topic, value_of(changed), key=wallet.encode())


async def _deposits(observer: Any, anvil: Anvil, final: int) -> None:
    """Mines until at least that many deposits are final."""

    async def enough() -> bool:
        await anvil.mine()
        count: int = await observer.fetchval("SELECT count(*) FROM deposits WHERE status = 'finalized'")
        await asyncio.sleep(0.2)
        return count >= final

    await until(enough, f"{final} final deposits", 100)


async def _quiet(stack: Stack, dsn: str, bootstrap: str, prefix: str) -> None:
    """Workers stop, first those that others follow; what one left unfinished is finished, as the next worker would."""
    for name in ("chains", "onboarding", "deposits"):
        await asyncio.to_thread(stack.children[name].stop, timeout_s=100)
    async with ground(dsn, bootstrap, prefix, []) as it, it.process() as services:
        await services.relay.journal()
        it.clock.forward(60)
        await Sweeper(services).sweep(await services.connect())
        assert await it.observer.fetchval("SELECT count(*) FROM outbox") == 0


async def test_the_topics_of_a_run_with_a_kill_hold_against_its_database(ran: Ran) -> None:
    """Every commit is in the journal, every message in its topic and in order, every acknowledged event in the inbox."""
    settings = load_settings(
        env_file=None, database_url=ran.dsn, kafka_bootstrap=ran.bootstrap, topic_prefix=ran.prefix
    )
    observer = await connect(ran.dsn, SCHEMA)
    try:
        soon = datetime.now(UTC) + SETTLING
        results = await verify_kafka(settings, observer, timedelta(hours=1), 20, soon)
    finally:
        await observer.close()
    assert [row for result in results for row in result.offending] == []
    assert {result.number: result.checked > 0 for result in results} == {9: True, 10: True, 13: True}


async def test_every_journaled_table_is_rebuilt_from_the_topic_alone_without_a_difference(
    ran: Ran, database: str
) -> None:
    report = await rebuild(ran.bootstrap, ran.prefix, database, SCHEMA)
    assert report.records == len(ran.records) > 20
    assert await differences(ran.dsn, database, SCHEMA) == {}
    rebuilt = await connect(database, SCHEMA)
    try:
        counts = {
            table: await rebuilt.fetchval(f"SELECT count(*) FROM {table}")
            for table in (
                "wallets",
                "deposits",
                "deposit_reports",
                "entries",
                "calls",
                "chain_cursors",
                "inbox",
                "audit",
            )
        }
        assert all(counts.values()), counts
        assert counts["wallets"] == 12
        assert 1 <= counts["calls"] <= 3, "customers who wait together are one call"
        assert not [result for result in await verify(rebuilt) if not result.holds]
    finally:
        await rebuilt.close()


async def test_everything_that_was_told_is_in_the_journal(ran: Ran) -> None:
    journaled = {message.id for _, packed in ran.records for message in unpack(packed).messages if message.id}
    for topic in (WALLETS_PROVISIONED, DEPOSITS_CREDITED, DEPOSITS_FINALIZED):
        told = {dict(m.headers)["ce_id"].decode() for m in await read_topic(ran.bootstrap, topic, ran.prefix)}
        assert told
        assert told <= journaled


async def test_the_tables_outside_of_the_journal_are_those_that_are_declared_so(ran: Ran) -> None:
    assert await tables_outside(ran.dsn, SCHEMA) == OUTSIDE


async def test_one_changed_row_is_a_difference(ran: Ran, database: str) -> None:
    await rebuild(ran.bootstrap, ran.prefix, database, SCHEMA)
    rebuilt = await connect(database, SCHEMA)
    try:
        await rebuilt.execute(
            "UPDATE wallets SET created_at = created_at + interval '1 microsecond' WHERE user_id = 'ann'"
        )
    finally:
        await rebuilt.close()
    found = await differences(ran.dsn, database, SCHEMA)
    assert list(found) == ["wallets"]
    assert len(found["wallets"]) == 8


def money(ran: Ran) -> list[int]:
    """Which records wrote entries."""
    names = [{block.table.name for block in unpack(packed).blocks} for _, packed in ran.records]
    return [index for index, tables in enumerate(names) if "entries" in tables]


def edited(packed: bytes) -> bytes:
    """The record with other amounts in it, its proof as it was."""
    version, stage, topic, at, content, proof = msgpack.unpackb(zstandard.ZstdDecompressor().decompress(packed))
    changed = content
    for amount in (25, 7, 3, 2):
        changed = changed.replace(b"%d" % (amount * USDC_UNIT), b"%d" % ((amount + 1) * USDC_UNIT))
    assert changed != content
    return zstandard.ZstdCompressor().compress(msgpack.packb([version, stage, topic, at, changed, proof]))


async def test_a_record_that_was_edited_is_noticed(ran: Ran, database: str) -> None:
    index = money(ran)[0]
    seq, packed = ran.records[index]
    broken = [*ran.records[:index], (seq, edited(packed)), *ran.records[index + 1 :]]
    with pytest.raises(JournalBroken, match=f"record {seq} at offset {index}: its contents are not those"):
        await apply(broken, database, SCHEMA)


async def test_a_record_that_is_missing_is_noticed(ran: Ran, database: str) -> None:
    index = money(ran)[0]
    with pytest.raises(JournalBroken, match="after position"):
        await apply([*ran.records[:index], *ran.records[index + 1 :]], database, SCHEMA)


async def test_records_in_another_order_are_noticed(ran: Ran, database: str) -> None:
    first, second, *_ = [i for i, (_, packed) in enumerate(ran.records) if unpack(packed).stage == "watch_chain.MATIC"]
    swapped = list(ran.records)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    with pytest.raises(JournalBroken, match="after position"):
        await apply(swapped, database, SCHEMA)


async def test_a_record_of_an_unknown_version_is_not_guessed_at(ran: Ran, database: str) -> None:
    seq, packed = ran.records[0]
    fields = msgpack.unpackb(zstandard.ZstdDecompressor().decompress(packed))
    newer = zstandard.ZstdCompressor().compress(msgpack.packb([99, *fields[1:]]))
    with pytest.raises(JournalBroken, match="version 99"):
        await apply([(seq, newer)], database, SCHEMA)
