"""The whole product on the session's parts, shared by the e2e files that do not crash it.

`story` is started once per run, when a test first asks for it. Tests keep apart by customers, wallets and event ids of
their own; what a test needs of the database or of a topic it asks for by these.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import asyncpg
import orjson
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition

from agents import lenient_records
from connectors.circle.chains import to_circle
from stablerail.config import load_settings
from stablerail.dev.anvil import Anvil
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from stablerail.dev.stack import Stack
from stablerail.dev.usdc import Usdc
from tests.support.invariants import end_database
from topics.catalog import Topic
from topics.events import Chain

T = TypeVar("T")

WALLET_CHAINS = load_settings(env_file=None).provisioned_chains
"""On which a new customer gets a wallet."""
WAIT_S = 100.0
"""Generous: the machine may be busy. What is waited for is a condition, never a time."""


@dataclass(frozen=True)
class Sent:
    """Where a produced message stands."""

    partition: int
    offset: int


@dataclass(frozen=True)
class Letter:
    """A dead letter."""

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]

    def ours(self, name: str) -> str:
        """A header that we added."""
        (value,) = [value for header, value in self.headers if header == f"dlq_{name}"]
        assert value is not None
        return value.decode()

    @property
    def theirs(self) -> list[tuple[str, bytes | None]]:
        """The headers as they came."""
        return [(name, value) for name, value in self.headers if not name.startswith("dlq_")]


READERS = {
    "deposits": ("deposits",),
    "chain": ("deposits", "withdrawals"),
    "withdrawals": ("withdrawals",),
    "transactions": ("withdrawals",),
    "transfers": ("withdrawals",),
    "orders": ("investing",),
    "broker": ("treasury",),
}
"""Movements that read a topic, by its name's first word; of the others it is onboarding."""


