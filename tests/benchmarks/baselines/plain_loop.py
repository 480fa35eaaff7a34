"""Baseline `plain`: the loop one would write first, made as fast as it goes. Same events, same topics, same guarantees of
delivery (inbox, outbox, acknowledge last), and nothing else: no commit record, no journal, no owner rows, no deposits'
identity, history, audit or dead letters; keys that are integers, and one index per table.

poll -> decode -> one transaction (claim, lock, fold, write, outbox rows) -> publish -> delete outbox rows -> acknowledge

2,000 events of all partitions in one transaction, whole record batches to the broker. Its database is what STABLERAIL_DATABASE_URL says.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from typing import Any

import asyncpg
import msgspec
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

BATCH_EVENTS = int(os.environ.get("BENCH_BATCH_EVENTS", "2000"))
HOT = 0

SCHEMA = """
CREATE SCHEMA plain; SET search_path = plain;
CREATE TABLE accounts (id bigint PRIMARY KEY, balance bigint NOT NULL, version bigint NOT NULL) WITH (fillfactor = 50);
CREATE TABLE transactions (id uuid PRIMARY KEY, kind text NOT NULL, at timestamptz NOT NULL DEFAULT now());
CREATE TABLE entries (account_id bigint NOT NULL, version bigint NOT NULL, transaction_id uuid NOT NULL,
    seq smallint NOT NULL, amount bigint NOT NULL, balance_after bigint NOT NULL, PRIMARY KEY (account_id, version));
CREATE TABLE inbox (event_id uuid PRIMARY KEY, stage text NOT NULL, at timestamptz NOT NULL DEFAULT now());
CREATE TABLE outbox (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, topic text NOT NULL, key bytea NOT NULL,
    payload bytea NOT NULL);
"""
WALLETS = "SELECT address FROM stablerail.wallets ORDER BY address"
ACCOUNTS = "INSERT INTO accounts SELECT x, 0, 0 FROM generate_series(0, $1::bigint) AS x"
CLAIM = """INSERT INTO inbox (event_id, stage) SELECT unnest($1::uuid[]), 'deposit'
ON CONFLICT DO NOTHING RETURNING event_id"""
LOCK = "SELECT id, balance, version FROM accounts WHERE id = ANY($1::bigint[]) ORDER BY id FOR UPDATE"
WRITE = """WITH t AS (INSERT INTO transactions (id, kind) SELECT x, 'deposit' FROM (SELECT unnest($1::uuid[]) AS x) AS x),
e AS (INSERT INTO entries SELECT unnest($2::bigint[]), unnest($3::bigint[]), unnest($4::uuid[]), unnest($5::smallint[]),
    unnest($6::bigint[]), unnest($7::bigint[])),
u AS (UPDATE accounts a SET balance = x.b, version = x.v
    FROM (SELECT unnest($8::bigint[]) AS i, unnest($9::bigint[]) AS b, unnest($10::bigint[]) AS v) AS x WHERE a.id = x.i)
