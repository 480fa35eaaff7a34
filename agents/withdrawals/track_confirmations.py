"""chain.heads -> attempts: mined, confirmed, reverted; withdrawals; chain_cursors -> transactions.confirmed, transactions.signed

Decides:  for every transaction of ours, what the chain says of it under the new head: mined in a block, taken back with it
          (then it is sent again), final with exactly our transfer, or final and reverted.
Key:      the chain.
Repeats:  harmless; the chain is read as it is now, whatever head woke us, and what is further on is left alone.
Refuses:  nothing; what the endpoints cannot tell yet is asked again at the next head.

A nonce has one outcome: that of the attempt that is final. Its other attempts are then replaced, never failed. A nonce that
is finally used while none of its attempts has a receipt on two endpoints is a person's business (`nonce_taken`); so is a
payment that succeeded without exactly our transfer (`unexpected_transfers`). Neither releases anything. The first pauses its
lane as well: somebody else uses the key. What it was signed for, a person ends (foreign.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from agents.outcome import Done, Emit, Outcome, Stage
from agents.withdrawals.attempts import lock_lanes, lock_nonces
from agents.withdrawals.look import RESEND_S, ChainWriter, News
from agents.withdrawals.looker import Looker, cursor_of
from agents.withdrawals.sign_transactions import OPEN, OPENS_ITSELF, PAUSED
from agents.withdrawals.withdrawal import (
    NEXT,
    NONCE_TAKEN,
    UNEXPECTED_TRANSFERS,
    Attempt,
    AttemptStatus,
    Lane,
    Status,
    Withdrawal,
    attempt_row,
    lane_row,
    moved,
    paid_for,
)
from chain.outcomes import Executed, Gone
from ledger.rows import Connection, Row, Table
from ledger.tables import CHAIN_CURSORS
from topics.catalog import CHAIN_HEADS, TRANSACTIONS_CONFIRMED, TRANSACTIONS_SIGNED
from topics.envelope import Received
from topics.events import HeadSeen, TransactionConfirmed, TransactionSigned

NAME: Final = "track_confirmations"
BLACKLISTED: Final = "blacklisted"
"""The token's issuer refuses one of the addresses."""
_BLACKLIST: Final = "Blacklistable: account is blacklisted"

REORG: Final = "reorg"
UNSEEN: Final = "unseen"

_OPEN: Final = frozenset({AttemptStatus.SIGNED, AttemptStatus.BROADCAST, AttemptStatus.MINED})
_FINAL: Final = frozenset({AttemptStatus.CONFIRMED, AttemptStatus.REVERTED})


@dataclass
class Facts:
    now: datetime
    news: dict[str, News]
    """By chain."""
    groups: dict[tuple[str, str, int], list[Attempt]] = field(default_factory=dict)
    """Locked: every attempt of the nonces that something is said about, by (chain, signer, nonce), in order of n."""
    withdrawals: dict[str, Withdrawal] = field(default_factory=dict)
    """Locked, by id."""
    lanes: dict[tuple[str, str], Lane] = field(default_factory=dict)
    """Locked, by (chain, signer)."""


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, HeadSeen)
    news = facts.news.get(event.chain)
    if news is None:
        return Done()
    rows: list[tuple[Table, Row]] = [
        (CHAIN_CURSORS, (cursor_of(event.chain), news.window.as_json(), facts.now)),
    ]
    step = _Step(facts, news, rows)
    for (chain, _, _), group in sorted(facts.groups.items()):
        if chain == event.chain:
            step.judge(group)
    for signer, count in sorted(news.nonces.items()):
        lane = facts.lanes.get((event.chain, signer))
        after = None if lane is None else _counted(lane, count, signer in step.robbed, signer in step.given_back)
        if lane is not None and after is not None and after != lane:
            rows.append(lane_row(after._replace(version=lane.version + 1, updated_at=facts.now)))
    return Done(inserts=tuple(step.history), upserts=tuple(rows), emits=tuple(step.emits))


def _counted(lane: Lane, count: int, robbed: bool, given_back: bool) -> Lane:
    """The lane with the chain's count; paused where somebody else used one of its nonces for good, open again where that was not
    so."""
    after = lane._replace(chain_nonce=count)
    if given_back and not robbed and lane.reason == NONCE_TAKEN:
        return after._replace(status=OPEN, reason="")
    if robbed and (lane.status == OPEN or lane.reason in OPENS_ITSELF):
        return after._replace(status=PAUSED, reason=NONCE_TAKEN)
    return after


