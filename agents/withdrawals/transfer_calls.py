"""Calls for transfers: how one is made, looked for where Circle may have made it already, and what its answer means."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from agents.deeds import Deeds
from agents.intents import Again, Conclusion, Ended, StoredCall
from agents.outcome import Alert, Done, Emit
from agents.withdrawals import custodian, stored
from agents.withdrawals.custodian import (
    CUSTODIAN_SILENT,
    REFUSED,
    SECOND_TRANSFER,
    TRANSFER_NOT_SHOWN,
    Transfer,
    changed,
    rank,
)
from agents.withdrawals.transfer_by_custodian import NAME
from agents.withdrawals.withdrawal import ENDED, Status, Withdrawal, moved
from connectors.circle.client import PAGE_SIZE, PAGES_MAX, CircleClient, id_of
from connectors.circle.transactions import SOURCE
from connectors.errors import KEY_USED, Refused, Unknown, of_a_look
from ledger.rows import Connection, Row, Table
from ledger.tables import CUSTODIAN_TRANSFERS, WITHDRAWALS
from topics.catalog import TRANSFERS_NOTIFIED
from topics.events import TransferNotified

SILENT_FOR: Final = timedelta(hours=1)
"""Then a person must look, whatever was counted: what a breaker, a rate or a refused key keeps back is no attempt."""
LISTED_FROM: Final = timedelta(hours=1)
"""Before the call was made, for clocks that differ."""


class CircleTransfers:
    """Performs the calls of transfer_by_custodian."""

    def __init__(self, client: CircleClient, clock: Callable[[], datetime]) -> None:
        self._client = client
        self._clock = clock

    async def perform(self, call: StoredCall) -> dict[str, Any]:
        """{"id", "state"} of the transfer, or {"refused": why, "code"} of one that Circle may have heard of before, refuses now
        and does not list. Raises connectors.errors."""
        now = self._clock()
        if call.outlived_its_key(now):
            found = await self._find(call)
            if found is not None:
                return found
        wanted = call.request
        try:
            made = await self._client.create_transfer(
                str(call.idempotency_key),
                wallet_id=wanted["wallet_id"],
                token_id=wanted["token_id"],
                destination_address=wanted["to"],
                amount=wanted["amount"],
                fee_level=wanted["fee_level"],
                ref_id=wanted["withdrawal_id"],
            )
        except Refused as error:
            known = call.may_be_known(now) or error.status == KEY_USED
            if not known or error.ours:
                raise
            found = await self._find(call)
            if found is None and error.status == KEY_USED:
                raise Unknown("Circle knows the key, and does not list what it made") from None
            return found or {"refused": str(error), "code": error.partner_code}
        return {"id": made["id"], "state": str(made.get("state"))}

    async def _find(self, call: StoredCall) -> dict[str, Any] | None:
        """The oldest of Circle's transfers with our reference."""
        wanted = call.request
        try:
            async for one in listed(self._client, wanted["withdrawal_id"], wanted["to"], call.created_at):
                # also under an id that nobody can read: it is there
                return {"id": id_of(one), "state": str(one.get("state"))}
        except Refused as error:
            raise of_a_look(error) from None
        return None


async def listed(
    client: CircleClient, withdrawal_id: str, to: str, asked_at: datetime
) -> AsyncIterator[dict[str, Any]]:
    """Circle's transfers to this address with the withdrawal's reference, oldest first, as Circle shows them."""
    after: str | None = None
    for _ in range(PAGES_MAX):
        page = await client.outbound_page(since=asked_at - LISTED_FROM, after=after, destination_address=to)
        for one in page:
            if one.get("refId") == withdrawal_id:
                yield one
        if len(page) < PAGE_SIZE:
            return
        after = str(page[-1].get("id"))
    raise Unknown("Circle's list of transfers does not end")


@dataclass
class Facts:
    now: datetime
    withdrawals: dict[str, Withdrawal] = field(default_factory=dict)
    transfers: dict[str, Transfer] = field(default_factory=dict)
    """Both locked, by the withdrawal's id."""


