"""A nonce of ours that somebody else's transaction has used for good: a person ends what was signed with it, in one commit.

| of | what is stored |
| --- | --- |
| a withdrawal | its attempts replaced; failed, `nonce_taken`; its hold given back; `withdrawals.settled` |
| a top-up | its attempts replaced; failed. Nothing of it was booked, and nothing will be; its lane may be given coins again |

Proven before: two endpoints at least, and more than say otherwise, have the nonce used at the chain's depth, and a receipt of
nothing that we ever signed with it. Under the rows' locks nothing else was signed with it since. The lane stays paused: who has
found out who else uses the key opens it (`stablerail lanes resume`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple

from agents.withdrawals.attempts import lock_lanes, lock_nonces
from agents.withdrawals.errors import NonceNotTaken
from agents.withdrawals.in_flight import LaneKey
from agents.withdrawals.lanes import check_reason
from agents.withdrawals.look import AGREE_MIN
from agents.withdrawals.top_ups import FAILED, OPEN, TopUp
from agents.withdrawals.withdrawal import (
    ENDED,
    NONCE_TAKEN,
    Attempt,
    AttemptStatus,
    Status,
    Withdrawal,
    attempt_row,
    moved,
    released,
    settled,
)
from chain.outcomes import taken
from chain.rpc import Asks
from ledger.audit_logs import Log
from ledger.book import TRIES_MAX, settle
from ledger.commit import OVERTAKEN, lock_writer, seal
from ledger.errors import PostingRefused
from ledger.posting import Fold
from ledger.record import Message
from ledger.rows import Block, Connection, Op, block
from ledger.sql import load
from ledger.store import blocks_of
from ledger.tables import GAS_TOP_UPS
from topics.catalog import WITHDRAWALS_SETTLED
from topics.envelope import value_of

_sql = load("agents.withdrawals", "top_ups.sql")
_tracking = load("agents.withdrawals", "tracking.sql")

WRITER: Final = "foreign_nonces"
_WAITS: Final = frozenset({AttemptStatus.SIGNED, AttemptStatus.BROADCAST})
"""What its attempts must be: one that is in a block may still be ours to settle."""


class Released(NamedTuple):
    """What was ended."""

    about: str
    """`withdrawal` or `top_up`"""
    id: str
    """The withdrawal's, or `MATIC:0x…:7`."""
    tx_hashes: tuple[str, ...]


async def release(
    connection: Connection,
    lane: LaneKey,
    nonce: int,
    rpcs: Sequence[Asks],
    depth_blocks: int,
    reason: str,
    at: datetime,
    actor: str,
) -> Released:
    """`rpcs`: every endpoint of the lane's chain. Raises LookupError where nothing was signed with it, NonceNotTaken, ValueError for a
    reason that is none."""
    check_reason(reason)
    rows = await connection.fetch(_tracking.hashes_of_nonces, lane[0], [lane[1]], [nonce])
    proven = tuple(sorted(row[2] for row in rows))
    if not proven:
        raise LookupError(f"{':'.join(lane)} {nonce}")
    if len(rpcs) < AGREE_MIN:
        raise NonceNotTaken(f"{AGREE_MIN} endpoints must say so, and STABLERAIL_RPC_URLS has {len(rpcs)} of {lane[0]}")
    if not await taken(rpcs, AGREE_MIN, lane[1], nonce, proven, depth_blocks):
        raise NonceNotTaken(
            f"{AGREE_MIN} endpoints do not say that nonce {nonce} is used {depth_blocks} blocks deep, and by nothing that we signed"
        )
    careful = False
    for _ in range(TRIES_MAX - 1):
        try:
            return await _released(connection, lane, nonce, proven, reason, at, actor, careful)
        except OVERTAKEN:
            careful = True
    return await _released(connection, lane, nonce, proven, reason, at, actor, careful)


async def _released(
    connection: Connection,
    lane: LaneKey,
    nonce: int,
    proven: tuple[str, ...],
    reason: str,
    at: datetime,
    actor: str,
    careful: bool,
) -> Released:
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        withdrawals, groups = await lock_nonces(connection, [(*lane, nonce)])
        group = groups[(*lane, nonce)]
        await lock_lanes(connection, {lane})
        _check(group, proven)
        rows = [attempt_row(_replaced(attempt, at)) for attempt in group]
        blocks: list[Block] = [block(rows[0][0], Op.UPSERT, [row for _, row in rows])]
        messages: list[Message] = []
        withdrawal = next(iter(withdrawals.values()), None)
        if withdrawal is not None:
            done = Released("withdrawal", withdrawal.id, proven)
            fold, ended, message = await _failed(connection, withdrawal, at, actor, careful)
            blocks += [*blocks_of(fold, owners[0].batch), *ended]
            messages.append(message)
        else:
            done = Released("top_up", f"{':'.join(lane)}:{nonce}", proven)
            blocks.append(await _not_given(connection, lane, nonce, at))
        after = {"nonce": nonce, "lane": ":".join(lane), "reason": reason, "tx_hashes": list(proven)}
        log = Log(actor, f"{done.about}.released", done.about, done.id, None, after)
        await seal(
            connection, WRITER, owners, blocks=blocks, messages=messages, at=at, actor=actor, summary={log.action: 1},
            logs=[log],
        )  # fmt: skip
    return done


def _check(group: Sequence[Attempt], proven: tuple[str, ...]) -> None:
    if tuple(sorted(attempt.tx_hash for attempt in group)) != proven:
        raise NonceNotTaken("another attempt was signed with it meanwhile: once more")
    if any(attempt.status not in _WAITS for attempt in group):
        raise NonceNotTaken(f"its attempts are {', '.join(attempt.status for attempt in group)}")


def _replaced(attempt: Attempt, at: datetime) -> Attempt:
    return attempt._replace(
        status=AttemptStatus.REPLACED.value, error=NONCE_TAKEN, updated_at=at, version=attempt.version + 1
    )


async def _failed(
    connection: Connection, withdrawal: Withdrawal, at: datetime, actor: str, careful: bool
) -> tuple[Fold, list[Block], Message]:
    if withdrawal.status in ENDED:
        raise NonceNotTaken(f"withdrawal {withdrawal.id} is {withdrawal.status}")
    (result,), fold = await settle(connection, [released(withdrawal)], at, careful=careful)
    if isinstance(result, PostingRefused):
        raise result  # a bug: what has not ended has its hold
    ended, (row, line) = moved(withdrawal, Status.FAILED, fold.at, actor, NONCE_TAKEN)
    _, key, event, event_id = settled(ended)
    message = Message(WITHDRAWALS_SETTLED.name, key.encode(), value_of(event), event_id, event.ce_type())
    return fold, [block(row[0], Op.UPSERT, [row[1]]), block(line[0], Op.INSERT, [line[1]])], message


async def _not_given(connection: Connection, lane: LaneKey, nonce: int, at: datetime) -> Block:
    row = await connection.fetchrow(_sql.lock_top_up, *lane, nonce)
    if row is None or row["state"] != OPEN:
        raise NonceNotTaken("its top-up has ended")
    top_up = TopUp(*row)
    return block(GAS_TOP_UPS, Op.UPSERT, [top_up._replace(amount=int(top_up.amount), state=FAILED, ended_at=at)])
