"""Invariant 11: the hash chain, and the rows that it seals.

| step | what it finds |
| --- | --- |
| since | a chain that does not hold the checkpoint's head any more: the past was rewritten together with its hashes, or cut off |
| walk | an audit row that was edited, deleted, inserted or moved; an end that is not the owner row's |
| seals | commit by commit, rows of transactions, entries and audit_logs that are not those which the commit's audit row hashed |
| strays | entries without a transaction; transactions that name no commit and are of no commit from before they did |

Everything is streamed by server-side cursors in the order of the hashes, so memory is that of one commit.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from ledger.checkpoint import Checkpoint, Heads
from ledger.commit import link
from ledger.proof import ledger_blocks, ledger_digest, logs_digest
from ledger.rows import Connection
from ledger.sql import load

_sql = load("ledger", "sql/verify_chain.sql")

Progress = Callable[[str, int, int], None]
"""What is looked at, how many of it so far, of how many (0: not known)."""

_PREFETCH: Final = 5_000
_TOLD_EVERY: Final = 10_000
_LAST: Final = 2**63 - 1


@dataclass
class Found:
    """What the steps have found, and where the chains end."""

    rows_max: int
    progress: Progress
    checked: int = 0
    offending: list[str] = field(default_factory=list)
    heads: Heads = field(default_factory=dict)
    batch_first: int = _LAST
    """The lowest number among the commits that were walked."""
    batch_last: int = 0

    def add(self, text: str) -> None:
        if len(self.offending) < self.rows_max:
            self.offending.append(text)


async def verify_chain(
    connection: Connection, since: Checkpoint, rows_max: int, progress: Progress, *, ledger: bool = True
) -> Found:
    """All steps; without `ledger` the logs' seals only. In a transaction."""
    found = Found(rows_max, progress, heads=dict(since.heads), batch_last=since.batch)
    await _since(connection, since, found)
    await _walk(connection, since, found)
    first = min(found.batch_first, since.batch + 1)
    await _seals(connection, first, found, ledger)
    if ledger:
        for name, query in (("an entry without its transaction", _sql.orphans), ("no commit has it", _sql.unsealed)):
            for row in await connection.fetch(query, rows_max):
                found.add(f"{name}: {dict(row)}")
    return found


def _lists(heads: Heads) -> tuple[list[Any], ...]:
    keys = sorted(heads)
    return [k[0] for k in keys], [k[1] for k in keys], [k[2] for k in keys], [heads[k][0] for k in keys]


async def _since(connection: Connection, since: Checkpoint, found: Found) -> None:
    rows = await connection.fetch(_sql.at_checkpoint, *_lists(since.heads))
    held = {(stage, topic, partition): head for stage, topic, partition, head in rows}
    for key, (position, head) in since.heads.items():
        if position and held.get(key) != head:
            found.add(f"{_name(key)} position {position} is not what it was at the checkpoint")


async def _walk(connection: Connection, since: Checkpoint, found: Found) -> None:
    total = await connection.fetchval(_sql.count_audit)
    heads = found.heads
    async for row in connection.cursor(_sql.audit_chain, *_lists(since.heads), prefetch=_PREFETCH):
        stage, topic, partition, position, at, actor, summary, digest, head, *seals = row
        key = (stage, topic, partition)
        last_position, last_head = heads.get(key, (0, b""))
        expected = link(last_head, digest, at, actor, orjson.loads(summary), (*seals,))
        if position != last_position + 1 or head != expected:
            found.add(f"{_name(key)} position {position} does not follow from the one before")
        heads[key] = (position, head)
        if seals[0] is not None:
            found.batch_first = min(found.batch_first, seals[0])
            found.batch_last = max(found.batch_last, seals[0])
        found.checked += 1
        if found.checked % _TOLD_EVERY == 0:
            found.progress("audit chain", found.checked, total)
    owners = {(s, t, p): (position, head) for s, t, p, position, head in await connection.fetch(_sql.owner_heads)}
    for key in sorted(heads.keys() | owners.keys()):
        if heads.get(key, (0, b"")) != owners.get(key):
            found.add(f"{_name(key)} ends at another head than its owner row")


class _Stream:
    """Rows of a cursor whose first column is the batch, ascending."""

    def __init__(self, rows: AsyncIterator[Any]) -> None:
        self._rows = rows
        self._row: Any = None
        self.batch = -1

    async def forward(self) -> None:
        self._row = await anext(self._rows, None)
        self.batch = _LAST if self._row is None else self._row[0]

    async def take(self, batch: int) -> list[tuple[Any, ...]]:
        """The rows of the batch, without their first column."""
        rows: list[tuple[Any, ...]] = []
        while self.batch == batch:
            rows.append(self._row[1:])
            await self.forward()
        return rows


async def _seals(connection: Connection, first: int, found: Found, ledger: bool) -> None:
    queries = [_sql.seals, _sql.sealed_logs] + ([_sql.sealed_transactions, _sql.sealed_entries] if ledger else [])
    streams = [_Stream(aiter(connection.cursor(query, first, prefetch=_PREFETCH))) for query in queries]
    total = await connection.fetchval(_sql.count_entries, first) if ledger else 0
    done = told = 0
    for stream in streams:
        await stream.forward()
    while (batch := min(stream.batch for stream in streams)) < _LAST:
        seals, logs, *lines = [await stream.take(batch) for stream in streams]
        wrong = []
        if any(seal[1] != logs_digest(_plain_logs(logs)) for seal in seals) or (logs and not seals):
            wrong.append("audit_logs")
        if ledger:
            digest = ledger_digest(ledger_blocks(*lines))
            if any(seal[0] != digest for seal in seals) or (digest and not seals):
                wrong.append("transactions, entries")
            done += len(lines[1])
            if done - told >= _TOLD_EVERY:
                found.progress("sealed rows", done, total)
                told = done
        if wrong:
            places = ", ".join(f"{_name(seal[2:5])} position {seal[5]}" for seal in seals) or "no commit"
            found.add(f"batch {batch} ({places}): {'; '.join(wrong)} are not the rows that were sealed")


def _plain_logs(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """With JSON values where the database gives text: before and after."""
    loaded = []
    for row in rows:
        before, after = (value and orjson.loads(value) for value in row[7:9])
        loaded.append((*row[:7], before, after, *row[9:]))
    return loaded


def _name(key: Any) -> str:
    stage, topic, partition = key
    return f"{stage} {topic}[{partition}]"
