"""withdrawals.send: how many withdrawals a second are signed, stored, and in a node's pool.

Ours is what the two stages do with a batch: prepare, settle (claim, lock, decide, sign, rows, commit record), then the same of
what was emitted, with the sending in its prepare. The baseline is the bare way: one commit of nonces and bytes, the same requests,
one commit of the marks. On both sides a batch is signed and stored while the one before is sent and the one before that is marked,
as the stages of a worker do it: one connection to the node, which makes no blocks.

Through Kafka the real worker is measured as in end_to_end.py: events wait, and the broker's own time of the last
`transactions.broadcast` ends the run.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType, SimpleNamespace
from typing import Any

import aiohttp
import asyncpg
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from agents.intake import READ_AT_ONCE
from agents.item import Item, read_item
from agents.outcome import Stage
from agents.stage import settle
from agents.withdrawals import broadcast_transactions, sign_transactions
from agents.withdrawals.desks import Desk, Desks
from chain.broadcaster import BATCH_MAX, Broadcaster
from chain.fees import POLICIES
from chain.hot_wallet import HotWallet
from chain.rpc import Rpc
from chain.signer import KeySigner
from chain.transactions import digest, signed, transfer_data, unsigned_call
from ledger.commit import claim_owners
from ledger.migrate import upgrade
from stablerail.dev.processes import free_port
from tests.benchmarks.baselines import bare_send
from tests.benchmarks.ledger_load import connect
from tests.benchmarks.parts import SCHEMA, Parts, Place, place
from tests.benchmarks.records import Comparison, Record, Spread
from tests.benchmarks.withdrawals_load import AMOUNT, CHAIN, PASSWORD, Field, Waiting, field, insert, waiting
from tests.benchmarks.workload import PARTITIONS
from topics.catalog import TRANSACTIONS_BROADCAST, WITHDRAWALS_ACCEPTED
from topics.envelope import Received
from topics.partitioner import partition_of

Told = Callable[[str], None]
BATCH = 200
WARM = 2
"""Batches before the clock."""
SIGNATURES = 4_000
POLL_S = 0.05


@dataclass(frozen=True)
class Sizes:
    payments: int


Step = Callable[[Any], Awaitable[Any]]


class Ours:
    """The two stages: signed and stored; read again and sent, which is the second's `prepare` and goes on beside the rest as
    in agents/delivery.py; settled."""

    def __init__(self, here: Field, connections: Sequence[Any], rpc: Rpc) -> None:
        self._connection, self._other, reading = connections
        wallet = HotWallet([rpc], here.signer.address, here.usdc.address.lower())
        token = here.usdc.address.lower()
        self.desks = Desks([Desk(CHAIN, here.anvil.chain_id, here.signer, token, wallet, POLICIES[CHAIN], 10**6)])
        self._sign, self.waiting = sign_transactions.stages(self.desks)

        async def connected() -> Any:
            return reading

        self.connected = connected
        self._broadcast = broadcast_transactions.stage({CHAIN.value: Broadcaster([rpc])}, connected)
        self._epochs: dict[str, Any] = {}
        self._offset = 0

    @property
    def steps(self) -> Sequence[Step]:
        return self._signed, self._offered, self._told

    async def _signed(self, batch: Sequence[Waiting]) -> Any:
        items = await self.items(self._sign, self._connection, [(one.value, one.headers) for one in batch])
        return await self.settled(self._sign, self._connection, items, await self._sign.prepare(received(items)))

    async def _offered(self, told: Sequence[Any]) -> Any:
        at = datetime.now(UTC)
        events = ((message.value, message.kafka_headers("sign_transactions", at)) for message in told)
        items = await self.items(self._broadcast, self._other, events)
        return items, asyncio.create_task(self._broadcast.prepare(received(items)))

    async def _told(self, offered: Any) -> None:
        items, sending = offered
        told = await self.settled(self._broadcast, self._other, items, await sending)
        if len(told) != len(items) or not told:
            raise RuntimeError(f"{len(told)} of {len(items)} were sent")

    async def items(self, stage: Stage[Any], connection: Any, events: Iterable[tuple[Any, Any]]) -> list[Item]:
        """In slices, as agents/delivery.py reads them."""
        topic, items = stage.source.name, []
        if stage.name not in self._epochs:
            async with connection.transaction():
                epochs, _ = await claim_owners(connection, stage.name, [(topic, 0)], datetime.now(UTC))
            self._epochs[stage.name] = epochs
        for value, headers in events:
            self._offset += 1
            if self._offset % READ_AT_ONCE == 0:
                await asyncio.sleep(0)
            record: Any = SimpleNamespace(
                topic=topic, partition=0, offset=self._offset, timestamp=0, key=b"k", value=value, headers=headers
            )
            items.append(read_item(stage, record))
        return items

    async def settled(self, stage: Stage[Any], connection: Any, items: list[Item], prepared: Any) -> Sequence[Any]:
        done = await settle(connection, stage, items, self._epochs[stage.name], datetime.now(UTC), prepared)
        assert done.sealed is not None
        return done.sealed.messages


def received(items: Sequence[Item]) -> list[Received]:
    return [item.received for item in items if item.received is not None]


class Bare:
    def __init__(self, here: Field, connections: Sequence[Any], http: Any) -> None:
        self._here = here
        self._connection, self._other, _ = connections
        self._http = http

    @property
    def steps(self) -> Sequence[Step]:
        return self._store, self._send, self._mark

    async def _store(self, batch: Sequence[Waiting]) -> Any:
        here, payments = self._here, [(one.id, one.to, AMOUNT) for one in batch]
        return await bare_send.store(self._connection, here.signer, here.usdc.address, here.anvil.chain_id, payments)

    async def _send(self, stored: Any) -> Any:
        await bare_send.send(self._http, self._here.anvil.rpc_url, stored[1], BATCH_MAX)
        return stored

    async def _mark(self, stored: Any) -> None:
        await bare_send.mark(self._other, self._here.signer, stored[0], len(stored[1]))


async def through(steps: Sequence[Step], batches: Sequence[Sequence[Waiting]]) -> None:
    """Each step of a batch beside the earlier steps of the next."""
    between: list[asyncio.Queue[Any]] = [asyncio.Queue(maxsize=1) for _ in steps]

    async def run(number: int) -> None:
        for batch in batches:
            done = await steps[number](batch if number == 0 else await between[number - 1].get())
            if number + 1 < len(steps):
                await between[number].put(done)

    async with asyncio.TaskGroup() as group:
        for number in range(len(steps)):
            group.create_task(run(number))


async def run(parts: Parts, side: str, payments: int) -> float:
    """Payments per second."""
    total = payments + WARM * BATCH
    gc.set_threshold(100_000, 50, 100)  # as the worker has it
    parts.postgres.drop_database("benchmark_send")
    dsn = parts.postgres.create_database("benchmark_send")
    await upgrade(dsn, SCHEMA)
    parts.postgres.execute("CHECKPOINT")
    load = waiting(total)
    batches = [load[start : start + BATCH] for start in range(0, total, BATCH)]
    owner = await asyncpg.connect(dsn)
    connections = [await connect(dsn) if side == "ours" else await asyncpg.connect(dsn) for _ in range(3)]
    async with (
        field(parts.directory, total) as here,
        Rpc(here.anvil.rpc_url, here.anvil.chain_id) as rpc,
        aiohttp.ClientSession() as http,
    ):
        try:
            await owner.execute(bare_send.TABLES)
            await owner.execute("INSERT INTO bare.lanes VALUES ($1, 0)", here.signer.address)
            await insert(owner, load)
            measured = Ours(here, connections, rpc) if side == "ours" else Bare(here, connections, http)
            await through(measured.steps, batches[:WARM])
            await owner.execute("ANALYZE")
            started = time.perf_counter()
            await through(measured.steps, batches[WARM:])
            seconds = time.perf_counter() - started
            if await here.pending_nonce() != total:
                raise RuntimeError("the node has not got all of them")
            return payments / seconds
        finally:
            for one in (*connections, owner):
                await one.close()


def signatures() -> float:
    """Per second, of transfers of which only the nonce differs."""
    signer, data, token = KeySigner(b"\7" * 32), transfer_data("0x" + "a" * 40, AMOUNT), "0x" + "b" * 40
    started = time.perf_counter()
    for nonce in range(SIGNATURES):
        fields = unsigned_call(
            chain_id=137, nonce=nonce, priority_fee=25 * 10**9, max_fee=10**11, gas_limit=100_000, to=token,
            data=data,
        )  # fmt: skip
        signed(fields, signer.sign(digest(fields)))
    return SIGNATURES / (time.perf_counter() - started)


# -- through Kafka -----------------------------------------------------------------------------------------------------


async def through_kafka(parts: Parts, payments: int, limit_s: float) -> float:
    """Payments per second of a worker process."""
    total = payments + WARM * BATCH
    load = waiting(total)
    async with asyncio.timeout(limit_s), place(parts) as here, field(parts.directory, total) as chain:
        owner = await asyncpg.connect(here.dsn)
        consumer = AIOKafkaConsumer(bootstrap_servers=here.bootstrap, auto_offset_reset="earliest")
        await consumer.start()
        try:
            await insert(owner, load)
            start_worker(here, chain)
            warm, rest = load[: WARM * BATCH], load[WARM * BATCH :]
            await tell(here, warm)
            await _until(here, consumer, len(warm))
            await owner.execute("ANALYZE")
            for child in here.children:
                child.send_signal(signal.SIGSTOP)
            await tell(here, rest)
            started = time.time()
            for child in here.children:
                child.send_signal(signal.SIGCONT)
            await _until(here, consumer, total)
            ended = await _last(consumer, _partitions(here))
            if await chain.pending_nonce() != total:
                raise RuntimeError("the node has not got all of them")
            return payments / (ended - started)
        finally:
            await consumer.stop()
            await owner.close()


def start_worker(
    here: Place, chain: Field, movement: str = "withdrawals", more: Mapping[str, str] = MappingProxyType({})
) -> None:
    settings = {
        "STABLERAIL_WITHDRAWAL_CHAINS": CHAIN.value,
        "STABLERAIL_RPC_URLS": json.dumps({CHAIN.value: [chain.anvil.rpc_url]}),
        "STABLERAIL_USDC_CONTRACTS": json.dumps({CHAIN.value: chain.usdc.address}),
        "STABLERAIL_CHAIN_IDS": json.dumps({CHAIN.value: chain.anvil.chain_id}),
        "STABLERAIL_WITHDRAWAL_KEYSTORE": str(chain.keystore),
        "STABLERAIL_WITHDRAWAL_KEYSTORE_PASSWORD": PASSWORD,
        "STABLERAIL_WITHDRAWAL_IN_FLIGHT_MAX": "10000",
        **more,
    }
    here.start(["-m", "stablerail.cli", "worker", movement, "--port", str(free_port())], settings)


async def tell(here: Place, withdrawals: Sequence[Waiting]) -> None:
    """Into withdrawals.accepted."""
    producer = AIOKafkaProducer(bootstrap_servers=here.bootstrap, acks="all")
    await producer.start()
    topic, key = WITHDRAWALS_ACCEPTED.named(here.prefix), CHAIN.encode()
    sent = [
        await producer.send(topic, one.value, key=key, partition=partition_of(key, PARTITIONS), headers=one.headers)
        for one in withdrawals
    ]
    await asyncio.gather(*sent)
    await producer.stop()


def _partitions(here: Place) -> list[TopicPartition]:
    return [TopicPartition(TRANSACTIONS_BROADCAST.named(here.prefix), number) for number in range(PARTITIONS)]


async def _until(here: Place, consumer: AIOKafkaConsumer, expected: int) -> None:
    while sum((await consumer.end_offsets(_partitions(here))).values()) < expected:
        here.check_running()
        await asyncio.sleep(POLL_S)


async def _last(consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition]) -> float:
    """The broker's time of the last message, in seconds."""
    ends = await consumer.end_offsets(partitions)
    consumer.assign(partitions)
    last_ms = 0
    for partition, end in ends.items():
        if end:
            consumer.seek(partition, end - 1)
            last_ms = max(last_ms, (await consumer.getone(partition)).timestamp)
    return last_ms / 1000


