"""`stablerail verify`: the database's own invariants, and the custody mirror against the chains we read."""

from __future__ import annotations

from ledger.rows import Connection
from ledger.verify import Result, unheard, verify
from ledger.verify_chain import Progress
from stablerail.config import Settings
from stablerail.wiring import connector, rpcs
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
        rpc = rpcs(settings, chain)[0]
        try:
            await rpc.verify_chain_id()
            token, depth = settings.usdc_contracts[chain].lower(), settings.finality_depths_blocks[chain]
            final = (await rpc.head()).number - depth
            addresses = [
                row[0] for row in await connection.fetch("SELECT address FROM wallets WHERE chain = $1", chain.value)
            ]
            held = sum([await rpc.balance_of(token, address, max(final, 0)) for address in addresses])
            open_ = await connection.fetchval(
                "SELECT coalesce(sum(amount), 0)::text FROM deposits"
                " WHERE chain = $1 AND status = 'credited' AND block_number <= $2",
                chain.value,
                final,
            )
            early = await connection.fetchval(
                "SELECT coalesce(sum(amount), 0)::text FROM deposits"
                " WHERE chain = $1 AND status = 'finalized' AND block_number > $2",
                chain.value,
                final,
            )
            mirror = await connection.fetchval(
                "SELECT coalesce(sum(balance), 0)::text FROM accounts WHERE type = 'custody_usdc' AND shard = $1",
                chain.value,
            )
            checked += len(addresses)
            difference = held - int(open_) + int(early) - int(mirror)
            if difference:
                offending.append(f"{chain}: the wallets hold {format_amount(difference)} more than the mirror says")
        finally:
            await rpc.close()
    return Result(4, "custody mirror = on-chain holdings at a final block", checked, tuple(offending))
