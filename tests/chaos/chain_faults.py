"""What breaks of the chain: endpoints that are down, stand still or lie, replies that are lost, reorganizations, dear blocks."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from contextlib import suppress
from itertools import count
from typing import Any, Final

from aiohttp import web

from stablerail.dev.anvil import RpcRefused
from tests.chaos.inputs import Fault, History
from tests.chaos.rig import Rig
from tests.support.rpc_stub import LyingEndpoint

GWEI: Final = 10**9
SPIKE_WEI: Final = 120 * GWEI


class ChainFaults:
    """One endpoint is in trouble at a time (but for replies that are lost), so that another can be believed."""

    def __init__(self, rig: Rig, history: History) -> None:
        self.rig, self.history = rig, history
        self.random = random.Random(f"faults {history.seed}")
        self.last = ""
        self._endpoint = asyncio.Lock()
        self._chain = asyncio.Lock()

    def _hits(self, fault: Fault, target: str) -> None:
        """From here on it counts."""
        fault.target, fault.in_flight, fault.at_s = target, self.history.in_flight, time.time()
        self.history.faults.append(fault)
        self.last = f"{fault.kind} of {target}"

    async def _last(self, least_s: float, most_s: float) -> None:
        await asyncio.sleep(self.random.uniform(least_s, most_s))

    async def _rpc_down(self, fault: Fault) -> None:
        async with self._endpoint:
            endpoint = self.random.choice(self.rig.endpoints)
            self._hits(fault, endpoint.url)
            if self.random.random() < 0.5:
                endpoint.hangs = True
            else:
                endpoint.whole = self.random.choice(((503, b""), (429, b""), (200, b"<html>"), (200, b"{")))
            await self._last(2, 8)
            honest(endpoint)

    async def _rpc_stale(self, fault: Fault) -> None:
        """An endpoint that stands still: its head is this one, and nothing is newer."""
        async with self._endpoint:
            endpoint = self.random.choice(self.rig.endpoints)
            head = int(await self.rig.anvil.rpc("eth_blockNumber"), 16)
            self._hits(fault, endpoint.url)

            async def block(params: list[Any], honest: Any) -> Any:
                if params[0] in ("latest", "pending"):
                    return await self.rig.anvil.rpc("eth_getBlockByNumber", hex(head), *params[1:])
                return None if honest is None or int(honest["number"], 16) > head else honest

            endpoint.lies = {
                "eth_blockNumber": lambda _params, _honest: hex(head),
                "eth_getBlockByNumber": block,
                "eth_getTransactionReceipt": lambda _, r: None if r is None or int(r["blockNumber"], 16) > head else r,
                "eth_getLogs": lambda _, logs: [log for log in logs or [] if int(log["blockNumber"], 16) <= head],
            }
            await self._last(3, 10)
            honest(endpoint)

    async def _rpc_lie(self, fault: Fault) -> None:
        """An endpoint that hides what is there, or says that a hash is another."""
        async with self._endpoint:
            endpoint = self.random.choice(self.rig.endpoints)
            kind = self.random.choice(("hides receipts", "hides logs", "other hashes", "counts less"))
            self._hits(fault, f"{endpoint.url} {kind}")
            other = "0x" + "ab" * 32

            def receipt(_params: list[Any], honest: Any) -> Any:
                return honest and honest | {
                    "blockHash": other,
                    "logs": [log | {"blockHash": other} for log in honest["logs"]],
                }

            endpoint.lies = {
                "hides receipts": {"eth_getTransactionReceipt": lambda _params, _honest: None},
                "hides logs": {"eth_getLogs": lambda _params, _honest: []},
                "other hashes": {"eth_getTransactionReceipt": receipt},
                "counts less": {
                    "eth_getTransactionCount": lambda _params, honest: hex(max(0, int(honest or "0x0", 16) - 1))
                },
            }[kind]
            await self._last(3, 8)
            honest(endpoint)

    async def _lost_send(self, fault: Fault) -> None:
        """The nodes take the transactions that are sent, and do not answer, or something between breaks the answer."""
        async with self._endpoint:
            self._hits(fault, "eth_sendRawTransaction")
            sent = count()

            async def never(_params: list[Any], _honest: Any) -> Any:
                if next(sent) % 3 == 0:
                    await asyncio.sleep(20)
                raise web.HTTPBadGateway

            for endpoint in self.rig.endpoints:
                endpoint.lies = {"eth_sendRawTransaction": never}
            await self._last(2, 8)
            for endpoint in self.rig.endpoints:
                honest(endpoint)

    async def _fee_spike(self, fault: Fault) -> None:
        async with self._chain:
            self._hits(fault, f"{SPIKE_WEI // GWEI} gwei")
            for _ in range(self.random.randrange(3, 9)):
                await self.rig.anvil.rpc("anvil_setNextBlockBaseFeePerGas", hex(SPIKE_WEI))
                await asyncio.sleep(1)
            await self.rig.anvil.rpc("anvil_setNextBlockBaseFeePerGas", hex(GWEI))

    async def _reorg(self, fault: Fault) -> None:
        """The newest blocks are others. What was in them is mined again at once, or later, or (of the payer's) never."""
        async with self._chain:
            depth = self.random.randrange(1, 4)
            fate = self.random.choice(("again", "again", "later", "gone"))
            circle = self.rig.stack.children["circle"]
            # nothing of Circle's, and no block, comes between the look and the reorganization
            circle.send_signal(signal.SIGSTOP)
            try:
                await self.rig.anvil.mine_every(0)
                await asyncio.sleep(0.3)
                lost = await self._transactions(depth)
                pool = await self.rig.anvil.rpc("txpool_content")  # which a reorganization empties
                senders = {tx["from"] for tx in lost} | {one.lower() for part in pool.values() for one in part}
                if self.rig.wallets["MATIC"].address.lower() in senders:
                    return  # nobody can make Circle's sandbox send the same bytes again
                raws = [await self.rig.anvil.rpc("eth_getRawTransactionByHash", tx["hash"]) for tx in lost]
                again = [[raw, depth - 1] for raw in raws] if fate == "again" else []
                self._hits(fault, f"{depth} blocks with {len(lost)} transactions, {fate}")
                await self.rig.anvil.rpc("anvil_reorg", depth, again)
            finally:
                circle.send_signal(signal.SIGCONT)
                await self.rig.anvil.mine_every(1)
            if fate == "again":
                return
            if fate == "later":
                await self._last(0.5, 8)
            for tx, raw in zip(lost, raws, strict=True):
                if fate == "gone" and tx["from"] == self.rig.usdc.payer.lower():
                    other = {"from": tx["from"], "to": tx["from"], "nonce": tx["nonce"], "gas": hex(21_000)}
                    with suppress(RpcRefused):
                        gone = await self.rig.anvil.rpc("eth_sendTransaction", other)
                        self._is_gone(tx["hash"], gone)
                        continue
                with suppress(RpcRefused):  # known already: somebody sent it again
                    await self.rig.anvil.rpc("eth_sendRawTransaction", raw)

    async def _transactions(self, blocks: int) -> list[dict[str, Any]]:
        head = int(await self.rig.anvil.rpc("eth_blockNumber"), 16)
        found = []
        for number in range(head - blocks + 1, head + 1):
            found += (await self.rig.anvil.rpc("eth_getBlockByNumber", hex(number), True))["transactions"]
        return found

    def _is_gone(self, tx_hash: str, instead: str) -> None:
        for one in self.history.inputs:
            if one.key == tx_hash:
                one.about["gone"] = instead


def honest(endpoint: LyingEndpoint) -> None:
    endpoint.lies, endpoint.whole = {}, None
    endpoint.release()
