"""The second chapter of `make demo`: the customer withdraws, and the worker is killed with -9 between signature and sending.

The moment is held, not hoped for: the worker's node is behind a door (dev/gate.py) which is shut before the customer asks. What
is signed is stored and told by then; the node has not heard of it. Another worker sends the stored bytes, and no others.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from datetime import UTC, datetime
from typing import Any, Final

import aiohttp

from ledger.accounts import WORLD, custody
from ledger.book import post
from ledger.posting import Transaction, credit, debit
from ledger.rows import Connection
from stablerail.demo_story import AMOUNT, Hop, Story, StoryBroken, short
from stablerail.demo_view import Check
from stablerail.dev.gate import Gate
from stablerail.dev.stack import Stack
from stablerail.dev.usdc import Usdc
from topics.events import (
    Chain,
    Event,
    TransactionBroadcast,
    TransactionConfirmed,
    TransactionSigned,
    WithdrawalAccepted,
    WithdrawalRequested,
    WithdrawalSettled,
)
from topics.money import SCALE, format_amount

WITHDRAWN: Final = 10 * SCALE
HOT_WALLET: Final = 1_000 * SCALE
"""What the company puts into its hot wallet."""
GAS_MONEY_WEI: Final = 10**18


async def fund(stack: Stack, usdc: Usdc, connection: Connection) -> None:
    """Gas and USDC for the hot wallet, and the ledger's mirror of it."""
    await usdc.anvil.rpc("anvil_setBalance", stack.hot_wallet, hex(GAS_MONEY_WEI))
    await usdc.anvil.wait_mined(await usdc.transfer(stack.hot_wallet, HOT_WALLET))
    legs = (debit(custody(Chain.MATIC), HOT_WALLET), credit(WORLD, HOT_WALLET))
    transaction = Transaction(secrets.token_hex(16), "hot_wallet_funded", stack.hot_wallet, legs)
    await post(connection, "demo", [transaction], datetime.now(UTC))


def node_at(gate: Gate) -> dict[str, str]:
    """What puts the worker's node behind the door."""
    return {"STABLERAIL_RPC_URLS": json.dumps({Chain.MATIC.value: [gate.url]})}


