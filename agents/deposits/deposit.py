"""What a deposit is: its identity, its row, and the money it moves (docs/adr/0005). Pure.

Identity: the n-th equal transfer (same token and amount) to an address in a transaction, whoever reports it. Equal
transfers to one address are interchangeable, so reports of several sources meet at the same n in any order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, NamedTuple

from agents.deposits.policy import outstanding_of
from agents.outcome import Emit
from ledger.accounts import SHORTFALL, SUSPENSE, WORLD, buffer, custody, spendable
from ledger.counters import Count
from ledger.posting import Transaction, credit, debit
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_FINALIZED, DEPOSITS_PARKED
from topics.events import Chain, DepositCredited, DepositFinalized, DepositParked

SCANNER: Final = "scanner"
"""The source name of our own reader of a chain: its reports are the transaction's logs."""
CUSTODIAN: Final = "circle"
"""The source name of whoever holds our wallets: an address it reports is ours, known to us or not."""


Place = tuple[str, str]
"""(chain, address)"""


class Status(StrEnum):
    PENDING = "pending"
    """Reported, not credited; `held` says why. Finality judges it."""
    CREDITED = "credited"
    ORPHANED = "orphaned"
    """Credited, but the chain does not show it any more; reversed when that is final."""
    FINALIZED = "finalized"
    REVERSED = "reversed"
    PARKED = "parked"
    """Final, and nobody is credited: in suspense."""
    VANISHED = "vanished"
    """Never credited, and its chain has no such transfer."""


ENDED: Final = frozenset({Status.FINALIZED, Status.PARKED})
"""Nothing that is said of it later changes it."""


class Deposit(NamedTuple):
    """A row of `deposits`."""

    id: str
    n: int
    """Which of its group's equal transfers, from 0."""
    chain: str
    tx_hash: str
    recipient: str
    asset: str
    amount: int
    user_id: str | None
    """None: to a wallet whose owner nobody knows."""
    status: str
    generation: int
    """How often it was credited: the same transaction mined again after a reversal is credited again, once."""
    buffer_shard: str
    block_hash: str | None
    block_number: int | None
    log_index: int | None
    credited_at: datetime | None
    finalized_at: datetime | None
    updated_at: datetime
    sender: str | None = None
    """In the chain's own spelling; None while nobody has said."""
    held: str | None = None
    """A `Held`; None: credited at once."""
    counted: int | None = None
    """What of it the customer's counter of what is outstanding holds."""

    @classmethod
    def read(cls, row: Iterable[Any]) -> Deposit:
        """Of a row as deposits.sql selects it."""
        found = cls(*row)
        return found._replace(amount=int(found.amount), counted=found.counted and int(found.counted))


def about(deposit: Deposit) -> dict[str, str]:
    """For an alert."""
    return {"deposit_id": deposit.id, "chain": deposit.chain, "tx_hash": deposit.tx_hash}


class Report(NamedTuple):
    """A row of `deposit_reports`: who said so, and how sure."""

    id: str
    source: str
    transfer_id: str
    group_id: str
    deposit_id: str
    evidence: str
    block_hash: str | None
    """In which block our reader saw it; of other sources the deposit's own row says where it is."""
    reported_at: datetime


GROUP_DIGITS: Final = 28
EQUAL_MAX: Final = 1 << 16
"""Equal transfers of one transaction that have ids: more than any block has room for."""


def group_of(chain: str, tx_hash: str, to: str, asset: str, amount: int) -> str:
    """All equal transfers to an address in a transaction; 32 hex digits, the id of the first. Canonical address and hash."""
    name = f"{chain}\0{tx_hash}\0{to}\0{asset}\0{amount}"
    return hashlib.blake2b(name.encode(), digest_size=GROUP_DIGITS // 2, person=b"deposit").hexdigest() + "0000"


def deposit_id(group_id: str, n: int) -> str:
    """The n-th transfer of a group, 0 ≤ n < EQUAL_MAX; 32 hex digits, unique for ever."""
    return f"{group_id[:GROUP_DIGITS]}{n:04x}" if n else group_id


def report_id(source: str, transfer_id: str) -> str:
    """A source's transfer; 32 hex digits."""
    return hashlib.blake2b(f"{source}\0{transfer_id}".encode(), digest_size=16, person=b"report").hexdigest()


def _transaction_id(deposit_id: str, movement: str, generation: int) -> str:
    name = f"{deposit_id}\0{movement}\0{generation}"
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"transaction").hexdigest()


