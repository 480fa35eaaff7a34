"""chain.heads -> ledger: custody mirror, or the reversal -> deposits.finalized

Decides:  for every deposit that is deep enough under the new head, what the chain says of it now.
Key:      the chain.
Repeats:  harmless; a deposit that is further on is left alone.
Refuses:  nothing; what the endpoints cannot tell yet is asked again at the next head.

A deposit is final when two endpoints show it alike. One that two do not show is first ORPHANED; it is reversed when, at a
later head, two, each past the deposit's depth, still have nothing (chain/evidence.py). A node that is behind is no evidence. Where nobody named a block (it may
not be mined yet, or not where we look), the depth is counted from the head at which it was first missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from agents.deposits.deposit import Deposit, Status, finalized, reversed_
from agents.deposits.figures import count_ends
from agents.outcome import Done, Emit, Outcome, Stage
from chain.evidence import Canonical, Finding, Missing, Moved, find_transfer
from chain.rpc import Rpc
from ledger.posting import Transaction
from ledger.rows import Connection, Row, Table
from ledger.sql import load as load_sql
from ledger.tables import DEPOSITS
from topics.catalog import CHAIN_HEADS, DEPOSITS_FINALIZED
from topics.envelope import Received
from topics.events import HeadSeen

_sql = load_sql("agents.deposits", "deposits.sql")

DUE_MAX: Final = 500
"""Deposits looked up under one head; the rest follows under the next."""
LOOKUPS_AT_ONCE: Final = 10


@dataclass(frozen=True)
class ChainReader:
    """A chain that we read ourselves."""

    rpcs: Sequence[Rpc]
    """All endpoints; two must agree before anything is final or taken back. A single one's word is all there is."""
    token: str
    depth_blocks: int


@dataclass
class Facts:
    now: datetime
    findings: Mapping[str, Finding]
    """What the endpoints say, by deposit id."""
    due: dict[str, list[Deposit]] = field(default_factory=dict)
    """Locked deposits by chain."""


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, HeadSeen)
    postings: list[Transaction] = []
    emits: list[Emit] = []
    rows: list[tuple[Table, Row]] = []
    for deposit in facts.due.get(event.chain, ()):
        after, moved = _judge(deposit, facts.findings[deposit.id], event.number, facts.now)
        if after is None:
            continue
        rows.append((DEPOSITS, after))
        if moved is not None:
            postings.append(moved[0])
            emits.append(moved[1])
    return Done(postings=tuple(postings), upserts=tuple(rows), emits=tuple(emits))


def _judge(
    deposit: Deposit, finding: Finding, head: int, now: datetime
) -> tuple[Deposit | None, tuple[Transaction, Emit] | None]:
    """The deposit after what the chain says, and what it moves; (None, None): nothing changes."""
    if deposit.status not in (Status.CREDITED, Status.ORPHANED):
        return None, None
    if isinstance(finding, Canonical | Moved) and len(finding.log_indexes) > deposit.n:
        placed = deposit._replace(
            status=Status.CREDITED.value,
            block_hash=finding.block_hash,
            block_number=finding.block_number,
            log_index=finding.log_indexes[deposit.n],
            updated_at=now,
        )
        if isinstance(finding, Moved):
            return placed, None
        final = placed._replace(status=Status.FINALIZED.value, finalized_at=now)
        return final, finalized(final)
    if isinstance(finding, Canonical | Moved | Missing):
        if deposit.status == Status.CREDITED:
            since = head if deposit.block_number is None else deposit.block_number
            return deposit._replace(status=Status.ORPHANED.value, block_number=since, updated_at=now), None
        if isinstance(finding, Moved):
            return None, None  # fewer equal transfers than we credited, but not final yet
        gone = deposit._replace(status=Status.REVERSED.value, finalized_at=now, updated_at=now)
        return gone, reversed_(deposit)
    return None, None


def fold(facts: Facts, done: Done) -> None:
    """What one head settled, the next head of the batch leaves alone."""
    settled = {row[0] for _, row in done.upserts}
    for chain, due in facts.due.items():
        facts.due[chain] = [deposit for deposit in due if deposit.id not in settled]


class FinalizeDeposits:
    def __init__(self, chains: Mapping[str, ChainReader], connect: Callable[[], Awaitable[Connection]]) -> None:
        self._chains = chains
        self._connect = connect
        self._connection: Connection | None = None

    async def prepare(self, events: Sequence[Received]) -> Mapping[str, Finding]:
        """Before the transaction: asks every endpoint about every deposit that is due under the newest heads."""
        heads: dict[str, int] = {}
        for received in events:
            event = received.event
            assert isinstance(event, HeadSeen)
            if event.chain in self._chains:
                heads[event.chain] = max(event.number, heads.get(event.chain, 0))
        findings: dict[str, Finding] = {}
        limit = asyncio.Semaphore(LOOKUPS_AT_ONCE)
        for chain, head in heads.items():
            reader = self._chains[chain]

            async def look(row: Row, reader: ChainReader = reader, head: int = head) -> None:
                key, tx_hash, block_hash, recipient, amount = row
                async with limit:
                    findings[key] = await find_transfer(
                        reader.rpcs,
                        tx_hash,
                        block_hash,
                        reader.token,
                        recipient,
                        int(amount),
                        head,
                        reader.depth_blocks,
                    )

            connection = await self._reading()
            due = await connection.fetch(_sql.due, chain, head - reader.depth_blocks, DUE_MAX)
            await asyncio.gather(*(look(tuple(row)) for row in due))
        return findings

    async def _reading(self) -> Connection:
        if self._connection is None or self._connection.is_closed():
            self._connection = await self._connect()
        return self._connection

    async def load(
        self, connection: Connection, _events: Sequence[Received], findings: Mapping[str, Finding], at: datetime
    ) -> Facts:
        facts = Facts(at, findings)
        for row in await connection.fetch(_sql.locked, list(findings)):
            deposit = Deposit(*row)
            facts.due.setdefault(deposit.chain, []).append(deposit._replace(amount=int(deposit.amount)))
        return facts


def stage(chains: Mapping[str, ChainReader], connect: Callable[[], Awaitable[Connection]]) -> Stage[Facts]:
    """`connect` opens a connection for reading what is due."""
    agent = FinalizeDeposits(chains, connect)
    return Stage(
        name="finalize_deposits",
        source=CHAIN_HEADS,
        prepare=agent.prepare,
        load=agent.load,
        decide=decide,
        fold=fold,
        figures=count_ends,
        emits=(DEPOSITS_FINALIZED,),
    )
