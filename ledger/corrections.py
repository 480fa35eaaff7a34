"""Corrections by people: one asks, another approves, and only then the ledger moves.

| step | what | why there |
| --- | --- | --- |
| request | legs checked, a row in `corrections` | nothing is posted on one person's word |
| approve | the row locked, then the accounts; posted under an id that follows from the correction's | twice is harmless; of two at once one posts |
| reject | the row locked and ended | |

A correction may also end what it is about (agents/withdrawals/ended_by_people.py): then who approves it brings the deed.

Each writes its log in the same commit. So does a refusal of the ledger or of the second person: the log is committed, the
correction stays as it was, and the caller gets the refusal.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Final, NamedTuple

import orjson

from ledger.accounts import SUSPENSE, SYSTEM, Account, AccountType, spendable
from ledger.audit_logs import Log
from ledger.commit import Owner, lock_writer, seal
from ledger.errors import (
    ActorMissing,
    BadLegs,
    CorrectionDecided,
    CorrectionRefused,
    CorrectionReused,
    InsufficientFunds,
    MoneyHeld,
    NothingLeft,
    OtherCommand,
    PostingRefused,
    ReasonMissing,
    SameActor,
    UnknownCorrection,
    UnknownUser,
)
from ledger.levels import buffer_levels
from ledger.posting import Direction, Fold, Leg, Transaction, check_balanced, check_leg, credit, debit
from ledger.record import Message
from ledger.rows import Block, Connection, Op, Row, block
from ledger.sql import load
from ledger.store import blocks_of, lock
from ledger.tables import CORRECTIONS

_sql = load("ledger", "sql/corrections.sql")

WRITER: Final = "corrections"
REASON_LENGTH_MAX: Final = 1_000
LEGS_MAX: Final = 100
HOLDING: Final = frozenset({AccountType.PENDING_WITHDRAWAL, AccountType.PENDING_INVESTMENT})
Left = Callable[[], Awaitable[int | None]]
"""Base units; None: there is no telling."""
CORRECTION: Final = "correction"
SUSPENSE_ASSIGNED: Final = "suspense_assigned"
POSTED: Final = frozenset({CORRECTION, SUSPENSE_ASSIGNED})
"""Kinds that are their legs and nothing else."""
_NAMESPACE: Final = uuid.UUID("5e1f3a52-0f0e-4c4d-9a3b-8f6f0c1d2e3f")


@dataclass(frozen=True, slots=True)
class Correction:
    """A correction as it is stored. `transaction_id`: under which it is, or would be, posted."""

    id: str
    """32 hex digits."""
    kind: str
    """correction | suspense_assigned | withdrawal_paid | withdrawal_failed"""
    state: str
    """requested | approved | rejected"""
    reason: str
    reference: str
    legs: tuple[Leg, ...]
    transaction_id: str
    requested_by: str
    requested_at: datetime
    decided_by: str | None = None
    decided_at: datetime | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        found = asdict(replace(self, legs=()))
        times = {name: value.isoformat() for name, value in found.items() if isinstance(value, datetime)}
        return {**found, **times, "legs": _plain(self.legs)}

    def transaction(self) -> Transaction:
        return Transaction(self.transaction_id, self.kind, self.reference, self.legs)

    def _block(self) -> Block:
        row: Row = (
            self.id, self.kind, self.state, self.reason, self.reference, _plain(self.legs), self.transaction_id,
            self.requested_by, self.requested_at, self.decided_by, self.decided_at,
        )  # fmt: skip
        return block(CORRECTIONS, Op.UPSERT, [row])

    def same_wish(self, other: Correction) -> bool:
        mine, its = ((c.kind, c.reason, c.reference, _plain(c.legs), c.requested_by) for c in (self, other))
        return mine == its


class Done(NamedTuple):
    """What an approval does, for its commit."""

    fold: Fold
    blocks: Sequence[Block] = ()
    """Beside the fold's."""
    messages: Sequence[Message] = ()


Deed = Callable[[Correction], Awaitable[Done]]
"""Within the approval's transaction, the correction locked; it locks what it needs. Raises CorrectionRefused, PostingRefused."""


