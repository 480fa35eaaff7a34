"""kill -9 of the real worker around a speed-up: nothing is signed twice, every withdrawal is paid once, and told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio

from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from tests.support import withdrawal_points
from tests.support.crash_rig import Rigs
from tests.support.withdrawal_points import SETTINGS, Boundary, boundaries
from tests.support.withdrawal_rig import WithdrawalRig, withdrawal_rig
from tests.support.worker_rig import PATIENCE_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

rig = withdrawal_points.rig

POINTS: list[Boundary] = [
    *(one for one in boundaries("raise_fees") if one.name in ("committed, the reply lost", "before telling")),
    *(one for one in boundaries("broadcast_transactions") if one.name == "before the node has it"),
]
"""Before the commit there is nothing: tests/integration/test_raise_fees.py."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rigs(scratch: Path, postgres: Postgres, kafka: Kafka, tools: Tools) -> AsyncIterator[Rigs[WithdrawalRig]]:
    settings = {**SETTINGS, "STABLERAIL_WITHDRAWAL_SPEED_UP_BLOCKS": "3"}
    rigs = Rigs(partial(withdrawal_rig, scratch, postgres, kafka, tools, settings))
    yield rigs
    await rigs.close()


@pytest.mark.parametrize("boundary", POINTS, ids=str)
async def test_a_worker_killed_around_a_speed_up_signs_nothing_twice_and_pays_once(
    rig: WithdrawalRig, boundary: Boundary
) -> None:
    rig.raises = True
    await rig.anvil.rpc("evm_setAutomine", False)
    await rig.ask(1)

    async def sent() -> bool:
        return bool(await rig.database.fetchval("SELECT count(*) FROM attempts WHERE status = 'broadcast'"))

    await rig.until(sent, "a node has it")
    await rig.until(rig.is_idle, "the journal has everything")
    await rig.anvil.rpc("anvil_dropAllTransactions")  # and loses it
    hold = boundary.hold(rig)
    async with rig.blocks():
        await hold.wait_hit_async(PATIENCE_S)
    rig.worker.kill()
    assert not hold.release(), "a dead client's packet does not go on"
    rig.start_worker()
    await rig.check()
    rows = await rig.database.fetch(
        "SELECT nonce, array_agg(n ORDER BY n) AS n, count(*) FILTER (WHERE status = 'confirmed') AS confirmed,"
        " count(*) FILTER (WHERE status NOT IN ('confirmed', 'replaced')) AS others FROM attempts GROUP BY nonce"
    )
    assert all(row["n"] == list(range(1, len(row["n"]) + 1)) for row in rows)
    assert {(row["confirmed"], row["others"]) for row in rows} == {(1, 0)}
    assert max(len(row["n"]) for row in rows) >= 2, "it was sped up"
