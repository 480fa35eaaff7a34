"""transfers.notified -> custodian_transfers, withdrawals; ledger: hold captured and mirror posted, or hold released -> withdrawals.settled

Decides:  how a withdrawal of the rail `circle` stands by what Circle says of its transfer, and how it ends.
Key:      the withdrawal, or the transfer where the notification lacks our reference.
Repeats:  harmless; a state is never followed by one before it, and a withdrawal that has ended is left alone.
Refuses:  unknown_withdrawal, transfer_changed  ->  transfers.notified.dlq

Only a final word of Circle's ends a withdrawal, and on a chain that we read ourselves the chain has the last one:

| Circle says | our transfer is final on chain | it is not final, or nobody can tell | it is not there | no chain to ask, no hash |
| --- | --- | --- | --- | --- |
| COMPLETE | completed | later | later, then a person must look | completed |
| FAILED, DENIED, CANCELLED | completed, alert | later | later, then released | released |
| REFUSED (ours: never taken) | - | - | - | released |

"Later, then": a transaction that is nowhere may still be on its way. It is looked for until no look has found it for ABSENT_S,
however often nobody could be asked before. Every hash that Circle ever told of is looked for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from agents.deposits.finalize_deposits import ChainReader
from agents.outcome import Alert, Done, Outcome, Rejected, Retry, Stage
from agents.withdrawals import custodian, stored
from agents.withdrawals.custodian import (
    COMPLETE,
    ENDS,
    NOT_SHOWN,
    REFUSED,
    SECOND_TRANSFER,
    TRANSFER_NOT_SHOWN,
    UNPROVEN,
    UNTOLD,
    Transfer,
    changed,
    is_ours,
    rank,
)
from agents.withdrawals.figures import count_ends
from agents.withdrawals.transfer_calls import second
from agents.withdrawals.transfer_looks import Look, TransferLooker, named_in
from agents.withdrawals.withdrawal import (
    ENDED,
    NEXT,
    STUCK,
    UNEXPECTED_TRANSFERS,
    Status,
    Withdrawal,
    moved,
    paid,
    released,
    settled,
)
from connectors.circle.transactions import SOURCE
from ledger.accounts import shard_of
from ledger.rows import Connection, Row, Table
from ledger.sql import load as load_sql
from ledger.tables import CUSTODIAN_TRANSFERS, WITHDRAWALS
from topics.catalog import TRANSFERS_NOTIFIED, WITHDRAWALS_SETTLED
from topics.envelope import Received
from topics.events import TransferNotified

_sql = load_sql("agents.withdrawals", "custodian.sql")

NAME: Final = "settle_transfers"
NOT_FINAL: Final = "not_final"
NOT_FINAL_S: Final = 5.0
NOT_FINAL_S_MAX: Final = 60.0
ABSENT_S: Final = 600.0
ABSENT_LOOK_S: Final = 60.0
"""Between two looks for what is nowhere."""

CONTRADICTED: Final = "custodian_contradicted"
"""Alert: Circle's final word is not what the chain, or Circle itself before, said."""
SHORT: Final = "custodian_short"
"""Alert, and the code of the end: our wallet at Circle has too little USDC, or gas."""
_CODES: Final = {"DENIED": "custodian_denied", REFUSED: "custodian_refused"}
_SHORT_REASONS: Final = frozenset({"INSUFFICIENT_TOKEN", "INSUFFICIENT_NATIVE_TOKEN"})


GOES_ON: Final = frozenset({STUCK, *UNTOLD})
"""Of a review: it ends by itself with the custodian's next word."""
_NOT_RELEASED: Final = frozenset({SECOND_TRANSFER, UNEXPECTED_TRANSFERS, UNPROVEN})
"""Of a review: something may have been paid that this transfer knows nothing of. Only people give the hold back (ended_by_people.py)."""


