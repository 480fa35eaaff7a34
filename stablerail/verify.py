"""`stablerail verify`: the database's own invariants, and the custody mirror against the chains we read."""

from __future__ import annotations

from ledger.rows import Connection
from ledger.verify import Result, unheard, verify
from ledger.verify_chain import Progress
from stablerail.config import Settings
from stablerail.wiring import connector, custody_of, rpcs
from topics.money import format_amount


async def verify_all(settings: Settings, progress: Progress = unheard) -> list[Result]:
    """Every invariant that applies so far. Raises ChainError when a chain cannot be read."""
    connection = await connector(settings)()
    try:
        results = await verify(connection, progress=progress)
        results.extend([await _custody(settings, connection)] if settings.read_chains else [])
    finally:
        await connection.close()
    return sorted(results, key=lambda result: result.number)


async def _custody(settings: Settings, connection: Connection) -> Result:
    """4: the mirror = what our wallets hold at the final block up to which deposits were judged."""
    offending = []
    checked = 0
    for chain in settings.read_chains:
        endpoints = rpcs(settings, chain)
        try:
            wallets, difference = await custody_of(settings, chain, endpoints).difference(connection)
            checked += wallets
            if difference:
                offending.append(f"{chain}: the wallets hold {format_amount(difference)} more than the mirror says")
        finally:
            for rpc in endpoints:
                await rpc.close()
    return Result(4, "custody mirror = on-chain holdings at a final block", checked, tuple(offending))
