"""Baseline `lab`: the plain loop as it was first measured (what the order names): batches of 500, a text key beside the id of
a transaction, two unique keys of an entry, one send for each message. `plain_loop` is the same made as fast as it goes.
"""

from __future__ import annotations

import asyncio

import uvloop

from tests.benchmarks.baselines.plain_loop import SCHEMA, WRITE, Plain, main


class Lab(Plain):
    schema = SCHEMA.replace(
        "id uuid PRIMARY KEY, kind text NOT NULL, at",
        "id uuid PRIMARY KEY, idempotency_key text NOT NULL UNIQUE, kind text NOT NULL, at",
    ).replace("PRIMARY KEY (account_id, version)", "PRIMARY KEY (transaction_id, seq), UNIQUE (account_id, version)")
    write = WRITE.replace(
        "transactions (id, kind) SELECT x, 'deposit'",
        "transactions (id, idempotency_key, kind) SELECT x, 'deposit:' || x, 'deposit'",
    )
    batch_events = 500

    async def _publish(self, _partitions: list[int], messages: list[tuple[bytes, bytes]]) -> None:
        await asyncio.gather(*[await self._producer.send(self._topic, key=key, value=value) for key, value in messages])


assert Lab.schema != Plain.schema
assert Lab.write != Plain.write

if __name__ == "__main__":
    uvloop.run(main(Lab))