INSERT INTO outbox (topic, key, payload) SELECT $11, unnest($12::bytea[]), unnest($13::bytea[])
RETURNING id"""
DELETE = "DELETE FROM outbox WHERE id = ANY($1::bigint[])"


class Notified(msgspec.Struct):
    transfer_id: str
    to: str
    amount: str


class Credited(msgspec.Struct):
    transfer_id: str
    to: str
    amount: int
    balance: int
    version: int


_decode = msgspec.json.Decoder(Notified).decode
_encode = msgspec.json.Encoder().encode


def base_units(text: str) -> int:
    whole, _, fraction = text.partition(".")
    return int(whole) * 1_000_000 + int(fraction.ljust(6, "0") if fraction else 0)


class Plain:
    schema = SCHEMA
    write = WRITE
    batch_events = BATCH_EVENTS

    def __init__(self, connection: Any, producer: Any, topic_out: str) -> None:
        self._connection = connection
        self._producer = producer
        self._topic = topic_out
        self._accounts: dict[str, int] = {}

    async def prepare(self) -> None:
        await self._connection.execute(self.schema)
        addresses = [row[0] for row in await self._connection.fetch(WALLETS)]
        self._accounts = {address: number for number, address in enumerate(addresses, 1)}
        await self._connection.execute(ACCOUNTS, len(addresses))

    async def handle(self, polled: dict[Any, list[Any]]) -> None:
        """One batch, from decoded to published and forgotten."""
        events = [(tp.partition, _decode(record.value)) for tp, records in polled.items() for record in records]
        async with self._connection.transaction():
            won = await self._connection.fetch(CLAIM, [event.transfer_id for _, event in events])
            if len(won) != len(events):
                fresh = {str(row[0]) for row in won}
                events = [(p, event) for p, event in events if event.transfer_id in fresh]
            if not events:
                return
            ids, messages = await self._post([event for _, event in events])
        await self._publish([partition for partition, _ in events], messages)
        await self._connection.execute(DELETE, ids)

    async def _post(self, events: list[Notified]) -> tuple[list[int], list[tuple[bytes, bytes]]]:
        accounts = [self._accounts[event.to] for event in events]
        rows = await self._connection.fetch(LOCK, sorted({HOT, *accounts}))
        state = {row[0]: [row[1], row[2]] for row in rows}
        hot = state[HOT]
        account_ids: list[int] = []
        versions: list[int] = []
        transaction_ids: list[str] = []
        seqs: list[int] = []
        amounts: list[int] = []
        balances: list[int] = []
        messages = []
        for event, account in zip(events, accounts, strict=True):
            amount, own = base_units(event.amount), state[account]
            hot[0] -= amount
            hot[1] += 1
            own[0] += amount
            own[1] += 1
            account_ids += (HOT, account)
            versions += (hot[1], own[1])
            transaction_ids += (event.transfer_id, event.transfer_id)
            seqs += (0, 1)
            amounts += (-amount, amount)
            balances += (hot[0], own[0])
            messages.append((event.to.encode(), _encode(Credited(event.transfer_id, event.to, amount, own[0], own[1]))))
        written = await self._connection.fetch(
            self.write,
            [event.transfer_id for event in events],
            *(account_ids, versions, transaction_ids, seqs, amounts, balances),
            *(list(state), [s[0] for s in state.values()], [s[1] for s in state.values()]),
            *(self._topic, [key for key, _ in messages], [value for _, value in messages]),
        )
        return [row[0] for row in written], messages

    async def _publish(self, partitions: list[int], messages: list[tuple[bytes, bytes]]) -> None:
        """A key keeps the partition it came from: no hashing, and one record batch per partition."""
        queues: dict[int, list[tuple[bytes, bytes]]] = {}
        for partition, message in zip(partitions, messages, strict=True):
            queues.setdefault(partition, []).append(message)
        acks = []
        for partition, queue in queues.items():
            batch = self._producer.create_batch()
            for key, value in queue:
                if batch.append(key=key, value=value, timestamp=None) is None:
                    acks.append(await self._producer.send_batch(batch, self._topic, partition=partition))
                    batch = self._producer.create_batch()
                    batch.append(key=key, value=value, timestamp=None)
            acks.append(await self._producer.send_batch(batch, self._topic, partition=partition))
        await asyncio.gather(*acks)


async def main(loop: type[Plain] = Plain) -> None:
    gc.set_threshold(100_000, 50, 100)  # as the worker has it
    bootstrap, prefix = os.environ["STABLERAIL_KAFKA_BOOTSTRAP"], os.environ["STABLERAIL_TOPIC_PREFIX"]
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    connection = await asyncpg.connect(os.environ["STABLERAIL_DATABASE_URL"], server_settings={"jit": "off"})
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, linger_ms=0, max_batch_size=1_000_000
    )
    consumer = AIOKafkaConsumer(
        f"{prefix}deposits.notified",
        bootstrap_servers=bootstrap,
        group_id=f"{prefix}baseline",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        session_timeout_ms=50_000,
    )
    await producer.start()
    await consumer.start()
    plain = loop(connection, producer, f"{prefix}deposits.credited")
    await plain.prepare()
    try:
        while not stopping.is_set():
            polled = await consumer.getmany(timeout_ms=200, max_records=loop.batch_events)
            if polled:
                await plain.handle(polled)
                await consumer.commit()
    finally:
        await consumer.stop()
        await producer.stop()
        await connection.close()


if __name__ == "__main__":
    uvloop.run(main())
