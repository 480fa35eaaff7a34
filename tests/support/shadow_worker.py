"""`python -m tests.support.shadow_worker JSON`: posts its share of the movements beside a legacy table, to be killed at any moment.

Movement k is of a customer and an amount that k alone decides, and so is its id: who begins again posts nothing twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from datetime import UTC, datetime
from typing import Any

from ledger import book
from ledger.accounts import buffer, fiat_buffer, fiat_exposure, spendable
from ledger.commit import TRANSIENT
from ledger.posting import Transaction, credit, debit
from ledger.shadow import Mirror
from ledger.store import Posted
from tests.integration.test_shadow import legacy_of, product_of

MOVEMENTS = 20_000
CUSTOMERS = 200
CHUNK = 20
CREDITED, DEALT = 5_000_003, 2_000_001


def customer(k: int) -> str:
    return f"user-{k // 2 % CUSTOMERS:03d}"


def movement(k: int) -> Transaction:
    """Of two that follow each other the first gives, the second takes less to the broker: none is refused."""
    id, user = hashlib.blake2b(str(k).encode(), digest_size=16).hexdigest(), customer(k)
    if k % 2 == 0:
        return Transaction(id, "credit", f"{k}", (debit(spendable(user), CREDITED), credit(buffer(), CREDITED)))
    legs = (
        debit(buffer(), DEALT), credit(spendable(user), DEALT),
        debit(fiat_exposure(user), DEALT), credit(fiat_buffer(), DEALT),
    )  # fmt: skip
    return Transaction(id, "moved_to_broker", f"{k}", legs)


async def main(given: dict[str, Any]) -> None:
    connection = await product_of(given["dsn"], Mirror(legacy_of()))
    for start in range(given["number"] * CHUNK, MOVEMENTS, given["workers"] * CHUNK):
        if start < given["done"]:
            continue
        while True:
            try:
                batch = await book.post(
                    connection, f"w{given['number']}", [movement(k) for k in range(start, start + CHUNK)],
                    datetime.now(UTC),
                )  # fmt: skip
                break
            except TRANSIENT:
                await asyncio.sleep(0.01)
        assert all(isinstance(one, Posted) for one in batch.results), batch.results
        print(start, flush=True)
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
