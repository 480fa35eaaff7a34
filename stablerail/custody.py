"""The custody mirror against the chain, at one height: what our wallets hold there, and what the ledger says they hold.

What they hold is what two endpoints say alike, and more of them than say anything else; with one configured, its word. While no two
agree nothing is compared, and nothing is told: an endpoint that lies or stands still must not ring for money that is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import structlog

from agents.looking import Kept
from chain.endpoints import votes
from chain.errors import ChainError, NoAgreement
from chain.evidence import QUORUM
from chain.heads import readable
from chain.rpc import Rpc
from ledger.commit import TRANSIENT
from ledger.rows import Connection
from ledger.sql import load
from stablerail.config import Settings
from topics.events import Chain

_log = structlog.get_logger()
_LATER: Final[tuple[type[Exception], ...]] = (ChainError, *TRANSIENT)
_sql = load("stablerail", "custody.sql")


ADDRESSES_MAX: Final = 10_000
"""In memory at a time, however many customers there are."""


class Look(NamedTuple):
    final: int
    """The block."""
    wallets: int
    difference: int
    """Base units that they hold above what the ledger says."""
    held: int
    """Base units."""


@dataclass(frozen=True, slots=True)
class Custody:
    chain: Chain
    rpcs: Sequence[Rpc]
    token: str
    depth_blocks: int

    async def look(self, connection: Connection) -> Look:
        """At the newest final block.

        Deposits at or below that block whose finality the ledger has not posted yet are added to the mirror, those above it
        that it has posted are taken off, and so it is with withdrawals the other way round: both sides speak of the same
        height, whoever is ahead. Raises ChainError: NoAgreement while endpoints differ.
        """
        final = max((await readable(self.rpcs)).head.number - self.depth_blocks, 0)
        wallets = held = 0
        last = ""
        while True:
            rows = await connection.fetch(_sql.wallets, self.chain.value, last, ADDRESSES_MAX)
            addresses = [row[0] for row in rows]
            held += await self._held(addresses, final)
            wallets += len(addresses)
            if len(addresses) < ADDRESSES_MAX:
                break
            last = addresses[-1]
        expected = int(await connection.fetchval(_sql.expected, self.chain.value, final))
        return Look(final, wallets, held - expected, held)

    async def _held(self, addresses: Sequence[str], final: int) -> int:
        async def word(rpc: Rpc) -> dict[int, int]:
            return {final: sum(await rpc.balances_of(self.token, addresses, final))}

        agreed = await votes(self.rpcs, min(QUORUM, len(self.rpcs)), [final], word)
        if final not in agreed:
            raise NoAgreement(f"no two endpoints of {self.chain} say the same of our wallets at block {final}")
        return agreed[final]


class CustodyCheck:
    """Compares again and again, in the process that watches the chain. `work` never returns."""

    def __init__(
        self,
        custody: Custody,
        connect: Callable[[], Awaitable[Connection]],
        interval_s: float,
        leads: Callable[[], bool],
        tell: Callable[[str, int | None], None],
    ) -> None:
        """`tell(chain, base units)` gets the difference, None where another process watches the chain."""
        self._custody, self._reading, self._interval_s = custody, Kept(connect), interval_s
        self._leads, self._tell = leads, tell

    async def work(self) -> None:
        chain = self._custody.chain.value
        while True:
            try:
                if self._leads():
                    async with self._reading.open() as connection:
                        difference = (await self._custody.look(connection)).difference
                    self._tell(chain, difference)
                    if difference:
                        _log.warning("custody.differs", chain=chain, base_units=difference)
                else:
                    self._tell(chain, None)
            except _LATER as error:
                _log.warning("custody.retry", chain=chain, error=type(error).__name__, reason=str(error))
            await asyncio.sleep(self._interval_s)


def custody_of(settings: Settings, chain: Chain, endpoints: Sequence[Rpc]) -> Custody:
    """The custody mirror of a chain that we read."""
    return Custody(chain, endpoints, settings.usdc_contracts[chain].lower(), settings.finality_depths_blocks[chain])
