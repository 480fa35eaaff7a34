"""withdrawals.growth: what a block costs us with ten thousand transactions in flight, against a hundred.

The same number of ours is in each block: what is over waits in the node's pool. Timed are the three stages that a head wakes, one
after the other: what the chain says of our transactions, what is to be sped up, what can be signed; each is prepare and settle. The
payments that take the places of those mined are signed and sent between the blocks, untimed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg

from agents.outcome import Stage
from agents.withdrawals import raise_fees, track_confirmations
from agents.withdrawals.look import ChainWriter
from agents.withdrawals.raising import RaisePolicy
from chain.rpc import Rpc
from ledger.migrate import upgrade
from tests.benchmarks.ledger_load import connect
from tests.benchmarks.parts import SCHEMA, Parts
from tests.benchmarks.records import Comparison, Record
from tests.benchmarks.withdrawals_load import CHAIN, Field, field, insert, waiting
from tests.benchmarks.withdrawals_send import BATCH, Ours, received, through
from topics.envelope import headers_of, value_of
from topics.events import HeadSeen

MINED = 100
"""Of each block."""
BLOCK_GAS = 6_290_000
"""Room for MINED transfers to addresses that hold nothing yet, one more or less: they use 61,96x of gas each, and offer 100,000."""
FEW = 100
DEPTH = 2
WARM = 4
"""Blocks before the clock: some are then final in each that counts."""
GOAL = round(1 / 1.3, 3)


class _Woken(Ours):
    """The stages that a head wakes, too."""

    def __init__(self, here: Field, connections: Sequence[Any], rpc: Rpc) -> None:
        super().__init__(here, connections, rpc)
        self._here, self._connection_of_heads = here, connections[0]
        writer = ChainWriter([rpc], here.usdc.address.lower(), DEPTH)
        track: Stage[Any] = track_confirmations.stage({CHAIN.value: writer}, self.connected, lambda: datetime.now(UTC))
        self._woken = (track, raise_fees.stage(self.desks, {CHAIN: RaisePolicy()}), self.waiting)

    async def block(self, rpc: Rpc) -> float:
        """Makes a block, and the seconds that its head took."""
        await self._here.anvil.mine()
        head = await rpc.head()
        event = HeadSeen(
            chain=CHAIN, chain_id=rpc.chain_id, number=head.number, block_hash=head.hash, timestamp_s=head.timestamp_s
        )
        at = datetime.now(UTC)
        headers = headers_of(event.ce_type(), event_id=event.identity(), source="benchmark", time=at)
        seconds = 0.0
        for stage in self._woken:
            items = await self.items(stage, self._connection_of_heads, [(value_of(event), headers)])
            started = time.perf_counter()
            await self.settled(stage, self._connection_of_heads, items, await stage.prepare(received(items)))
            seconds += time.perf_counter() - started
        return seconds


async def run(parts: Parts, in_flight: int, blocks: int) -> float:
    """Milliseconds of a block."""
    gc.set_threshold(100_000, 50, 100)  # as the worker has it
    total = in_flight + (WARM + blocks) * MINED
    parts.postgres.drop_database("benchmark_growth_of_lanes")
    dsn = parts.postgres.create_database("benchmark_growth_of_lanes")
    await upgrade(dsn, SCHEMA)
    parts.postgres.execute("CHECKPOINT")
    owner = await asyncpg.connect(dsn)
    connections = [await connect(dsn) for _ in range(3)]
    async with field(parts.directory, total) as here, Rpc(here.anvil.rpc_url, here.anvil.chain_id) as rpc:
        try:
            await here.anvil.rpc("evm_setBlockGasLimit", hex(BLOCK_GAS))
            woken = _Woken(here, connections, rpc)
            await _paid(owner, woken, in_flight)
            await owner.execute("VACUUM ANALYZE")
            seconds, mined = 0.0, 0
            for number in range(WARM + blocks):
                took = await woken.block(rpc)
                seconds += took if number >= WARM else 0.0
                latest = int(await here.anvil.rpc("eth_getTransactionCount", here.signer.address, "latest"), 16)
                if abs(latest - mined - MINED) > 1 and in_flight > FEW:
                    raise RuntimeError(f"{latest - mined} are in a block made for {MINED}")
                await _paid(owner, woken, latest - mined)
                mined = latest
            return seconds / blocks * 1000
        finally:
            for one in (*connections, owner):
                await one.close()


async def _paid(owner: Any, woken: Ours, number: int) -> None:
    """So many more, signed and in the pool."""
    load = waiting(number)
    await insert(owner, load)
    await through(woken.steps, [load[start : start + BATCH] for start in range(0, number, BATCH)])


async def growth(parts: Parts, in_flight: int, blocks: int, repeats: int, told: Callable[[str], None]) -> Record:
    many: list[float] = []
    few: list[float] = []
    for _ in range(repeats):
        for found, number in ((many, in_flight), (few, FEW)):
            found.append(await run(parts, number, blocks))
            told(f"{number:,} in flight: {found[-1]:.1f} ms")
    return Record(
        "withdrawals.growth",
        Comparison.of(
            f"a block of {MINED} of ours with {FEW} in flight against {in_flight:,}, both in time",
            *("ms per block", many, few, GOAL),
            less_is_better=True,
        ),
        {"in_flight": in_flight, "blocks": blocks, "mined_per_block": MINED},
        "one lane; the three stages that a head wakes, in the benchmark's process; a node of its own",
    )
