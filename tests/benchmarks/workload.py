"""The deposits that every benchmark sends: made once from a seed, the same for both sides and in every round."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import asyncpg
from aiokafka import AIOKafkaProducer

from topics.envelope import headers_of, value_of
from topics.events import DepositNotified, Evidence
from topics.partitioner import partition_of

CHAIN = "MATIC"
PARTITIONS = 4
SOURCE = "circle"
REQUEST_BYTES_MAX = 1_000_000
BACKLOG_AT_ONCE = 25_000

WALLETS = """INSERT INTO wallets (chain, address, user_id, wallet_id, created_at)
SELECT $1, x.a, x.u, x.w, now() FROM unnest($2::text[], $3::text[], $4::text[]) AS x(a, u, w)"""


class Deposit(NamedTuple):
    """A message of `deposits.notified`, as the bridge publishes Circle's."""

    event_id: str
    """`ce_id`."""
    user_id: str
    partition: int
    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]


@dataclass(frozen=True)
class Workload:
    addresses: list[str]
    """Wallets of known customers, one each."""
    warm_up: list[Deposit]
    """One deposit to each wallet: after it every account exists and every cache is filled."""
    deposits: list[Deposit]
    backlog: int = 0
    """So many deposits more, made by `parts`: half a million take half a gigabyte, which nobody needs to hold for all rounds."""
    seed: int = 3

    @property
    def events(self) -> int:
        return len(self.deposits) + self.backlog

    def parts(self) -> Iterator[list[Deposit]]:
        """All deposits, a part at a time."""
        if self.deposits:
            yield self.deposits
        draw, now = random.Random(f"backlog {self.seed}"), datetime.now(UTC)  # of no other workload's warm-up
        for first in range(0, self.backlog, BACKLOG_AT_ONCE):
            numbers = [draw.randrange(len(self.addresses)) for _ in range(min(BACKLOG_AT_ONCE, self.backlog - first))]
            yield [_deposit(draw, number, self.addresses[number], now) for number in numbers]


def make(events: int, wallets: int, *, in_turn: bool = False, seed: int = 3) -> Workload:
    """Distinct transactions and amounts of 1 to 1,000 USDC, to random wallets or to one after the other."""
    draw = random.Random(seed)
    addresses = [f"0x{draw.getrandbits(160):040x}" for _ in range(wallets)]
    now = datetime.now(UTC)
    order = (n % wallets if in_turn else draw.randrange(wallets) for n in range(events))
    return Workload(
        addresses,
        [_deposit(draw, number, address, now) for number, address in enumerate(addresses)],
        [_deposit(draw, number, addresses[number], now) for number in order],
    )


def again(load: Workload, backlog: int, seed: int) -> Workload:
    """Other deposits to the same wallets: one each to warm up, and a backlog."""
    draw, now = random.Random(seed), datetime.now(UTC)
    warm_up = [_deposit(draw, number, address, now) for number, address in enumerate(load.addresses)]
    return Workload(load.addresses, warm_up, [], backlog, seed)


def user_of(wallet: int) -> str:
    return f"user-{wallet:05d}"


def _deposit(draw: random.Random, wallet: int, address: str, now: datetime) -> Deposit:
    event = DepositNotified(
        source=SOURCE,
        transfer_id=str(uuid.UUID(int=draw.getrandbits(128), version=4)),
        chain=CHAIN,
        tx_hash=f"0x{draw.getrandbits(256):064x}",
        to=address,
        asset="USDC",
        amount=draw.randrange(1_000_000, 1_000_000_000),
        evidence=Evidence.CONFIRMED,
        block_hash=f"0x{draw.getrandbits(256):064x}",
        block_number=draw.randrange(50_000_000, 60_000_000),
        sender=f"0x{draw.getrandbits(160):040x}",
    )
    headers = headers_of(event.ce_type(), event_id=event.identity(), source=SOURCE, time=now)
    key = address.encode()
    partition = partition_of(key, PARTITIONS)
    return Deposit(event.identity(), user_of(wallet), partition, key, value_of(event), headers)


async def insert_wallets(dsn: str, schema: str, addresses: Sequence[str]) -> None:
    connection = await asyncpg.connect(dsn, server_settings={"search_path": schema})
    try:
        users = [user_of(number) for number in range(len(addresses))]
        await connection.execute(WALLETS, CHAIN, list(addresses), users, [f"wallet-{user}" for user in users])
    finally:
        await connection.close()


async def preload(bootstrap: str, topic: str, deposits: Sequence[Deposit]) -> None:
    """Into Kafka as fast as it goes, in whole record batches."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", max_batch_size=REQUEST_BYTES_MAX)
    await producer.start()
    try:
        for partition in range(PARTITIONS):
            batch = producer.create_batch()
            for deposit in _of(deposits, partition):
                fields = {"key": deposit.key, "value": deposit.value, "timestamp": None, "headers": deposit.headers}
                if batch.append(**fields) is None:
                    await (await producer.send_batch(batch, topic, partition=partition))
                    batch = producer.create_batch()
                    batch.append(**fields)
            if batch.record_count():
                await (await producer.send_batch(batch, topic, partition=partition))
    finally:
        await producer.stop()


def _of(deposits: Sequence[Deposit], partition: int) -> Iterator[Deposit]:
    return (deposit for deposit in deposits if deposit.partition == partition)