@dataclass(frozen=True)
class Story:
    """A running stack and the ways tests look at it."""

    stack: Stack
    usdc: Usdc
    dsn: str = field(repr=False)
    bootstrap: str
    prefix: str

    # -- money -------------------------------------------------------------------------------------------------------

    async def customer(self) -> tuple[str, dict[str, str]]:
        """A new approved customer: id, and address by chain."""
        user = f"user-{uuid.uuid4().hex[:12]}"
        await self.stack.approve(user)

        async def ready() -> dict[str, str] | None:
            rows = await self.rows("SELECT chain, address FROM wallets WHERE user_id = $1", user)
            return dict(rows) if len(rows) == len(WALLET_CHAINS) else None

        return user, await until(ready, f"wallets of {user}")

    async def rows(self, query: str, *arguments: Any) -> list[Any]:
        connection = await asyncpg.connect(self.dsn, server_settings={"search_path": "stablerail"})
        try:
            return [tuple(row) for row in await connection.fetch(query, *arguments)]
        finally:
            await connection.close()

    async def deposits(self, address: str) -> list[tuple[str, int, int, int]]:
        """(status, amount, n, generation) of each deposit to the address."""
        query = "SELECT status, amount::bigint, n, generation FROM deposits WHERE recipient = $1 ORDER BY amount, n"
        return await self.rows(query, address)

    async def balance(self, owner: str, account: str = "usdc_balance", shard: str = "") -> int:
        query = "SELECT coalesce(sum(balance), 0)::bigint FROM accounts WHERE owner = $1 AND type = $2 AND shard = $3"
        ((balance,),) = await self.rows(query, owner, account, shard)
        return int(balance)

    async def finalized(self, address: str, deposits: int) -> None:
        """Mines until that many deposits to the address are final. Others' blocks may come between."""

        async def final() -> bool:
            await self.usdc.anvil.mine()
            return [status for status, *_ in await self.deposits(address)] == ["finalized"] * deposits

        await until(final, f"{deposits} final deposits to {address}", pause_s=0.3)

    # -- messages ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def producer(self, **settings: Any) -> AsyncIterator[AIOKafkaProducer]:
        producer = AIOKafkaProducer(bootstrap_servers=self.bootstrap, acks="all", **settings)
        await producer.start()
        try:
            yield producer
        finally:
            await producer.stop()

    async def produce(self, topic: Topic, *messages: dict[str, Any], **settings: Any) -> list[Sent]:
        """Sends {key, value, headers, …}, in this order."""
        async with self.producer(**settings) as producer:
            sent = []
            for message in messages:
                at = await producer.send_and_wait(topic.named(self.prefix), **message)
                sent.append(Sent(at.partition, at.offset))
            return sent

    async def records(self, topic: Topic) -> list[ConsumerRecord]:
        """Everything the topic holds now."""
        return await records(self.bootstrap, topic.named(self.prefix))

    async def events(self, topic: Topic) -> list[tuple[ConsumerRecord, dict[str, Any]]]:
        """The records that hold JSON objects, with these: other tests may have sent anything."""
        found = []
        for record in await self.records(topic):
            try:
                content = orjson.loads(record.value or b"")  # json follows a hundred thousand brackets into the ground
            except ValueError:
                continue
            if isinstance(content, dict):
                found.append((record, content))
        return found

    async def letters(self, topic: Topic, sent: Sequence[Sent], stage: str | None = None) -> list[list[Letter]]:
        """The dead letters of each message, of one stage where several read the topic; waits until all of them are settled. One
        that was told again, as it was, is one."""
        await self.settled(topic, sent)
        found: dict[Sent, list[Letter]] = {place: [] for place in sent}
        for record in await self.records(topic.dlq):
            letter = Letter(record.key, record.value, list(record.headers))
            place = Sent(int(letter.ours("partition")), int(letter.ours("offset")))
            if place in found and letter not in found[place] and stage in (None, letter.ours("stage")):
                found[place].append(letter)
        return [found[place] for place in sent]

    async def settled(self, topic: Topic, sent: Sequence[Sent]) -> None:
        """Waits until a stage has acknowledged these messages: then what they caused is out."""
        first = topic.name.partition(".")[0]
        needed: dict[TopicPartition, int] = {}
        for place in sent:
            partition = TopicPartition(topic.named(self.prefix), place.partition)
            needed[partition] = max(needed.get(partition, 0), place.offset + 1)
        for movement in self.stack.children.keys() & READERS.get(first, ("onboarding",)):
            group = f"stablerail-{self.prefix}{movement}"
            consumer = AIOKafkaConsumer(bootstrap_servers=self.bootstrap, group_id=group, enable_auto_commit=False)
            consumer.assign(list(needed))
            await consumer.start()
            try:

                async def committed(consumer: AIOKafkaConsumer = consumer) -> bool:
                    return all([(await consumer.committed(tp) or 0) >= offset for tp, offset in needed.items()])

                await until(committed, f"{topic.name} settled up to {needed} by {movement}")
            finally:
                await consumer.stop()

    # -- commands ----------------------------------------------------------------------------------------------------

    async def command(self, *arguments: str, environment: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        """`stablerail …` with the stack's settings: exit code and everything it printed."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "stablerail.cli", *arguments,
            env={**os.environ, **self.stack.environment, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        printed, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, printed

    async def api_key(self, *scopes: str) -> str:
        """A new key for the API."""
        code, printed = await self.command("keys", "create", *[part for scope in scopes for part in ("--scope", scope)])
        assert code == 0, printed
        return printed.decode().split()[-1]

    # -- the sandboxes -----------------------------------------------------------------------------------------------

    async def control(self, path: str, body: dict[str, Any]) -> Any:
        """A call to Circle's sandbox under /_control."""
        url = f"{self.stack.url('circle')}/_control/{path}"
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
            assert answer.status < 300, await answer.text()
            return await answer.json()

    async def look(self, path: str) -> Any:
        """What Circle's sandbox shows under /_control."""
        url = f"{self.stack.url('circle')}/_control/{path}"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def inject(self, chain: Chain, address: str, amount: str, *states: str, **fields: Any) -> Any:
        """An inbound transaction at Circle on a chain that nobody reads."""
        blockchain = to_circle(chain, "testnet")
        body = {"blockchain": blockchain, "address": address, "amount": amount, "states": states, **fields}
        return (await self.control("transfers", body))["transaction"]


async def until(condition: Callable[[], Awaitable[T | None]], what: str, *, pause_s: float = 0.1) -> T:
    """The condition's first value that is true."""
    deadline = time.monotonic() + WAIT_S
    while not (value := await condition()):
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for {what}"
        await asyncio.sleep(pause_s)
    return value


async def records(bootstrap: str, topic: str) -> list[ConsumerRecord]:
    """Everything a topic holds now, without a group; also what only lenient consumers can read."""
    lenient_records.install()
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=2**24,
    )
    await consumer.start()
    try:
        parts = [TopicPartition(topic, number) for number in await _partitions(consumer, topic)]
        consumer.assign(parts)
        ends = await consumer.end_offsets(parts)
        found: list[ConsumerRecord] = []
        while any([await consumer.position(part) < end for part, end in ends.items()]):
            for some in (await consumer.getmany(timeout_ms=500)).values():
                found.extend(some)
        return found
    finally:
        await consumer.stop()


