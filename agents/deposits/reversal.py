"""What a reversed deposit takes from its customer: what is spendable, then what withdrawals hold that are not signed, newest
first; the rest is a shortfall.

| step | what | why there |
| --- | --- | --- |
| lock | deposits (the caller), withdrawals, holds, counters, accounts of all that may be posted | what is decided will be posted |
| take | pure: the customer's purse after a deposit is taken from it | |

A withdrawal that was accepted while the locks were taken would not be seen: the transaction runs again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

import asyncpg

from agents.deposits.deposit import Deposit, Place, Status, about, finalized, parked, reversed_
from agents.deposits.policy import Held
from agents.outcome import Alert, Emit
from agents.withdrawals.withdrawal import Status as Withdrawn
from agents.withdrawals.withdrawal import Withdrawal, moved, released, settled
from ledger import store
from ledger.accounts import spendable
from ledger.holds import HOLDS
from ledger.posting import Transaction
from ledger.rows import Connection, Row, Table
from ledger.sql import load as load_sql
from topics.money import format_amount

_sql = load_sql("agents.deposits", "deposits.sql")


class Taken(NamedTuple):
    """How a reversal is paid for."""

    cancelled: tuple[Withdrawal, ...]
    """As they are before."""
    shortfall: int


@dataclass
class Purse:
    """What a customer has that a reversal may take."""

    spendable: int = 0
    held: list[tuple[Withdrawal, int]] = field(default_factory=list)
    """Withdrawals that are not signed, newest first, and what each holds."""

    def copy(self) -> Purse:
        return Purse(self.spendable, list(self.held))

    def take(self, amount: int) -> Taken:
        """As few withdrawals as are needed, the newest first; none where even all of them would change nothing."""
        cancelled = []
        while self.spendable < amount and self.held:
            withdrawal, holds = self.held.pop(0)
            self.spendable += holds
            cancelled.append(withdrawal)
        taken = min(amount, self.spendable)
        self.spendable -= taken
        return Taken(tuple(cancelled), amount - taken)


class Reversed(NamedTuple):
    """What becomes of a deposit that is taken back."""

    deposit: Deposit
    postings: tuple[Transaction, ...]
    emits: tuple[Emit, ...]
    cancelled: tuple[Withdrawal, ...]
    alerts: tuple[Alert, ...]


def reverse(deposit: Deposit, purse: Purse, now: datetime) -> Reversed:
    """Of one that is credited. The purse is lighter then."""
    assert deposit.user_id is not None
    taken = purse.take(deposit.amount)
    gone = deposit._replace(status=Status.REVERSED.value, finalized_at=now, updated_at=now)
    after, posting, emit = reversed_(gone, taken.shortfall)
    alerts: tuple[Alert, ...] = ()
    if taken.shortfall:
        owed = {"user_id": deposit.user_id, "shortfall": format_amount(taken.shortfall)}
        alerts = (Alert("deposit_shortfall", about(deposit) | owed),)
    return Reversed(after, (posting,), (emit,), taken.cancelled, alerts)


class Cancelled(NamedTuple):
    """What becomes of withdrawals that a reversal cancels; to be posted before it."""

    postings: tuple[Transaction, ...]
    inserts: tuple[tuple[Table, Row], ...]
    upserts: tuple[tuple[Table, Row], ...]
    emits: tuple[Emit, ...]


def cancel(withdrawals: Sequence[Withdrawal], now: datetime, stage: str) -> Cancelled:
    steps = [moved(withdrawal, Withdrawn.CANCELLED, now, stage, "deposit_reversed") for withdrawal in withdrawals]
    return Cancelled(
        tuple(map(released, withdrawals)),
        tuple(line for _, (_, line) in steps),
        tuple(row for _, (row, _) in steps),
        tuple(settled(after) for after, _ in steps),
    )


async def lock_purses(
    connection: Connection, users: Iterable[str], due: Sequence[Deposit], owners: Mapping[Place, str], at: datetime
) -> dict[str, Purse]:
    """The customers' purses, locked, with all that may be posted for the `due` deposits, which are locked already. Raises
    SerializationError: run the transaction again."""
    found = {user: Purse() for user in users}
    withdrawals = [
        Withdrawal(*row)._replace(amount=int(row[7])) for row in await connection.fetch(_sql.not_signed, list(found))
    ]
    fold = await store.lock(connection, [*_possible(due, owners), *map(released, withdrawals)], at)
    if await connection.fetchval(_sql.count_not_signed, list(found)) != len(withdrawals):
        raise asyncpg.SerializationError("a withdrawal was accepted while the locks were taken")
    for withdrawal in withdrawals:
        hold = fold.states.get((HOLDS, withdrawal.hold_id or ""))
        if hold is not None and hold.state == "open":
            found[withdrawal.user_id].held.append((withdrawal, hold.remaining))
    for user, purse in found.items():
        purse.spendable = fold.balances[spendable(user)].balance
    return found


def _possible(due: Sequence[Deposit], owners: Mapping[Place, str]) -> Iterator[Transaction]:
    """Any of these may be posted: their accounts and counters are locked together."""
    for deposit in due:
        yield parked(deposit._replace(held=Held.DENIED.value))[0]
        user = deposit.user_id or owners.get((deposit.chain, deposit.recipient))
        if user is not None:  # what belongs to nobody can only be parked
            owned = deposit._replace(user_id=user)
            yield finalized(owned)[1]
            yield reversed_(owned)[1]
