"""The invariants that can be told from the database alone (DESIGN §7). Each is one query of offending rows."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from ledger.commit import link
from ledger.rows import Connection
from ledger.sql import load

_sql = load("ledger", "sql/verify.sql")


@dataclass(frozen=True, slots=True)
class Result:
    """One invariant: how much was looked at, and the first rows that break it."""

    number: int
    name: str
    checked: int
    offending: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.offending


_QUERIES = (
    (1, "entries of a transaction sum to zero per asset", _sql.transactions_balanced, _sql.count_transactions),
    (2, "all accounts of an asset sum to zero", _sql.assets_balanced, _sql.count_accounts),
    (3, "balance = sum of entries, versions without gaps", _sql.accounts_proved, _sql.count_accounts),
    (5, "one transfer, at most one credit", _sql.credited_once, _sql.count_deposits),
    (9, "every commit record is journaled and emitted", _sql.waiting_records, _sql.count_commits),
    (10, "every input event has exactly one outcome", _sql.events_settled, _sql.count_events),
)


async def verify(connection: Connection, *, rows_max: int = 5) -> list[Result]:
    """All of them, in order of their numbers, in one snapshot."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        results = []
        for number, name, query, count in _QUERIES:
            rows = await connection.fetch(f"{query} LIMIT {rows_max}")
            checked = await connection.fetchval(count)
            results.append(Result(number, name, checked, tuple(str(dict(row)) for row in rows)))
        results.append(await _chain(connection, rows_max))
    return sorted(results, key=lambda result: result.number)


async def _chain(connection: Connection, rows_max: int) -> Result:
    """11: each audit row's head follows from the one before and the row itself, positions have no gap, and the owner rows
    hold the last head."""
    heads: dict[tuple[str, str, int], tuple[int, bytes]] = {}
    offending: list[str] = []
    checked = 0
    async for row in connection.cursor(_sql.audit_chain, prefetch=1_000):
        stage, topic, partition, position, at, actor, summary, digest, head = row
        key = (stage, topic, partition)
        last_position, last_head = heads.get(key, (0, b""))
        expected = link(last_head, digest, at, actor, orjson.loads(summary))
        if position != last_position + 1 or head != expected:
            offending.append(f"{stage} {topic}[{partition}] position {position}")
        heads[key] = (position, head)
        checked += 1
    owners = {(s, t, p): (position, head) for s, t, p, position, head in await connection.fetch(_sql.owner_heads)}
    for stage, topic, partition in sorted(heads.keys() | owners.keys()):
        key = (stage, topic, partition)
        if heads.get(key, (0, b"")) != owners.get(key):
            offending.append(f"{stage} {topic}[{partition}] ends at another head than its owner row")
    return Result(11, "the audit chain verifies", checked, tuple(offending[:rows_max]))
