"""Withdrawals asked for and cancelled beside the flow of events, each in one commit. The API calls it.

| what | how |
| --- | --- |
| request | the row `pending`, its history and `withdrawals.requested`, or what the key was used for before |
| cancel | the row locked; the hold, if there is one, given back; `withdrawals.settled` (cancelled) |

Before a signature the row decides between a cancel and whoever signs: both lock it first, and one of them finds it moved on.
Answer the customer when the journal has the commit, and tell its messages after that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final, NamedTuple

import asyncpg

from agents.withdrawals.errors import KeyReused, NotCancellable, ReservedUser, UnknownWithdrawal
from agents.withdrawals.stored import lock
from agents.withdrawals.withdrawal import (
    NOT_SIGNED,
    Status,
    Withdrawal,
    asked,
    moved,
    released,
    rows_of,
    settled,
)
from ledger.accounts import may_own, shard_of
from ledger.book import TRIES_MAX, settle
from ledger.commit import OVERTAKEN, Sealed, lock_writer, seal
from ledger.errors import PostingRefused
from ledger.posting import Fold
from ledger.record import Message
from ledger.rows import Block, Connection, Op, block
from ledger.store import blocks_of
from topics.catalog import WITHDRAWALS_REQUESTED, WITHDRAWALS_SETTLED
from topics.envelope import value_of
from topics.events import WithdrawalRequested

WRITERS: Final = 8
"""Audit chains that these commits are spread over by withdrawal: commits of one chain wait for each other."""


class Answered(NamedTuple):
    withdrawal: Withdrawal
    sealed: Sealed | None
    """The commit; None: nothing was to be done any more."""


class _Unchanged(Exception):
    """Nothing is to be committed, not even an owner row that was made."""

    def __init__(self, withdrawal: Withdrawal) -> None:
        self.withdrawal = withdrawal


async def request(
    connection: Connection, event: WithdrawalRequested, at: datetime, *, actor: str, traceparent: str | None = None
) -> Answered:
    """Takes a request. One that was taken before is answered with its withdrawal as it now is. Raises KeyReused, ReservedUser."""
    if not may_own(event.user_id):
        raise ReservedUser(event.user_id)
    pending = asked(event, at)
    rows = [block(table, Op.INSERT, [row]) for table, row in rows_of(pending, actor)]
    message = Message(
        WITHDRAWALS_REQUESTED.name,
        event.user_id.encode(),
        value_of(event),
        event.identity(),
        event.ce_type(),
        traceparent,
    )

    async def take(_careful: bool) -> Answered:
        writer = _writer(pending.id)
        async with connection.transaction():
            owners = await lock_writer(connection, writer)
            known = (await lock(connection, [pending.id])).get(pending.id)
            if known is not None:
                raise KeyReused if known.fingerprint != pending.fingerprint else _Unchanged(known)
            sealed = await seal(
                connection,
                writer,
                owners,
                blocks=rows,
                messages=[message],
                at=at,
                actor=actor,
                summary={"requested": 1},
            )
        return Answered(pending, sealed)

    return await _whole(take)


async def cancel(
    connection: Connection, id: str, at: datetime, *, actor: str, traceparent: str | None = None
) -> Answered:
    """Ends a withdrawal that nothing was signed for; one that is cancelled is answered as it is. Raises UnknownWithdrawal,
    NotCancellable."""

    async def take(careful: bool) -> Answered:
        writer = _writer(id)
        async with connection.transaction():
            owners = await lock_writer(connection, writer)
            before = (await lock(connection, [id])).get(id)
            if before is None:
                raise UnknownWithdrawal
            if before.status == Status.CANCELLED:
                raise _Unchanged(before)
            if before.status not in NOT_SIGNED:
                raise NotCancellable(before.status)
            fold = Fold({}, at) if before.hold_id is None else await _released(connection, before, at, careful)
            after, (row, line) = moved(before, Status.CANCELLED, fold.at, actor)
            blocks: list[Block] = [*blocks_of(fold, owners[0].batch)]
            blocks += [block(row[0], Op.UPSERT, [row[1]]), block(line[0], Op.INSERT, [line[1]])]
            _, key, event, event_id = settled(after)
            message = Message(
                WITHDRAWALS_SETTLED.name, key.encode(), value_of(event), event_id, event.ce_type(), traceparent
            )
            sealed = await seal(
                connection, writer, owners, blocks=blocks, messages=[message], at=fold.at, actor=actor,
                summary={"cancelled": 1},
            )  # fmt: skip
        return Answered(after, sealed)

    return await _whole(take)


async def _released(connection: Connection, withdrawal: Withdrawal, at: datetime, careful: bool) -> Fold:
    (result,), fold = await settle(connection, [released(withdrawal)], at, careful=careful)
    if isinstance(result, PostingRefused):
        raise result  # a bug: a withdrawal that is not signed has its hold
    return fold


def _writer(withdrawal_id: str) -> str:
    return f"withdrawal_requests.{shard_of(withdrawal_id, WRITERS)}"


async def _whole(take: Callable[[bool], Awaitable[Answered]]) -> Answered:
    """Runs it, again where another writer was first."""
    careful = False
    for tries in range(1, TRIES_MAX + 1):
        try:
            return await take(careful)
        except _Unchanged as unchanged:
            return Answered(unchanged.withdrawal, None)
        except OVERTAKEN as error:
            if tries == TRIES_MAX:
                raise
            careful = careful or isinstance(error, asyncpg.UniqueViolationError)
    raise AssertionError("unreachable")
