"""a chain -> chain_cursors -> chain.heads, deposits.notified

Reads heads and USDC transfers to our wallets over RPC, on its own: what a vendor's webhook forgets arrives here.
Cursor and messages are one commit, so nothing is skipped and repeats have the same ids. One watcher per chain in the
whole deployment, held by an advisory lock; the others stand by. From where people want it read again (`ask_rescan`) it is:
what is known is found once more, and does nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

import orjson
import structlog

from agents.lone_writer import SILENCE_S, LoneWriter
from agents.services import Services
from chain.errors import ChainError, ChainMoved, ReorgTooDeep, WrongChainId
from chain.evidence import QUORUM
from chain.head_news import HeadNews
from chain.heads import readable
from chain.rpc import FILTER_ADDRESSES_MAX, Block, Rpc
from chain.scan import ScanSettings, ScanState, begin
from chain.scanner import Pass, reread, scan_once
from ledger.audit_logs import Log
from ledger.commit import lock_writer, seal
from ledger.record import Message
from ledger.rows import Changes, Connection
from ledger.sql import load
from ledger.tables import CHAIN_CURSORS
from topics.catalog import CHAIN_HEADS, DEPOSITS_NOTIFIED
from topics.envelope import value_of
from topics.events import Chain, DepositNotified, Evidence, HeadSeen

_log = structlog.get_logger()
_sql = load("agents.chains", "chains.sql")

WAIT_S_MAX = 30.0
REST_TURNS_MAX: Final = 1_000
"""Half an hour at two seconds each: one that refuses for good is tried about as often as people look."""
RESCANS: Final = "rescans"
"""The writer of what people ask for."""


@dataclass(frozen=True)
class Watched:
    """A chain to watch."""

    chain: Chain
    chain_id: int
    rpcs: tuple[Rpc, ...]
    """They are read in turn, each up to where another is too (chain/heads.py); finality asks all of them."""
    scan: ScanSettings
    interval_s: float
    start_block: int | None = None
    """First block of interest for a scan that has no cursor yet; None: the head at its start."""


class WatchChain:
    """One chain's watcher. `work` and `listen` never return."""

    def __init__(self, watched: Watched, services: Services, seen: Callable[[str, int, int, int], None]) -> None:
        """`seen(chain, head, blocks behind, endpoints that answer)` gets the figures."""
        self._news = HeadNews(watched.rpcs)
        self.listen = self._news.work
        """Heads over WebSocket, where endpoints offer it: `work` then does not wait for its interval."""
        self._watched = watched
        self._services = services
        self._seen = seen
        self._writer = f"watch_chain.{watched.chain.value}"
        self._lone = LoneWriter(self._writer, services, max(SILENCE_S, 3 * watched.interval_s))
        self._log = _log.bind(stage=self._writer)
        self._wait_s = watched.interval_s
        self._turn = 0
        """Passes that read something: each reads another endpoint, so that what one keeps silent about is in the next one's overlap."""
        self._rpc: Rpc | None = None
        self._in_vain: dict[Rpc, None] = {}
        """Read by passes that failed since one read something, the latest last: it refuses, or what it says does not fit together.
        Another is read next, if there is one."""
        self._rests: dict[Rpc, tuple[int, int]] = {}
        """Until which turn, and for how many, one is not read that failed where another did not: a round, and each time twice as long."""
        self._left_out: tuple[tuple[str, str], ...] = ()

    def leads(self) -> bool:
        """Whether this process is the one that watches."""
        return self._lone.leads

    async def work(self) -> None:
        await self._lone.rounds(self._work, self._failed, (ChainError,))

    async def _work(self, connection: Connection) -> float:
        """Looks, and waits for a new head."""
        caught_up = await self.look(connection)
        self._services.unready.pop(self._writer, None)
        self._wait_s = self._watched.interval_s if caught_up else 0.0
        await self._news.wait(self._wait_s)
        return 0.0

    def _failed(self, error: Exception) -> float:
        if isinstance(error, ChainError) and self._rpc is not None:
            self._in_vain.pop(self._rpc, None)
            self._in_vain[self._rpc] = None
        if isinstance(error, ChainMoved):
            self._wait_s = self._watched.interval_s
        elif isinstance(error, ReorgTooDeep | WrongChainId):
            # a person must look: a new start block, or the right endpoint
            self._log.critical("chain.stands", error=error.code, reason=str(error))
            self._services.unready[self._writer] = error.code
            self._wait_s = WAIT_S_MAX
        else:
            self._log.warning("chain.retry", error=getattr(error, "code", type(error).__name__), reason=str(error))
            self._wait_s = min(max(self._wait_s, 0.1) * 2, WAIT_S_MAX)
        return self._wait_s

    async def look(self, connection: Connection) -> bool:
        """One pass; whether everything up to the head was read."""
        turn = self._watched.rpcs[self._turn % len(self._watched.rpcs)]
        resting = [rpc for rpc, (until, _) in self._rests.items() if self._turn < until]
        self._rpc = None
        source = await readable(self._watched.rpcs, turn, [*[*self._in_vain][-1:], *resting])
        self._rpc = rpc = source.rpc
        self._tell_left_out(source.left_out)
        state, asked = await self._state(connection, rpc, source.head)
        addresses = await self._addresses(connection)
        found = await scan_once(
            rpc, state, addresses, self._watched.scan, source.head,
            agreed=source.agreed, doubtful=not source.agreed and len(self._watched.rpcs) >= QUORUM,
        )  # fmt: skip
        if addresses is None:
            found = await self._ours(connection, found)
        if found.rewound_from is not None:
            self._log.warning("chain.reorg", was=found.rewound_from.number)
        if found.heads or found.transfers or found.state != state or asked:
            await self._commit(found, asked)
        if found.state.cursor != state.cursor:
            self._next_turn(rpc)
        for head in found.heads:
            read = found.state.cursor.number if found.state.cursor else 0
            answering = len(self._watched.rpcs) - len(source.left_out)
            self._seen(self._watched.chain.value, head.number, head.number - read, answering)
        return found.caught_up

    def _next_turn(self, read: Rpc) -> None:
        self._turn += 1
        self._rests.pop(read, None)
        failed, self._in_vain = self._in_vain.keys() - {read}, {}
        if len(failed) == 1:  # more of them: it was our network, or the chain
            (one,) = failed
            _, turns = self._rests.get(one, (0, 0))
            turns = min(2 * turns, REST_TURNS_MAX) or len(self._watched.rpcs)
            self._rests[one] = self._turn + turns, turns

    def _tell_left_out(self, left_out: tuple[tuple[str, str], ...]) -> None:
        """Once, when it changes: an endpoint of another chain is as good as none, whenever it turns out to be one."""
        for endpoint, code in set(left_out) - set(self._left_out):
            self._log.error("chain.endpoint_left_out", endpoint=endpoint, error=code)
        for endpoint, _ in set(self._left_out) - set(left_out):
            self._log.info("chain.endpoint_back", endpoint=endpoint)
        self._left_out = left_out

    async def _state(self, connection: Connection, rpc: Rpc, head: Block) -> tuple[ScanState, list[str]]:
        """Where it stands, or is to stand; and the rows that asked for that."""
        chain, start = self._watched.chain.value, self._watched.start_block
        asked = {
            key: int(key.rpartition(":")[2]) for (key,) in await connection.fetch(_sql.rescans, _rescan(chain, ""))
        }
        stored = await connection.fetchval(_sql.cursor, chain)
        if stored is None:
            return begin(head.number if start is None else start, self._watched.scan), [*asked]
        state = ScanState.of_json(orjson.loads(stored))
        if not asked:
            return state, []
        first = min(*asked.values(), head.number)
        try:
            return await reread(rpc, state, first), [*asked]
        except ChainError as error:  # perhaps it keeps nothing so old: what is new does not wait for one that does
            self._log.warning("chain.rescan_waits", first_block=first, reason=str(error))
            return state, []

    async def _addresses(self, connection: Connection) -> set[str] | None:
        """None where there are more than an endpoint is given: reading all of them under every head takes seconds."""
        chain, most = self._watched.chain.value, FILTER_ADDRESSES_MAX
        found = {row[0] for row in await connection.fetch(_sql.addresses, chain, most + 1)}
        return found if len(found) <= most else None

    async def _ours(self, connection: Connection, found: Pass) -> Pass:
        """Of all transfers those to us. Asked after they were read, so a wallet that was made meanwhile is there."""
        told = sorted({transfer.to for transfer in found.transfers})
        rows = await connection.fetch(_sql.ours, self._watched.chain.value, told) if told else []
        ours = {row[0] for row in rows}
        return replace(found, transfers=tuple(one for one in found.transfers if one.to in ours))

    async def _commit(self, found: Pass, asked: Sequence[str]) -> None:
        changes = Changes()
        changes.upsert(CHAIN_CURSORS, (self._watched.chain.value, found.state.as_json(), self._services.clock()))
        for key in asked:
            changes.delete(CHAIN_CURSORS, (key,))
        await self._lone.commit(
            changes.blocks(),
            [*self._transfers(found), *map(self._head, found.heads)],
            {"transfers": len(found.transfers), "heads": len(found.heads)},
        )

    def _transfers(self, found: Pass) -> list[Message]:
        messages = []
        for log in found.transfers:
            place = f"{log.block_hash}:{log.log_index}"
            event = DepositNotified(
                source="scanner",
                transfer_id=place,
                chain=self._watched.chain.value,
                tx_hash=log.tx_hash,
                to=log.to,
                asset="USDC",
                amount=log.amount,
                evidence=Evidence.CONFIRMED,
                block_hash=log.block_hash,
                block_number=log.block_number,
                log_index=log.log_index,
                sender=log.sender,
            )
            # what an endpoint that lies has in that place is another event: it must not keep out what the others have there
            contents = hashlib.blake2b(value_of(event), digest_size=8).hexdigest()
            event_id = f"{self._watched.chain.value}:{place}:{contents}"
            messages.append(_message(DEPOSITS_NOTIFIED.name, log.to, event, event_id))
        return messages

    def _head(self, head: Block) -> Message:
        event = HeadSeen(
            chain=self._watched.chain,
            chain_id=self._watched.chain_id,
            number=head.number,
            block_hash=head.hash,
            timestamp_s=head.timestamp_s,
        )
        return _message(CHAIN_HEADS.name, self._watched.chain.value, event, event.identity())


def _message(topic: str, key: str, event: Any, event_id: str) -> Message:
    return Message(topic, key.encode(), value_of(event), event_id, event.ce_type())


def _rescan(chain: str, block: int | str) -> str:
    """A row in chain_cursors that asks for it."""
    return f"rescan:{chain}:{block}"


async def ask_rescan(
    connection: Connection, chain: Chain, first_block: int, reason: str, actor: str, at: datetime
) -> None:
    """Has the chain's watcher, wherever it stands, read from this block on again; never below the block that it began at."""
    log = Log(actor, "chain.rescan", "chain", chain.value, after={"from_block": first_block, "reason": reason})
    changes = Changes()
    changes.upsert(CHAIN_CURSORS, (_rescan(chain.value, first_block), {}, at))
    async with connection.transaction():
        owners = await lock_writer(connection, RESCANS)
        await seal(
            connection, RESCANS, owners, blocks=changes.blocks(), messages=[], at=at, actor=actor,
            summary={log.action: 1}, logs=[log],
        )  # fmt: skip
