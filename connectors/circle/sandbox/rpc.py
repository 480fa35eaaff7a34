"""Plain JSON-RPC over HTTP: what the sandbox asks an EVM chain, and the transfers that it makes there (on an anvil)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import aiohttp
import orjson
from eth_utils.crypto import keccak

TRANSFER_TOPIC: Final = "0x" + keccak(text="Transfer(address,address,uint256)").hex()
_TRANSFER: Final = "0x" + keccak(text="transfer(address,uint256)")[:4].hex()
_GAS: Final = 150_000
_GAS_MONEY_WEI: Final = 10**18
_FEES: Final = {"maxFeePerGas": hex(5_000 * 10**9), "maxPriorityFeePerGas": hex(2 * 10**9)}
"""So dear that no base fee throws it out of the anvil's pool: Circle speeds up what it has sent, and this sends once."""
_BEHIND_S: Final = 2.0
"""For so long at most the anvil's count of a sender's transactions lacks one that it took. Later it is right again, whatever a
reorganisation left of them."""
_BALANCE_OF: Final = "0x" + keccak(text="balanceOf(address)")[:4].hex()

T = TypeVar("T")


class RpcError(Exception):
    """The node did not answer as it should."""


@dataclass(frozen=True)
class Block:
    number: int
    hash: str


@dataclass(frozen=True)
class TransferLog:
    tx_hash: str
    block: Block
    index: int
    sender: str
    to: str
    amount: int
    """Base units."""


class Rpc:
    """One node. Every method raises RpcError, and nothing else, when the node cannot be asked."""

    def __init__(self, url: str, usdc_address: str, timeout_s: float = 10.0) -> None:
        self._url = url
        self._usdc = usdc_address.lower()
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s))
        self._sending = asyncio.Lock()
        self._next_nonces: dict[str, tuple[int, float]] = {}
        """By sender: the nonce after the one that was sent last, and when."""

    async def close(self) -> None:
        await self._session.close()

    async def block(self, number: int | str) -> Block | None:
        """The canonical block of that number, or `latest`."""
        tag = hex(number) if isinstance(number, int) else number
        return await self._ask("eth_getBlockByNumber", [tag, False], _block)

    async def transfers(self, first: int, last: int) -> list[TransferLog]:
        """USDC transfers of these blocks, in log order."""
        span = {"address": self._usdc, "topics": [TRANSFER_TOPIC], "fromBlock": hex(first), "toBlock": hex(last)}
        return await self._ask("eth_getLogs", [span], lambda logs: [_log(raw) for raw in logs])

    async def usdc_balance(self, address: str) -> int:
        """Base units at the latest block."""
        data = _BALANCE_OF + address.removeprefix("0x").rjust(64, "0")
        return await self._ask("eth_call", [{"to": self._usdc, "data": data}, "latest"], lambda word: int(word, 16))

    async def send_usdc(self, sender: str, to: str, amount: int) -> str:
        """The hash, also of a transaction that will revert. The anvil signs for any sender, and is made to give it gas.

        Nonces are ours: of those that the anvil chooses, one that it takes while it mines a block of the same sender may be used
        already, and that transaction, its hash given out, is in no block ever."""
        await self._ask("anvil_impersonateAccount", [sender], lambda _: None)
        await self._ask("anvil_setBalance", [sender, hex(_GAS_MONEY_WEI)], lambda _: None)
        data = _TRANSFER + to.removeprefix("0x").rjust(64, "0") + f"{amount:064x}"
        sent = {"from": sender, "to": self._usdc, "data": data, "gas": hex(_GAS), **_FEES}
        async with self._sending:
            nonce = await self._ask("eth_getTransactionCount", [sender, "pending"], lambda word: int(word, 16))
            following, at = self._next_nonces.get(sender, (0, 0.0))
            if time.monotonic() - at < _BEHIND_S:
                nonce = max(nonce, following)
            tx_hash = await self._ask("eth_sendTransaction", [{**sent, "nonce": hex(nonce)}], str)
            self._next_nonces[sender] = nonce + 1, time.monotonic()
        return tx_hash

    async def mined(self, tx_hash: str) -> tuple[Block, bool] | None:
        """The transaction's block, and whether it succeeded; None while it is in none."""
        return await self._ask("eth_getTransactionReceipt", [tx_hash], _mined)

    async def _ask(self, method: str, params: list[Any], parse: Callable[[Any], T]) -> T:
        body = orjson.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
        try:
            async with self._session.post(self._url, data=body, headers={"Content-Type": "application/json"}) as reply:
                answer = orjson.loads(await reply.read())
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise RpcError(f"{method}: {type(error).__name__}") from None
        try:
            return parse(answer["result"])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise RpcError(f"{method}: an unreadable answer") from None


def _block(raw: dict[str, Any] | None) -> Block | None:
    return None if raw is None else Block(int(raw["number"], 16), raw["hash"])


def _mined(raw: dict[str, Any] | None) -> tuple[Block, bool] | None:
    if raw is None:
        return None
    return Block(int(raw["blockNumber"], 16), raw["blockHash"]), int(raw["status"], 16) == 1


def _log(raw: dict[str, Any]) -> TransferLog:
    return TransferLog(
        tx_hash=raw["transactionHash"],
        block=Block(int(raw["blockNumber"], 16), raw["blockHash"]),
        index=int(raw["logIndex"], 16),
        sender="0x" + raw["topics"][1][-40:],
        to="0x" + raw["topics"][2][-40:],
        amount=int(raw["data"], 16),
    )
