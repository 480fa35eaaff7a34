"""What the hash chain says about the append-only rows: one hash per commit over its ledger rows, one over its logs.

The writer makes it from the columns it is about to write, `verify` from the tables, with the same functions. What they hash
must never change: rows that are there for ever have to give the same hash (a test holds an example).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import orjson

from ledger.rows import Block, Op, Row, block
from ledger.tables import AUDIT_LOGS, ENTRIES, TRANSACTIONS

_LEDGER: Final = (TRANSACTIONS.name, ENTRIES.name)


def ledger_blocks(transactions: Sequence[Row], entries: Sequence[Row]) -> Iterator[Block]:
    """A commit's ledger rows as they are written and hashed: transactions by id, entries by account and version.

    That order is also the one in which an index takes them best.
    """
    if transactions:
        yield transactions_block(transactions)
    if entries:
        yield entries_block(entries)


def transactions_block(rows: Iterable[Row]) -> Block:
    """Their part of it."""
    return block(TRANSACTIONS, Op.INSERT, sorted(rows))


def entries_block(rows: Iterable[Row]) -> Block:
    """Their part of it."""
    return block(ENTRIES, Op.INSERT, sorted(rows))


def ledger_digest(blocks: Iterable[Block]) -> bytes | None:
    """SHA-256 over what `ledger_blocks` made, found among a commit's blocks; None where there is nothing of it."""
    parts = [text for b in blocks if b.table.name in _LEDGER for text in (b.table.name, *b.columns)]
    return hashlib.sha256("\0".join(parts).encode()).digest() if parts else None


def logs_digest(rows: Sequence[Row]) -> bytes | None:
    """SHA-256 over rows of `audit_logs` in order of `n`; None without any."""
    if not rows:
        return None
    at = [name for name, _ in AUDIT_LOGS.columns].index("at")
    plain = [[*row[:at], row[at].isoformat(), *row[at + 1 :]] for row in rows]
    return hashlib.sha256(orjson.dumps(plain, option=orjson.OPT_SORT_KEYS)).digest()
