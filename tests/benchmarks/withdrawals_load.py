"""Withdrawals that wait for a signature, a chain that keeps what it is sent, and a hot wallet with enough of everything."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import asyncpg

from chain.signer import KeySigner
from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import fetch
from stablerail.dev.keystore import write_keystore
from stablerail.dev.usdc import Usdc, deploy
from tests.benchmarks.parts import SCHEMA
from topics.envelope import headers_of, value_of
from topics.events import Chain, Rail, WithdrawalAccepted

CHAIN = Chain.MATIC
AMOUNT = 1_000_000
PASSWORD = "benchmark"
INSERT = f"""
INSERT INTO {SCHEMA}.withdrawals (id, user_id, idempotency_key, fingerprint, rail, chain, asset, amount, recipient, status,
    hold_id, requested_at, updated_at, version)
SELECT x.id, 'user', x.id::text, x.id, 'chain', '{CHAIN.value}', 'USDC', {AMOUNT}, x.recipient, 'signing', x.id, x.at, x.at, 1
FROM unnest($1::uuid[], $2::text[], $3::timestamptz[]) AS x(id, recipient, at)
"""


class Waiting(NamedTuple):
    """An accepted withdrawal and its event."""

    id: str
    to: str
    value: bytes
    headers: list[tuple[str, bytes]]


@dataclass(frozen=True)
class Field:
    anvil: Anvil
    usdc: Usdc
    signer: KeySigner
    keystore: Path

    async def pending_nonce(self) -> int:
        return int(await self.anvil.rpc("eth_getTransactionCount", self.signer.address, "pending"), 16)


@asynccontextmanager
async def field(directory: Path, payments: int) -> AsyncIterator[Field]:
    """A chain of its own that makes no blocks, so that the pool is all that is measured."""
    name = secrets.token_hex(4)
    key = secrets.token_bytes(32)
    keystore = directory / f"{name}.json"
    write_keystore(keystore, PASSWORD, key)
    with Anvil(directory / f"anvil-{name}", fetch()) as anvil:
        usdc = await deploy(anvil, fetch().contracts)
        signer = KeySigner(key)
        await usdc.transfer(signer.address, AMOUNT * payments)
        await anvil.rpc("anvil_setBalance", signer.address, hex(10**24))
        await anvil.mine(2)
        await anvil.rpc("evm_setAutomine", False)
        yield Field(anvil, usdc, signer, keystore)


def waiting(number: int) -> list[Waiting]:
    made = []
    now = datetime.now(UTC)
    for _ in range(number):
        id, to = uuid.uuid4().hex, "0x" + secrets.token_hex(20)
        event = WithdrawalAccepted(
            withdrawal_id=id, user_id="user", rail=Rail.CHAIN, chain=CHAIN, asset="USDC", amount=AMOUNT, to=to
        )
        headers = headers_of(event.ce_type(), event_id=id, source="benchmark", time=now)
        made.append(Waiting(id, to, value_of(event), [(name, value or b"") for name, value in headers]))
    return made


async def insert(connection: asyncpg.Connection, withdrawals: Sequence[Waiting]) -> None:
    start = datetime.now(UTC)
    times = [start + timedelta(microseconds=number) for number in range(len(withdrawals))]
    await connection.execute(INSERT, [one.id for one in withdrawals], [one.to for one in withdrawals], times)
