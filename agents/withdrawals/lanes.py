"""Lanes as people see and change them. Each change is a log.

| | |
| --- | --- |
| added | its key is known: workers sign with it within seconds, once the chain was looked at |
| paused | nothing is signed until a person opens it; what is signed goes its way |
| draining | the same, on the way to be retired; it may be opened again |
| retired | for good, once the chain has ended all its nonces; what its address holds is moved by people |

A lane that paused by itself opens by itself, but for one: a nonce of ours was used for good by a transaction that we did not sign.
One of which the chain counts transactions that we did not sign does as soon as it counts them no more: never, where they are
final. Whoever opens either has found out who else uses the key; its nonces go on where the chain is. After a restore a lane is opened
by comparing (agents/recovery); a person who opens it unseen says why.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from agents.withdrawals.attempts import lock_lanes
from agents.withdrawals.errors import LaneInFlight, LaneNotCounted, LaneRestored, LaneRetired
from agents.withdrawals.in_flight import LaneKey
from agents.withdrawals.sign_transactions import DRAINING, OPEN, OPENS_ITSELF, PAUSED, RETIRED
from agents.withdrawals.withdrawal import RESTORED, Lane
from ledger.audit_logs import Log
from ledger.commit import Sealed, lock_writer, seal
from ledger.rows import Connection, Op, block
from ledger.sql import load
from ledger.tables import LANE_KEYS, LANES

_sql = load("agents.withdrawals", "lanes.sql")

WRITER: Final = "lanes"
REASON_MAX: Final = 200
"""Characters."""


async def list_lanes(connection: Connection) -> list[Lane]:
    """Every lane, by chain and signer."""
    return [Lane(*row) for row in await connection.fetch(_sql.lanes)]


async def add_lane(connection: Connection, lane: LaneKey, source: str, at: datetime, actor: str) -> Sealed:
    """Says where the key of (chain, signer) is (chain/keys.py); again: where it is now. The lane's row is made by the worker that
    first signs for it, from the chain's own count. LaneRetired, LaneRestored."""
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        known = (await lock_lanes(connection, {lane})).get(lane)
        if known is not None and known.status == RETIRED:
            raise LaneRetired(known.key)
        if known is not None and known.is_restored:
            raise LaneRestored(known.key)
        log = Log(actor, "lane.added", "lane", ":".join(lane), None, {"source": source})
        return await seal(
            connection, WRITER, owners, blocks=[block(LANE_KEYS, Op.UPSERT, [(*lane, source, at)])], messages=[], at=at,
            actor=actor, summary={log.action: 1}, logs=[log],
        )  # fmt: skip


async def pause_lane(connection: Connection, lane: tuple[str, str], reason: str, at: datetime, actor: str) -> Sealed:
    """Nothing is signed for (chain, signer) until a person opens it. What is signed already goes its way. LookupError when
    there is no such lane, ValueError for a reason that is none, LaneRestored where it is paused until it was compared."""
    check_reason(reason)
    if reason in OPENS_ITSELF or reason.partition(":")[0] == RESTORED:
        raise ValueError(f"{reason} is what a lane says by itself")
    return await _change(connection, lane, PAUSED, reason, at, actor)


async def open_lane(
    connection: Connection,
    lane: tuple[str, str],
    at: datetime,
    actor: str,
    *,
    forced: str | None = None,
    counted: int | None = None,
) -> Sealed:
    """It signs again, from the chain's own count on where that is higher: `counted`, the least that any endpoint says now. A count
    that was made up would leave a gap that no block ever fills: the one that the row has, from which nobody says so now, counts only
    where `forced` says why, else LaneNotCounted. One that is restored only so, too, else LaneRestored. LookupError when there is no
    such lane."""
    if forced is not None:
        check_reason(forced)
    return await _change(connection, lane, OPEN, "", at, actor, forced, counted)


def check_reason(reason: str) -> None:
    """ValueError for what says nothing."""
    if not reason.strip() or len(reason) > REASON_MAX or not reason.isprintable():
        raise ValueError(f"a reason has 1 to {REASON_MAX} printable characters")


async def drain_lane(connection: Connection, lane: LaneKey, at: datetime, actor: str) -> Sealed:
    """Nothing is signed for it any more; what is signed goes its way. LookupError, LaneRetired, LaneRestored."""
    return await _change(connection, lane, DRAINING, "", at, actor)


async def retire_lane(connection: Connection, lane: LaneKey, at: datetime, actor: str) -> Sealed:
    """For good. LookupError; LaneInFlight while the chain has not ended all its nonces; LaneRestored."""
    return await _change(connection, lane, RETIRED, "", at, actor)


_VERBS: Final = {OPEN: "opened", PAUSED: "paused", DRAINING: "drained", RETIRED: "retired"}


async def _change(
    connection: Connection,
    key: LaneKey,
    status: str,
    reason: str,
    at: datetime,
    actor: str,
    forced: str | None = None,
    counted: int | None = None,
) -> Sealed:
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        before = (await lock_lanes(connection, {key})).get(key)
        if before is None:
            raise LookupError(":".join(key))
        if before.status == RETIRED:
            raise LaneRetired(before.key)
        if before.is_restored and forced is None:
            raise LaneRestored(before.key)
        if status == OPEN and counted is None and forced is None and before.chain_nonce > before.next_nonce:
            raise LaneNotCounted(before.key, before.next_nonce, before.chain_nonce)
        # under the lane's lock nobody signs a nonce for it meanwhile
        if status == RETIRED and (nonces := await open_nonces(connection, key)):
            raise LaneInFlight(before.key, nonces)
        count = before.chain_nonce if counted is None else counted
        nonce = max(before.next_nonce, count) if status == OPEN else before.next_nonce
        after = before._replace(
            next_nonce=nonce, chain_nonce=count, status=status, reason=reason, version=before.version + 1, updated_at=at
        )
        said = {} if forced is None else {"forced": forced}
        log = Log(actor, f"lane.{_VERBS[status]}", "lane", before.key, plain(before), plain(after) | said)
        return await seal(
            connection, WRITER, owners, blocks=[block(LANES, Op.UPSERT, [after])], messages=[], at=at, actor=actor,
            summary={log.action: 1}, logs=[log],
        )  # fmt: skip


async def open_nonces(connection: Connection, lane: LaneKey) -> list[int]:
    """Those that the chain has not ended, lowest first."""
    return [row[0] for row in await connection.fetch(_sql.open_nonces, *lane)]


def plain(lane: Lane) -> dict[str, Any]:
    return {"status": lane.status, "reason": lane.reason, "next_nonce": lane.next_nonce}