async def _partitions(consumer: AIOKafkaConsumer, topic: str) -> set[int]:
    await consumer._client.force_metadata_update()
    found: set[int] = consumer.partitions_for_topic(topic) or await consumer._client._wait_on_metadata(topic)
    return found


def report(to: str, **fields: Any) -> dict[str, Any]:
    """The JSON of a deposits.notified of an outside producer."""
    return {
        "version": 1,
        "source": "partner",
        "transfer_id": uuid.uuid4().hex,
        "chain": "MATIC",
        "tx_hash": "0x" + uuid.uuid4().hex * 2,
        "to": to,
        "asset": "USDC",
        "amount": "25.00",
        "evidence": "seen",
        **fields,
    }


def message(key: str, content: Any, **headers: str) -> dict[str, Any]:
    """What `produce` takes: the JSON alone, and headers where given."""
    value = json.dumps(content).encode()
    return {"key": key.encode(), "value": value, "headers": [(name, text.encode()) for name, text in headers.items()]}


def apart(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs a coroutine in an event loop that is not the tests'."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(work())).result()


def parts_environment(kafka: Kafka, anvil: Anvil, usdc: Usdc) -> dict[str, str]:
    """The settings of a stack on these parts, without its database."""
    return {
        "STABLERAIL_KAFKA_BOOTSTRAP": kafka.bootstrap,
        "STABLERAIL_RPC_URLS": json.dumps({"MATIC": [anvil.rpc_url]}),
        "STABLERAIL_CHAIN_IDS": json.dumps({"MATIC": anvil.chain_id}),
        "STABLERAIL_USDC_CONTRACTS": json.dumps({"MATIC": usdc.address}),
    }


@pytest.fixture(scope="package")
def story(kafka: Kafka, postgres: Postgres, anvil: Anvil, usdc: Usdc, scratch: Path) -> Iterator[Story]:
    """Everything up: sandboxes, bridge, API, all workers."""
    name = f"story_{uuid.uuid4().hex[:8]}"
    prefix = f"{name}."
    dsn = postgres.create_database(name)
    environment = {
        **parts_environment(kafka, anvil, usdc),
        "STABLERAIL_DATABASE_URL": dsn,
        "STABLERAIL_TOPIC_PREFIX": prefix,
    }
    # bad input in bulk is what some tests send; the fuse has its own
    fuse = {"STABLERAIL_FUSE_RUN_EVENTS_MAX": "100000", "STABLERAIL_FUSE_RATIO_MAX": "1"}
    # nobody crashes here; on a busy machine a worker that was taken for dead would repeat a dead letter
    session = {"STABLERAIL_KAFKA_SESSION_TIMEOUT_S": "30"}
    # what becomes of a transfer at Circle comes by its webhooks alone
    looks = {"STABLERAIL_CIRCLE_TRANSFER_POLL_S": "1h"}
    stack = Stack(scratch / name, environment, settings=fuse | session | looks)
    try:
        apart(stack.up)
        yield Story(stack, usdc, dsn, kafka.bootstrap, prefix)
    finally:
        stack.stop()
        end_database(postgres, name)