async def request(
    connection: Connection, correction_id: str, legs: Sequence[Leg], reason: str, actor: str, at: datetime,
    *, kind: str = CORRECTION, reference: str = "", left: Left | None = None, transaction_id: str | None = None,
) -> Correction:  # fmt: skip
    """Asks for a correction. The same id with the same contents answers what is there and changes nothing. `left`: how much there is
    to correct of what it is about, asked where nobody else asks or approves meanwhile. `transaction_id`: where it is not its own.

    Raises CorrectionRefused, PostingRefused for legs that could never be posted; nothing is written then.
    """
    _check(legs, reason, actor)
    wanted = Correction(
        correction_id,
        kind,
        "requested",
        reason.strip(),
        reference or correction_id,
        tuple(legs),
        transaction_id or uuid.uuid5(_NAMESPACE, correction_id).hex,
        actor,
        at,
    )
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        known = await _find(connection, correction_id)
        if known is not None:
            if not known.same_wish(wanted):
                raise CorrectionReused(correction_id)
            return known
        await _check_customers(connection, legs)
        if left is not None:
            await _check_left(connection, wanted, await left())
        log = Log(actor, "correction.requested", "correction", wanted.id, after=wanted.plain())
        await _seal(connection, owners, [wanted._block()], log, at)
    return wanted


async def assign_suspense(
    connection: Connection, correction_id: str, user_id: str, amount: int, reason: str, actor: str, at: datetime,
    *, reference: str = "",
) -> Correction:  # fmt: skip
    """Asks that money in suspense becomes a customer's, of what is about `reference` no more than was parked. As `request`."""
    legs = (debit(spendable(user_id), amount), credit(SUSPENSE, amount))

    async def left() -> int | None:
        ((came, remains),) = await connection.fetch(_sql.parked, reference, SUSPENSE.id)
        return int(remains) if int(came) else None  # a word of people's own, not what was parked

    return await request(
        connection, correction_id, legs, reason, actor, at, kind=SUSPENSE_ASSIGNED, reference=reference,
        left=left if reference else None,
    )  # fmt: skip


async def approve(
    connection: Connection, correction_id: str, actor: str, at: datetime, deed: Deed | None = None
) -> Correction:
    """Posts it, or does `deed`, which a kind has that is more than its legs. An approved one is answered as it is. Raises
    CorrectionRefused, PostingRefused."""
    refusal: CorrectionRefused | PostingRefused | None = None
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        found = await _known(connection, correction_id)
        if found.state == "approved":
            return found
        posted: list[Block] = []
        told: list[Message] = []
        done = found
        try:
            _decidable(found, actor)
            if (found.kind in POSTED) != (deed is None):
                raise OtherCommand(found.id, found.kind)
            fold, blocks, messages = await (_posted(connection, found, at) if deed is None else deed(found))
            at = fold.at
            done = replace(found, state="approved", decided_by=actor, decided_at=at)
            posted = [*blocks_of(fold, owners[0].batch), *blocks, done._block()]
            told = [*messages, *buffer_levels(fold)]
        except (CorrectionRefused, PostingRefused) as error:
            refusal = error
        await _seal(connection, owners, posted, _decided("approved", actor, found, done, refusal), at, told)
    if refusal is not None:
        raise refusal
    return done


async def reject(connection: Connection, correction_id: str, actor: str, at: datetime) -> Correction:
    """Ends it without posting; whoever asked may take it back. A rejected one is answered as it is."""
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        found = await _known(connection, correction_id)
        if found.state == "rejected":
            return found
        if found.state == "approved":
            raise CorrectionDecided(found.id, found.state, found.decided_by)
        done = replace(found, state="rejected", decided_by=actor, decided_at=at)
        await _seal(connection, owners, [done._block()], _decided("rejected", actor, found, done, None), at)
    return done


async def list_corrections(connection: Connection, state: str | None = None, limit: int = 100) -> list[Correction]:
    """Newest first."""
    return [_read(row) for row in await connection.fetch(_sql.list, state, limit)]


async def find(connection: Connection, correction_id: str) -> Correction:
    """Raises UnknownCorrection."""
    row = await connection.fetchrow(_sql.find, correction_id)
    if row is None:
        raise UnknownCorrection(correction_id)
    return _read(row)


async def _posted(connection: Connection, correction: Correction, at: datetime) -> Done:
    transaction = correction.transaction()
    fold = await lock(connection, [transaction], at)
    fold.post(transaction)
    await _check_holds(connection, fold, correction)
    return Done(fold)


