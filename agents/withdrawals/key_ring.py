"""lanes, lane_keys -> what this process signs with: lanes that were added, moved to another key store or retired while it runs.

A key that cannot be loaded is tried again later and said in the log; what waits is signed by the other lanes meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Final

import structlog

from agents.looking import look_again_and_again
from agents.withdrawals.desks import Desk, Desks
from agents.withdrawals.in_flight import LaneKey
from agents.withdrawals.sign_transactions import RETIRED
from chain.errors import KeystoreError, SignerError
from chain.signer import Signer
from ledger.rows import Connection
from ledger.sql import load
from topics.events import Chain

_log = structlog.get_logger()
_sql = load("agents.withdrawals", "lanes.sql")

LOOK_S: Final = 2.0
AGAIN_S: Final = 30.0
"""After a key could not be loaded: stretching a password takes a second of a core."""


class KeyRing:
    """`load(source, address)` raises KeystoreError or SignerError; it may block. `desk` makes what signs for one of `chains` with
    what it loaded."""

    def __init__(
        self,
        desks: Desks,
        connect: Callable[[], Awaitable[Connection]],
        load: Callable[[str, str], Signer],
        desk: Callable[[Chain, Signer], Desk],
        chains: Collection[Chain],
    ) -> None:
        self._chains = frozenset(chain.value for chain in chains)
        self._desks, self._connect, self._load, self._desk = desks, connect, load, desk
        self._sources: dict[LaneKey, str] = {}
        """Where each key that we loaded came from."""
        self._failed: dict[LaneKey, tuple[str, float]] = {}
        """The source, and when it is tried again, by the loop's clock."""

    async def work(self) -> None:
        await look_again_and_again(self._connect, self.look, LOOK_S, "lanes.unseen")

    async def look(self, connection: Connection) -> None:
        """Once."""
        for chain, signer, source, status in await connection.fetch(_sql.lane_keys):
            key = (chain, signer)
            known = self._desks.get(key)
            if known is not None and known.gives_gas:
                continue  # its key is in the settings, and signs no withdrawals
            if status == RETIRED:
                self._sources.pop(key, None)
                self._desks.drop(key)
            elif source is not None and chain in self._chains and self._sources.get(key) != source:
                await self._take(key, source)

    async def _take(self, key: LaneKey, source: str) -> None:
        now = asyncio.get_running_loop().time()
        tried, again = self._failed.get(key, ("", 0.0))
        if tried == source and now < again:
            return
        try:
            signer = await asyncio.to_thread(self._load, source, key[1])
        except (KeystoreError, SignerError) as error:
            self._failed[key] = (source, now + AGAIN_S)
            _log.error("lane.key_refused", chain=key[0], signer=key[1], code=error.code, reason=error.detail)
            return
        self._desks.put(self._desk(Chain(key[0]), signer))
        _log.info("lane.key_loaded", chain=key[0], signer=key[1], source=source)
        self._sources[key] = source
        self._failed.pop(key, None)
