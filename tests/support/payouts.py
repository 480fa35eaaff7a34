"""Withdrawals that are signed and sent by hand, on a real PostgreSQL and a real chain, and the stages after that in the test's
own process, without Kafka: a head is told by `head`, and what the stages emit is handed on at once.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
from eth_utils import keccak

from agents.item import read_item
from agents.outcome import Stage
from agents.stage import settle
from agents.withdrawals import settle_withdrawals, track_confirmations
from agents.withdrawals.look import ChainWriter
from agents.withdrawals.withdrawal import (
    Attempt,
    Lane,
    Status,
    Withdrawal,
    attempt_row,
    held,
    lane_row,
    rows_of,
    transaction_ids,
    withdrawal_id,
)
from chain.rpc import Rpc
from ledger.accounts import buffer, pending_withdrawal, spendable
from ledger.commit import claim_owners, lock_writer, seal
from ledger.posting import Transaction, credit, debit
from ledger.record import Message
from ledger.rows import Changes, Connection
from ledger.store import blocks_of, lock
from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools
from stablerail.dev.usdc import Usdc, calldata, deploy
from tests.support.ledger_rig import AT, balance
from tests.support.rpc_stub import LyingEndpoint
from topics.catalog import TRANSACTIONS_CONFIRMED, TRANSACTIONS_SIGNED, WITHDRAWALS_SETTLED
from topics.envelope import headers_of, value_of
from topics.events import HeadSeen

CHAIN = "MATIC"
DEPTH = 6
GAS = 100_000
FEE_WEI = 100 * 10**9


async def store(
    connection: Connection, changes: Changes, transactions: Sequence[Transaction] = (), at: datetime = AT
) -> None:
    """One commit, as a writer of ours makes it."""
    async with connection.transaction():
        owners = await lock_writer(connection, "test")
        fold = await lock(connection, transactions, at)
        for transaction in transactions:
            fold.post(transaction)
        blocks = [*blocks_of(fold, owners[0].batch), *changes.blocks()]
        await seal(connection, "test", owners, blocks=blocks, messages=[], at=fold.at, actor="test", summary={})


def asked(user: str, amount: int, to: str, key: str = "k", status: Status = Status.BROADCASTING) -> Withdrawal:
    """A withdrawal as it is once it was signed."""
    id = withdrawal_id(user, key)
    hold = transaction_ids(id)[0]
    return Withdrawal(
        id, user, key, "0" * 32, "chain", CHAIN, "USDC", amount, to, status.value, None, hold, AT, AT, None, 1
    )


async def open_withdrawal(connection: Connection, withdrawal: Withdrawal, *rows: Any) -> None:
    """Its customer is given the amount, which is held; `rows` are stored with it."""
    fund = Transaction(
        secrets.token_hex(16), "test", "", (debit(spendable(withdrawal.user_id), withdrawal.amount),
        credit(buffer(), withdrawal.amount)),
    )  # fmt: skip
    changes = Changes()
    row, line = rows_of(withdrawal, "test")
    changes.upsert(*row)
    changes.insert(*line)
    for other in rows:
        changes.upsert(*other)
    await store(connection, changes, [fund])
    await store(connection, Changes(), [held(withdrawal)])


@dataclass
class Payouts:
    connection: Connection
    anvil: Anvil
    usdc: Usdc
    signer: str
    """Our hot wallet; the node has its key."""
    rpc: Rpc
    liar: Rpc
    """A second endpoint, that can be made to lie."""
    endpoint: LyingEndpoint
    track: Stage[Any]
    settle: Stage[Any]
    now: datetime = AT
    told: list[Message] = field(default_factory=list)
    """Every message of the stages, in order."""
    next_nonce: int = 0
    _offsets: Any = field(default_factory=count)
    _epochs: dict[str, dict[tuple[str, int], int]] = field(default_factory=dict)

    # -- before the stages ---------------------------------------------------------------------------------------------

    async def sign(self, withdrawal: Withdrawal, *, nonce: int | None = None, n: int = 1, to: str = "") -> Attempt:
        """Stored, not sent. The first of its nonce with the withdrawal's rows."""
        first = nonce is None
        nonce = self.next_nonce if nonce is None else nonce
        self.next_nonce = max(self.next_nonce, nonce + 1)
        fee = FEE_WEI * 9 ** (n - 1) // 8 ** (n - 1)
        raw = bytes.fromhex(
            (
                await self.anvil.rpc(
                    "eth_signTransaction",
                    {
                        "from": self.signer,
                        "to": self.usdc.address,
                        "data": calldata("transfer(address,uint256)", to or withdrawal.recipient, withdrawal.amount),
                        "gas": hex(GAS),
                        "maxFeePerGas": hex(fee),
                        "maxPriorityFeePerGas": hex(fee),
                        "nonce": hex(nonce),
                        "chainId": hex(self.anvil.chain_id),
                        "type": "0x2",
                    },
                )
            ).removeprefix("0x")
        )
        attempt = Attempt(
            CHAIN, "0x" + keccak(raw).hex(), self.signer, nonce, n, "payment", withdrawal.id, raw, GAS, fee, fee,
            "broadcast", None, None, None, self.now, self.now, self.now, 1,
        )  # fmt: skip
        lane = lane_row(Lane(CHAIN, self.signer, self.next_nonce, 0, "open", "", self.next_nonce, self.now))
        if first:
            await open_withdrawal(self.connection, withdrawal, attempt_row(attempt), lane)
        else:
            changes = Changes()
            changes.upsert(*attempt_row(attempt))
            await store(self.connection, changes)
        return attempt

    async def send(self, attempt: Attempt) -> None:
        await self.anvil.rpc("eth_sendRawTransaction", "0x" + attempt.raw.hex())

    async def sent(self, amount: int = 25_000_000, to: str = "") -> tuple[Withdrawal, Attempt]:
        """A withdrawal of a new customer whose transaction is in the mempool, or mined where each has its block."""
        withdrawal = asked(f"user-{secrets.token_hex(4)}", amount, to or "0x" + secrets.token_hex(20))
        attempt = await self.sign(withdrawal)
        await self.send(attempt)
        return withdrawal, attempt

    # -- the stages ------------------------------------------------------------------------------------------------------

    async def head(self, blocks: int = 0) -> list[Message]:
        """Mines so many blocks one by one, tells each head (or the one there is), and hands on what follows; the messages."""
        before = len(self.told)
        for _ in range(max(blocks, 1)):
            if blocks:
                await self.anvil.mine(1)
            found = await self.rpc.head()
            event = HeadSeen(
                chain=CHAIN, chain_id=self.anvil.chain_id, number=found.number, block_hash=found.hash,
                timestamp_s=found.timestamp_s,
            )  # fmt: skip
            for message in await self.run(self.track, event, secrets.token_hex(8)):
                if message.topic == TRANSACTIONS_CONFIRMED.name:
                    await self.run_raw(self.settle, message)
        return self.told[before:]

    async def send_again(self) -> int:
        """What broadcast_transactions does with what was told for it; how many."""
        again = [m for m in self.told if m.topic == TRANSACTIONS_SIGNED.name]
        self.told = [m for m in self.told if m.topic != TRANSACTIONS_SIGNED.name]
        for message in again:
            (raw,) = await self.connection.fetchrow(
                "SELECT raw FROM attempts WHERE tx_hash = $1", message.id.partition(":")[0]
            )
            await self.anvil.rpc("eth_sendRawTransaction", "0x" + raw.hex())
        return len(again)

    async def run(self, stage: Stage[Any], event: Any, id: str) -> list[Message]:
        return await self.run_raw(stage, Message(stage.source.name, b"k", value_of(event), id, event.ce_type()))

    async def run_raw(self, stage: Stage[Any], message: Message) -> list[Message]:
        """Settles one event; what the stage emits."""
        key = (stage.source.name, 0)
        if stage.name not in self._epochs:
            async with self.connection.transaction():
                self._epochs[stage.name], _ = await claim_owners(self.connection, stage.name, [key], self.now)
        record = SimpleNamespace(
            topic=key[0], partition=0, offset=next(self._offsets), timestamp=0, key=message.key, value=message.value,
            headers=headers_of(message.type, event_id=message.id, source="test", time=self.now),
        )  # fmt: skip
        item = read_item(stage, record)  # type: ignore[arg-type]
        assert item.received is not None
        prepared = await stage.prepare([item.received])
        done = await settle(self.connection, stage, [item], self._epochs[stage.name], self.now, prepared)
        messages = list(done.sealed.messages) if done.sealed is not None else []
        self.told += messages
        return messages

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    # -- what became of it -----------------------------------------------------------------------------------------------

    async def status(self, withdrawal: Withdrawal) -> tuple[str, str | None]:
        row = await self.connection.fetchrow("SELECT status, code FROM withdrawals WHERE id = $1", withdrawal.id)
        return row["status"], row["code"]

    async def attempt_status(self, attempt: Attempt) -> str:
        found: str = await self.connection.fetchval("SELECT status FROM attempts WHERE tx_hash = $1", attempt.tx_hash)
        return found

    async def paid_on_chain(self, withdrawal: Withdrawal) -> int:
        """What the recipient got, by the chain's own Transfer logs."""
        head = (await self.rpc.head()).number
        logs = await self.rpc.logs(self.usdc.address.lower(), {withdrawal.recipient}, 0, head)
        return sum(log.amount for log in logs if log.sender == self.signer)

    async def balances(self, withdrawal: Withdrawal) -> tuple[int, int]:
        """(spendable, held) of its customer."""
        accounts = spendable(withdrawal.user_id), pending_withdrawal(withdrawal.user_id)
        return (await balance(self.connection, accounts[0]) or 0, await balance(self.connection, accounts[1]) or 0)

    def settled(self) -> list[tuple[str, str | None]]:
        """(outcome, code) of every withdrawals.settled."""
        ends = [orjson.loads(m.value) for m in self.told if m.topic == WITHDRAWALS_SETTLED.name]
        return [(end["outcome"], end.get("code")) for end in ends]


@asynccontextmanager
async def payouts(connection: Connection, connect: Any, directory: Path, tools: Tools) -> AsyncIterator[Payouts]:
    """On a chain of its own that mines a block per transaction, and when it is told to."""
    with Anvil(directory, tools) as anvil:
        usdc = await deploy(anvil, tools.contracts)
        signer = (await anvil.rpc("eth_accounts"))[5].lower()
        await usdc.transfer(signer, 1_000_000_000_000)
        async with (
            LyingEndpoint(anvil.rpc_url) as endpoint,
            Rpc(anvil.rpc_url, anvil.chain_id) as rpc,
            Rpc(endpoint.url, anvil.chain_id) as liar,
        ):
            writer = ChainWriter((rpc, liar), usdc.address.lower(), DEPTH)
            made: Payouts
            opened: list[Connection] = []

            async def open_one() -> Connection:
                opened.append(await connect())
                return opened[-1]

            track = track_confirmations.stage({CHAIN: writer}, open_one, lambda: made.now)
            made = Payouts(connection, anvil, usdc, signer, rpc, liar, endpoint, track, settle_withdrawals.stage(1))
            try:
                yield made
            finally:
                for one in opened:
                    await one.close()
