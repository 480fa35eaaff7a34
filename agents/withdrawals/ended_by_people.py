"""A withdrawal that nothing ends by itself is ended by two people: a correction (ledger/corrections.py) that one asks for and another
approves. Its commit is what a stage's would be: hold, row and history, attempts or transfer, `withdrawals.settled`.

| they say | believed on a chain that we read | on another |
| --- | --- | --- |
| paid, by this transaction | it is final, moved the amount from our wallet to the recipient, and is of nothing else | as they say |
| not paid | nothing of it moved anything to the recipient, and nothing of it can any more | Circle says no COMPLETE |

Nothing can any more: on the rail `chain` the nonce is finally used. On the rail `circle` every transfer with its reference has
ended in Circle's words of now, to somebody who sees the wallet. A transaction that Circle told of and that is in no block and no
pool, and a transfer that Circle does not show, must be nowhere ABSENT_S after it was asked for too. Two endpoints must say what a
chain says. It is looked at for the request, and again for the approval. Where the review is that the payment moved another amount
(`unexpected_transfers`), any amount is a payment; the difference is another correction's.

A call that Circle has not answered would be made again. So the request takes its lease, and for STOPPED_FOR nobody makes it; the
approval ends it, as not paid no sooner than ABSENT_S later. Refused while a performer has the lease, and where it has run out.
One that was never made ends with the approval, unless a performer is quicker: Circle has not heard of it and need not be asked.

What comes to light afterwards changes nothing and is told: Circle's other word by the alert `custodian_contradicted`, a payment
that is mined after all by invariant 4, the mirror beside the chain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from agents.concluding import member_of, stored_calls
from agents.intents import CONCLUDED, Member, StoredCall, form
from agents.withdrawals import custodian, stored, transfer_by_custodian
from agents.withdrawals.attempts import attempts_of, lock_attempts
from agents.withdrawals.custodian import Transfer, changed
from agents.withdrawals.errors import MayStillBePaid, NotOnItsWay, PaymentNotProven, UnknownWithdrawal, WasPaid
from agents.withdrawals.look import AGREE_MIN, ChainWriter
from agents.withdrawals.settle_transfers import ABSENT_S
from agents.withdrawals.transfer_calls import listed
from agents.withdrawals.withdrawal import (
    NEXT,
    NONCE_TAKEN,
    UNEXPECTED_TRANSFERS,
    Attempt,
    AttemptStatus,
    Status,
    Withdrawal,
    attempt_row,
    moved,
    paid,
    released,
    settled,
)
from chain.outcomes import Executed, fates
from connectors.circle.client import CircleClient
from connectors.circle.transactions import ENDED
from connectors.errors import ConnectorError, Refused
from ledger import corrections
from ledger.accounts import pending_withdrawal, shard_of, spendable
from ledger.book import settle
from ledger.corrections import Correction, Done
from ledger.errors import CorrectionRefused, PostingRefused
from ledger.posting import Leg, credit, debit
from ledger.record import Message
from ledger.rows import Block, Connection, Op, Row, Table, block
from ledger.sql import load
from ledger.tables import CALL_MEMBERS, CALLS
from topics.catalog import WITHDRAWALS_SETTLED
from topics.envelope import value_of
from topics.events import Rail

_sql = load("agents.withdrawals", "ended_by_people.sql")

PAID: Final = "withdrawal_paid"
FAILED: Final = "withdrawal_failed"
NOT_PAID: Final = "not_paid"
"""The code of an end: two people have said so."""
STOPPED_FOR: Final = timedelta(hours=1)
"""For as long a call that is overdue is no fault (invariant 13)."""
ENDED_BY_PEOPLE: Final = "ended_by_people"
"""Of a call: it was never answered."""
_FINAL: Final = frozenset({AttemptStatus.CONFIRMED, AttemptStatus.REVERTED})


@dataclass(frozen=True)
class Outside:
    """Who can be asked."""

    chain: ChainWriter | None
    """None: the withdrawal's chain is not read."""
    circle: CircleClient | None
    """None: no credentials are set."""
    buffer_shards: int = 1


@dataclass(frozen=True)
class Seen:
    """What the books and the outside said, before anything was locked."""

    hashes: frozenset[str]
    """Every transaction that our books have of it."""
    fates: Mapping[str, Executed] = field(default_factory=dict)
    nowhere: bool = False
    """Circle told of a transaction that is in no block, or does not show what was asked for."""
    transfer_id: str | None = None
    """Circle's id of it, in our books."""
    never_asked: bool = False
    """No call for it was made: Circle was not asked either."""


