"""A lane's nonces as its chain counts them, beside ours: what differs, and what `stablerail lanes sync --apply` does about it.

| the chain (the least of the endpoints that answer) | it means | applied |
| --- | --- | --- |
| counts as ours, or up to what is in flight | nothing | nothing |
| counts more nonces than we gave | somebody else used the key | the lane pauses, foreign_nonce; the chain's count is its floor |
| counts more than our row says | the row is behind | the row's count follows |
| counts fewer than the lowest of ours that is not final | an endpoint is behind, or the chain was reorganised | nothing |
| holds more in its pool than we gave | somebody else is about to use the key, or our database is older than the chain | nothing |
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple

from agents.withdrawals.attempts import lock_lanes
from agents.withdrawals.errors import LaneRetired
from agents.withdrawals.in_flight import LaneKey
from agents.withdrawals.lanes import WRITER, list_lanes, open_nonces
from agents.withdrawals.sign_transactions import FOREIGN_NONCE, OPEN, PAUSED, RETIRED
from agents.withdrawals.withdrawal import Lane
from chain.errors import RpcError, WrongChainId
from chain.rpc import Call, Rpc
from chain.wire import quantity
from ledger.audit_logs import Log
from ledger.commit import lock_writer, seal
from ledger.rows import Connection, Op, block
from ledger.tables import LANES


class Count(NamedTuple):
    """What one endpoint says of the signer."""

    endpoint: str
    latest: int = 0
    """Nonces that are in blocks."""
    pending: int = 0
    """With those in its pool."""
    failure: str = ""


@dataclass(frozen=True)
class Comparison:
    lane: Lane
    open_nonces: Sequence[int]
    """Of ours, those that are not final."""
    counts: Sequence[Count]
    findings: Sequence[str]
    """For people; empty: nothing differs."""
    after: Lane | None
    """The row as it is to be."""


async def compare(connection: Connection, key: LaneKey, rpcs: Sequence[Rpc], at: datetime) -> Comparison:
    """LookupError when there is no such lane."""
    lane = next((one for one in await list_lanes(connection) if (one.chain, one.signer) == key), None)
    if lane is None:
        raise LookupError(":".join(key))
    counts = await asyncio.gather(*(_count(rpc, key[1]) for rpc in rpcs))
    return judged(lane, await open_nonces(connection, key), counts, at)


async def least_count(rpcs: Sequence[Rpc], signer: str) -> int | None:
    """Nonces of the signer that are in blocks, by the endpoint that counts the fewest; None when none answers."""
    counts = await asyncio.gather(*(_count(rpc, signer) for rpc in rpcs))
    return min((one.latest for one in counts if not one.failure), default=None)


def judged(lane: Lane, nonces: Sequence[int], counts: Sequence[Count], at: datetime) -> Comparison:
    """Pure."""
    found = Comparison(lane, nonces, counts, (), None)
    heard = [count for count in counts if not count.failure]
    if not heard:
        return replace(found, findings=("no endpoint answers: nothing is known",))
    latest, pending = min(one.latest for one in heard), max(one.pending for one in heard)
    said: list[str] = []
    after = lane._replace(chain_nonce=max(lane.chain_nonce, latest))
    if len({one.latest for one in heard}) > 1:
        said.append("the endpoints count differently: the least is believed")
    if latest > lane.next_nonce:
        used = f"{lane.next_nonce} to {latest - 1}"
        said.append(
            f"nonces {used} were used from outside: somebody else has the key, or our database is older than the chain"
        )
        if lane.status == OPEN:
            after = after._replace(status=PAUSED, reason=FOREIGN_NONCE)
    elif pending > lane.next_nonce:
        said.append(
            f"a pool holds {pending - max(latest, lane.next_nonce)} transactions of the signer that are not ours"
        )
    if latest > lane.chain_nonce:
        said.append(f"the lane's row counts {lane.chain_nonce} of the chain's {latest}")
    lowest = min(nonces, default=lane.next_nonce)
    if latest < lowest:
        said.append(
            f"nonces {latest} to {lowest - 1} are final here and the chain does not count them: it is behind, or another"
        )
    changed = after if after != lane and lane.status != RETIRED else None
    if changed is not None:
        changed = changed._replace(version=lane.version + 1, updated_at=at)
    return replace(found, findings=tuple(said), after=changed)


async def apply(connection: Connection, comparison: Comparison, at: datetime, actor: str) -> bool:
    """Stores what the comparison says, with a log. False where the lane is another than was compared: compare again."""
    lane, after = comparison.lane, comparison.after
    assert after is not None
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        now = (await lock_lanes(connection, {(lane.chain, lane.signer)})).get((lane.chain, lane.signer))
        if now is not None and now.status == RETIRED:
            raise LaneRetired(lane.key)
        if now != lane:
            return False
        log = Log(
            actor, "lane.synced", "lane", lane.key, _plain(lane), _plain(after) | {"found": list(comparison.findings)}
        )
        await seal(
            connection, WRITER, owners, blocks=[block(LANES, Op.UPSERT, [after])], messages=[], at=at, actor=actor,
            summary={log.action: 1}, logs=[log],
        )  # fmt: skip
    return True


async def _count(rpc: Rpc, signer: str) -> Count:
    calls = [
        Call("eth_chainId", [], quantity),
        *(Call("eth_getTransactionCount", [signer, tag], quantity) for tag in ("latest", "pending")),
    ]
    try:
        chain_id, latest, pending = await rpc.ask(calls)
        if chain_id != rpc.chain_id:
            raise WrongChainId(rpc.endpoint, rpc.chain_id, chain_id)
    except RpcError as error:
        return Count(rpc.endpoint, failure=error.detail)
    return Count(rpc.endpoint, latest, pending)


def _plain(lane: Lane) -> dict[str, Any]:
    return {
        "status": lane.status,
        "reason": lane.reason,
        "next_nonce": lane.next_nonce,
        "chain_nonce": lane.chain_nonce,
    }
