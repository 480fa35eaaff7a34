"""Millions of entries, made with COPY as a writer would have made them: rounds in which each user gets one transfer from the hot
account, a thousand transfers to a time, a time every second; versions without gaps, balances right, ids random.

The indexes are there from the beginning and grow with the rows, five minutes more for five million and their deposits: made afterwards their pages are
nine tenths full, and nearly each would split within the next half million random ids. Those of an index that grew split one by one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Final

from ledger.accounts import Account
from ledger.rows import Connection
from tests.benchmarks.ledger_load import BATCH, HOT, START, copy, users
from tests.benchmarks.parts import SCHEMA

AMOUNT: Final = 25_000_000
ENTRY_COLUMNS: Final = (
    "account_id", "version", "transaction_id", "seq", "direction", "amount", "balance_after", "at",
)  # fmt: skip
TRANSACTION_COLUMNS: Final = ("id", "kind", "reference", "fingerprint", "at")
BALANCES: Final = f"""UPDATE accounts a SET version = e.version, balance = e.balance_after, updated_at = e.at
FROM (SELECT DISTINCT ON (account_id) account_id, version, balance_after, at FROM {SCHEMA}.entries
    ORDER BY account_id, version DESC) e WHERE a.id = e.account_id"""


async def fill(connection: Connection, count: int, transfers: int) -> None:
    """Into a database with accounts at zero and nothing else."""
    names = users(count)
    for first in range(0, transfers, BATCH):
        numbers = range(first, min(first + BATCH, transfers))
        at = (START + timedelta(seconds=first // BATCH)).isoformat()
        random = os.urandom(48 * len(numbers)).hex()
        ids = [random[place : place + 96] for place in range(0, len(random), 96)]
        await copy(connection, "entries", ENTRY_COLUMNS, "".join(_entries(names, numbers, ids, at)))
        lines = [f"{id[:32]}\tdeposit\t{id[32:64]}\t{id[64:]}\t{at}\n" for id in ids]
        await copy(connection, "transactions", TRANSACTION_COLUMNS, "".join(lines))
    await connection.execute(BALANCES)
    await connection.execute("VACUUM ANALYZE")


def _entries(names: Sequence[Account], numbers: range, ids: Sequence[str], at: str) -> Iterator[str]:
    hot = HOT.id
    for number, id in zip(numbers, ids, strict=True):
        turn, user = divmod(number, len(names))
        yield (
            f"{names[user].id}\t{turn + 1}\t{id[:32]}\t0\td\t{AMOUNT}\t{AMOUNT * (turn + 1)}\t{at}\n"
            f"{hot}\t{number + 1}\t{id[:32]}\t1\tc\t{AMOUNT}\t{-AMOUNT * (number + 1)}\t{at}\n"
        )
