"""Baseline of withdrawals.send: the bare durable way to send. Nothing is decided, locked but the nonce, told or journaled.

one transaction: take nonces, sign, store nonce, hash and bytes -> JSON-RPC batches -> one transaction: mark
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from chain.signer import KeySigner
from chain.transactions import Signed, digest, signed, transfer_data, unsigned_call
from ledger.rows import Connection

TABLES = """
CREATE SCHEMA bare;
CREATE TABLE bare.lanes (signer text PRIMARY KEY, next_nonce bigint NOT NULL);
CREATE TABLE bare.attempts (
    signer text, nonce bigint, withdrawal_id uuid NOT NULL, tx_hash text NOT NULL, raw bytea NOT NULL,
    status text NOT NULL, PRIMARY KEY (signer, nonce)
) WITH (fillfactor = 70);
"""
TAKE = "UPDATE bare.lanes SET next_nonce = next_nonce + $2 WHERE signer = $1 RETURNING next_nonce - $2"
STORE = """
INSERT INTO bare.attempts
SELECT $1, unnest($2::bigint[]), unnest($3::uuid[]), unnest($4::text[]), unnest($5::bytea[]), 'signed'
"""
MARK = "UPDATE bare.attempts SET status = 'broadcast' WHERE signer = $1 AND nonce = ANY ($2::bigint[])"


async def store(
    connection: Connection, signer: KeySigner, token: str, chain_id: int, batch: Sequence[tuple[str, str, int]]
) -> tuple[int, list[bytes]]:
    """`batch`: (withdrawal id, recipient, amount) of each. The first nonce, and the bytes to send."""
    async with connection.transaction():
        first: int = await connection.fetchval(TAKE, signer.address, len(batch))
        made: list[Signed] = []
        for n, (_, to, amount) in enumerate(batch):
            fields = unsigned_call(
                chain_id=chain_id, nonce=first + n, priority_fee=25 * 10**9, max_fee=100 * 10**9, gas_limit=100_000,
                to=token, data=transfer_data(to, amount),
            )  # fmt: skip
            made.append(signed(fields, signer.sign(digest(fields))))
        await connection.execute(
            STORE,
            *(signer.address, list(range(first, first + len(batch))), [id for id, _, _ in batch]),
            *([one.tx_hash for one in made], [one.raw for one in made]),
        )
    return first, [one.raw for one in made]


async def send(http: Any, url: str, raws: Sequence[bytes], per_request: int) -> None:
    for start in range(0, len(raws), per_request):
        calls = [
            {"jsonrpc": "2.0", "id": n, "method": "eth_sendRawTransaction", "params": ["0x" + raw.hex()]}
            for n, raw in enumerate(raws[start : start + per_request])
        ]
        headers = {"content-type": "application/json"}
        async with http.post(url, data=orjson.dumps(calls), headers=headers) as response:
            answers = orjson.loads(await response.read())
        assert len(answers) == len(calls)
        assert all("result" in answer for answer in answers), answers


async def mark(connection: Connection, signer: KeySigner, first: int, count: int) -> None:
    await connection.execute(MARK, signer.address, list(range(first, first + count)))
