"""broker.funded -> ledger: debit broker_operational, credit system_buffer_fiat

Decides:  that the company's own USD have arrived at the broker's firm account.
Key:      funding id.
Repeats:  harmless; the ledger transaction's id is made of the funding's.
Refuses:  transaction_reused (the funding's id with another amount)  ->  broker.funded.dlq
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from agents.outcome import Done, Outcome, Rejected, Stage
from ledger.accounts import SYSTEM, Account, AccountType, fiat_buffer, shard_of
from ledger.posting import Transaction, credit, debit
from ledger.rows import Connection
from topics.catalog import BROKER_FUNDED
from topics.envelope import Received
from topics.events import BrokerFunded

NAME: Final = "fund_broker"
BROKER: Final = Account(SYSTEM, AccountType.BROKER_OPERATIONAL)


@dataclass
class Facts:
    shards: int
    seen: dict[str, Transaction] = field(default_factory=dict)
    """What this batch has posted; what others have is told by the ledger."""


def fold(facts: Facts, done: Done) -> None:
    facts.seen.update({posting.id: posting for posting in done.postings})


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, BrokerFunded)
    key = hashlib.blake2b(event.funding_id.encode(), digest_size=16, person=b"broker funded").hexdigest()
    legs = (debit(BROKER, event.amount), credit(fiat_buffer(shard_of(event.funding_id, facts.shards)), event.amount))
    funding = Transaction(key, "broker_funded", event.funding_id, legs)
    before = facts.seen.get(key)
    if before is not None:
        return Done() if before == funding else Rejected("transaction_reused", f"{event.funding_id} had another amount")
    return Done(postings=(funding,))


def stage(fiat_shards: int) -> Stage[Facts]:
    async def load(_connection: Connection, _events: Sequence[Received], _prepared: Any, _at: datetime) -> Facts:
        return Facts(fiat_shards)

    return Stage(name=NAME, source=BROKER_FUNDED, load=load, decide=decide, fold=fold)