async def request(
    connection: Connection,
    correction_id: str,
    id: str,
    tx_hash: str | None,
    outside: Outside,
    reason: str,
    actor: str,
    at: datetime,
) -> Correction:
    """Asks that it ends as paid by this transaction, or as not paid where there is none. Raises UnknownWithdrawal, CorrectionRefused."""
    withdrawal = await stored.read(connection, id)
    if withdrawal is None:
        raise UnknownWithdrawal
    if tx_hash is not None:
        tx_hash = tx_hash.lower() if tx_hash[:2] in ("0x", "0X") else tx_hash
        if re.fullmatch("[0-9A-Za-z]{1,128}", tx_hash) is None:
            raise PaymentNotProven(f"{tx_hash!r} is no transaction's hash")
    await _look(connection, withdrawal, tx_hash, outside)
    pending, amount = pending_withdrawal(withdrawal.user_id), withdrawal.amount
    legs: tuple[Leg, ...] = (debit(spendable(withdrawal.user_id), amount), credit(pending, amount))
    transaction = released(withdrawal)
    if tx_hash is not None:
        transaction = paid(withdrawal, shard_of(withdrawal.user_id, outside.buffer_shards))
        legs = (credit(pending, amount), *transaction.legs)
    async with connection.transaction():
        asked_for = await corrections.request(
            connection, correction_id, legs, reason, actor, at,
            kind=FAILED if tx_hash is None else PAID, reference=id if tx_hash is None else f"{id}:{tx_hash}",
            transaction_id=transaction.id,
        )  # fmt: skip
        if asked_for.state == "requested":
            await _stop_asking(connection, asked_for, at)
    return asked_for


async def approve(connection: Connection, correction_id: str, outside: Outside, actor: str, at: datetime) -> Correction:
    """Ends it. What is approved is answered as it is. Raises CorrectionRefused, and whatever the refusal is it is in the audit."""
    found = await corrections.find(connection, correction_id)
    seen: Seen | CorrectionRefused | None = None
    if found.kind in (PAID, FAILED) and found.state == "requested":
        id, tx_hash = about(found)
        withdrawal = await stored.read(connection, id)
        assert withdrawal is not None
        try:
            seen = await _look(connection, withdrawal, tx_hash, outside)
        except CorrectionRefused as refusal:
            seen = refusal

    async def deed(correction: Correction) -> Done:
        if isinstance(seen, CorrectionRefused):
            raise seen
        assert seen is not None
        return await _end(connection, correction, seen, outside.buffer_shards, actor, at)

    return await corrections.approve(connection, correction_id, actor, at, deed)


def about(correction: Correction) -> tuple[str, str | None]:
    """The withdrawal that it ends, and the transaction that paid it."""
    id, _, tx_hash = correction.reference.partition(":")
    return id, tx_hash or None


# -- what is known -------------------------------------------------------------------------------------------------------


async def _look(connection: Connection, withdrawal: Withdrawal, tx_hash: str | None, outside: Outside) -> Seen:
    _check_open(withdrawal)
    await _check_free(connection, withdrawal, tx_hash)
    by_us = withdrawal.rail == Rail.CHAIN
    wallet, seen = await (_signed if by_us else _asked)(connection, withdrawal, tx_hash, outside)
    recipient = withdrawal.recipient.lower()
    if tx_hash is None:
        for mined, fate in seen.fates.items():
            if any(to == recipient for _, to, _ in fate.transfers):
                raise WasPaid(f"{mined} moved {_told(fate)}")
    elif outside.chain is not None:
        proof = seen.fates.get(tx_hash)
        if proof is None:
            raise PaymentNotProven(f"{AGREE_MIN} endpoints do not say that {tx_hash} is final")
        amounts = {amount for sender, to, amount in proof.transfers if (sender, to) == (wallet.lower(), recipient)}
        if withdrawal.amount not in amounts and not (amounts and withdrawal.code == UNEXPECTED_TRANSFERS):
            wanted = f"{withdrawal.amount} from {wallet} to {recipient}"
            raise PaymentNotProven(f"{tx_hash} moved {_told(proof)}, and not {wanted}")
    return seen


