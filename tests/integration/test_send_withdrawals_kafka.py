"""Withdrawals from accepted to the mempool on real Kafka, PostgreSQL and a node, a worker's death between, and what is said of
the key meanwhile: nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from agents.services import Services
from chain.keys import load_keystore
from ledger.record import Message, unpack
from ledger.tables import JOURNALED
from stablerail.dev.anvil import Anvil
from stablerail.dev.kafka import Kafka
from stablerail.dev.keystore import write_keystore
from stablerail.dev.usdc import Usdc
from stablerail.metrics import Metrics
from tests.support import sending as sending_rig
from tests.support.in_process import SCHEMA, Ground, ground, running, until
from tests.support.ledger_rig import assert_holds
from tests.support.rebuild import differences, empty_database, rebuild
from tests.support.sending import Process, Sending, accepted, sending
from topics.catalog import (
    CHAIN_HEADS,
    JOURNAL,
    TRANSACTIONS_BROADCAST,
    TRANSACTIONS_SIGNED,
    WITHDRAWALS_ACCEPTED,
    Topic,
)
from topics.envelope import headers_of

TOPICS = [WITHDRAWALS_ACCEPTED, CHAIN_HEADS, TRANSACTIONS_SIGNED, TRANSACTIONS_BROADCAST]
KEY = bytes.fromhex("8da4ef21b864d2cc526dbdb2a120bd2874c36c9d0a1fb7f8c63d7f7a8b41de8f")
PASSWORD = "what-opens-the-hot-wallet"
NUMBER = 12


chain, token = sending_rig.chain, sending_rig.token


@pytest.fixture
async def at(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    async with ground(database, kafka.bootstrap, topic_prefix, TOPICS) as it:
        yield it


@pytest.fixture
async def desk(at: Ground, chain: Anvil, token: Usdc, tmp_path: Path) -> AsyncIterator[Sending]:
    connection = await at.connect()
    write_keystore(tmp_path / "wallet.json", PASSWORD, KEY)
    signer = load_keystore(tmp_path / "wallet.json", PASSWORD)
    async with sending(connection, at.connect, chain, token, signer) as made:
        yield made
    await connection.close()


async def tell(at: Ground, message: Message) -> None:
    topic = next(topic for topic in TOPICS if topic.name == message.topic)
    headers: Any = headers_of(message.type, event_id=message.id, source="test", time=at.clock())
    await at.send(topic, message.key or b"", message.value or b"", headers)


class Killed(Exception):
    """The process is gone."""


async def never(*_: Any) -> None:
    await asyncio.Event().wait()


async def killed_before_it_tells(at: Ground, process: Process) -> None:
    """A worker that commits what it signed, and dies before the first message of it leaves."""
    with contextlib.suppress(Killed):
        async with at.process() as services:
            reached = asyncio.Event()

            async def emit(messages: Any, *rest: Any) -> None:
                if messages:
                    reached.set()
                    await never()

            services.emitter.emit = emit  # type: ignore[method-assign,assignment]
            async with running(process.sign, services, at):
                await asyncio.wait_for(reached.wait(), 100)
                raise Killed


async def all_are_in_the_mempool(desk: Sending) -> bool:
    return await desk.statuses() == {("confirming", "broadcast"): NUMBER}


def texts_of(key: bytes) -> list[str]:
    return [key.hex(), repr(key)[2:-1], str(int.from_bytes(key, "big"))]


async def everything_said(at: Ground, services: Services, topics: list[Topic]) -> str:
    """Every topic, the journal unpacked, every table, the metrics."""
    said = []
    for topic in topics:
        said += [repr((record.key, record.value, record.headers)) for record in await at.told(topic)]
    said += [repr(unpack(record.value)) for record in await at.told(JOURNAL)]
    for table in [*(table.name for table in JOURNALED), "outbox"]:
        said += [repr(tuple(row)) for row in await at.observer.fetch(f"SELECT * FROM {table}")]
    assert isinstance(services.observer, Metrics)
    said.append(services.observer.render().decode())
    return "\n".join(said)


async def test_a_worker_that_dies_between_signature_and_broadcast_pays_each_once_and_says_nothing_of_its_key(
    at: Ground, desk: Sending
) -> None:
    asked = await desk.ask(NUMBER)
    for one in asked:
        await tell(at, accepted(one))
    with capture_logs() as logs:
        await killed_before_it_tells(at, desk.process())
        assert await at.told(TRANSACTIONS_SIGNED) == []
        assert await desk.in_pool() == 0
        signed = await desk.nonces()
        assert signed, "what was committed when it died"
        next_one = desk.process()
        async with (
            at.process() as services,
            running(next_one.sign, services, at),
            running(next_one.wait, services, at),
            running(next_one.broadcast, services, at),
        ):
            await until(lambda: all_are_in_the_mempool(desk), "all are in the mempool")
        # redelivered from the first record to another worker
        third = desk.process()
        async with at.process() as services, running(third.sign, services, at), running(third.broadcast, services, at):
            await tell(at, await desk.newest())
            await until(lambda: all_are_in_the_mempool(desk), "nothing more happens")
            said = await everything_said(at, services, TOPICS)
    await desk.anvil.mine()
    assert sorted(one for one, _ in await desk.paid()) == sorted(one.recipient for one in asked)
    assert await desk.nonces() == list(range(NUMBER))
    assert len({record.value for record in await at.told(TRANSACTIONS_SIGNED)}) == NUMBER
    await assert_holds(desk.connection)
    async with empty_database(at.dsn) as empty:
        await rebuild(at.bootstrap, at.prefix, empty, SCHEMA)
        assert await differences(at.dsn, empty) == {}

    said += repr(logs)
    assert desk.signer.address in said, "what is looked through is what was said"
    for secret in (*texts_of(KEY), PASSWORD):
        assert secret not in said
