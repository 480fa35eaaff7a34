"""Heads as the endpoints tell of them over WebSocket, where they do: a hint to look now. What is looked at is asked of all endpoints
as ever, and whoever waits looks after his interval anyway; so a head that is made up costs a look, and one that is not told some
seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import structlog

from chain.errors import ChainError
from chain.rpc import Rpc

_log = structlog.get_logger()

AGAIN_S: Final = 1.0
"""Before the next try to subscribe; doubled each time that nothing was told."""
AGAIN_S_MAX: Final = 300.0
"""An endpoint that offers none is asked no more often."""
APART_S: Final = 0.2
"""Between two looks, whatever is told."""


class HeadNews:
    """`work` never returns; `wait` may be called by one."""

    def __init__(self, rpcs: Sequence[Rpc]) -> None:
        self._rpcs = rpcs
        self._told = asyncio.Event()
        self.subscribed: set[str] = set()
        """Endpoints that have told of a head and are connected."""
        self._ended_s = 0.0
        """When the last wait did; of the loop's clock."""

    async def wait(self, for_s: float) -> None:
        """Until a head is told of, or so long. One that was told of since the last wait ends it at once, but not sooner than APART_S
        after that: an endpoint that floods us does not have us flood the others."""
        loop = asyncio.get_running_loop()
        due_s = min(for_s, self._ended_s + APART_S - loop.time())
        if due_s > 0:
            await asyncio.sleep(due_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(for_s - max(due_s, 0.0)):
                await self._told.wait()
        self._told.clear()
        self._ended_s = loop.time()

    async def work(self) -> None:
        await asyncio.gather(*map(self._listen, self._rpcs))

    async def _listen(self, rpc: Rpc) -> None:
        def told() -> None:
            self.subscribed.add(rpc.endpoint)
            self._told.set()

        wait_s = AGAIN_S
        while True:
            try:
                await rpc.watch_heads(told)
            except ChainError as error:
                _log.info("chain.heads_not_told", endpoint=rpc.endpoint, error=error.code, again_s=wait_s)
            if rpc.endpoint in self.subscribed:
                self.subscribed.discard(rpc.endpoint)
                wait_s = AGAIN_S
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, AGAIN_S_MAX)