def _check_open(withdrawal: Withdrawal) -> None:
    if Status.COMPLETED not in NEXT[Status(withdrawal.status)]:
        raise NotOnItsWay(f"the withdrawal is {withdrawal.status}")


async def _check_free(connection: Connection, withdrawal: Withdrawal, tx_hash: str | None) -> None:
    """No transaction pays two withdrawals."""
    other = tx_hash and await connection.fetchval(_sql.payment_of, withdrawal.chain, tx_hash, withdrawal.id)
    if other:
        raise PaymentNotProven(f"{tx_hash} is of {other}")


def _told(fate: Executed) -> str:
    return ", ".join(f"{amount} from {sender} to {to}" for sender, to, amount in fate.transfers) or "nothing"


async def _signed(
    connection: Connection, withdrawal: Withdrawal, tx_hash: str | None, outside: Outside
) -> tuple[str, Seen]:
    """The signer, and what became of everything that was signed: its nonce is used, so that nothing of it can be mined any more."""
    group = await attempts_of(connection, withdrawal.id)
    if not group or any(attempt.status in _FINAL for attempt in group):
        raise NotOnItsWay("its transaction is final, and ends it by itself" if group else "nothing of it was signed")
    hashes = frozenset(attempt.tx_hash for attempt in group)
    signer, nonce = group[0].signer, group[0].nonce
    found = await _fates(outside.chain, withdrawal, {*hashes, *([tx_hash] if tx_hash else [])}, (signer, nonce))
    if found is None:
        depth = "" if outside.chain is None else f" {outside.chain.depth_blocks} blocks deep"
        raise MayStillBePaid(f"{AGREE_MIN} endpoints do not say that nonce {nonce} of {signer} is used{depth}")
    return signer, Seen(hashes, found)


async def _asked(
    connection: Connection, withdrawal: Withdrawal, tx_hash: str | None, outside: Outside
) -> tuple[str, Seen]:
    """The wallet's address, and what became of what Circle told of."""
    transfer = (await custodian.lock(connection, [withdrawal.id])).get(withdrawal.id)
    if transfer is None:
        raise NotOnItsWay("Circle was not asked for it")
    place = (withdrawal.chain, transfer.custodian, transfer.wallet_id)
    wallet = await connection.fetchval(_sql.wallet, *place) or "a wallet of ours that was not looked up yet"
    known = frozenset(transfer.hashes)
    if tx_hash is None and await _never_asked(connection, withdrawal, transfer):
        return wallet, Seen(known, never_asked=True)
    if tx_hash is not None:
        hashes, nowhere = {tx_hash}, False
    else:
        told, nowhere = await _ended_at_circle(withdrawal, transfer, outside)
        hashes = {*known, *told}
    if outside.chain is None or not hashes:
        return wallet, Seen(known, {}, nowhere, transfer.transfer_id)
    found = await _fates(outside.chain, withdrawal, hashes, None)
    if found is None:
        text = f"{AGREE_MIN} endpoints do not say what became of {', '.join(sorted(hashes))}"
        raise PaymentNotProven(text) if tx_hash else MayStillBePaid(text)
    return wallet, Seen(known, found, nowhere or found.keys() != hashes, transfer.transfer_id)


async def _never_asked(connection: Connection, withdrawal: Withdrawal, transfer: Transfer) -> bool:
    told = transfer.transfer_id is not None or transfer.hashes
    return not told and bool(await connection.fetchval(_sql.never_asked, withdrawal.id, withdrawal.requested_at))


async def _fates(
    chain: ChainWriter | None, withdrawal: Withdrawal, hashes: set[str], used: tuple[str, int] | None
) -> dict[str, Executed] | None:
    if chain is None or len(chain.rpcs) < AGREE_MIN:
        number = 0 if chain is None else len(chain.rpcs)
        raise MayStillBePaid(
            f"{AGREE_MIN} endpoints must say so, and STABLERAIL_RPC_URLS has {number} of {withdrawal.chain}"
        )
    return await fates(chain.rpcs, AGREE_MIN, sorted(hashes), chain.token, chain.depth_blocks, used)


