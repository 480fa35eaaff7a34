"""`stablerail verify`: the database's own invariants, the custody mirror against the chains we read, the topics if asked for."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from ledger.rows import Connection
from ledger.sql import load
from ledger.verify import JUDGED, Result, together, unheard, verify
from ledger.verify_chain import Progress
from stablerail.config import Settings
from stablerail.connections import connector, rpcs
from stablerail.custody import custody_of
from stablerail.verify_kafka import verify_kafka
from stablerail.verify_rebuild import verify_rebuild
from topics.money import format_amount

LATE_BLOCKS: Final = 100
"""A deposit so far below the final block that is not judged yet is late: it was due under a hundred heads."""
_sql = load("stablerail", "operations.sql")


async def verify_all(
    settings: Settings,
    progress: Progress = unheard,
    *,
    rows_max: int = 5,
    topics: timedelta | None = None,
    rebuild: str | None = None,
) -> list[Result]:
    """Every invariant; `topics`: also what so much of the topics holds, `rebuild`: 12 too, with a scratch database on that server.
    Raises ChainError when a chain cannot be read, KafkaError when the topics cannot."""
    connection = await connector(settings)()
    try:
        results = await verify(connection, rows_max=rows_max, progress=progress)
        if settings.read_chains:
            results.extend(await verify_chains(settings, connection))
        if topics is not None:
            progress("topics", 0, 0)
            results.extend(await verify_kafka(settings, connection, topics, rows_max))
    finally:
        await connection.close()
    if rebuild is not None:
        results.append(await verify_rebuild(settings, rebuild, rows_max=rows_max, progress=progress))
    return together(results)


async def verify_chains(settings: Settings, connection: Connection) -> tuple[Result, Result]:
    """4: the mirror = what our wallets hold at the final block up to which deposits were judged. 6: what is final was judged."""
    offending, late = [], []
    checked = deposits = 0
    for chain in settings.read_chains:
        endpoints = rpcs(settings, chain)
        try:
            found = await custody_of(settings, chain, endpoints).look(connection)
        finally:
            for rpc in endpoints:
                await rpc.close()
        counts = await connection.fetchrow(_sql.judged, chain.value, found.final - LATE_BLOCKS)
        assert counts is not None
        overdue, known = counts
        checked += found.wallets
        deposits += known
        if found.difference:
            offending.append(f"{chain}: the wallets hold {format_amount(found.difference)} more than the mirror says")
        if overdue:
            late.append(f"{chain}: {overdue} deposits are {LATE_BLOCKS} blocks below the final one and not judged")
    return (
        Result(4, "custody mirror = on-chain holdings at a final block", checked, tuple(offending)),
        Result(6, JUDGED, deposits, tuple(late)),
    )