async def send(parts: Parts, payments: int, repeats: int, limit_s: float, told: Told) -> Record:
    await parts.prepare([])
    rates: dict[str, list[float]] = {"ours": [], "bare send": [], "through Kafka": [], "signatures": []}
    for _ in range(repeats):
        for name, found in rates.items():
            if name == "signatures":
                found.append(signatures())
            elif name == "through Kafka":
                found.append(await through_kafka(parts, payments, limit_s))
            else:
                found.append(await run(parts, name, payments))
            told(f"{name}: {found[-1]:,.0f} /s")
    unit = "payments/s"
    return Record(
        "withdrawals.send",
        Comparison.of(
            f"the two stages on batches of {BATCH} against the bare way: commit nonces and bytes, send, mark",
            *(unit, rates["ours"], rates["bare send"], 0.8),
        ),
        {
            "through_kafka": Comparison.of(
                "a worker, from events that wait in Kafka to transactions.broadcast, against the bare way",
                *(unit, rates["through Kafka"], rates["bare send"], 0.4),
            ),
            "signatures_per_s": Spread.of(rates["signatures"], 0),
            "signatures_per_s_aim": 20_000,
            "batch": BATCH,
            "payments": payments,
        },
        "one signer; a node of its own that makes no blocks; one connection to PostgreSQL and one to the node",
    )
