"""What a chain says of a signer of ours: its next nonce, its coins and tokens, and what gas costs. Read once per block."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from chain.errors import RpcError, RpcTimeout, WrongChainId
from chain.evidence import QUORUM
from chain.fees import HISTORY_BLOCKS, HISTORY_PERCENTILE, FeeHistory, middle, read_history
from chain.health import FAR_BLOCKS
from chain.logs import topic_of
from chain.rpc import Call, Rpc
from chain.wire import amount, mapping, quantity

LOOK_S_MAX: Final = 3.0
"""An endpoint that takes longer has not answered."""
GRACE_S: Final = 0.25
"""Once QUORUM endpoints have answered, the others are waited for so long."""
ALONE_S: Final = 1.0
"""One answer alone waits so long for a second: an endpoint that hangs must not make every look last LOOK_S_MAX. The first look,
which may begin a lane, waits as long as that."""
AGE_S_MAX: Final = 15.0
"""Older than this it is looked at again, though no new block was told of."""


@dataclass(frozen=True, slots=True)
class Look:
    """Of several endpoints: what two of them say, the least block of those that are not far behind."""

    block_number: int
    """What is mined behind it may not be in the amounts yet."""
    nonce: int
    """The chain's count: every nonce below it is in a block."""
    pending_nonce: int
    """With what the endpoints hold in their pools."""
    native: int
    """Wei."""
    tokens: int
    """Base units."""
    history: FeeHistory
    """In the middle of what the endpoints say (fees.py)."""
    disputed: bool = False
    """Fewer endpoints answered than must agree, or two that count its nonces differently: one is behind, or lies. No lane is
    begun on that; one that has begun has its own nonces, and pays."""


class HotWallet:
    """One signer on one chain, seen through all its endpoints."""

    def __init__(self, rpcs: Sequence[Rpc], address: str, token: str) -> None:
        self.address = address
        self._rpcs = rpcs
        self._token = token
        self._last: Look | None = None
        self._at = 0.0
        self._looking = asyncio.Lock()
        self.failure = ""
        """Why the last look saw nothing."""

    async def look(self, block_number: int = 0) -> Look | None:
        """What is known of that block or a later one; None when no endpoint answers. Any number may ask at once."""
        async with self._looking:
            now = asyncio.get_running_loop().time()
            last = self._last
            if last is None or last.block_number < block_number or now - self._at > AGE_S_MAX:
                self._last, self._at = await self._read(), now
            return self._last

    async def _read(self) -> Look | None:
        tasks = [asyncio.create_task(self._one(rpc)) for rpc in self._rpcs]
        waiting: set[asyncio.Task[Look]] = set(tasks)
        alone_s = LOOK_S_MAX if self._last is None else ALONE_S
        answered = 0
        try:
            async with asyncio.timeout(LOOK_S_MAX) as limit:
                while waiting:
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    answered += sum(task.exception() is None for task in done)
                    if answered:
                        patience_s = GRACE_S if answered >= QUORUM else alone_s
                        limit.reschedule(min(limit.when() or 0.0, asyncio.get_running_loop().time() + patience_s))
        except TimeoutError:
            pass
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        failures = [task.exception() for task in tasks if not task.cancelled()]
        for failure in failures:
            if failure is not None and not isinstance(failure, RpcError):
                raise failure
        self.failure = "; ".join(str(failure) for failure in failures if failure is not None) or RpcTimeout.code
        looks = [task.result() for task in tasks if not task.cancelled() and task.exception() is None]
        return _merged(looks, len(self._rpcs))

    async def _one(self, rpc: Rpc) -> Look:
        balance_of = {"to": self._token, "data": "0x70a08231" + topic_of(self.address)[2:]}
        calls = [
            # first: the amounts are of this block or a later one
            Call("eth_getBlockByNumber", ["latest", False], lambda block: quantity(mapping(block)["number"])),
            Call("eth_chainId", [], quantity),
            Call("eth_getTransactionCount", [self.address, "latest"], quantity),
            Call("eth_getTransactionCount", [self.address, "pending"], quantity),
            Call("eth_getBalance", [self.address, "latest"], amount),
            Call("eth_call", [balance_of, "latest"], amount),
            Call("eth_feeHistory", [hex(HISTORY_BLOCKS), "latest", [HISTORY_PERCENTILE]], read_history),
        ]
        number, chain_id, *found = await rpc.ask(calls)
        if chain_id != rpc.chain_id:
            raise WrongChainId(rpc.endpoint, rpc.chain_id, chain_id)
        return Look(number, *found)


def _merged(looks: Sequence[Look], configured: int) -> Look | None:
    """What two endpoints have reached, where two answer. One that is behind, or that lies about one figure, is overruled by two
    others; of two, the one that makes us wait is believed, and never the one that makes us overspend. `configured`: how many
    were asked."""
    if not looks:
        return None
    reached = _second(looks, lambda look: look.block_number)
    looks = [look for look in looks if look.block_number >= reached - FAR_BLOCKS]
    money = 1 if len(looks) > QUORUM else 0
    counts = {(look.nonce, look.pending_nonce) for look in looks}
    return Look(
        block_number=min(reached, *(look.block_number for look in looks)),
        nonce=_counted(looks, lambda look: look.nonce),
        pending_nonce=_counted(looks, lambda look: look.pending_nonce),
        native=sorted(look.native for look in looks)[money],
        tokens=sorted(look.tokens for look in looks)[money],
        history=middle([look.history for look in looks]),
        disputed=len(looks) < min(QUORUM, configured) or (len(looks) == QUORUM and len(counts) > 1),
    )


def _second(looks: Sequence[Look], figure: Callable[[Look], int]) -> int:
    """What two have reached."""
    return sorted(map(figure, looks))[-min(QUORUM, len(looks))]


def _counted(looks: Sequence[Look], figure: Callable[[Look], int]) -> int:
    """Of two, the greater: a nonce that is used is never given."""
    return _second(looks, figure) if len(looks) > QUORUM else max(map(figure, looks))
