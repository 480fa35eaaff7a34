"""Where a look at a chain comes from: the open attempts in the database, the stored window, the endpoint whose turn it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Final

import orjson
import structlog

from agents.looking import Kept
from agents.withdrawals.look import ChainWriter, LaneNonce, News, OpenAttempt, look
from chain.endpoints import ranked
from chain.errors import ChainError
from chain.heads import readable
from chain.window import Window
from ledger.commit import TRANSIENT
from ledger.rows import Connection
from ledger.sql import load as load_sql
from topics.envelope import Received
from topics.events import HeadSeen

_log = structlog.get_logger()
_sql = load_sql("agents.withdrawals", "tracking.sql")

_LATER: Final[tuple[type[Exception], ...]] = (ChainError, *TRANSIENT)


def cursor_of(chain: str) -> str:
    """Its row in chain_cursors."""
    return f"withdrawals:{chain}"


class Looker:
    """Reads what is open, and what the chains say of it. One per stage."""

    def __init__(
        self,
        chains: Mapping[str, ChainWriter],
        connect: Callable[[], Awaitable[Connection]],
        clock: Callable[[], datetime],
    ) -> None:
        self._chains = chains
        self._reading = Kept(connect)
        self._clock = clock
        self._turns = dict.fromkeys(chains, 0)
        """Looks so far: each time another endpoint is read, so that what one withholds is seen by the next."""

    async def prepare(self, events: Sequence[Received]) -> dict[str, News]:
        """Before the transaction: what each chain that has a new head says. What cannot be read is asked at the next head."""
        woken = {received.event.chain.value for received in events if isinstance(received.event, HeadSeen)}
        news: dict[str, News] = {}
        for name in sorted(woken & self._chains.keys()):
            try:
                async with self._reading.open() as connection:
                    found = await self._look(connection, name)
            except _LATER as error:
                code = getattr(error, "code", type(error).__name__)
                _log.warning("withdrawals.later", chain=name, error=code, reason=str(error))
                continue
            if found is not None:
                news[name] = found
        return news

    async def _look(self, connection: Connection, name: str) -> News | None:
        chain = self._chains[name]
        if not await connection.fetchval(_sql.any_open, name):
            return None
        turn = chain.rpcs[self._turns[name] % len(chain.rpcs)]
        self._turns[name] += 1
        reached = await readable(chain.rpcs, turn)
        source = reached.rpc
        rpcs = [source, *(rpc for rpc in ranked(chain.rpcs) if rpc is not source)]
        stored = await connection.fetchval(_sql.cursor, cursor_of(name))

        async def attempts(seen: Sequence[str], lowest: int) -> list[OpenAttempt]:
            return [OpenAttempt(*row) for row in await connection.fetch(_sql.open_attempts, name, seen, lowest)]

        async def signed(nonces: Collection[LaneNonce]) -> dict[LaneNonce, list[str]]:
            hashes: dict[LaneNonce, list[str]] = {}
            columns = [list(column) for column in zip(*nonces, strict=True)]
            for signer, nonce, tx_hash in await connection.fetch(_sql.hashes_of_nonces, name, *columns):
                hashes.setdefault((signer, nonce), []).append(tx_hash)
            return hashes

        window = None if stored is None else Window.of_json(orjson.loads(stored))
        if window is not None and reached.agreed and reached.head.number < window.first:
            # two endpoints are below all of it: one that answered alone made it up
            _log.warning("withdrawals.window_dropped", chain=name, first=window.first, head=reached.head.number)
            window = None
        return await look(chain, rpcs, window, attempts, signed, self._clock())
