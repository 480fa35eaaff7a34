"""The custody mirror against our wallets on a real chain, at one height."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest

from chain import endpoints, heads
from chain.errors import ChainError
from chain.rpc import BALANCES_AT_ONCE, Rpc
from ledger.rows import Connection
from ledger.sql import load
from stablerail.config import load_settings
from stablerail.custody import Custody, CustodyCheck
from stablerail.dev.anvil import Anvil
from stablerail.dev.usdc import Usdc
from stablerail.metrics import Metrics
from stablerail.verify import LATE_BLOCKS, verify_all
from tests.support import ledger_rig
from tests.support.in_process import until
from tests.support.invariants import may_break
from tests.support.ledger_rig import owner
from tests.support.patience import PATIENCE_S
from tests.support.rpc_stub import LyingEndpoint
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
        assert (await custody.look(connection))[1:3] == (len(wallets), 0)
        await anvil.wait_mined(await usdc.transfer(wallets[-1], DUST))
        await anvil.mine(DEPTH - 1)
        assert (await custody.look(connection))[1:3] == (len(wallets), 0)
        await anvil.mine(1)
        assert (await custody.look(connection))[1:3] == (len(wallets), DUST)

        metrics = Metrics()

        async def connect() -> Connection:
            return connection

        leads = [True]
        check = CustodyCheck(custody, connect, 0.01, lambda: leads[0], metrics.custody_discrepancy)
        task = asyncio.create_task(check.work())

        async def told() -> float | None:
            return metrics.registry.get_sample_value("stablerail_custody_discrepancy", {"chain": "MATIC"})

        assert await until(told, "the gauge") == DUST / 10**6
        leads[0] = False

        async def untold() -> bool:
            return await told() is None

        await until(untold, "another worker's, from now on")
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize(("name", "types"), [("expected", "text, bigint"), ("by_word", "text")])
async def test_what_the_wallets_should_hold_is_found_however_many_rows_there_are(
    connection: Connection, name: str, types: str
) -> None:
    """It is asked every minute, for each chain."""
    query = getattr(load("stablerail", "custody.sql"), name)
    await connection.execute(f"SET enable_seqscan = off; PREPARE asked ({types}) AS {query}")
    plan = await connection.fetch(f"EXPLAIN EXECUTE asked('MATIC'{', 7' if ',' in types else ''})")
    lines = [row[0] for row in plan]
    large = ("accounts", "deposits", "attempts", "withdrawals", "custodian_transfers")
    assert not [line for line in lines if any(f"Seq Scan on {table}" in line for table in large)], lines


async def test_an_endpoint_that_lies_or_stands_still_rings_for_nothing(
    dsn: str, connection: Connection, anvil: Anvil, usdc: Usdc, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (heads, endpoints):
        monkeypatch.setattr(module, "GRACE_S", PATIENCE_S)  # all of them are heard
    wallet = "0x" + secrets.token_hex(20)
    database = await owner(dsn)
    await database.execute(
        "INSERT INTO wallets (chain, address, user_id, wallet_id, created_at) VALUES ('MATIC', $1, $1, $1, now())",
        wallet,
    )
    await database.close()
    await anvil.wait_mined(await usdc.transfer(wallet, DUST))
    await anvil.mine(DEPTH)
    async with AsyncExitStack() as stack:
        liar, honest = [await stack.enter_async_context(LyingEndpoint(anvil.rpc_url)) for _ in range(2)]
        first, *others = [
            await stack.enter_async_context(Rpc(url, anvil.chain_id)) for url in (liar.url, honest.url, anvil.rpc_url)
        ]

        def custody(*rpcs: Rpc) -> Custody:
            return Custody(Chain.MATIC, rpcs, usdc.address.lower(), DEPTH)

        final = (await custody(*others).look(connection)).final
        nothing = "0x" + "0" * 64
        for lies in (
            {"eth_call": lambda _params, _honest: nothing},
            {"eth_call": lambda _params, _honest: None},
            {"eth_getBlockByNumber": lambda _params, raw: raw | {"number": "0xffffff"}},
        ):
            liar.lies = lies
            assert await custody(first, *others).look(connection) == (final, 1, DUST, DUST)
        for lies in ({"eth_call": lambda _params, _honest: nothing}, {"eth_call": lambda _params, _honest: None}):
            liar.lies = lies
            with pytest.raises(ChainError):
                await custody(first, others[0]).look(connection)
        liar.lies = {"eth_call": lambda _params, _honest: nothing}
        assert (await custody(first).look(connection)).held == 0, "of one its word is all there is"

        def stands_still(params: list[Any], raw: Any) -> Any:
            return raw | {"number": hex(final)} if params[0] == "latest" else raw

        liar.lies = {"eth_getBlockByNumber": stands_still}
        assert (await custody(first, others[0]).look(connection))[:1] == (final - DEPTH,), "both have that block"
        honest.whole = (503, b"")
        with pytest.raises(ChainError):
            await custody(first, others[0]).look(connection)


DEPOSIT = (
    "INSERT INTO deposits (id, n, chain, tx_hash, recipient, asset, amount, status, generation, buffer_shard, held,"
    " block_number, updated_at) VALUES (gen_random_uuid(), 1, 'MATIC', '0x1', '0x2', 'USDC', 5, 'pending', 0, '', 'unproven',"
    " $1, now())"
)


async def test_verify_tells_a_changed_mirror_as_4_and_a_final_deposit_that_nobody_judged_as_6(
    dsn: str, anvil: Anvil, usdc: Usdc
) -> None:
    may_break(dsn, "a mirror is edited")
    settings = load_settings(
        env_file=None,
        database_url=dsn,
        rpc_urls={"MATIC": [anvil.rpc_url]},
        chain_ids={"MATIC": anvil.chain_id},
        usdc_contracts={"MATIC": usdc.address},
        finality_depths_blocks={"MATIC": DEPTH},
    )

    async def broken() -> dict[int, tuple[str, ...]]:
        return {one.number: one.offending for one in await verify_all(settings) if not one.holds}

    await anvil.mine(LATE_BLOCKS + DEPTH + 1)
    assert await broken() == {}
    database = await owner(dsn)
    try:
        await database.execute(DEPOSIT, LATE_BLOCKS * 1_000_000)
        assert await broken() == {}, "it is young"
        await database.execute("UPDATE deposits SET block_number = 1")
        assert await broken() == {
            6: (f"MATIC: 1 deposits are {LATE_BLOCKS} blocks below the final one and not judged",)
        }
        await database.execute("DELETE FROM deposits")
        await database.execute(
            "INSERT INTO accounts VALUES (gen_random_uuid(), 'system', 'custody_usdc', 'USDC', 'MATIC', 5, 1, now())"
        )
        found = await broken()
        assert found.keys() == {2, 3, 4}
        assert found[4] == ("MATIC: the wallets hold -0.000005 more than the mirror says",)
    finally:
        await database.close()
