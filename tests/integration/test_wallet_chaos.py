"""A rush of approvals on a bad day: Circle fails, loses replies and refuses the rate, and the worker is killed again and again.

STABLERAIL_TEST_APPROVALS and STABLERAIL_TEST_KILLS make it as large as it is meant: 2000 and 10.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from connectors.circle.sandbox.gate import Weather
from ledger.verify import verify
from stablerail.dev.kafka import Kafka
from tests.support.in_process import SCHEMA, until
from tests.support.rebuild import differences, empty_database, rebuild
from tests.support.wallet_rig import CHAINS, Rig, wallet_rig
from topics.catalog import WALLETS_PROVISIONED

APPROVALS = int(os.environ.get("STABLERAIL_TEST_APPROVALS", "240"))
KILLS = int(os.environ.get("STABLERAIL_TEST_KILLS", "4"))
SPEED = 60.0
"""A minute of the product's is a second of ours."""
CALLS_LEAST = 30

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
async def rig(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Rig]:
    async with wallet_rig(database, kafka.bootstrap, topic_prefix) as it:
        yield it


async def test_whatever_fails_and_dies_each_customer_has_one_wallet_per_chain_here_and_at_circle(
    rig: Rig, tmp_path: Path
) -> None:
    drawn = random.Random(8)
    rig.circle.sandbox.gate.weather = Weather(unavailable=0.20, lost_replies=0.05, limited=0.02, seed=8)
    users = [f"user-{n:05}" for n in range(APPROVALS)]
    await rig.approve(*users)
    order = {
        "dsn": rig.at.dsn,
        "bootstrap": rig.at.bootstrap,
        "prefix": rig.at.prefix,
        "circle": rig.circle.base_url,
        "since": datetime.now(UTC).isoformat(),
        "speed": SPEED,
        "policy": {"members_max": APPROVALS // CALLS_LEAST, "attempts_max": 12, "rate_per_s": 20.0},
    }
    for life in range(KILLS + 1):
        with (tmp_path / f"worker-{life}.log").open("wb") as log:
            worker = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.support.wallet_worker", json.dumps(order),
                stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert worker.stdout is not None
        try:
            assert (await asyncio.wait_for(worker.stdout.readuntil(b"ready\n"), 100)).endswith(b"ready\n")
            if life < KILLS:
                heard = rig.calls + drawn.randint(0, 3)
                await until(lambda n=heard: _settled_or(rig, n), "it works")  # type: ignore[misc]
                await asyncio.sleep(drawn.uniform(0.0, 0.1))
            else:
                await rig.ended(Counter(completed=APPROVALS), "all have wallets", timeout_s=300)
                await until(lambda: told(rig, APPROVALS), "all are told", 100)
        finally:
            if worker.returncode is None:
                worker.send_signal(signal.SIGKILL)
            await worker.wait()
    each = Counter({(user, chain.value): 1 for user in users for chain in CHAINS})
    assert rig.at_circle() == each
    assert await rig.in_database() == each
    owners = {wallet.id: wallet.ref_id for wallet in rig.circle.sandbox.state.wallets.values()}
    rows = await rig.at.observer.fetch("SELECT wallet_id, user_id FROM wallets")
    assert dict(tuple(row) for row in rows) == owners
    assert len(rig.circle.sandbox.state.wallet_sets) == 1
    assert rig.calls > CALLS_LEAST
    assert await rig.letters() == []
    await rig.at.journaled()
    assert not [result for result in await verify(rig.at.observer) if not result.holds]
    async with empty_database(rig.at.dsn) as empty:
        await rebuild(rig.at.bootstrap, rig.at.prefix, empty, SCHEMA)
        assert await differences(rig.at.dsn, empty) == {}


async def _settled_or(rig: Rig, calls: int) -> bool:
    """So many calls were heard, or there is nothing left to ask."""
    return rig.calls > calls or await rig.jobs() == Counter(completed=APPROVALS)


async def told(rig: Rig, customers: int) -> bool:
    records = await rig.at.told(WALLETS_PROVISIONED)
    return len({record.key for record in records}) == customers
