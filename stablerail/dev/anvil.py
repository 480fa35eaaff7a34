"""anvil, an EVM chain on this machine that mines a block per transaction (or one every `block_time_s`)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import aiohttp

from stablerail.dev.errors import DevError
from stablerail.dev.fetch import Tools
from stablerail.dev.processes import Child, free_port, port_answers, wait_ready

POLYGON_AMOY = 80002


class RpcRefused(DevError):
    """The node answered with a JSON-RPC error: `rpc_code` and its message."""

    code = "rpc_refused"

    def __init__(self, method: str, rpc_code: int, message: str) -> None:
        super().__init__(f"{method}: {message}")
        self.rpc_code = rpc_code


async def rpc(url: str, method: str, *params: Any) -> Any:
    """The `result` of one JSON-RPC call. Raises RpcRefused, aiohttp.ClientError."""
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        answer = await response.json()
    if "error" in answer:
        raise RpcRefused(method, answer["error"]["code"], answer["error"]["message"])
    return answer["result"]


class Node:
    """An anvil that runs already, here or in a container."""

    def __init__(self, rpc_url: str, chain_id: int = POLYGON_AMOY) -> None:
        self.rpc_url = rpc_url
        self.chain_id = chain_id

    async def rpc(self, method: str, *params: Any) -> Any:
        """For example `await anvil.rpc("anvil_mine", hex(12))`."""
        return await rpc(self.rpc_url, method, *params)

    async def mine(self, blocks: int = 1) -> int:
        """Mines empty blocks (or what is pending); returns the head's number."""
        await self.rpc("anvil_mine", hex(blocks))
        return int(await self.rpc("eth_blockNumber"), 16)

    async def mine_every(self, seconds: int) -> None:
        """From now on one block per interval, with or without transactions."""
        await self.rpc("evm_setIntervalMining", seconds)

    async def wait_mined(self, tx_hash: str, timeout_s: float = 20) -> dict[str, Any]:
        """The receipt. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while (receipt := await self.rpc("eth_getTransactionReceipt", tx_hash)) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        result: dict[str, Any] = receipt
        return result


class Anvil(Node):
    """The chain starts anew each time: it keeps nothing in `directory` but its log."""

    def __init__(
        self,
        directory: Path,
        tools: Tools,
        *,
        chain_id: int = POLYGON_AMOY,
        block_time_s: float | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self.directory = directory.absolute()
        self.port = free_port()
        super().__init__(f"http://127.0.0.1:{self.port}", chain_id)
        self._command: list[str | Path] = [tools.anvil, "--host", "127.0.0.1", "--port", str(self.port)]
        self._command += ["--chain-id", str(chain_id), *arguments]
        if block_time_s is not None:
            self._command += ["--block-time", str(block_time_s)]
        self._child: Child | None = None

    @property
    def pid(self) -> int:
        assert self._child is not None, "not started"
        return self._child.pid

    @property
    def is_running(self) -> bool:
        return self._child is not None and self._child.returncode is None

    def start(self, timeout_s: float = 60) -> Self:
        if self._child is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            log = self.directory / "anvil.log"
            env = {**os.environ, "HOME": str(self.directory)}  # where it would put its caches
            child = self._child = Child(self._command, log=log, env=env, orphan_signal=signal.SIGKILL)
            wait_ready(child, "anvil", partial(port_answers, self.port), timeout_s)
        return self

    def stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.stop(timeout_s=2)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
