"""An EVM chain -> inbound transactions: one per USDC log to a wallet of ours, CONFIRMED when seen, COMPLETE when deep.

A reorganisation is noticed by the hashes of the heads seen before; reading then goes back to the last one that still
holds. A transaction mined again keeps its record and gets its new block; one that vanished stays CONFIRMED for ever.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable

import structlog

from connectors.circle.sandbox.config import SandboxConfig
from connectors.circle.sandbox.rpc import Block, Rpc, RpcError, TransferLog
from connectors.circle.sandbox.state import State, Transaction
from connectors.circle.sandbox.tokens import usdc_token_id
from topics.money import format_amount

HEADS_KEPT = 512  # deeper reorganisations are not simulated
BLOCKS_PER_READ = 2_000

log = structlog.get_logger()


def decimal(amount: int) -> str:
    """25_000_000 -> "25", 10_000 -> "0.01": as Circle writes amounts."""
    return format_amount(amount).rstrip("0").rstrip(".")


class ChainWatch:
    """Watches one chain until cancelled. `announce` is told of every new state of an inbound transaction."""

    def __init__(self, config: SandboxConfig, rpc: Rpc, state: State, announce: Callable[[Transaction], None]) -> None:
        self._config = config
        self._rpc = rpc
        self._state = state
        self._announce = announce
        self._heads: deque[Block] = deque(maxlen=HEADS_KEPT)
        self._known: dict[tuple[str, int], str] = {}
        """(tx hash, place among the transaction's transfers) -> our transaction: holds across a reorganisation."""
        self._waiting: dict[str, None] = {}
        """Ids of transactions that are not COMPLETE, in order."""

    async def run(self) -> None:
        while True:
            try:
                await self.poll()
            except RpcError as error:
                await log.awarning("sandbox_chain_unreachable", reason=str(error))
            await asyncio.sleep(self._config.poll_s)

    async def poll(self) -> None:
        """Reads what is new, then completes what is deep enough."""
        head = await self._rpc.block("latest")
        if head is None:
            raise RpcError("no latest block")
        if not self._heads:
            self._heads.append(head)  # wallets are younger than the sandbox: nothing before can concern them
            return
        await self._rewind()
        while (first := self._heads[-1].number + 1) <= head.number:
            last = min(head.number, first + BLOCKS_PER_READ - 1)
            block = head if last == head.number else await self._rpc.block(last)
            if block is None:
                return  # the chain became shorter meanwhile; the next poll sees it
            self._take(await self._rpc.transfers(first, last))
            self._heads.append(block)
        await self._complete(head)

    async def _rewind(self) -> None:
        while len(self._heads) > 1 and await self._rpc.block(self._heads[-1].number) != self._heads[-1]:
            self._heads.pop()

    def _take(self, transfers: list[TransferLog]) -> None:
        places: Counter[str] = Counter()
        for transfer in transfers:
            place = places[transfer.tx_hash]
            places[transfer.tx_hash] += 1
            wallet = self._state.wallet_at(self._config.evm_blockchain, transfer.to)
            if wallet is None:
                continue
            block = {"block_hash": transfer.block.hash, "block_height": transfer.block.number}
            known = self._known.get((transfer.tx_hash, place))
            if known is not None:
                self._state.change(known, **block)
                continue
            transaction = Transaction(
                state="CONFIRMED",
                blockchain=wallet.blockchain,
                wallet_id=wallet.id,
                token_id=usdc_token_id(wallet.blockchain),
                amounts=[decimal(transfer.amount)],
                source_address=transfer.sender,
                destination_address=wallet.address,
                tx_hash=transfer.tx_hash,
                block_hash=transfer.block.hash,
                block_height=transfer.block.number,
            )
            self._known[transfer.tx_hash, place] = transaction.id
            self._state.transactions[transaction.id] = transaction
            self._waiting[transaction.id] = None
            self._announce(transaction)

    async def _complete(self, head: Block) -> None:
        deep = head.number - self._config.confirmations + 1
        canonical: dict[int, Block | None] = {}
        for transaction_id in list(self._waiting):
            transaction = self._state.transactions[transaction_id]
            height = transaction.block_height
            assert height is not None
            if height > deep:
                continue
            if height not in canonical:
                canonical[height] = await self._rpc.block(height)
            if canonical[height] == Block(height, str(transaction.block_hash)):
                del self._waiting[transaction_id]
                self._announce(self._state.change(transaction_id, state="COMPLETE"))