async def _ended_at_circle(withdrawal: Withdrawal, transfer: Transfer, outside: Outside) -> tuple[set[str], bool]:
    """The transactions of its transfers, each of which has ended, and whether there is none, or the one that we know is not shown."""
    if outside.circle is None:
        raise MayStillBePaid("no credentials for Circle are set, which must say that it has ended")
    try:
        await outside.circle.wallet(transfer.wallet_id)  # who may not see it is shown none of its transfers
        shown = await _shown(outside.circle, withdrawal, transfer)
    except ConnectorError as error:
        raise MayStillBePaid(f"Circle must say that it has ended: {error.code}: {error}") from None
    for key, one in shown.items():
        if one.get("state") not in ENDED:
            raise MayStillBePaid(f"Circle says {one.get('state')} of transfer {key}")
        to, unseen = one.get("destinationAddress"), outside.chain is None or not one.get("txHash")
        there = to is None or str(to).lower() == withdrawal.recipient.lower()
        if one["state"] == "COMPLETE" and unseen and there:
            raise WasPaid(f"Circle says COMPLETE of transfer {key}")
    hashes = {str(one["txHash"]) for one in shown.values() if one.get("txHash")}
    told = {tx_hash if outside.chain is None else tx_hash.lower() for tx_hash in hashes}
    return told, not shown or transfer.transfer_id not in (None, *shown)


async def _shown(circle: CircleClient, withdrawal: Withdrawal, transfer: Transfer) -> dict[str, dict[str, Any]]:
    """Circle's transfers of it, by their ids: the one that we know, and all with its reference."""
    shown: dict[str, dict[str, Any]] = {}
    if transfer.transfer_id is not None:
        try:
            shown[transfer.transfer_id] = await circle.transaction(transfer.transfer_id)
        except Refused as error:
            if error.status != 404:
                raise
    async for one in listed(circle, withdrawal.id, withdrawal.recipient, transfer.created_at):
        shown[str(one.get("id"))] = one
    return shown


# -- the end -------------------------------------------------------------------------------------------------------------


async def _end(
    connection: Connection, correction: Correction, seen: Seen, buffer_shards: int, actor: str, at: datetime
) -> Done:
    id, tx_hash = about(correction)
    wish = await _waiting(connection, id)  # first, as whoever makes calls and concludes them locks
    call, asked_at = (None, correction.requested_at) if wish else await _stopped(connection, correction, at)
    if seen.never_asked and wish is None:
        raise MayStillBePaid("Circle is asked for it meanwhile: once more")
    withdrawal = (await stored.lock(connection, [id]))[id]
    _check_open(withdrawal)
    await _check_free(connection, withdrawal, tx_hash)  # nobody else approves meanwhile
    if withdrawal.rail == Rail.CHAIN:
        mined, blocks = await _end_attempts(connection, withdrawal, tx_hash, seen, at)
    else:
        mined, blocks = await _end_transfer(connection, correction, tx_hash, seen, call, asked_at, at)
    shard = shard_of(withdrawal.user_id, buffer_shards)
    posting = released(withdrawal) if tx_hash is None else paid(withdrawal, shard)
    (result,), fold = await settle(connection, [posting], at)
    if isinstance(result, PostingRefused):
        raise result
    status, code = (Status.FAILED, NOT_PAID) if tx_hash is None else (Status.COMPLETED, None)
    ended, rows = moved(withdrawal._replace(code=None), status, fold.at, actor, code)
    _, key, event, event_id = settled(ended, tx_hash or mined)
    message = Message(WITHDRAWALS_SETTLED.name, key.encode(), value_of(event), event_id, event.ce_type())
    if wish is not None:
        call = form(transfer_by_custodian.NAME, [wish], wish.request, at)
    ended_call = [] if call is None else [await _end_call(connection, call, at)]
    if call is not None and wish is not None:
        ended_call.append(block(CALL_MEMBERS, Op.UPSERT, [wish.row(transfer_by_custodian.NAME, call.id)]))
    return Done(fold, [*blocks, *ended_call, *_blocks(rows)], [message])


def _blocks(rows: tuple[tuple[Table, Row], tuple[Table, Row]]) -> list[Block]:
    """Of a row that is there, and the line of its history."""
    (table, row), (history, line) = rows
    return [block(table, Op.UPSERT, [row]), block(history, Op.INSERT, [line])]


