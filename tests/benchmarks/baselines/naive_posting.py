"""Baseline: a posting as one would write it first. Seven statements, one transfer at a time, many connections.

BEGIN, claim, lock both accounts, update one, update the other, insert both entries, COMMIT. Into the plain fold's tables.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime

from ledger.rows import Connection
from tests.benchmarks.baselines.plain_fold import Transfer

CLAIM = """INSERT INTO plain.transactions (id, at, kind, reference) VALUES ($1::text::uuid, $2, 'deposit', $3)
ON CONFLICT DO NOTHING RETURNING true"""
LOCK = """SELECT id, balance::text FROM plain.accounts WHERE id IN ($1::text::uuid, $2::text::uuid)
ORDER BY id FOR UPDATE"""
MOVE = "UPDATE plain.accounts SET balance = balance + $2::text::numeric WHERE id = $1::text::uuid"
INSERT = """INSERT INTO plain.entries (account_id, transaction_id, at, direction, amount, balance_after) VALUES
($1::text::uuid, $2::text::uuid, $3, 'd', $4::text::numeric, $5::text::numeric),
($6::text::uuid, $2::text::uuid, $3, 'c', $4::text::numeric, $7::text::numeric)"""


async def post_all(connections: Sequence[Connection], hot: str, transfers: Iterable[Transfer], at: datetime) -> None:
    """Each connection takes the next transfer when it is done with one."""
    coming = iter(transfers)
    await asyncio.gather(*(_post_from(connection, hot, coming, at) for connection in connections))


async def _post_from(connection: Connection, hot: str, coming: Iterator[Transfer], at: datetime) -> None:
    for id, reference, account, amount in coming:
        async with connection.transaction():
            if not await connection.fetchval(CLAIM, id, at, reference):
                continue
            rows = await connection.fetch(LOCK, account, hot)
            held = {row[0].hex: int(row[1]) for row in rows}
            await connection.execute(MOVE, account, str(amount))
            await connection.execute(MOVE, hot, str(-amount))
            after = str(held[account] + amount), str(held[hot] - amount)
            await connection.execute(INSERT, account, id, at, str(amount), after[0], hot, after[1])
