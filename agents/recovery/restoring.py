"""What is closed when a database was restored, and how it opens again.

| closed | means | opened by |
| --- | --- | --- |
| every lane: paused, `restored` | nothing is signed for it and nothing sent, what is signed already neither | a comparison with its chain |
| every partner: a row of `gates` | no call is made to it; asking it what it has goes on | a comparison with what it has |

The journal comes before every broadcast and every call, so a database that was rebuilt from a whole journal knows all that was
done. Closed is for what was not whole: an old backup without the journal, a topic that lost its end. Stages that act in the
database alone go on: what they repeat is found in the inbox.

The closing commit is the first of the restored database; each opening is a commit with a log that says what was compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

import orjson

from agents.onboarding import provision_wallets
from agents.withdrawals import transfer_by_custodian
from agents.withdrawals.attempts import lock_lanes
from agents.withdrawals.lanes import plain
from agents.withdrawals.sign_transactions import CLEARS_ITSELF, DRAINING, OPEN, PAUSED, RETIRED
from agents.withdrawals.withdrawal import RESTORED, Lane
from ledger.audit_logs import Log
from ledger.commit import Sealed, lock_writer, seal
from ledger.rows import Changes, Connection
from ledger.sql import load
from ledger.tables import GATES, LANES, RESTORES

_sql = load("agents.recovery", "restoring.sql")

WRITER: Final = "rebuild"
PARTNERS: Final = frozenset({provision_wallets.stage().partner, transfer_by_custodian.stage({}).partner})
"""Whom the acting stages call."""
COMPARED: Final = "recovery.compared"


class Restore(NamedTuple):
    """A row of `restores`."""

    id: int
    at: datetime
    actor: str
    first_seq: int
    """The restored database's own records have this number or a higher one; its closing commit is the first."""
    records: int
    """Of the journal's, that it was made of: what comes later with a lower number is of the database that was lost."""


class Gate(NamedTuple):
    """A row of `gates`: closed while it is there."""

    name: str
    reason: str
    closed_at: datetime
    closed_by: str

    @property
    def partner(self) -> str:
        return self.name.removeprefix("partner:")


def gate_of(partner: str) -> str:
    """Its name in `gates`."""
    return f"partner:{partner}"


async def close(
    connection: Connection, at: datetime, actor: str, *, first_seq: int, records: int
) -> tuple[Restore, Sealed]:
    """Closes every lane and every partner of a database that was just brought to the end of its journal, in one commit. `records`:
    the journal's; `first_seq`: the lowest number that a commit from now on can get. Said anew each time: whoever took over before
    may have been another database, whose own numbers begin where that time said."""
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        known = await last_restore(connection)
        restore = Restore((known.id if known else 0) + 1, at, actor, first_seq, records)
        changes = Changes()
        changes.insert(RESTORES, restore)
        logs = [Log(actor, "database.restored", "database", str(restore.id), after={"records": records})]
        for row in await connection.fetch(_sql.lanes):
            before = Lane(*row)
            if before.is_restored or before.status == RETIRED:
                continue  # nothing is ever signed for a retired one
            after = _closed(before, at)
            changes.upsert(LANES, after)
            logs.append(Log(actor, "lane.paused", "lane", before.key, plain(before), plain(after)))
        called = {row[0] for row in await connection.fetch(_sql.partners_called)}
        for partner in sorted(PARTNERS | called):
            gate = Gate(gate_of(partner), RESTORED, at, actor)
            changes.upsert(GATES, gate)
            logs.append(Log(actor, "gate.closed", "gate", gate.name, after={"reason": RESTORED}))
        sealed = await seal(
            connection, WRITER, owners, blocks=changes.blocks(), messages=[], at=at, actor=actor,
            summary={"restored": restore.id, "records": records}, logs=logs,
        )  # fmt: skip
    return restore, sealed


def _closed(lane: Lane, at: datetime) -> Lane:
    """Paused until compared. What a person must look at, has paused or is draining, stays so afterwards."""
    kept = DRAINING if lane.status == DRAINING else ""
    if lane.status == PAUSED and lane.reason not in CLEARS_ITSELF:
        kept = lane.reason
    reason = f"{RESTORED}: {kept}" if kept else RESTORED
    return lane._replace(status=PAUSED, reason=reason, version=lane.version + 1, updated_at=at)


def _opened(lane: Lane, at: datetime) -> Lane:
    kept = lane.reason.removeprefix(RESTORED).removeprefix(": ")
    status, reason = (DRAINING, "") if kept == DRAINING else (PAUSED if kept else OPEN, kept)
    return lane._replace(status=status, reason=reason, version=lane.version + 1, updated_at=at)


async def last_restore(connection: Connection) -> Restore | None:
    row = await connection.fetchrow(_sql.last_restore)
    return None if row is None else Restore(*row)


async def closed_lanes(connection: Connection) -> list[Lane]:
    return [Lane(*row) for row in await connection.fetch(_sql.closed_lanes)]


async def closed_gates(connection: Connection) -> list[Gate]:
    return [Gate(*row) for row in await connection.fetch(_sql.gates)]


async def open_compared(
    connection: Connection, lanes: Sequence[Lane], gates: Sequence[Gate], said: Sequence[Log], at: datetime, actor: str
) -> Sealed:
    """Opens what was compared, in one commit; `said` are the logs of what the comparisons found, of what stays closed too. What has
    changed since it was compared stays closed."""
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        changes = Changes()
        logs = list(said)
        stored = await lock_lanes(connection, {(lane.chain, lane.signer) for lane in lanes})
        for lane in lanes:
            before = stored.get((lane.chain, lane.signer))
            if before is None or (before.next_nonce, before.reason) != (lane.next_nonce, lane.reason):
                continue
            after = _opened(before, at)
            changes.upsert(LANES, after)
            logs.append(Log(actor, "lane.opened", "lane", before.key, plain(before), plain(after)))
        for gate in sorted(gates):
            row = await connection.fetchrow(_sql.lock_gate, gate.name)
            if row is not None and Gate(*row) == gate:
                changes.delete(GATES, (gate.name,))
                logs.append(Log(actor, "gate.opened", "gate", gate.name, before={"reason": gate.reason}))
        summary: dict[str, int] = {}
        for log in logs:
            summary[log.action] = summary.get(log.action, 0) + 1
        return await seal(
            connection, WRITER, owners, blocks=changes.blocks(), messages=[], at=at, actor=actor, summary=summary,
            logs=logs,
        )  # fmt: skip


class Parked(NamedTuple):
    """A withdrawal that waits for a person."""

    id: str
    user_id: str
    chain: str
    amount: int
    recipient: str
    code: str
    since: datetime


async def parked(connection: Connection, limit: int = 1_000) -> list[Parked]:
    """The oldest first."""
    found = (Parked(*row) for row in await connection.fetch(_sql.parked, limit))
    return [one._replace(amount=int(one.amount)) for one in found]


async def findings(connection: Connection) -> dict[str, tuple[datetime, str | None, dict[str, Any]]]:
    """What the newest comparison of each lane and gate said: (when, code, what), by name."""
    rows = await connection.fetch(_sql.findings, ["lane", "gate"])
    return {name: (at, error, orjson.loads(after)) for name, at, error, after in rows}
