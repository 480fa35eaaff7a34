"""transactions.signed -> attempts, withdrawals -> transactions.broadcast

Decides:  what the nodes' answers mean: a node has the transaction, or it is sent again, or a person must look.
Key:      the lane, `<chain>:<signer>`.
Repeats:  harmless; the stored bytes are sent as they are, and an attempt that is in a block is not sent.
Refuses:  unknown_transaction  ->  transactions.signed.dlq

Sending comes before the commit that tells of it, and after the journal has the signature: the event is told only then. A
lost reply, a time-out, "nonce too low" and every answer that is not in the table (chain/answers.py) are UNKNOWN: the identical
bytes are sent again, later and later, until a node has them or a block does (track_confirmations). Nothing is released here.

What is sent again: a redelivered event, after a restart; a retry of the schedule; and what track_confirmations tells once more
because a reorg dropped it or a pool lost it. The last has no retry: it is told again each minute while no node has the
transaction. Each batch goes out in nonce order. For a lane that is `restored` nothing is sent at all until it was compared with
its chain; what is to be sent waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, NamedTuple

import structlog

from agents.looking import Kept
from agents.outcome import Done, Emit, Outcome, Rejected, Retry, Stage
from agents.withdrawals import stored
from agents.withdrawals.attempts import ToSend, lock_attempts, read_to_send
from agents.withdrawals.track_confirmations import says_unseen
from agents.withdrawals.withdrawal import Attempt, AttemptStatus, Status, Withdrawal, attempt_row, moved
from chain.answers import Answer, Verdict
from chain.broadcaster import Broadcaster, Bytes
from ledger.commit import TRANSIENT
from ledger.rows import Connection, Row, Table
from topics.catalog import TRANSACTIONS_BROADCAST, TRANSACTIONS_SIGNED
from topics.envelope import Received
from topics.events import TransactionBroadcast, TransactionSigned

_log = structlog.get_logger()

NAME: Final = "broadcast_transactions"
SENDABLE: Final = frozenset({AttemptStatus.SIGNED, AttemptStatus.BROADCAST})
RETRY_S: Final = 1.0
"""Before the first repeat; doubled each time."""
RETRY_S_MAX: Final = 60.0
NOT_SENT: Final = Answer(Verdict.UNREACHED, "not_sent")
"""It became sendable after we had looked."""
HELD: Final = Answer(Verdict.UNREACHED, "lane_restored")
"""Its lane sends nothing until it was compared with its chain."""
HELD_S: Final = 5.0
"""Then it is looked whether the lane is open."""


Key = tuple[str, str]
"""(chain, hash)"""


class Sent(NamedTuple):
    """What was stored for the events, and what the nodes said to those that were sent."""

    attempts: Sequence[ToSend]
    answers: Mapping[Key, Answer]


@dataclass
class Facts:
    now: datetime
    answers: Mapping[Key, Answer]
    attempts: dict[Key, Attempt] = field(default_factory=dict)
    """Locked."""
    withdrawals: dict[str, Withdrawal] = field(default_factory=dict)
    """Locked, by id."""


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, TransactionSigned)
    key = (event.chain.value, event.tx_hash)
    attempt = facts.attempts.get(key)
    if attempt is None:
        return Rejected("unknown_transaction", f"{event.tx_hash} on {event.chain} is none of ours")
    if attempt.status not in SENDABLE:
        return Done()
    answer = facts.answers.get(key, NOT_SENT)
    if answer.verdict is Verdict.KNOWN:
        return _sent(received, attempt, facts)
    if answer.verdict is Verdict.REFUSED and attempt.status == AttemptStatus.SIGNED:
        return _refused(attempt, answer.code, facts)
    if says_unseen(received.id):
        return Done()  # it is said again while it is so: with repeats of its own each would add one more, for ever
    if answer is HELD:
        return Retry(answer.code, HELD_S)
    # also a refusal of what another node had before: it is not believed
    return Retry(answer.code, min(RETRY_S * 2 ** min(received.attempt - 1, 20), RETRY_S_MAX))


def _sent(received: Received, attempt: Attempt, facts: Facts) -> Done:
    now = facts.now
    inserts: list[tuple[Table, Row]] = []
    updates: list[tuple[Table, Row]] = []
    if attempt.status == AttemptStatus.SIGNED:
        after = attempt._replace(
            status=AttemptStatus.BROADCAST.value,
            error=None,
            broadcast_at=now,
            updated_at=now,
            version=attempt.version + 1,
        )
        updates.append(attempt_row(after))
    withdrawal = facts.withdrawals.get(attempt.withdrawal_id or "")
    if withdrawal is not None and withdrawal.status == Status.BROADCASTING:
        _moved, (row, line) = moved(withdrawal, Status.CONFIRMING, now, NAME)
        updates.append(row)
        inserts.append(line)
    event = TransactionBroadcast.known(**vars(received.event))
    emit = Emit(TRANSACTIONS_BROADCAST, f"{attempt.chain}:{attempt.signer}", event, received.id)
    return Done(inserts=tuple(inserts), updates=tuple(updates), emits=(emit,))


def _refused(attempt: Attempt, code: str, facts: Facts) -> Done:
    """No node will ever take it; its nonce and its hold stay as they are until a person has looked."""
    after = attempt._replace(error=code, updated_at=facts.now, version=attempt.version + 1)
    withdrawal = facts.withdrawals.get(attempt.withdrawal_id or "")
    if withdrawal is None or withdrawal.status != Status.BROADCASTING:
        return Done()
    _moved, (row, line) = moved(withdrawal, Status.MANUAL_REVIEW, facts.now, NAME, code)
    return Done(inserts=(line,), updates=(attempt_row(after), row))


def fold(facts: Facts, done: Done) -> None:
    for _, row in done.updates:
        if isinstance(row, Attempt):
            facts.attempts[(row.chain, row.tx_hash)] = row
        elif isinstance(row, Withdrawal):
            facts.withdrawals[row.id] = row


class BroadcastTransactions:
    def __init__(self, chains: Mapping[str, Broadcaster], connect: Callable[[], Awaitable[Connection]]) -> None:
        self._chains = chains
        self._kept = Kept(connect)
        self._reading = asyncio.Lock()
        self._sending = asyncio.Lock()
        """One batch after the other, so that nonces go out in order: who has read first is the first who waits to send."""

    async def prepare(self, events: Sequence[Received]) -> Sent:
        """Before the transaction: sends what may be sent; the answers."""
        keys = set()
        for received in events:
            event = received.event
            assert isinstance(event, TransactionSigned)
            keys.add((event.chain.value, event.tx_hash))
        async with self._reading:  # while the batch before is sent
            attempts = await self._stored(keys)
        async with self._sending:
            return await self._send(attempts)

    async def _send(self, attempts: Sequence[ToSend]) -> Sent:
        answers = {one.key: HELD for one in attempts if one.held}
        for chain in sorted({one.chain for one in attempts} & self._chains.keys()):
            ours = [one for one in attempts if one.chain == chain and one.status in SENDABLE and not one.held]
            ours.sort(key=lambda one: (one.signer, one.nonce, one.n))
            sent = await self._chains[chain].send([Bytes(one.tx_hash, one.raw) for one in ours])
            for attempt, answer in zip(ours, sent, strict=True):
                answers[(chain, attempt.tx_hash)] = answer
        return Sent(attempts, answers)

    async def _stored(self, keys: set[Key]) -> list[ToSend]:
        wait_s = 0.05
        while True:
            try:
                async with self._kept.open() as connection:
                    return await read_to_send(connection, keys)
            except TRANSIENT as error:
                _log.warning("database.retry", stage=NAME, error=type(error).__name__)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, 2.0)

    async def load(self, connection: Connection, _events: Sequence[Received], sent: Sent, at: datetime) -> Facts:
        # what an attempt is for and which nonce it has never change: as they were read before the transaction
        ids = {one.withdrawal_id for one in sent.attempts if one.withdrawal_id is not None}
        nonces = {(one.chain, one.signer, one.nonce) for one in sent.attempts}
        withdrawals = await stored.lock(connection, ids)
        groups = await lock_attempts(connection, nonces)
        attempts = {(one.chain, one.tx_hash): one for group in groups.values() for one in group}
        return Facts(at, sent.answers, attempts, withdrawals)


def stage(chains: Mapping[str, Broadcaster], connect: Callable[[], Awaitable[Connection]]) -> Stage[Facts]:
    """`connect` opens a connection for reading the stored bytes."""
    agent = BroadcastTransactions(chains, connect)
    return Stage(
        name=NAME,
        source=TRANSACTIONS_SIGNED,
        prepare=agent.prepare,
        prepares_ahead=True,  # the same bytes, whoever sends them and however often
        load=agent.load,
        decide=decide,
        fold=fold,
        emits=(TRANSACTIONS_BROADCAST,),
    )