def transaction_ids(deposit_id: str, generation: int) -> list[str]:
    """Every ledger transaction that a deposit of this generation may have: found by key, not by an index."""
    movements = ("credit", "final", "reverse")
    ids = [_transaction_id(deposit_id, m, g) for g in range(1, generation + 1) for m in movements]
    return [*ids, _transaction_id(deposit_id, "park", generation)]


def credited(deposit: Deposit, outstanding_max: int | None = None) -> tuple[Transaction, Emit]:
    """Debit the customer, credit the buffer. `outstanding_max`: the bound that `deposit.counted` counts towards."""
    assert deposit.user_id is not None
    transaction = Transaction(
        _transaction_id(deposit.id, "credit", deposit.generation),
        "deposit",
        deposit.id,
        (
            debit(spendable(deposit.user_id), deposit.amount),
            credit(buffer(deposit.buffer_shard), deposit.amount),
        ),
    )
    if deposit.counted:
        count = Count(outstanding_of(deposit.user_id), deposit.counted, outstanding_max)
        transaction = transaction._replace(counts=(count,))
    event = DepositCredited.known(
        deposit_id=deposit.id,
        user_id=deposit.user_id,
        chain=Chain(deposit.chain),
        tx_hash=deposit.tx_hash,
        to=deposit.recipient,
        asset=deposit.asset,
        amount=deposit.amount,
        transaction_id=transaction.id,
    )
    return transaction, Emit(DEPOSITS_CREDITED, deposit.recipient, event, transaction.id)


def finalized(deposit: Deposit) -> tuple[Deposit, Transaction, Emit]:
    """The custody mirror: what our wallets hold on that chain at finality. And the deposit, outstanding no more."""
    transaction = Transaction(
        _transaction_id(deposit.id, "final", deposit.generation),
        "deposit_final",
        deposit.id,
        (debit(custody(deposit.chain), deposit.amount), credit(WORLD, deposit.amount)),
        counts=_discounted(deposit),
    )
    return deposit._replace(counted=None), transaction, _ended(deposit, transaction, "finalized")


def reversed_(deposit: Deposit, shortfall: int = 0) -> tuple[Deposit, Transaction, Emit]:
    """Back from the customer; what the customer no longer has, `shortfall` as far as it is known, is owed to us."""
    assert deposit.user_id is not None
    transaction = Transaction(
        _transaction_id(deposit.id, "reverse", deposit.generation),
        "deposit_reversed",
        deposit.id,
        (
            debit(buffer(deposit.buffer_shard), deposit.amount),
            credit(spendable(deposit.user_id), deposit.amount, remainder=SHORTFALL),
        ),
        counts=_discounted(deposit),
    )
    return deposit._replace(counted=None), transaction, _ended(deposit, transaction, "reversed", shortfall)


def parked(deposit: Deposit) -> tuple[Transaction, Emit]:
    """Nobody's, and ours to keep apart: suspense from the buffer, and the custody mirror."""
    transaction = Transaction(
        _transaction_id(deposit.id, "park", deposit.generation),
        "deposit_parked",
        deposit.id,
        (
            debit(SUSPENSE, deposit.amount),
            credit(buffer(deposit.buffer_shard), deposit.amount),
            debit(custody(deposit.chain), deposit.amount),
            credit(WORLD, deposit.amount),
        ),
    )
    event = DepositParked.model_validate(
        {
            "deposit_id": deposit.id,
            "user_id": deposit.user_id,
            "chain": deposit.chain,
            "tx_hash": deposit.tx_hash,
            "to": deposit.recipient,
            "sender": deposit.sender,
            "asset": deposit.asset,
            "amount": deposit.amount,
            "reason": deposit.held,
            "transaction_id": transaction.id,
        }
    )
    return transaction, Emit(DEPOSITS_PARKED, deposit.recipient, event, transaction.id)


def _discounted(deposit: Deposit) -> tuple[Count, ...]:
    if not deposit.counted:
        return ()
    assert deposit.user_id is not None
    return (Count(outstanding_of(deposit.user_id), -deposit.counted),)


def _ended(deposit: Deposit, transaction: Transaction, outcome: str, shortfall: int = 0) -> Emit:
    event = DepositFinalized.model_validate(
        {
            "deposit_id": deposit.id,
            "user_id": deposit.user_id,
            "chain": deposit.chain,
            "tx_hash": deposit.tx_hash,
            "asset": deposit.asset,
            "amount": deposit.amount,
            "outcome": outcome,
            "transaction_id": transaction.id,
            "shortfall": shortfall or None,
        }
    )
    return Emit(DEPOSITS_FINALIZED, deposit.recipient, event, transaction.id)
