"""withdrawals.block_fill: how much of its blocks' room the whole movement pays, when more is asked for than a block holds.

Customers ask by Kafka, a fifth faster than the chain can pay; nothing is signed beforehand. The chain makes a block of 30M gas a
second with its ordinary base fee, which rises by an eighth after each full block. Recipients hold USDC already, so each transfer
costs the same. A block's capacity is its gas over what one transfer used in these very blocks. Of each block what is paid counts,
and of each second what is told as settled, DEPTH blocks behind; the lesser is the share.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from ledger.accounts import buffer, spendable
from ledger.commit import lock_writer, seal
from ledger.posting import Transaction, credit, debit
from ledger.store import blocks_of, lock
from tests.benchmarks.ledger_load import connect
from tests.benchmarks.parts import Parts, Place, cpu_seconds, place
from tests.benchmarks.records import Comparison, Record, Spread
from tests.benchmarks.withdrawals_load import AMOUNT, CHAIN, Field, field
from tests.benchmarks.withdrawals_send import start_worker
from tests.benchmarks.workload import PARTITIONS
from topics.catalog import WITHDRAWALS_REQUESTED, WITHDRAWALS_SETTLED
from topics.envelope import headers_of, value_of
from topics.events import WithdrawalRequested
from topics.partitioner import partition_of

BLOCK_GAS = 30_000_000
OVER = 1.2
"""Asked for, over what a block holds."""
KNOWN_GAS = 44_855
"""Of a transfer to an address that holds USDC: how fast we ask. The capacity is counted from what was used."""
CUSTOMERS = 200
RECIPIENTS = 200
DEPTH = 2
WRITER = "benchmark"
TICK_S = 0.05
GOAL = 0.95


@dataclass(frozen=True)
class Filled:
    """Of the blocks that count."""

    capacity: int
    """Transfers that fit into a block."""
    paid: Sequence[int]
    """By block."""
    settled: Sequence[int]
    """By block's second."""
    cpu_s: dict[str, float]

    @property
    def share(self) -> float:
        return min(sum(self.paid), sum(self.settled)) / (self.capacity * len(self.paid))


async def run(parts: Parts, blocks: int, skipped: int, limit_s: float) -> Filled:
    rate = OVER * BLOCK_GAS / KNOWN_GAS
    async with (
        asyncio.timeout(limit_s),
        place(parts) as here,
        field(parts.directory, int(rate * (blocks + 5))) as chain,
    ):
        await chain.anvil.rpc("evm_setAutomine", True)
        known = ["0x" + secrets.token_hex(20) for _ in range(RECIPIENTS)]
        for recipient in known:
            await chain.usdc.transfer(recipient, 1)
        await _fund(here.dsn, int(rate * (blocks + 5)) * AMOUNT)
        settings = {
            "STABLERAIL_WITHDRAWAL_IN_FLIGHT_MAX": "2000",  # three blocks: what is signed is not outbid before it is mined
            "STABLERAIL_WITHDRAWAL_FEE_CAPS_GWEI": json.dumps({CHAIN.value: 10**7}),
            "STABLERAIL_WITHDRAWAL_NETWORK_DAY_MAXIMUM": str(10**9),
            "STABLERAIL_FINALITY_DEPTHS_BLOCKS": json.dumps({CHAIN.value: DEPTH}),
            "STABLERAIL_SCAN_INTERVAL_S": "0.2",
        }
        for movement in ("withdrawals", "chains"):
            start_worker(here, chain, movement, settings)
        await _until_owned(here)
        await chain.anvil.rpc("evm_setAutomine", False)
        await chain.anvil.mine_every(1)
        return await _watched(here, chain, known, rate, blocks, skipped)


