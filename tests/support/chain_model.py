"""A chain in memory, as simple as one can be that mines, reorganises, drops and replaces; and nodes of it that lag, fail and
lose replies. They speak JSON-RPC's methods, so that what reads a real node reads these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from chain.errors import RpcRefused, RpcUnavailable
from chain.health import Health
from chain.logs import TRANSFER_TOPIC, topic_of
from chain.rpc import Block, Call
from chain.window import latest

TOKEN = "0x" + "c" * 40
BUMP_PERCENT = 10
"""What a node wants more for a transaction that replaces another."""


@dataclass(frozen=True)
class Tx:
    hash: str
    signer: str
    nonce: int
    to: str
    amount: int
    """0: it moves nothing (a cancel)."""
    fee: int


@dataclass(frozen=True)
class Mined:
    number: int
    hash: str
    parent: str
    txs: tuple[Tx, ...]


@dataclass
class Net:
    blacklist: frozenset[str] = frozenset()
    blocks: list[Mined] = field(default_factory=list)
    mempool: dict[tuple[str, int], Tx] = field(default_factory=dict)
    signed: dict[str, Tx] = field(default_factory=dict)
    """By hash: what exists at all; whether it was ever sent is another matter."""
    _made: int = 0

    def __post_init__(self) -> None:
        self.mine(0)

    @property
    def head(self) -> int:
        return len(self.blocks) - 1

    def count(self, signer: str, number: int) -> int:
        return sum(tx.signer == signer for block in self.blocks[: number + 1] for tx in block.txs)

    def receive(self, tx: Tx) -> str:
        """As a node takes a raw transaction: "" or why not."""
        if any(tx in block.txs for block in self.blocks):
            return "already known"
        if tx.nonce < self.count(tx.signer, self.head):
            return "nonce too low"
        other = self.mempool.get((tx.signer, tx.nonce))
        if other == tx:
            return "already known"
        if other is not None and tx.fee * 100 < other.fee * (100 + BUMP_PERCENT):
            return "replacement transaction underpriced"
        self.mempool[tx.signer, tx.nonce] = tx
        return ""

    def mine(self, room: int) -> None:
        """One block with at most so many transactions of the mempool."""
        txs: list[Tx] = []
        counts = {signer: self.count(signer, self.head) for signer, _ in self.mempool} if self.blocks else {}
        for (signer, nonce), tx in sorted(self.mempool.items()):
            if nonce == counts[signer] and len(txs) < room:
                counts[signer] += 1
                txs.append(tx)
        self._append(txs)

    def _append(self, txs: Sequence[Tx]) -> None:
        self._made += 1
        parent = self.blocks[-1].hash if self.blocks else "0x" + "0" * 64
        self.blocks.append(Mined(len(self.blocks), f"0x{self._made:064x}", parent, tuple(txs)))
        for tx in txs:
            self.mempool.pop((tx.signer, tx.nonce), None)

    def reorganise(self, depth: int, then: str) -> None:
        """The last blocks are replaced by as many empty ones and one more. Their transactions: "back" in the mempool, where
        there is none of the nonce; "gone", nobody has them any more; "other", another one of the nonce is mined in their
        place, if any was ever signed."""
        dropped = [tx for block in self.blocks[len(self.blocks) - depth :] for tx in block.txs]
        del self.blocks[len(self.blocks) - depth :]
        others = {(tx.signer, tx.nonce): tx for tx in self.signed.values() if tx not in dropped}
        for tx in dropped:
            other = others.get((tx.signer, tx.nonce))
            if then == "back":
                self.mempool.setdefault((tx.signer, tx.nonce), tx)
            elif then == "other" and other is not None:
                self.mempool[tx.signer, tx.nonce] = other
        for number in range(depth + 1):
            self._append(()) if number or then != "other" else self.mine(len(dropped))

    def paid(self, to: str) -> int:
        """How many payments the address got, by the chain as it is now."""
        return sum(tx.to == to and self.succeeds(tx) for block in self.blocks for tx in block.txs if tx.amount)

    def succeeds(self, tx: Tx) -> bool:
        return tx.to not in self.blacklist


@dataclass(eq=False)
class Node:
    """An endpoint. `lag`: how many of the newest blocks it has not seen."""

    net: Net
    endpoint: str
    lag: int = 0
    down: bool = False
    health: Health = field(default_factory=Health)

    async def head_of_chain(self) -> Block:
        (block,) = await self.ask([latest()])
        return block

    async def verify_chain_id(self) -> None:
        if self.down:
            raise RpcUnavailable(self.endpoint, "down")

    async def ask(self, calls: Sequence[Call]) -> list[Any]:
        if self.down:
            raise RpcUnavailable(self.endpoint, "down")
        return [call.read(getattr(self, call.method)(*call.params)) for call in calls]

    @property
    def head(self) -> int:
        return max(0, self.net.head - self.lag)

    def _block(self, tag: str) -> Mined | None:
        number = self.head if tag == "latest" else int(tag, 16)
        return self.net.blocks[number] if number <= self.head else None

    def eth_getBlockByNumber(self, tag: str, _whole: bool) -> Any:  # noqa: N802
        block = self._block(tag)
        return block and {
            "number": hex(block.number),
            "hash": block.hash,
            "parentHash": block.parent,
            "timestamp": "0x1",
            "transactions": [tx.hash for tx in block.txs],
        }

    def eth_getBlockReceipts(self, tag: str) -> Any:  # noqa: N802
        block = self._block(tag)
        return block and [self._receipt(block, tx) for tx in block.txs]

    def eth_getTransactionReceipt(self, tx_hash: str) -> Any:  # noqa: N802
        for block in self.net.blocks[: self.head + 1]:
            for tx in block.txs:
                if tx.hash == tx_hash:
                    return self._receipt(block, tx)
        return None

    def eth_getTransactionCount(self, signer: str, tag: str) -> Any:  # noqa: N802
        return hex(self.net.count(signer, self.head if tag == "latest" else int(tag, 16)))

    def eth_getTransactionByHash(self, tx_hash: str) -> Any:  # noqa: N802
        if (
            self.eth_getTransactionReceipt(tx_hash) is None
            and self.net.signed[tx_hash] not in self.net.mempool.values()
        ):
            return None
        tx = self.net.signed[tx_hash]
        return {"from": tx.signer, "to": TOKEN, "input": "0x", "gas": "0x1"}

    def eth_call(self, _call: Any, _tag: str) -> Any:
        raise RpcRefused(self.endpoint, "eth_call", 3, "execution reverted: Blacklistable: account is blacklisted")

    def _receipt(self, block: Mined, tx: Tx) -> Any:
        place = {"transactionHash": tx.hash, "blockHash": block.hash, "blockNumber": hex(block.number)}
        succeeded = self.net.succeeds(tx)
        log = {
            **place, "address": TOKEN, "logIndex": "0x0", "data": f"0x{tx.amount:064x}",
            "topics": [TRANSFER_TOPIC, topic_of(tx.signer), topic_of(tx.to)],
        }  # fmt: skip
        return {**place, "status": hex(succeeded), "logs": [log] if succeeded and tx.amount else []}
