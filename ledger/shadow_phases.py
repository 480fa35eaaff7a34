"""How far shadow mode is: the phase's row, what stands in the way of the next, the discrepancies, and the way back.

| step | what it needs |
| --- | --- |
| off -> shadow | nothing; what the table missed is written there first |
| shadow -> ledger | 7 days in the phase without a discrepancy, and none now |
| ledger -> strict | 48 hours so |
| strict -> cut_over | 72 hours so |
| back | nothing; what the table missed is written there first |
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple

from ledger.accounts import SYSTEM
from ledger.audit_logs import Log
from ledger.commit import Sealed, Unchanged, lock_writer, seal
from ledger.errors import PhaseRefused
from ledger.rows import Connection, Op, block, uuids
from ledger.shadow import Difference, Mirror, Phase, Step
from ledger.sql import load
from ledger.tables import SHADOW, SHADOW_DISCREPANCIES

_sql = load("ledger", "sql/shadow.sql")

WRITER: Final = "shadow"
CLEAN: Final = {
    Phase.LEDGER: timedelta(days=7),
    Phase.STRICT: timedelta(hours=48),
    Phase.CUT_OVER: timedelta(hours=72),
}
"""How long the phase before must have been clean."""
SEEN_AGAIN: Final = timedelta(minutes=1)
"""A discrepancy that is seen all the time is not stored all the time."""
PAGE: Final = 1_000
BEHIND_AT_ONCE: Final = 100_000
"""Accounts that the table has missed, found by one pass over all of them: a page at a time, a million would take a thousand passes."""
SHOWN_MAX: Final = 5
_FIRST_ID: Final = "0" * 32

Progress = Callable[[int], None]
"""Called with how many more customers or accounts are done."""


class State(NamedTuple):
    """Where it stands. Version 0: nobody has decided yet."""

    phase: Phase = Phase.OFF
    version: int = 0
    changed_at: datetime | None = None
    changed_by: str = ""
    reason: str | None = None


class Found(NamedTuple):
    """A discrepancy as it is stored; base units."""

    user_id: str
    type: str
    ledger: int
    legacy: str
    first_seen: datetime
    last_seen: datetime


def first_phase(*, shadow: bool, strict: bool, source: str) -> Phase:
    """What the settings say. `source`: legacy or ledger."""
    if not shadow:
        return Phase.CUT_OVER if source == "ledger" else Phase.OFF
    if source == "legacy":
        return Phase.SHADOW
    return Phase.STRICT if strict else Phase.LEDGER


async def state(connection: Connection) -> State:
    row = await connection.fetchrow(_sql.phase)
    return State() if row is None else State(Phase(row[0]), *list(row)[1:])


async def begin(connection: Connection, first: Phase, at: datetime, actor: str) -> Sealed | None:
    """Stores the first phase; None where there is one."""
    try:
        async with connection.transaction():
            owners = await lock_writer(connection, WRITER)
            if (await state(connection)).version:
                raise Unchanged
            return await _store(connection, owners, State(), first, at, actor, "settings")
    except Unchanged:
        return None


def clean_since(now: State, last_difference: datetime | None) -> datetime | None:
    """Since when the phase has found no discrepancy; None before the first phase."""
    if now.changed_at is None or last_difference is None:
        return now.changed_at
    return max(now.changed_at, last_difference)


def in_the_way(now: State, last_difference: datetime | None, at: datetime) -> list[str]:
    """What stands in the way of the next phase, as far as time tells."""
    if now.phase is Phase.CUT_OVER:
        return ["there is no phase after cut_over"]
    wanted = CLEAN.get(_beside(now.phase, 1))
    since = clean_since(now, last_difference)
    if wanted is None or since is None or at - since >= wanted:
        return []
    return [f"clean since {since:%Y-%m-%d %H:%M:%S} UTC, {_hours(at - since)} h of {_hours(wanted)} h"]


def _hours(span: timedelta) -> str:
    return f"{max(0, span // timedelta(minutes=6)) / 10:g}"


def _beside(phase: Phase, by: int) -> Phase:
    phases = list(Phase)
    return phases[phases.index(phase) + by]


async def last_difference(connection: Connection) -> datetime | None:
    found: datetime | None = await connection.fetchval(_sql.last_difference)
    return found


async def discrepancies(connection: Connection, since: datetime, limit: int = 100) -> list[Found]:
    """Seen since then, the newest first."""
    rows = await connection.fetch(_sql.discrepancies, since, limit)
    return [Found(user, type, int(ledger), *rest) for user, type, ledger, *rest in rows]


async def store_differences(connection: Connection, differences: Sequence[Difference], at: datetime) -> Sealed | None:
    """Stores each once, with when it was first and last seen; None when all were stored a moment ago."""
    by_id = {_id(one): one for one in differences}
    if not by_id:
        return None
    try:
        async with connection.transaction():
            owners = await lock_writer(connection, WRITER)
            rows = await connection.fetch(_sql.seen, uuids(by_id))
            seen = {row[0].hex: (row[1], row[2]) for row in rows}
            new = []
            for id, (user, type, ledger, legacy) in by_id.items():
                first, last = seen.get(id, (at, None))
                if last is None or at - last >= SEEN_AGAIN:
                    new.append((id, user, type.value, ledger, str(legacy), first, at))
            if not new:
                raise Unchanged
            return await seal(
                connection, WRITER, owners, blocks=[block(SHADOW_DISCREPANCIES, Op.UPSERT, new)], messages=[],
                at=at, actor=WRITER, summary={"discrepancies": len(new)},
            )  # fmt: skip
    except Unchanged:
        return None


def _id(one: Difference) -> str:
    text = "\0".join((one.user_id, one.type.value, str(one.ledger), str(one.legacy)))
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"discrepancy").hexdigest()


async def scan(
    connection: Connection, mirror: Mirror, progress: Progress = lambda _: None
) -> AsyncIterator[Difference]:
    """Every difference there is, a page of customers in memory: the table's customers, then the ledger's own."""
    after: str | None = None
    while True:
        users = await mirror.page(connection, after, PAGE)
        for one in (await mirror.look(connection, users)).differences(mirror.legacy):
            yield one
        progress(len(users))
        if len(users) < PAGE:
            break
        after = users[-1]
    owner = ""
    while True:
        owners = [row[0] for row in await connection.fetch(_sql.owners, owner, SYSTEM, PAGE)]
        there = await mirror.read(connection, owners)
        alone = [user for user in owners if user not in there]
        for one in (await mirror.look(connection, alone)).differences(mirror.legacy):
            yield one
        progress(len(alone))
        if len(owners) < PAGE:
            return
        owner = owners[-1]


async def move(
    connection: Connection,
    mirror: Mirror,
    by: int,
    at: datetime,
    *,
    actor: str,
    force: str | None = None,
    progress: Progress = lambda _: None,
) -> tuple[State, Sealed]:
    """One phase on (`by` 1) or back (-1). `force`: why, although something stands in the way; it is logged.

    `connection` has no mirror of its own. The phase's row is locked while it moves: postings wait for as long as it takes to
    find what the table has missed since the first pass. Raises PhaseRefused.
    """
    now = await state(connection)
    if now.version == 0:
        raise PhaseRefused("moved", ["there is no phase yet; a worker or the API stores the first when it starts"])
    reasons = await _reasons(connection, mirror, now, by, at, progress)
    if reasons and (force is None or _ends(now.phase, by)):
        raise PhaseRefused(_beside(now.phase, by) if not _ends(now.phase, by) else "moved", reasons)
    wanted = _beside(now.phase, by)
    missed = wanted.writes and not now.phase.writes
    if missed:
        await catch_up(connection, mirror, progress)
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        await connection.execute(_sql.queue)
        row = await connection.fetchrow(_sql.lock_phase)
        assert row is not None
        if row[1] != now.version:
            raise PhaseRefused(wanted, [f"somebody else moved it to {row[0]}"])
        if missed:
            await catch_up(connection, mirror)
        sealed = await _store(connection, owners, now, wanted, at, actor, force, reasons)
    return State(wanted, now.version + 1, at, actor, force), sealed


def _ends(phase: Phase, by: int) -> bool:
    return phase is (Phase.CUT_OVER if by > 0 else Phase.OFF)


async def _reasons(
    connection: Connection, mirror: Mirror, now: State, by: int, at: datetime, progress: Progress
) -> list[str]:
    if by < 0:
        return ["there is no phase before off"] if now.phase is Phase.OFF else []
    reasons = in_the_way(now, await last_difference(connection), at)
    if now.phase.writes:
        found = [one async for one in _first(scan(connection, mirror, progress), SHOWN_MAX)]
        if found:
            mirror.tell(found)
            await store_differences(connection, found, at)
            named = ", ".join(f"{one.user_id}.{one.type}" for one in found)
            reasons.append(f"balances differ now: {named}{' and more' if len(found) == SHOWN_MAX else ''}")
    return reasons


async def _first(found: AsyncIterator[Difference], count: int) -> AsyncIterator[Difference]:
    left = count
    async for one in found:
        yield one
        left -= 1
        if not left:
            return


async def catch_up(connection: Connection, mirror: Mirror, progress: Progress = lambda _: None) -> int:
    """Writes into the table what it missed of the ledger; how many accounts were behind.

    An account without a mark has moved only while nothing was written: the table is given all of it where it has nothing.
    Where it has something that nobody of us wrote, it is left alone: a read finds it, a person decides.
    """
    after, behind, types = _FIRST_ID, 0, list(mirror.legacy.types)
    while rows := await connection.fetch(_sql.behind, types, after, BEHIND_AT_ONCE):
        after = rows[-1][0]
        for page in (rows[n : n + PAGE] for n in range(0, len(rows), PAGE)):
            behind += await _written(connection, mirror, page)
            progress(len(page))
    return behind


async def _written(connection: Connection, mirror: Mirror, rows: Sequence[Any]) -> int:
    """A page of `catch_up`: how many accounts were brought up."""
    unmarked = {owner for _, owner, *_, mark in rows if mark is None}
    look = await mirror.look(connection, sorted(unmarked)) if unmarked else None
    there = look.legacy if look is not None else {}
    steps = []
    for id, owner, type, balance, version, mark in rows:
        if mark is None and look is not None and owner not in look.ledger:
            continue  # changed whenever both were read: what the table has is not known
        value = there.get(owner, {}).get(type, Decimal(0))
        if mark is None and value and value != mirror.legacy.shown(int(balance)):
            continue
        known = mark if mark is not None else balance if value else 0
        steps.append(Step(id, int(known), int(balance), version))
    async with connection.transaction():
        await mirror.write(connection, steps)
    return len(steps)


async def _store(
    connection: Connection,
    owners: Sequence[object],
    before: State,
    phase: Phase,
    at: datetime,
    actor: str,
    reason: str | None,
    overridden: Sequence[str] = (),
) -> Sealed:
    row = ("phase", before.version + 1, phase.value, at, actor, reason)
    was = {"phase": before.phase.value}
    now = {"phase": phase.value, "reason": reason, "overridden": list(overridden)}
    return await seal(
        connection, WRITER, owners,  # type: ignore[arg-type]
        blocks=[block(SHADOW, Op.UPSERT, [row])], messages=[], at=at, actor=actor, summary={"phase": phase.value},
        logs=[Log(actor, "shadow.moved", "shadow", "phase", was, now)],
    )  # fmt: skip