@dataclass
class Facts:
    now: datetime
    looks: Mapping[str, Look]
    """By withdrawal."""
    read: frozenset[str]
    """Chains that we read."""
    buffer_shards: int = 1
    withdrawals: dict[str, Withdrawal] = field(default_factory=dict)
    transfers: dict[str, Transfer] = field(default_factory=dict)
    """Both locked, by the withdrawal's id."""
    owners: dict[str, str] = field(default_factory=dict)
    """Transfer id -> withdrawal id."""


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, TransferNotified)
    owner = facts.owners.get(event.transfer_id)
    key = event.reference if is_ours(event.reference) else owner
    if event.source != SOURCE or key is None:
        return Done()  # somebody else's, or ours before its id was known: then the poller brings it
    if owner not in (None, key):
        return Rejected("transfer_changed", f"{event.transfer_id} is the transfer of {owner}")
    withdrawal, transfer = facts.withdrawals.get(key), facts.transfers.get(key)
    if withdrawal is None or transfer is None:
        return Rejected("unknown_withdrawal", key)
    if event.state == REFUSED and transfer.transfer_id is not None:
        return Done()  # Circle has it all the same
    if transfer.transfer_id not in (None, event.transfer_id):
        return second(withdrawal, str(transfer.transfer_id), event.transfer_id, facts.now, NAME)
    if withdrawal.status in ENDED:
        return _after_the_end(withdrawal, transfer, event)
    if event.state == NOT_SHOWN:
        waits = withdrawal.status != Status.MANUAL_REVIEW  # else a person looks already
        return _review(withdrawal, transfer, TRANSFER_NOT_SHOWN, facts.now) if waits else Done()
    if not _as_asked(event, withdrawal):
        return _review(withdrawal, transfer, UNEXPECTED_TRANSFERS, facts.now)
    if event.state in ENDS:
        return _ended(event, withdrawal, transfer, facts, received.attempt)
    return _on_its_way(event, withdrawal, transfer, facts.now)


def _after_the_end(withdrawal: Withdrawal, transfer: Transfer, event: TransferNotified) -> Done:
    said = {COMPLETE: True}.get(event.state, False if event.state in ENDS else None)
    # it was ended as paid by another transaction: by people, who did not know of this one
    twice = said and transfer.hashes and event.tx_hash not in (None, *transfer.hashes)
    if said is None or (said == (withdrawal.status == Status.COMPLETED) and not twice):
        return Done()
    about = {
        "withdrawal": withdrawal.id,
        "status": withdrawal.status,
        "transfer": event.transfer_id,
        "said": event.state,
    }
    return Done(alerts=(Alert(CONTRADICTED, about),))


def _as_asked(event: TransferNotified, withdrawal: Withdrawal) -> bool:
    """What the custodian tells of it is what was asked for."""
    pairs = ((event.chain, withdrawal.chain), (event.to, withdrawal.recipient), (event.amount, withdrawal.amount))
    return all(told in (None, asked) for told, asked in pairs)


def _merged(
    event: TransferNotified, transfer: Transfer, now: datetime
) -> tuple[Transfer, tuple[tuple[Table, Row], tuple[Table, Row]]]:
    """The transfer with what the event adds, and the later of both states."""
    hashes = [*transfer.hashes, *([event.tx_hash] if event.tx_hash and event.tx_hash not in transfer.hashes else [])]
    later = rank(event.state) >= rank(transfer.state)
    return changed(
        transfer,
        now,
        transfer_id=transfer.transfer_id if event.state == REFUSED else event.transfer_id,
        state=event.state if later else transfer.state,
        tx_hashes=" ".join(hashes),
        block_number=transfer.block_number if event.block_number is None else event.block_number,
        reason=event.reason or transfer.reason,
    )


def _on_its_way(event: TransferNotified, withdrawal: Withdrawal, transfer: Transfer, now: datetime) -> Done:
    after, (row, step) = _merged(event, transfer, now)
    inserts: tuple[tuple[Table, Row], ...] = (step,)
    upserts: tuple[tuple[Table, Row], ...] = (row,)
    if after._replace(updated_at=transfer.updated_at, version=transfer.version) == transfer:
        if withdrawal.status != Status.MANUAL_REVIEW or withdrawal.code not in UNTOLD:
            return Done()
        inserts = upserts = ()
    status, code = Status.BROADCASTING, None
    alerts: tuple[Alert, ...] = ()
    if after.state == "CONFIRMED":
        status = Status.CONFIRMING
    elif after.state == "STUCK":
        status, code, alerts = Status.MANUAL_REVIEW, STUCK, (Alert(STUCK, _about(withdrawal, after)),)
    before = Status(withdrawal.status)
    waits_for_people = before is Status.MANUAL_REVIEW and withdrawal.code not in GOES_ON
    if (status, code or withdrawal.code) == (before, withdrawal.code) or waits_for_people or status not in NEXT[before]:
        return Done(inserts=inserts, upserts=upserts)
    _, (moved_row, line) = moved(withdrawal._replace(code=None), status, now, NAME, code)
    return Done(inserts=(*inserts, line), upserts=(*upserts, moved_row), alerts=alerts)