class TransferDeeds(Deeds[Facts]):
    """Every transfer a call of its own. None is ever given up: whether it was paid is for Circle to say."""

    def __init__(self, circle: CircleTransfers | None, review_attempts: int) -> None:
        """After `review_attempts` without an answer, or SILENT_FOR, a person must look."""
        self._circle = circle
        self._review_attempts = review_attempts

    async def perform(self, call: StoredCall) -> dict[str, Any]:
        assert self._circle is not None
        return await self._circle.perform(call)

    async def load(self, connection: Connection, ended: Sequence[Ended], at: datetime) -> Facts:
        ids = {str(one.call.request["withdrawal_id"]) for one in ended}
        return Facts(at, await stored.lock(connection, ids), await custodian.lock(connection, ids))

    def fold(self, facts: Facts, done: Done) -> None:
        for table, row in done.upserts:
            if table is WITHDRAWALS:
                facts.withdrawals[row[0]] = Withdrawal(*row)
            elif table is CUSTODIAN_TRANSFERS:
                facts.transfers[row[0]] = Transfer(*row)

    def put_off(self, call: StoredCall, again: Again, due: datetime, facts: Facts) -> Done:
        withdrawal = facts.withdrawals[call.request["withdrawal_id"]]
        silent = call.attempts >= self._review_attempts or facts.now - call.created_at >= SILENT_FOR
        told = facts.transfers[withdrawal.id].transfer_id is not None  # a notification, or the list
        if not silent or told or withdrawal.status != Status.BROADCASTING:
            return Done()
        _, (row, line) = moved(withdrawal, Status.MANUAL_REVIEW, facts.now, NAME, CUSTODIAN_SILENT)
        about = {"withdrawal": withdrawal.id, "call": call.id, "attempts": str(call.attempts), "error": again.code}
        return Done(inserts=(line,), upserts=(row,), alerts=(Alert(CUSTODIAN_SILENT, about),))

    def conclude(self, call: StoredCall, reply: dict[str, Any] | Refused, facts: Facts) -> Conclusion | Again:
        if isinstance(reply, dict) and "refused" in reply and call.error != TRANSFER_NOT_SHOWN:
            return Again(TRANSFER_NOT_SHOWN)  # once more later: Circle may be slow to list what it has made
        if isinstance(reply, Refused) or "refused" in reply:
            return Conclusion(Done(emits=(_refused(call, reply),)), traces={call.id: call.members[0].traceparent})
        return Conclusion(_taken(facts, call.request["withdrawal_id"], reply))

    def give_up(self, call: StoredCall, code: str, facts: Facts) -> Conclusion:
        raise AssertionError("the policy has no last attempt")


def _refused(call: StoredCall, reply: dict[str, Any] | Refused) -> Emit:
    """Told like any other end of a transfer: the hold is released where money moves, in settle_transfers."""
    code = reply.partner_code if isinstance(reply, Refused) else reply["code"]
    withdrawal_id: str = call.request["withdrawal_id"]
    event = TransferNotified.model_validate(
        {
            "source": SOURCE,
            "transfer_id": f"refused:{call.id}",
            "reference": withdrawal_id,
            "state": REFUSED,
            "chain": call.request["chain"],
            "reason": f"code {code}".encode("ascii", "replace").decode(),
        }
    )
    return Emit(TRANSFERS_NOTIFIED, withdrawal_id, event, call.id)


def _taken(facts: Facts, withdrawal_id: str, reply: dict[str, Any]) -> Done:
    """The custodian has it. A notification may have been quicker than the reply."""
    withdrawal, transfer = facts.withdrawals[withdrawal_id], facts.transfers[withdrawal_id]
    known = transfer.transfer_id
    if known is not None and known != reply["id"]:
        return second(withdrawal, known, reply["id"], facts.now, NAME)
    inserts: list[tuple[Table, Row]] = []
    upserts: list[tuple[Table, Row]] = []
    if known is None:
        state = reply["state"] if transfer.state == custodian.ASKED and rank(reply["state"]) == 1 else transfer.state
        row, line = changed(transfer, facts.now, transfer_id=reply["id"], state=state)[1]
        upserts.append(row)
        inserts.append(line)
    if withdrawal.status == Status.MANUAL_REVIEW and withdrawal.code == CUSTODIAN_SILENT:
        _, (row, line) = moved(withdrawal._replace(code=None), Status.BROADCASTING, facts.now, NAME)
        upserts.append(row)
        inserts.append(line)
    return Done(inserts=tuple(inserts), upserts=tuple(upserts))


def second(withdrawal: Withdrawal, first: str, other: str, now: datetime, actor: str) -> Done:
    """The custodian has two transfers for one withdrawal: a person's business, whatever becomes of the first."""
    about = {"withdrawal": withdrawal.id, "transfer": first, "other": other}
    alert = Alert(SECOND_TRANSFER, about)
    if withdrawal.status in ENDED or withdrawal.code == SECOND_TRANSFER:
        return Done(alerts=(alert,))
    _, (row, line) = moved(withdrawal, Status.MANUAL_REVIEW, now, actor, SECOND_TRANSFER)
    return Done(inserts=(line,), upserts=(row,), alerts=(alert,))
