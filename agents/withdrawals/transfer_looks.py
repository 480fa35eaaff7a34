"""What a chain that we read says of the custodian's transfers, asked before a batch's transaction."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final, NamedTuple

import structlog

from agents.deposits.finalize_deposits import ChainReader
from agents.looking import Kept
from agents.withdrawals.custodian import ENDS, REFUSED, is_ours
from chain.errors import ChainError
from chain.evidence import Canonical, Finding, Missing, find_transfer
from chain.heads import readable
from ledger.commit import TRANSIENT
from ledger.rows import Connection, uuids
from ledger.sql import load
from topics.envelope import Received
from topics.events import TransferNotified

_log = structlog.get_logger()
_sql = load("agents.withdrawals", "custodian.sql")

LOOKUPS_AT_ONCE: Final = 16
UNSEEN_MAX: Final = timedelta(minutes=3)
"""Between two looks: whatever was there meanwhile, and went, nobody has seen."""
ABSENT_MAX: Final = 10_000
"""Withdrawals whose transactions are nowhere, in one process; one that is forgotten is looked for as long again."""


class Look(NamedTuple):
    """What the chain says."""

    hashes: frozenset[str]
    """That were looked for."""
    paid: str | None = None
    """The one that is final with our transfer."""
    absent: bool = False
    """None of them is there."""
    absent_s: float = 0.0
    """For how long none was, whenever this process looked."""


def named_in(events: Sequence[Received]) -> list[TransferNotified]:
    return [received.event for received in events if isinstance(received.event, TransferNotified)]


async def _look(chain: ChainReader, hashes: frozenset[str], to: str, amount: int) -> Look:
    try:
        head = (await readable(chain.rpcs)).head.number
    except ChainError as error:
        _log.warning("transfers.chain_not_asked", error=error.code)
        return Look(frozenset())
    findings: dict[str, Finding] = {}
    for tx_hash in sorted(hashes):
        findings[tx_hash] = await find_transfer(
            chain.rpcs, tx_hash, None, chain.token, to, amount, head, chain.depth_blocks
        )
    found = next((tx_hash for tx_hash, finding in findings.items() if isinstance(finding, Canonical)), None)
    return Look(hashes, found, all(isinstance(finding, Missing) for finding in findings.values()))


class TransferLooker:
    def __init__(
        self,
        chains: Mapping[str, ChainReader],
        connect: Callable[[], Awaitable[Connection]],
        clock: Callable[[], datetime],
    ) -> None:
        self._chains = chains
        self._clock = clock
        self._absent: OrderedDict[str, tuple[frozenset[str], datetime, datetime]] = OrderedDict()
        """By withdrawal: which hashes are nowhere, since when, and the last look. Of this process alone: another looks as long again."""
        self._reading = Kept(connect)

    async def prepare(self, events: Sequence[Received]) -> Mapping[str, Look]:
        """Before the transaction: every hash of a transfer that has ended, looked for on its chain. Where nobody can be asked
        nothing is known, and the event comes again."""
        ended = [e for e in named_in(events) if e.state in ENDS and e.state != REFUSED]
        if not ended or not self._chains:
            return {}
        told: dict[str, set[str]] = {}
        for event in ended:
            for name in {event.transfer_id, event.reference or event.transfer_id} if event.tx_hash else ():
                told.setdefault(name, set()).add(str(event.tx_hash))
        references = {event.reference for event in ended if event.reference is not None and is_ours(event.reference)}
        try:
            async with self._reading.open() as connection:
                rows = await connection.fetch(_sql.asked, uuids(references), [event.transfer_id for event in ended])
        except TRANSIENT as error:
            _log.warning("transfers.later", error=type(error).__name__)
            return {}
        limit = asyncio.Semaphore(LOOKUPS_AT_ONCE)
        looks: dict[str, Look] = {}

        async def look(key: str, transfer_id: str | None, known: str, chain: str, to: str, amount: str) -> None:
            hashes = frozenset({*known.split(), *told.get(key, ()), *told.get(transfer_id or "", ())})
            if hashes and chain in self._chains:
                async with limit:
                    looks[key] = await _look(self._chains[chain], hashes, to, int(amount))

        await asyncio.gather(*(look(*row) for row in rows))
        return {key: self._timed(key, one) for key, one in looks.items()}

    def _timed(self, key: str, look: Look) -> Look:
        before = self._absent.pop(key, None)
        if not look.absent:
            return look
        now = self._clock()
        since = now
        if before is not None and before[0] == look.hashes and now - before[2] <= UNSEEN_MAX:
            since = before[1]
        self._absent[key] = (look.hashes, since, now)
        if len(self._absent) > ABSENT_MAX:
            self._absent.popitem(last=False)
        return look._replace(absent_s=(now - since).total_seconds())
