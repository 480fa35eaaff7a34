"""withdrawals.latency: from an accepted withdrawal sent to Kafka until its transaction is in the node's pool, on an idle system.

One withdrawal at a time, the next when the last is in the pool and a pause has passed. The pool is asked for the signer's pending
count again and again (the resolution is one request). The baseline is that of deposits.latency, one bare Kafka hop and one bare
commit until it can be read; ours has HOPS of them: accepted, signed.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

import aiohttp
import asyncpg
import orjson
from aiokafka import AIOKafkaProducer

from tests.benchmarks import latency, workload
from tests.benchmarks.latency import SETTLING_SHARE, quantile
from tests.benchmarks.parts import Parts, place
from tests.benchmarks.records import Comparison, Record, Spread
from tests.benchmarks.sides import HOP_AND_COMMIT
from tests.benchmarks.withdrawals_load import CHAIN, Field, field, insert, waiting
from tests.benchmarks.withdrawals_send import start_worker
from tests.benchmarks.workload import PARTITIONS
from topics.catalog import WITHDRAWALS_ACCEPTED
from topics.partitioner import partition_of

HOPS = 2
"""Kafka topics between an accepted withdrawal and the node."""
PAUSE_S = 0.02
WARM = 20


async def run(parts: Parts, number: int, limit_s: float) -> list[float]:
    """Milliseconds of each."""
    load = waiting(number + WARM)
    found: list[float] = []
    async with asyncio.timeout(limit_s), place(parts) as here, field(parts.directory, len(load)) as chain:
        owner = await asyncpg.connect(here.dsn)
        await insert(owner, load)
        await owner.close()
        start_worker(here, chain)
        topic, key = WITHDRAWALS_ACCEPTED.named(here.prefix), CHAIN.encode()
        partition = partition_of(key, PARTITIONS)
        producer = AIOKafkaProducer(bootstrap_servers=here.bootstrap, acks="all", enable_idempotence=True, linger_ms=0)
        await producer.start()
        async with aiohttp.ClientSession() as http:
            gc.collect()
            for count, one in enumerate(load, start=1):
                sent = time.perf_counter()
                acked = await producer.send(topic, one.value, key=key, partition=partition, headers=one.headers)
                while await _pending(http, chain) < count:
                    if time.perf_counter() - sent > 1:
                        here.check_running()
                        await asyncio.sleep(0.05)
                found.append((time.perf_counter() - sent) * 1000)
                await acked
                await asyncio.sleep(PAUSE_S)
        await producer.stop()
    return found[WARM:][number // SETTLING_SHARE :]


async def _pending(http: aiohttp.ClientSession, chain: Field) -> int:
    call = {"jsonrpc": "2.0", "id": 1, "method": "eth_getTransactionCount", "params": [chain.signer.address, "pending"]}
    headers = {"content-type": "application/json"}
    async with http.post(chain.anvil.rpc_url, data=orjson.dumps(call), headers=headers) as response:
        return int(orjson.loads(await response.read())["result"], 16)


async def measure(parts: Parts, number: int, repeats: int, limit_s: float, told: Callable[[str], None]) -> Record:
    load = workload.make(number, number, in_turn=True)
    await parts.prepare(load.addresses)
    ours: list[list[float]] = []
    bare: list[list[float]] = []
    for _ in range(repeats):
        ours.append(await run(parts, number, limit_s))
        told(f"withdrawal: {quantile(ours[-1], 0.5):.2f} ms")
        bare.append((await latency.run(parts, HOP_AND_COMMIT, load, limit_s)).readable_ms)
        told(f"hop and commit: {quantile(bare[-1], 0.5):.2f} ms")
    return Record(
        "withdrawals.latency",
        Comparison.of(
            f"p50 of {HOPS} bare Kafka hops and commits, over ours from accepted to in the node's pool",
            *("ms", [quantile(one, 0.5) for one in ours], [HOPS * quantile(one, 0.5) for one in bare], 0.33),
            less_is_better=True,
        ),
        {
            "pool_p99_ms": Spread.of([quantile(one, 0.99) for one in ours]),
            "hop_and_commit_p50_ms": Spread.of([quantile(one, 0.5) for one in bare]),
            "withdrawals_per_run": number,
        },
        "one at a time; from sending to the first answer of the node that counts it as pending",
    )
