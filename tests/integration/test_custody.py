"""The custody mirror against our wallets on a real chain, at one height."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress

from chain.rpc import BALANCES_AT_ONCE, Rpc
from ledger.rows import Connection
from stablerail.custody import Custody, CustodyCheck
from stablerail.dev.anvil import Anvil
from stablerail.dev.usdc import Usdc
from stablerail.metrics import Metrics
from tests.support import ledger_rig
from tests.support.in_process import until
from tests.support.ledger_rig import owner
from topics.events import Chain

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection

DEPTH = 3
DUST = 7


async def test_money_on_our_wallets_that_the_ledger_does_not_know_is_told_once_it_is_final(
    dsn: str, connection: Connection, anvil: Anvil, usdc: Usdc
) -> None:
    wallets = ["0x" + secrets.token_hex(20) for _ in range(BALANCES_AT_ONCE + 5)]
    database = await owner(dsn)
    await database.executemany(
        "INSERT INTO wallets (chain, address, user_id, wallet_id, created_at) VALUES ('MATIC', $1, $1, $1, now())",
        [(wallet,) for wallet in wallets],
    )
    await database.close()
    async with Rpc(anvil.rpc_url, anvil.chain_id) as rpc:
        custody = Custody(Chain.MATIC, [rpc], usdc.address.lower(), DEPTH)
        await anvil.mine(DEPTH)
        assert (await custody.look(connection))[1:] == (len(wallets), 0)
        await anvil.wait_mined(await usdc.transfer(wallets[-1], DUST))
        await anvil.mine(DEPTH - 1)
        assert (await custody.look(connection))[1:] == (len(wallets), 0)
        await anvil.mine(1)
        assert (await custody.look(connection))[1:] == (len(wallets), DUST)

        metrics = Metrics()

        async def connect() -> Connection:
            return connection

        check = CustodyCheck(custody, connect, 0.01, lambda: True, metrics.custody_discrepancy)
        task = asyncio.create_task(check.work())

        async def told() -> bool:
            name, labels = "stablerail_custody_discrepancy", {"chain": "MATIC"}
            return metrics.registry.get_sample_value(name, labels) == DUST / 10**6

        await until(told, "the gauge")
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