def _ended(event: TransferNotified, withdrawal: Withdrawal, transfer: Transfer, facts: Facts, attempt: int) -> Outcome:
    after, (row, step) = _merged(event, transfer, facts.now)
    hashes = frozenset(after.hashes)
    look = None
    if hashes and withdrawal.chain in facts.read:
        look = facts.looks.get(withdrawal.id)
        if look is None or not hashes <= look.hashes or not (look.paid or look.absent):
            return Retry(NOT_FINAL, min(NOT_FINAL_S * attempt, NOT_FINAL_S_MAX))
        if look.absent and look.absent_s < ABSENT_S:
            return Retry(NOT_FINAL, ABSENT_LOOK_S)
    says_paid = event.state == COMPLETE
    if says_paid and look is not None and look.absent:
        reviewed = _review(withdrawal, after, UNPROVEN, facts.now)
        return reviewed._replace(inserts=(step, *reviewed.inserts), upserts=(row, *reviewed.upserts))
    is_paid = says_paid if look is None else look.paid is not None
    if not is_paid and withdrawal.code in _NOT_RELEASED:
        return Done(inserts=(step,), upserts=(row,))
    alerts: tuple[Alert, ...] = ()
    if is_paid != says_paid:
        alerts = (Alert(CONTRADICTED, _about(withdrawal, after)),)
    status, code = _end(event, is_paid)
    if code == SHORT:
        alerts = (*alerts, Alert(SHORT, _about(withdrawal, after)))
    ended, (moved_row, line) = moved(withdrawal._replace(code=None), status, facts.now, NAME, code)
    tx_hash = look.paid if look is not None and look.paid else next(reversed(after.hashes), None)
    shard = shard_of(withdrawal.user_id, facts.buffer_shards)
    return Done(
        postings=(paid(withdrawal, shard) if is_paid else released(withdrawal),),
        inserts=(step, line),
        upserts=(row, moved_row),
        emits=(settled(ended, tx_hash),),
        alerts=alerts,
    )


def _end(event: TransferNotified, is_paid: bool) -> tuple[Status, str | None]:
    if is_paid:
        return Status.COMPLETED, None
    if event.state == "CANCELLED":
        return Status.CANCELLED, None
    short = event.reason in _SHORT_REASONS
    return Status.FAILED, SHORT if short else _CODES.get(event.state, "custodian_failed")


def _review(withdrawal: Withdrawal, transfer: Transfer, code: str, now: datetime) -> Done:
    if (withdrawal.status, withdrawal.code) == (Status.MANUAL_REVIEW, code):
        return Done()
    _, (row, line) = moved(withdrawal, Status.MANUAL_REVIEW, now, NAME, code)
    return Done(inserts=(line,), upserts=(row,), alerts=(Alert(code, _about(withdrawal, transfer)),))


def _about(withdrawal: Withdrawal, transfer: Transfer) -> dict[str, str]:
    return {
        "withdrawal": withdrawal.id,
        "chain": withdrawal.chain,
        "transfer": transfer.transfer_id or "",
        "state": transfer.state,
        "reason": transfer.reason or "",
        "tx_hashes": transfer.tx_hashes,
    }


def fold(facts: Facts, done: Done) -> None:
    for table, row in done.upserts:
        if table is WITHDRAWALS:
            facts.withdrawals[row[0]] = Withdrawal(*row)
        elif table is CUSTODIAN_TRANSFERS:
            transfer = facts.transfers[row[0]] = Transfer(*row)
            if transfer.transfer_id is not None:
                facts.owners[transfer.transfer_id] = transfer.withdrawal_id


def stage(
    chains: Mapping[str, ChainReader],
    connect: Callable[[], Awaitable[Connection]],
    clock: Callable[[], datetime],
    buffer_shards: int,
) -> Stage[Facts]:
    """`chains`: those that we read. `connect` opens a connection for reading what is open."""

    async def load(
        connection: Connection, events: Sequence[Received], looks: Mapping[str, Look], at: datetime
    ) -> Facts:
        named = named_in(events)
        rows = await connection.fetch(_sql.of_transfers, SOURCE, [event.transfer_id for event in named])
        owners = dict([tuple(row) for row in rows])
        ids = {*owners.values(), *(e.reference for e in named if e.reference is not None and is_ours(e.reference))}
        withdrawals = await stored.lock(connection, ids)
        transfers = await custodian.lock(connection, ids)
        return Facts(at, looks, frozenset(chains), buffer_shards, withdrawals, transfers, owners)

    return Stage(
        name=NAME,
        source=TRANSFERS_NOTIFIED,
        prepare=TransferLooker(chains, connect, clock).prepare,
        load=load,
        decide=decide,
        fold=fold,
        emits=(WITHDRAWALS_SETTLED,),
        figures=count_ends,
    )