def _check(legs: Sequence[Leg], reason: str, actor: str) -> None:
    if not 0 < len(reason.strip()) <= REASON_LENGTH_MAX:
        raise ReasonMissing(REASON_LENGTH_MAX)
    if not actor.strip():
        raise ActorMissing
    if not 2 <= len(legs) <= LEGS_MAX:
        raise BadLegs(len(legs), LEGS_MAX)
    for leg in legs:
        check_leg(leg.account, leg.amount)
    check_balanced((leg.account, leg.direction, leg.amount) for leg in legs)


async def _check_left(connection: Connection, wanted: Correction, left: int | None) -> None:
    if left is None:
        return
    others = [_legs(row[0]) for row in await connection.fetch(_sql.asked, wanted.kind, wanted.reference)]
    left -= sum(map(_moved, others))
    if _moved(wanted.legs) > left:
        raise NothingLeft(wanted.reference, left, _moved(wanted.legs))


async def _check_holds(connection: Connection, fold: Fold, correction: Correction) -> None:
    """The accounts are locked: nobody makes or captures a hold of theirs."""
    for account in {leg.account for leg in correction.legs if leg.direction == "c"}:
        balance = fold.balances[account].balance
        if account.type in HOLDING and balance < (held := int(await connection.fetchval(_sql.held, account.id))):
            raise MoneyHeld(str(account), held, balance)
        if account is SUSPENSE and correction.kind == SUSPENSE_ASSIGNED and balance < 0:
            taken = _moved(correction.legs)
            raise InsufficientFunds(str(account), balance + taken, taken)


async def _check_customers(connection: Connection, legs: Sequence[Leg]) -> None:
    """A mistyped customer would get an account and the money."""
    owners = {leg.account.owner for leg in legs} - {SYSTEM}
    known = {row[0] for row in await connection.fetch(_sql.customers, list(owners))}
    if missing := sorted(owners - known):
        raise UnknownUser(missing)


def _decidable(found: Correction, actor: str) -> None:
    if not actor.strip():
        raise ActorMissing
    if found.state != "requested":
        raise CorrectionDecided(found.id, found.state, found.decided_by)
    if actor.casefold() == found.requested_by.casefold():
        raise SameActor(actor)


def _decided(verb: str, actor: str, before: Correction, after: Correction, refusal: Any) -> Log:
    if refusal is None:
        return Log(actor, f"correction.{verb}", "correction", before.id, before.plain(), after.plain())
    return Log(actor, f"correction.{verb}", "correction", before.id, before.plain(), None, "refused", refusal.code)


async def _seal(
    connection: Connection, owners: list[Owner], blocks: list[Block], log: Log, at: datetime,
    messages: Sequence[Message] = (),
) -> None:  # fmt: skip
    """The commit's record is journaled by whoever commits, or the next relay's turn; the sweeper sends its messages."""
    await seal(
        connection, WRITER, owners, blocks=blocks, messages=messages, at=at, actor=log.actor,
        summary={log.action if log.status == "done" else f"{log.action}:{log.error}": 1}, logs=[log],
    )  # fmt: skip


async def _find(connection: Connection, correction_id: str) -> Correction | None:
    row = await connection.fetchrow(f"{_sql.find} FOR UPDATE", correction_id)
    return None if row is None else _read(row)


async def _known(connection: Connection, correction_id: str) -> Correction:
    found = await _find(connection, correction_id)
    if found is None:
        raise UnknownCorrection(correction_id)
    return found


def _moved(legs: Sequence[Leg]) -> int:
    return sum(leg.amount for leg in legs if leg.direction == "c")


def _plain(legs: Sequence[Leg]) -> list[dict[str, str]]:
    return [
        {
            "owner": a.owner, "type": str(a.type), "asset": a.asset, "shard": a.shard, "direction": direction,
            "amount": str(amount),
        }
        for a, direction, amount, _ in legs
    ]  # fmt: skip


def _read(row: Any) -> Correction:
    found = dict(row)
    return Correction(**{**found, "legs": _legs(found["legs"])})


def _legs(stored: str) -> tuple[Leg, ...]:
    legs = []
    for leg in orjson.loads(stored):
        direction: Direction = leg["direction"]
        legs.append(Leg(Account(leg["owner"], leg["type"], leg["asset"], leg["shard"]), direction, int(leg["amount"])))
    return tuple(legs)
