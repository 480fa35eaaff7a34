"""What people want of a withdrawal that is signed: another attempt with higher fees, or a cancel. Stored and logged in one commit.

Who asks has no key. raise_fees takes the wish up at the chain's next head, signs, and says in its row what became of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple

from agents.withdrawals import stored
from agents.withdrawals.attempts import attempts_of
from agents.withdrawals.errors import NotRaisable, UnknownWithdrawal
from agents.withdrawals.lanes import check_reason
from agents.withdrawals.raising import ATTEMPTS_MAX, ATTEMPTS_USED, CANCELLING, hopeless
from agents.withdrawals.sign_transactions import CANCEL, FEES_OVER_CAP
from agents.withdrawals.withdrawal import Attempt
from chain.fees import FeePolicy, Fees, raised
from ledger.audit_logs import Log
from ledger.commit import Unchanged, lock_writer, seal
from ledger.rows import Connection, Op, block
from ledger.sql import load
from ledger.tables import ATTEMPT_WISHES

_sql = load("agents.withdrawals", "raising.sql")

WRITER: Final = "attempt_wishes"
SPEED_UP: Final = "speed_up"
OPEN: Final = "open"
DONE: Final = "done"
REFUSED: Final = "refused"


class Wish(NamedTuple):
    """A row of `attempt_wishes`: the last one of its withdrawal."""

    withdrawal_id: str
    chain: str
    kind: str
    """`speed_up` or `cancel`"""
    attempts_max: int
    """Of the nonce, the new one included."""
    state: str
    """`open`, `done`, `refused`"""
    code: str | None
    """Why it was refused, or what it waits for."""
    n: int | None
    """The attempt that was signed for it."""
    asked_by: str
    reason: str
    asked_at: datetime
    ended_at: datetime | None


async def ask(
    connection: Connection,
    id: str,
    kind: str,
    attempts_max: int,
    policy: FeePolicy,
    reason: str,
    at: datetime,
    actor: str,
) -> Wish:
    """Stores the wish, in place of one that is open; the same that is open already is answered as it is.

    Raises UnknownWithdrawal, NotRaisable (why: see raising.py), ValueError for a reason that is none."""
    check_reason(reason)
    wish: Wish | None = None
    try:
        async with connection.transaction():
            owners = await lock_writer(connection, WRITER)
            withdrawal = (await stored.lock(connection, [id])).get(id)
            if withdrawal is None:
                raise UnknownWithdrawal
            group = await attempts_of(connection, id)
            why = hopeless(withdrawal, group) or _why_not(group, kind, attempts_max, policy)
            if why:
                raise NotRaisable(why)
            wish = await wish_of(connection, id)
            if wish is not None and (wish.state, wish.kind, wish.attempts_max) == (OPEN, kind, attempts_max):
                raise Unchanged
            wish = Wish(id, withdrawal.chain, kind, attempts_max, OPEN, None, None, actor, reason, at, None)
            after = {"kind": kind, "attempts": len(group), "attempts_max": attempts_max, "reason": reason}
            log = Log(actor, f"withdrawal.{kind}_asked", "withdrawal", id, None, after)
            await seal(
                connection, WRITER, owners, blocks=[block(ATTEMPT_WISHES, Op.UPSERT, [wish])], messages=[], at=at,
                actor=actor, summary={log.action: 1}, logs=[log],
            )  # fmt: skip
    except Unchanged:
        pass
    assert wish is not None
    return wish


def _why_not(group: Sequence[Attempt], kind: str, attempts_max: int, policy: FeePolicy) -> str:
    """What can be told without the chain."""
    newest = group[-1]
    if kind == CANCEL and newest.kind == CANCEL:
        return CANCELLING
    if len(group) >= min(attempts_max, ATTEMPTS_MAX):
        return ATTEMPTS_USED
    fees = Fees(newest.max_fee, newest.priority_fee)
    return FEES_OVER_CAP if raised(fees, fees, policy) is None else ""


async def wish_of(connection: Connection, id: str) -> Wish | None:
    return (await wishes_of(connection, [id])).get(id)


async def wishes_of(connection: Connection, ids: Sequence[str]) -> dict[str, Wish]:
    """By withdrawal, whatever their state."""
    return {row[0]: Wish(*row) for row in await connection.fetch(_sql.wishes_of, ids)}


async def wished(connection: Connection, chain: str) -> list[str]:
    """Withdrawals with a wish that is open; no more than a hundred."""
    return [row[0] for row in await connection.fetch(_sql.wished, chain)]