class _Step:
    """What one head changes, gathered."""

    def __init__(self, facts: Facts, news: News, rows: list[tuple[Table, Row]]) -> None:
        self._facts = facts
        self._news = news
        self._rows = rows
        self.history: list[tuple[Table, Row]] = []
        self.emits: list[Emit] = []
        self.robbed: set[str] = set()
        """Signers whose key somebody else uses."""
        self.given_back: set[str] = set()
        """Those of which that was said, and the nonce was used by us after all."""

    def judge(self, group: Sequence[Attempt]) -> None:
        """All attempts of one nonce, in order of n."""
        ended = next((attempt for attempt in group if attempt.status in _FINAL), None)
        if ended is None:
            ended = self._final(group)
        if ended is not None:
            for attempt in group:
                if attempt.status in _OPEN and attempt.tx_hash != ended.tx_hash:
                    self._attempt(attempt, AttemptStatus.REPLACED)
            return
        after = [self._placed(attempt) for attempt in group]
        if any(attempt.status == AttemptStatus.MINED for attempt in after):
            withdrawal = self._facts.withdrawals.get(group[0].withdrawal_id or "")
            if withdrawal is not None and (withdrawal.status, withdrawal.code) == (Status.MANUAL_REVIEW, NONCE_TAKEN):
                self.given_back.add(group[0].signer)
            self._withdrawal(group, Status.CONFIRMING)
            return
        if (group[0].signer, group[0].nonce) in self._news.taken:
            self.robbed.add(group[0].signer)
            self._withdrawal(group, Status.MANUAL_REVIEW, NONCE_TAKEN)
            return
        for before, attempt in zip(group, after, strict=True):
            if before.status == AttemptStatus.MINED:
                self._again(attempt, REORG)
        newest = after[-1]
        late = newest.updated_at <= self._facts.now - timedelta(seconds=RESEND_S)
        if newest.tx_hash in self._news.unseen and newest.status in _OPEN and late:
            self._again(self._attempt(newest, AttemptStatus(newest.status)), UNSEEN)

    def _final(self, group: Sequence[Attempt]) -> Attempt | None:
        """The attempt that ends the nonce, ended."""
        for attempt in group:
            verdict = self._news.verdicts.get(attempt.tx_hash)
            if not isinstance(verdict, Executed) or verdict.place != (attempt.block_hash, attempt.block_number):
                continue
            if not verdict.succeeded:
                reason = self._news.reasons.get(attempt.tx_hash, "")
                done = self._attempt(attempt, AttemptStatus.REVERTED, error=reason or "reverted")
                self._confirmed(done, BLACKLISTED if reason == _BLACKLIST else reason)
                return done
            if not self._as_signed(attempt, verdict):
                self._withdrawal(group, Status.MANUAL_REVIEW, UNEXPECTED_TRANSFERS)
                continue
            done = self._attempt(attempt, AttemptStatus.CONFIRMED, error=None)
            self._confirmed(done, "")
            return done
        return None

    def _as_signed(self, attempt: Attempt, verdict: Executed) -> bool:
        """Whether it moved exactly what it was signed for; a cancel moves nothing."""
        if attempt.kind != "payment":
            return not verdict.transfers
        withdrawal = self._facts.withdrawals.get(attempt.withdrawal_id or "")
        if withdrawal is None:
            return False
        return verdict.transfers == ((attempt.signer, withdrawal.recipient.lower(), withdrawal.amount),)

    def _placed(self, attempt: Attempt) -> Attempt:
        """The attempt where the chain has it now."""
        place = self._news.places.get(attempt.tx_hash)
        was = (attempt.block_hash, attempt.block_number)
        if attempt.status != AttemptStatus.MINED:
            return attempt if place is None else self._attempt(attempt, AttemptStatus.MINED, place)
        if place is not None:
            return attempt if place == was else self._attempt(attempt, AttemptStatus.MINED, place)
        gone = self._news.verdicts.get(attempt.tx_hash)
        if (attempt.tx_hash, was) in self._news.lost or (isinstance(gone, Gone) and gone.place == was):
            return self._attempt(attempt, AttemptStatus.BROADCAST, None)
        return attempt

    def _attempt(self, attempt: Attempt, status: AttemptStatus, place: Any = ..., error: Any = ...) -> Attempt:
        """`place` and `error` stay as they are unless they are given."""
        after = attempt._replace(status=status.value, updated_at=self._facts.now, version=attempt.version + 1)
        if place is not ...:
            block_hash, block_number = place or (None, None)
            after = after._replace(block_hash=block_hash, block_number=block_number)
        if error is not ...:
            after = after._replace(error=error)
        self._rows.append(attempt_row(after))
        return after

    def _withdrawal(self, group: Sequence[Attempt], status: Status, code: str | None = None) -> None:
        """Nothing where it is so already, or has ended, or a person looks at more than where its transaction is."""
        withdrawal = self._facts.withdrawals.get(group[0].withdrawal_id or "")
        if withdrawal is None or status not in NEXT[Status(withdrawal.status)]:
            return
        if (withdrawal.status, withdrawal.code) == (status, code or withdrawal.code):
            return
        if withdrawal.status == Status.MANUAL_REVIEW:
            if withdrawal.code == UNEXPECTED_TRANSFERS or status == Status.BROADCASTING:
                return
            withdrawal = withdrawal._replace(code=None)
        after, (row, line) = moved(withdrawal, status, self._facts.now, NAME, code)
        self._facts.withdrawals[withdrawal.id] = after
        self._rows.append(row)
        self.history.append(line)

    def _again(self, attempt: Attempt, reason: str) -> None:
        """It is to be sent once more, as it is."""
        self._withdrawal([attempt], Status.BROADCASTING)
        event = TransactionSigned.model_validate(_named(attempt) | {"n": attempt.n})
        id = _again_id(attempt, reason)
        self.emits.append(Emit(TRANSACTIONS_SIGNED, f"{attempt.chain}:{attempt.signer}", event, id))

    def _confirmed(self, attempt: Attempt, reason: str) -> None:
        """Told to whoever settles withdrawals; top_up_lanes reads the rows."""
        if attempt.withdrawal_id is not None:
            event = TransactionConfirmed.model_validate(
                _named(attempt)
                | {
                    "block_hash": attempt.block_hash,
                    "block_number": attempt.block_number,
                    "outcome": attempt.status,
                    "reason": reason,
                }
            )
            self.emits.append(
                Emit(TRANSACTIONS_CONFIRMED, f"{attempt.chain}:{attempt.signer}", event, event.identity())
            )