async def _watched(here: Place, chain: Field, known: Sequence[str], rate: float, blocks: int, skipped: int) -> Filled:
    processes = {"worker": here.children[0].pid, "chains": here.children[1].pid, "node": chain.anvil.pid}
    processes |= {"postgres": here.parts.postgres.pid, "kafka": here.parts.kafka.pid()}
    consumer = AIOKafkaConsumer(bootstrap_servers=here.bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    consumer.assign([TopicPartition(WITHDRAWALS_SETTLED.named(here.prefix), n) for n in range(PARTITIONS)])
    before = {name: cpu_seconds([pid]) for name, pid in processes.items()}
    asking = asyncio.create_task(_ask(here, known, rate))
    try:
        first = await _first_block(here, chain)
        last = first + blocks
        while await _head(chain) < last + DEPTH + 1:
            here.check_running()
            await asyncio.sleep(TICK_S)
            if asking.done():
                asking.result()
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    cpu = {name: round(cpu_seconds([pid]) - before[name], 1) for name, pid in processes.items()}
    told = await _told(consumer)
    await consumer.stop()
    found = [await chain.anvil.rpc("eth_getBlockByNumber", hex(n), False) for n in range(first + skipped, last)]
    used = sum(int(block["gasUsed"], 16) for block in found)
    paid = [len(block["transactions"]) for block in found]
    settled = [told[int(block["timestamp"], 16) + DEPTH + 1] for block in found]
    return Filled(int(BLOCK_GAS / (used / sum(paid))), paid, settled, cpu)


async def _fund(dsn: str, units: int) -> None:
    """Customers that hold enough."""
    gifts = [
        Transaction(secrets.token_hex(16), "gift", "", (debit(spendable(f"user-{n}"), units), credit(buffer(), units)))
        for n in range(CUSTOMERS)
    ]
    connection = await connect(dsn)
    at = datetime.now(UTC)
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        fold = await lock(connection, gifts, at)
        for gift in gifts:
            fold.post(gift)
        blocks = blocks_of(fold, owners[0].batch)
        await seal(connection, WRITER, owners, blocks=blocks, messages=[], at=fold.at, actor=WRITER, summary={})
    await connection.close()


async def _until_owned(here: Place) -> None:
    connection, stages = await connect(here.dsn), 7
    while await connection.fetchval("SELECT count(DISTINCT stage) FROM owners WHERE partition >= 0") < stages:
        here.check_running()
        await asyncio.sleep(TICK_S)
    await connection.close()


async def _ask(here: Place, known: Sequence[str], rate: float) -> None:
    """So many a second, without end."""
    producer = AIOKafkaProducer(bootstrap_servers=here.bootstrap, acks="all", linger_ms=5)
    await producer.start()
    topic, number, started = WITHDRAWALS_REQUESTED.named(here.prefix), 0, time.monotonic()
    try:
        while True:
            due = int((time.monotonic() - started) * rate)
            for n in range(number, due):
                user = f"user-{n % CUSTOMERS}"
                event = WithdrawalRequested(
                    user_id=user, idempotency_key=str(n), chain=CHAIN, asset="USDC", amount="1.000000",
                    to=known[n % RECIPIENTS],
                )  # fmt: skip
                headers = headers_of(
                    event.ce_type(), event_id=event.identity(), source="benchmark", time=datetime.now(UTC)
                )
                key = user.encode()
                await producer.send(
                    topic, value_of(event), key=key, partition=partition_of(key, PARTITIONS), headers=headers
                )
            number = due
            await asyncio.sleep(TICK_S)
    finally:
        await producer.stop()


async def _head(chain: Field) -> int:
    return int(await chain.anvil.rpc("eth_blockNumber"), 16)


async def _first_block(here: Place, chain: Field) -> int:
    """The first that pays."""
    seen = await _head(chain)
    while True:
        here.check_running()
        head = await _head(chain)
        for number in range(seen + 1, head + 1):
            if (await chain.anvil.rpc("eth_getBlockByNumber", hex(number), False))["transactions"]:
                return number
        seen = head
        await asyncio.sleep(TICK_S)


async def _told(consumer: Any) -> Counter[int]:
    """Second -> how many were told to be settled in it."""
    found: Counter[int] = Counter()
    ends = await consumer.end_offsets(consumer.assignment())
    while [tp for tp, end in ends.items() if await consumer.position(tp) < end]:
        for records in (await consumer.getmany(timeout_ms=500)).values():
            found.update(record.timestamp // 1000 for record in records)
    return found


async def measure(
    parts: Parts, blocks: int, skipped: int, repeats: int, limit_s: float, told: Callable[[str], None]
) -> Record:
    await parts.prepare([])
    runs: list[Filled] = []
    for _ in range(repeats):
        runs.append(await run(parts, blocks, skipped, limit_s))
        told(f"filled: {runs[-1].share:.2f} of {runs[-1].capacity}")
    counted = [len(one.paid) for one in runs]
    return Record(
        "withdrawals.block_fill",
        Comparison.of(
            "withdrawals paid and settled per block against what a block holds",
            "per block",
            [min(sum(one.paid), sum(one.settled)) / n for one, n in zip(runs, counted, strict=True)],
            [float(one.capacity) for one in runs],
            GOAL,
        ),
        {
            "paid_per_block": Spread.of([sum(one.paid) / n for one, n in zip(runs, counted, strict=True)]),
            "settled_per_block": Spread.of([sum(one.settled) / n for one, n in zip(runs, counted, strict=True)]),
            "asked_per_s": round(OVER * BLOCK_GAS / KNOWN_GAS),
            "blocks": blocks - skipped,
            **{f"cpu_{name}_s": Spread.of([one.cpu_s[name] for one in runs]) for name in runs[0].cpu_s},
        },
        "one lane, one worker of each movement; a block a second; the first blocks do not count",
    )
