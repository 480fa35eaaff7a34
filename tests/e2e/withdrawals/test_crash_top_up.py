"""kill -9 of the real worker around a top-up of a lane's gas: the coins are given once, and booked once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio

from ledger.accounts import gas_coins
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.keystore import write_keystore
from stablerail.dev.postgres import Postgres
from tests.support import withdrawal_points
from tests.support.crash_rig import Rigs
from tests.support.sending import COIN
from tests.support.withdrawal_points import SETTINGS, Boundary, boundaries
from tests.support.withdrawal_rig import PASSWORD, WithdrawalRig, withdrawal_rig
from tests.support.worker_rig import PATIENCE_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

rig = withdrawal_points.rig

NAMES = ("committed, the reply lost", "before telling")
"""Before the commit there is nothing: tests/integration/test_top_ups.py."""
POINTS: list[Boundary] = [one for one in boundaries("top_up_lanes") if one.name in NAMES]
LIMITS = '{"MATIC": {"below": "1", "upto": "5", "day_max": "100"}}'


@dataclass(frozen=True)
class Account:
    address: str
    keystore: Path


@pytest.fixture(scope="module")
def account(scratch: Path) -> Account:
    keystore = scratch / "gas-account.json"
    return Account(write_keystore(keystore, PASSWORD), keystore)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rigs(
    scratch: Path, postgres: Postgres, kafka: Kafka, tools: Tools, account: Account
) -> AsyncIterator[Rigs[WithdrawalRig]]:
    gas = {"STABLERAIL_GAS_KEYSTORE": str(account.keystore), "STABLERAIL_GAS_TOP_UPS": LIMITS}
    rigs = Rigs(partial(withdrawal_rig, scratch, postgres, kafka, tools, {**SETTINGS, **gas}))
    yield rigs
    await rigs.close()


@pytest.mark.parametrize("boundary", POINTS, ids=str)
async def test_a_worker_killed_around_a_top_up_gives_the_coins_once_and_books_them_once(
    rig: WithdrawalRig, account: Account, boundary: Boundary
) -> None:
    before = await rig.database.fetchval("SELECT count(*) FROM gas_top_ups")
    await rig.anvil.rpc("anvil_setBalance", account.address, hex(100 * COIN))
    hold = boundary.hold(rig)
    await rig.anvil.rpc("anvil_setBalance", rig.signer, hex(COIN // 2))
    async with rig.blocks():
        await hold.wait_hit_async(PATIENCE_S)
    rig.worker.kill()
    assert not hold.release(), "a dead client's packet does not go on"
    rig.start_worker()
    await rig.check()
    async with rig.blocks():
        await rig.until(partial(all_done, rig), "every top-up is final")
    await rig.until(rig.is_idle, "the journal has everything")
    rows = await rig.database.fetch("SELECT nonce, amount FROM gas_top_ups ORDER BY nonce")
    assert [row["nonce"] for row in rows] == list(range(before + 1))
    assert int(await rig.anvil.rpc("eth_getTransactionCount", account.address, "latest"), 16) == len(rows)
    assert int(await rig.anvil.rpc("eth_getBalance", rig.signer, "latest"), 16) > 4 * COIN
    for address, sign in ((rig.signer, 1), (account.address, -1)):
        id = gas_coins(f"MATIC:{address}").id
        booked = await rig.database.fetchval("SELECT balance FROM accounts WHERE id = $1", id)
        assert booked == sign * sum(row["amount"] for row in rows)


async def all_done(rig: WithdrawalRig) -> bool:
    return not await rig.database.fetchval("SELECT count(*) FROM gas_top_ups WHERE state = 'open'")
