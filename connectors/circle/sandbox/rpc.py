"""Plain JSON-RPC over HTTP: the four questions the sandbox asks an EVM chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import orjson
from eth_utils.crypto import keccak

TRANSFER_TOPIC: Final = "0x" + keccak(text="Transfer(address,address,uint256)").hex()
_BALANCE_OF: Final = "0x" + keccak(text="balanceOf(address)")[:4].hex()


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

    async def close(self) -> None:
        await self._session.close()

    async def block(self, number: int | str) -> Block | None:
        """The canonical block of that number, or `latest`."""
        tag = hex(number) if isinstance(number, int) else number
        found = await self._call("eth_getBlockByNumber", [tag, False])
        return None if found is None else Block(int(found["number"], 16), found["hash"])

    async def transfers(self, first: int, last: int) -> list[TransferLog]:
        """USDC transfers of these blocks, in log order."""
        span = {"address": self._usdc, "topics": [TRANSFER_TOPIC], "fromBlock": hex(first), "toBlock": hex(last)}
        return [_log(raw) for raw in await self._call("eth_getLogs", [span])]

    async def usdc_balance(self, address: str) -> int:
        """Base units at the latest block."""
        data = _BALANCE_OF + address.removeprefix("0x").rjust(64, "0")
        return int(await self._call("eth_call", [{"to": self._usdc, "data": data}, "latest"]), 16)

    async def _call(self, method: str, params: list[Any]) -> Any:
        body = orjson.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
        try:
            async with self._session.post(self._url, data=body, headers={"Content-Type": "application/json"}) as reply:
                answer = orjson.loads(await reply.read())
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise RpcError(f"{method}: {type(error).__name__}") from None
        if not isinstance(answer, dict) or "result" not in answer:
            raise RpcError(f"{method}: no result")
        return answer["result"]


def _log(raw: dict[str, Any]) -> TransferLog:
    return TransferLog(
        tx_hash=raw["transactionHash"],
        block=Block(int(raw["blockNumber"], 16), raw["blockHash"]),
        index=int(raw["logIndex"], 16),
        sender="0x" + raw["topics"][1][-40:],
        to="0x" + raw["topics"][2][-40:],
        amount=int(raw["data"], 16),
    )
