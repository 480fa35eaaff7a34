"""Lanes as people see and change them: listed, paused with a reason, opened again. Each change is a log.

A lane that paused by itself opens by itself, but for one: the chain counted transactions of the signer that we did not sign.
Whoever opens that one has found out who else uses the key; its nonces go on where the chain is.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from agents.withdrawals.attempts import lock_lanes
from agents.withdrawals.sign_transactions import CLEARS_ITSELF, OPEN, PAUSED
from agents.withdrawals.withdrawal import Lane
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
    there is no such lane, ValueError for a reason that is none."""
    if not reason.strip() or len(reason) > REASON_MAX or not reason.isprintable():
        raise ValueError(f"a reason has 1 to {REASON_MAX} printable characters")
    if reason in CLEARS_ITSELF:
        raise ValueError(f"{reason} is what a lane says by itself, and opens by itself")
    return await _change(connection, lane, PAUSED, reason, at, actor)


async def open_lane(connection: Connection, lane: tuple[str, str], at: datetime, actor: str) -> Sealed:
    """It signs again, from the chain's own count on where that is higher. LookupError when there is no such lane."""
    return await _change(connection, lane, OPEN, "", at, actor)


async def _change(
    connection: Connection, key: tuple[str, str], status: str, reason: str, at: datetime, actor: str
) -> Sealed:
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        before = (await lock_lanes(connection, {key})).get(key)
        if before is None:
            raise LookupError(":".join(key))
        nonce = max(before.next_nonce, before.chain_nonce) if status == OPEN else before.next_nonce
        after = before._replace(
            next_nonce=nonce, status=status, reason=reason, version=before.version + 1, updated_at=at
        )
        verb = "opened" if status == OPEN else "paused"
        log = Log(actor, f"lane.{verb}", "lane", before.key, _plain(before), _plain(after))
        return await seal(
            connection, WRITER, owners, blocks=[block(LANES, Op.UPSERT, [after])], messages=[], at=at, actor=actor,
            summary={log.action: 1}, logs=[log],
        )  # fmt: skip


def _plain(lane: Lane) -> dict[str, Any]:
    return {"status": lane.status, "reason": lane.reason, "next_nonce": lane.next_nonce}
