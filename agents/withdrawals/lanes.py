"""Lanes as people see and change them: listed, paused with a reason, opened again. Each change is a log.

A lane that paused by itself opens by itself, but for one: the chain counted transactions of the signer that we did not sign.
Whoever opens that one has found out who else uses the key; its nonces go on where the chain is. After a restore a lane is opened
by comparing (agents/recovery); a person who opens it unseen says why.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from agents.withdrawals.attempts import lock_lanes
from agents.withdrawals.errors import LaneRestored
from agents.withdrawals.sign_transactions import CLEARS_ITSELF, OPEN, PAUSED
from agents.withdrawals.withdrawal import RESTORED, Lane
from ledger.audit_logs import Log
from ledger.commit import Sealed, lock_writer, seal
from ledger.rows import Connection, Op, block
from ledger.sql import load
from ledger.tables import LANES

_sql = load("agents.withdrawals", "sending.sql")

WRITER: Final = "lanes"
REASON_MAX: Final = 200
"""Characters."""


async def list_lanes(connection: Connection) -> list[Lane]:
    """Every lane, by chain and signer."""
    return [Lane(*row) for row in await connection.fetch(_sql.lanes)]


async def pause_lane(connection: Connection, lane: tuple[str, str], reason: str, at: datetime, actor: str) -> Sealed:
    """Nothing is signed for (chain, signer) until a person opens it. What is signed already goes its way. LookupError when
    there is no such lane, ValueError for a reason that is none, LaneRestored where it is paused until it was compared."""
    check_reason(reason)
    if reason in CLEARS_ITSELF or reason.partition(":")[0] == RESTORED:
        raise ValueError(f"{reason} is what a lane says by itself")
    return await _change(connection, lane, PAUSED, reason, at, actor)


async def open_lane(
    connection: Connection, lane: tuple[str, str], at: datetime, actor: str, *, forced: str | None = None
) -> Sealed:
    """It signs again, from the chain's own count on where that is higher. LookupError when there is no such lane. One that is
    restored only where `forced` says why, else LaneRestored."""
    if forced is not None:
        check_reason(forced)
    return await _change(connection, lane, OPEN, "", at, actor, forced)


def check_reason(reason: str) -> None:
    """ValueError for what says nothing."""
    if not reason.strip() or len(reason) > REASON_MAX or not reason.isprintable():
        raise ValueError(f"a reason has 1 to {REASON_MAX} printable characters")


async def _change(
    connection: Connection, key: tuple[str, str], status: str, reason: str, at: datetime, actor: str,
    forced: str | None = None,
) -> Sealed:  # fmt: skip
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        before = (await lock_lanes(connection, {key})).get(key)
        if before is None:
            raise LookupError(":".join(key))
        if before.is_restored and forced is None:
            raise LaneRestored(before.key)
        nonce = max(before.next_nonce, before.chain_nonce) if status == OPEN else before.next_nonce
        after = before._replace(
            next_nonce=nonce, status=status, reason=reason, version=before.version + 1, updated_at=at
        )
        said = {} if forced is None else {"forced": forced}
        verb = "opened" if status == OPEN else "paused"
        log = Log(actor, f"lane.{verb}", "lane", before.key, plain(before), plain(after) | said)
        return await seal(
            connection, WRITER, owners, blocks=[block(LANES, Op.UPSERT, [after])], messages=[], at=at, actor=actor,
            summary={log.action: 1}, logs=[log],
        )  # fmt: skip


def plain(lane: Lane) -> dict[str, Any]:
    return {"status": lane.status, "reason": lane.reason, "next_nonce": lane.next_nonce}