def _again_id(attempt: Attempt, reason: str) -> str:
    return f"{attempt.tx_hash}:{reason}:{attempt.version}"


def says_unseen(event_id: str) -> bool:
    """Whether this `transactions.signed` says that nodes do not have a transaction. While that is so, another event says it again
    RESEND_S later; the first one of a signature, and one of a reorg, is never said again."""
    return event_id.split(":")[1:2] == [UNSEEN]


def _named(attempt: Attempt) -> dict[str, Any]:
    names = ("chain", "signer", "nonce", "tx_hash")
    return {name: getattr(attempt, name) for name in names} | {"withdrawal_id": paid_for(attempt)}


def fold(facts: Facts, done: Done) -> None:
    """What one head settled, the next head of the batch leaves alone."""
    for table, row in done.upserts:
        if table is CHAIN_CURSORS:
            facts.news.pop(row[0].removeprefix("withdrawals:"), None)


async def load(connection: Connection, _events: Sequence[Received], news: dict[str, News], at: datetime) -> Facts:
    touched = [(chain, *key) for chain, found in news.items() for key in found.touched]
    withdrawals, groups = await lock_nonces(connection, touched)
    lanes = {(chain, signer) for chain, found in news.items() for signer in found.nonces}
    return Facts(at, dict(news), groups, withdrawals, await lock_lanes(connection, lanes))


def stage(
    chains: Mapping[str, ChainWriter],
    connect: Callable[[], Awaitable[Connection]],
    clock: Callable[[], datetime],
) -> Stage[Facts]:
    """`connect` opens a connection for reading what is open."""
    looker = Looker(chains, connect, clock)
    return Stage(
        name=NAME,
        source=CHAIN_HEADS,
        prepare=looker.prepare,
        load=load,
        decide=decide,
        fold=fold,
        emits=(TRANSACTIONS_CONFIRMED, TRANSACTIONS_SIGNED),
    )
