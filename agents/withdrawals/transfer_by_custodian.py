"""withdrawals.accepted -> calls to Circle, one for each -> custodian_transfers, withdrawals -> transfers.notified

Takes:    those of the rail `circle`.
Decides:  which accepted withdrawals of the rail `circle` are asked of Circle now. From here on nothing but what becomes of the
          transfer ends it: it can be cancelled no more. Not asked for is what would be refused by now: its customer was rejected
          (`frozen_customer`), or its recipient denied (`denied_address`), after it was accepted. It is looked at every minute.
Key:      the chain.
Repeats:  harmless; the withdrawal's row says whether it was asked for, a call has one idempotency key for life, and a transfer
          carries the withdrawal's id as its reference.
Refuses:  unknown_withdrawal  ->  withdrawals.accepted.dlq

What Circle refuses is an answer to the customer (settle_transfers.py). Without an answer the call is repeated for ever, later
and later: after some attempts a person must look, and it goes on by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from agents.outcome import Call, Done, Outcome, Rejected, Retry, Stage
from agents.withdrawals import stored
from agents.withdrawals.custodian import ASKED, Source, Transfer, is_ours, rows_of
from agents.withdrawals.withdrawal import Status, Withdrawal, moved
from chain.addresses import alike
from connectors.circle.transactions import SOURCE
from ledger.rows import Connection
from ledger.sql import load as load_sql
from ledger.tables import WITHDRAWALS
from topics.catalog import TRANSFERS_NOTIFIED, WITHDRAWALS_ACCEPTED
from topics.envelope import Received
from topics.events import Rail, WithdrawalAccepted
from topics.money import format_amount

_sql = load_sql("agents.withdrawals", "withdrawals.sql")

NAME: Final = "transfer_by_custodian"
NO_WALLET: Final = "no_custodian_wallet"
WITHOUT_WALLET_S: Final = 60.0
FROZEN: Final = "frozen_customer"
FROZEN_S: Final = 60.0
DENIED: Final = "denied_address"
DENIED_S: Final = 60.0


@dataclass
class Facts:
    now: datetime
    sources: Mapping[str, Source]
    """By chain."""
    withdrawals: dict[str, Withdrawal] = field(default_factory=dict)
    """Locked, by id."""
    frozen: frozenset[str] = frozenset()
    """Of their customers: those whom the KYC vendor has rejected since."""
    denied: frozenset[str] = frozenset()
    """Of their recipients: those that were denied since."""


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, WithdrawalAccepted)
    withdrawal = facts.withdrawals.get(event.withdrawal_id)
    if withdrawal is None:
        return Rejected("unknown_withdrawal", event.withdrawal_id)
    if withdrawal.status != Status.SIGNING or withdrawal.rail != Rail.CIRCLE:
        return Done()
    source = facts.sources.get(withdrawal.chain)
    if source is None:
        # it was set when it was accepted; until it is again the customer may cancel
        return Retry(NO_WALLET, WITHOUT_WALLET_S)
    if withdrawal.user_id in facts.frozen:
        return Retry(FROZEN, FROZEN_S)  # as on the other rail: it waits, and may be cancelled
    if withdrawal.recipient in facts.denied:
        return Retry(DENIED, DENIED_S)  # likewise
    _, (row, line) = moved(withdrawal, Status.BROADCASTING, facts.now, NAME)
    transfer = Transfer(
        withdrawal.id, SOURCE, source.wallet_id, None, ASKED, "", None, None, facts.now, facts.now, 1
    )  # fmt: skip
    request = {
        "withdrawal_id": withdrawal.id,
        "chain": withdrawal.chain,
        "wallet_id": source.wallet_id,
        "token_id": source.token_id,
        "to": withdrawal.recipient,
        "amount": format_amount(withdrawal.amount),
        "fee_level": source.fee_level,
    }
    return Done(
        inserts=(*rows_of(transfer), line),
        upserts=(row,),
        calls=(Call(item=withdrawal.id, request=request, context={}),),
    )


def fold(facts: Facts, done: Done) -> None:
    for table, row in done.upserts:
        if table is WITHDRAWALS:
            facts.withdrawals[row[0]] = Withdrawal(*row)


def takes(event: WithdrawalAccepted) -> bool:
    return event.rail == Rail.CIRCLE


def stage(sources: Mapping[str, Source]) -> Stage[Facts]:
    async def load(connection: Connection, events: Sequence[Received], _prepared: Any, at: datetime) -> Facts:
        named = [received.event for received in events if isinstance(received.event, WithdrawalAccepted)]
        ids = {event.withdrawal_id for event in named if is_ours(event.withdrawal_id)}
        known = await stored.lock(connection, ids) if ids else {}
        users = sorted({withdrawal.user_id for withdrawal in known.values()})
        frozen = await connection.fetch(_sql.frozen, users) if users else []
        denied: set[str] = set()
        for chains, addresses in alike((withdrawal.chain, withdrawal.recipient) for withdrawal in known.values()):
            denied |= {row[0] for row in await connection.fetch(_sql.denied_addresses, chains, addresses)}
        return Facts(at, sources, known, frozenset(row[0] for row in frozen), frozenset(denied))

    return Stage(
        name=NAME,
        source=WITHDRAWALS_ACCEPTED,
        takes=takes,
        load=load,
        decide=decide,
        fold=fold,
        partner=SOURCE,
        operation="create_transfer",
        emits=(TRANSFERS_NOTIFIED,),
    )