async def _end_attempts(
    connection: Connection, withdrawal: Withdrawal, tx_hash: str | None, seen: Seen, at: datetime
) -> tuple[str | None, list[Block]]:
    """Which of them was mined, and all of them ended."""
    named = await attempts_of(connection, withdrawal.id)
    key = (named[0].chain, named[0].signer, named[0].nonce)
    group = (await lock_attempts(connection, [key]))[key]
    if {attempt.tx_hash for attempt in group} != seen.hashes or any(attempt.status in _FINAL for attempt in group):
        raise MayStillBePaid("its attempts are others meanwhile: once more")
    mined = next((attempt.tx_hash for attempt in group if attempt.tx_hash in seen.fates), None)
    rows = [attempt_row(_ended(attempt, tx_hash, mined, seen.fates, at)) for attempt in group]
    return mined, [block(rows[0][0], Op.UPSERT, [row for _, row in rows])]


def _ended(
    attempt: Attempt, tx_hash: str | None, mined: str | None, found: Mapping[str, Executed], at: datetime
) -> Attempt:
    after = attempt._replace(updated_at=at, version=attempt.version + 1)
    if attempt.tx_hash != mined:
        # as of a stranger's, which a comparison after a restore then knows (restoring.sql)
        return after._replace(
            status=AttemptStatus.REPLACED.value, error=NONCE_TAKEN if mined is None else attempt.error
        )
    place = found[mined].place
    after = after._replace(block_hash=place.block_hash, block_number=place.block_number)
    if attempt.tx_hash == tx_hash:
        return after._replace(status=AttemptStatus.CONFIRMED.value)
    return after._replace(status=AttemptStatus.REVERTED.value, error=UNEXPECTED_TRANSFERS)


async def _end_transfer(
    connection: Connection,
    correction: Correction,
    tx_hash: str | None,
    seen: Seen,
    call: StoredCall | None,
    asked_at: datetime,
    at: datetime,
) -> tuple[None, list[Block]]:
    id, _ = about(correction)
    transfer = (await custodian.lock(connection, [id]))[id]
    if tx_hash is None:
        if (transfer.transfer_id, frozenset(transfer.hashes)) != (seen.transfer_id, seen.hashes):
            raise MayStillBePaid("Circle tells of another one meanwhile: once more")
        earliest = asked_at + timedelta(seconds=ABSENT_S)
        if (seen.nowhere or call) and at < earliest:
            raise MayStillBePaid(f"what pays it is nowhere, and may be on its way until {earliest.isoformat()}")
        return None, []
    proof = seen.fates.get(tx_hash)
    number = transfer.block_number if proof is None else proof.place.block_number
    others = [one for one in transfer.hashes if one != tx_hash]
    return None, _blocks(changed(transfer, at, tx_hashes=" ".join([*others, tx_hash]), block_number=number)[1])


# -- a call that is not answered -----------------------------------------------------------------------------------------


def _holder(correction: Correction) -> str:
    return f"people:{correction.id}"


async def _stop_asking(connection: Connection, correction: Correction, at: datetime) -> None:
    """For a while nobody asks Circle for it."""
    id, _ = about(correction)
    call = await connection.fetchval(_sql.open_call, id)
    if call and not await connection.fetchval(_sql.stop, call, _holder(correction), at, at + STOPPED_FOR):
        raise MayStillBePaid("Circle is asked for it at this moment: once more in a minute")


async def _waiting(connection: Connection, id: str) -> Member | None:
    """What a call is still to be made of."""
    row = await connection.fetchrow(_sql.waiting, id)
    return None if row is None else member_of(*row)


async def _stopped(connection: Connection, correction: Correction, at: datetime) -> tuple[StoredCall | None, datetime]:
    """The call that has no answer, locked, and since when nobody makes it."""
    call = await connection.fetchval(_sql.open_call, about(correction)[0])
    if call is None:
        return None, correction.requested_at
    until = await connection.fetchval(_sql.stopped, call, _holder(correction), at)
    if until is None:
        raise MayStillBePaid("Circle is asked for it again, and has not answered: request it anew")
    (stored_call,) = await stored_calls(connection, {UUID(str(call)): 1})
    return stored_call, until - STOPPED_FOR


async def _end_call(connection: Connection, call: StoredCall, at: datetime) -> Block:
    """Nobody makes it any more. Nothing may be refused afterwards: the refusal would be committed with this."""
    await connection.execute(_sql.release, UUID(call.id))
    return block(CALLS, Op.UPSERT, [call.row(transfer_by_custodian.stage({}), CONCLUDED, at, None, ENDED_BY_PEOPLE)])