class Withdrawing:
    """`run` comes after the story's own hops; `take` sees its events."""

    def __init__(self, story: Story, stack: Stack, usdc: Usdc, gate: Gate, api_key: str) -> None:
        self._story, self._stack, self._usdc, self._gate, self._api_key = story, stack, usdc, gate, api_key
        self.to = "0x" + secrets.token_hex(20)
        """An address outside."""
        self.withdrawal_id = ""
        self.tx_hash = ""
        self.hops = {
            "asked": Hop("POST /v1/withdrawals", "stablerail/api"),
            "withdrawals.requested": Hop("withdrawals.requested", "stablerail/api"),
            "withdrawals.accepted": Hop("withdrawals.accepted", "accept_withdrawals.py"),
            "transactions.signed": Hop("transactions.signed", "sign_transactions.py"),
            "killed": Hop("kill -9 the withdrawals worker", "stablerail/demo"),
            "again": Hop("the worker, started again", "stablerail/demo"),
            "transactions.broadcast": Hop("transactions.broadcast", "broadcast_transactions.py"),
            "transactions.confirmed": Hop("transactions.confirmed", "track_confirmations.py"),
            "withdrawals.settled": Hop("withdrawals.settled", "settle_withdrawals.py"),
            "paid": Hop("GET /v1/users/{id}/balances", "stablerail/api"),
        }

    async def run(self) -> None:
        self._gate.shut()
        asked = await self._ask()
        self.withdrawal_id = asked["id"]
        self._done("asked", time.time(), f"{format_amount(WITHDRAWN)} USDC to {short(self.to)}, 202: {asked['status']}")
        await self.hops["transactions.signed"].seen.wait()
        await self._gate.held.wait()
        worker = self._stack.children.pop("withdrawals")
        await asyncio.to_thread(worker.kill)
        if await self._usdc.anvil.rpc("eth_getTransactionByHash", self.tx_hash) is not None:
            raise StoryBroken(f"the node has {self.tx_hash} before it was sent")
        told = f"pid {worker.pid}; {short(self.tx_hash)} is signed and stored, the node has not heard of it"
        self._done("killed", time.time(), told)
        self._gate.open()
        self._stack.start(("withdrawals",), node_at(self._gate))
        await self._stack.wait_ready(("withdrawals",))
        self._done("again", time.time(), f"pid {self._stack.children['withdrawals'].pid}, ready")
        await self.hops["withdrawals.settled"].seen.wait()
        left = format_amount(AMOUNT - WITHDRAWN)
        await self._story.until_balance(lambda found: found["available"] == left)
        self._done("paid", time.time(), f"available {left}")

    async def _ask(self) -> dict[str, Any]:
        url = f"{self._stack.url('api')}/v1/withdrawals"
        headers = {"Authorization": f"Bearer {self._api_key}", "Idempotency-Key": secrets.token_hex(8)}
        body = {
            "user_id": self._story.user_id, "chain": Chain.MATIC.value, "asset": "USDC",
            "amount": format_amount(WITHDRAWN), "to": self.to,
        }  # fmt: skip
        async with aiohttp.ClientSession(headers=headers) as session, session.post(url, json=body) as answer:
            if answer.status != 202:
                raise StoryBroken(f"POST {url} answered {answer.status}: {await answer.text()}")
            found: dict[str, Any] = await answer.json()
            return found

    def _done(self, key: str, at: float, detail: str) -> None:
        self._story.done(key, at, detail)

    def take(self, event: Event, at: float) -> None:
        """A record of a topic, at its own time."""
        match event:
            case WithdrawalRequested(user_id=self._story.user_id):
                self._done("withdrawals.requested", at, "stored before the API answered")
            case WithdrawalAccepted(user_id=self._story.user_id):
                self._done("withdrawals.accepted", at, "debit pending_withdrawal, credit usdc_balance")
            case TransactionSigned() if isinstance(event, TransactionBroadcast):
                self._done("transactions.broadcast", at, f"nonce {event.nonce}  {short(event.tx_hash)}, the same bytes")
            case TransactionSigned():
                if self.tx_hash not in ("", event.tx_hash):
                    raise StoryBroken(f"a second transaction was signed: {event.tx_hash}")
                self.tx_hash = event.tx_hash
                self._done("transactions.signed", at, f"nonce {event.nonce}  {short(event.tx_hash)}")
            case TransactionConfirmed():
                if event.outcome != "confirmed":
                    raise StoryBroken(f"the payment {event.outcome}: {event.reason}")
                self._done("transactions.confirmed", at, f"block {event.block_number}, final")
            case WithdrawalSettled(user_id=self._story.user_id):
                if event.outcome != "completed":
                    raise StoryBroken(f"the withdrawal {event.outcome}: {event.code}")
                legs = "debit system_buffer_usdc, world_usdc; credit pending_withdrawal, custody_usdc[MATIC]"
                self._done("withdrawals.settled", at, legs)
            case _:
                pass

    async def checks(self) -> list[Check]:
        """That the chain says: paid, by one transfer, by one transaction."""
        anvil, hot = self._usdc.anvil, self._stack.hot_wallet
        ends = ["0x" + "0" * 24 + address[2:].lower() for address in (hot, self.to)]
        query = {"address": self._usdc.address, "fromBlock": "0x0", "topics": [None, *ends]}
        transfers = len(await anvil.rpc("eth_getLogs", query))
        transactions = int(await anvil.rpc("eth_getTransactionCount", hot, "latest"), 16)
        paid = await self._usdc.balance_of(self.to)
        return [
            Check("balanceOf(outside), by the chain", format_amount(paid), paid == WITHDRAWN),
            Check("transfers to it, by the chain's logs", str(transfers), transfers == 1),
            Check("transactions of the hot wallet", str(transactions), transactions == 1),
        ]
