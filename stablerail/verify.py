"""`stablerail verify`: the database's own invariants, and the custody mirror against the chains we read."""

from __future__ import annotations

from typing import Final

from ledger.rows import Connection
from ledger.sql import load
from ledger.verify import Result, unheard, verify
from ledger.verify_chain import Progress
from stablerail.config import Settings
from stablerail.wiring import connector, rpcs
from topics.money import format_amount

LATE_BLOCKS: Final = 100
"""A deposit so far below the final block that is not judged yet is late: it was due under a hundred heads."""
_sql = load("stablerail", "operations.sql")


async def verify_all(settings: Settings, progress: Progress = unheard) -> list[Result]:
    """Every invariant that applies so far. Raises ChainError when a chain cannot be read."""
    connection = await connector(settings)()
    try:
        results = await verify(connection, progress=progress)
        if settings.read_chains:
            results.extend(await _chains(settings, connection))
    finally:
        await connection.close()
    return sorted(results, key=lambda result: result.number)


async def _chains(settings: Settings, connection: Connection) -> tuple[Result, Result]:
    """4: the mirror = what our wallets hold at the final block up to which deposits were judged. 6: what is final was judged."""
    offending, late = [], []
    checked = deposits = 0
    for chain in settings.read_chains:
        rpc = rpcs(settings, chain)[0]
        try:
            await rpc.verify_chain_id()
            token, depth = settings.usdc_contracts[chain].lower(), settings.finality_depths_blocks[chain]
            final = (await rpc.head()).number - depth
            addresses = [row[0] for row in await connection.fetch(_sql.our_addresses, chain.value)]
            held = sum([await rpc.balance_of(token, address, max(final, 0)) for address in addresses])
            counts = await connection.fetchrow(_sql.judged, chain.value, final, final - LATE_BLOCKS)
            assert counts is not None
            open_, early, mirror, overdue, known = map(int, counts)
        finally:
            await rpc.close()
        checked += len(addresses)
        deposits += known
        difference = held - open_ + early - mirror
        if difference:
            offending.append(f"{chain}: the wallets hold {format_amount(difference)} more than the mirror says")
        if overdue:
            late.append(f"{chain}: {overdue} deposits are {LATE_BLOCKS} blocks below the final one and not judged")
    return (
        Result(4, "custody mirror = on-chain holdings at a final block", checked, tuple(offending)),
        Result(6, "every final transfer is credited, rejected or parked", deposits, tuple(late)),
    )
