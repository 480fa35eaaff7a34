"""withdrawals.requested -> withdrawals; ledger: debit pending_withdrawal, credit usdc_balance -> withdrawals.accepted | withdrawals.settled

Decides:  whether a withdrawal may be made as it was asked for; if so, its amount is held.
Key:      user id.
Repeats:  harmless; a withdrawal's id is made of customer and idempotency key, and its row says that it was decided.
Refuses:  reserved_user, idempotency_key_reused  ->  withdrawals.requested.dlq

A customer's mistake is an answer: the withdrawal's row and `withdrawals.settled` (failed) with one of these codes, the first
that fits.

| code | why |
| --- | --- |
| frozen_customer | the KYC vendor's last word is a rejection |
| unsupported_rail | neither by our own wallet (`chain`) nor, where it is set up, by the custodian (`circle`) |
| unsupported_network | not a chain of ours, or no withdrawals leave by it on this rail |
| unsupported_token | not USDC; the native coin neither |
| bad_amount | not a decimal number above zero |
| too_many_decimals | more than the token has |
| bad_address | not an address of the chain, or one whose checksum (EIP-55) is wrong |
| zero_address | nobody's |
| token_contract | USDC's own contract keeps what it gets |
| own_wallet | a wallet of a customer of ours, a signer's, or one that the custodian sends from |
| denied_address | on the list of addresses that we send nothing to |
| below_minimum, above_maximum | withdrawal.min.<chain>, withdrawal.max.<chain> |
| insufficient_funds | the ledger's hold was refused: the balance is too small |
| closed_account | the ledger's hold was refused: the customer's account was closed |
| user_day_limit, network_day_limit | withdrawal.user_day, withdrawal.network_day.<chain> (limits.py) |
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Final, NamedTuple

from agents.outcome import Done, Emit, Outcome, Rejected, Stage
from agents.withdrawals.figures import count_ends
from agents.withdrawals.limits import WithdrawalPolicy, counted, exceeded, maximum, minimum
from agents.withdrawals.stored import lock
from agents.withdrawals.withdrawal import Status, Withdrawal, asked, held, moved, rows_of, settled, withdrawal_id
from chain.addresses import alike, check_address
from chain.assets import is_supported
from chain.errors import ChainError
from ledger.accounts import may_own
from ledger.errors import ClosedAccount, InsufficientFunds, LimitExceeded, PostingRefused
from ledger.rows import Connection, Row, Table
from ledger.sql import load as load_sql
from topics.catalog import WITHDRAWALS_ACCEPTED, WITHDRAWALS_REQUESTED, WITHDRAWALS_SETTLED
from topics.envelope import Received
from topics.events import Chain, Rail, WithdrawalAccepted, WithdrawalRequested
from topics.money import USDC_DECIMALS, parse_amount

_sql = load_sql("agents.withdrawals", "withdrawals.sql")

NAME: Final = "accept_withdrawals"
_TOO_FINE: Final = re.compile(rf"[0-9]+\.[0-9]{{{USDC_DECIMALS + 1},}}", re.ASCII)
_ZERO: Final = frozenset({"0x" + "0" * 40, "0x" + "0" * 64, "1" * 32})
"""EVM, Aptos, Solana (its system program)."""


@dataclass
class Facts:
    """What a batch knows, folded as it is decided."""

    now: datetime
    policy: WithdrawalPolicy
    limits: Mapping[str, int]
    own: frozenset[str]
    """Those of the addresses asked for that are wallets of ours, canonical."""
    denied: frozenset[str]
    withdrawals: dict[str, Withdrawal] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    """Customers whom the KYC vendor rejected."""


class _Wish(NamedTuple):
    """What was asked for, understood."""

    amount: int
    to: str
    """Canonical."""


def fold(facts: Facts, done: Done) -> None:
    for rows in (done.inserts, done.upserts):
        for _, row in rows:
            if isinstance(row, Withdrawal):
                facts.withdrawals[row.id] = row


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, WithdrawalRequested)
    if not may_own(event.user_id):
        return Rejected("reserved_user", f"{event.user_id!r} is the company's own")
    fresh = asked(event, facts.now)
    known = facts.withdrawals.get(fresh.id)
    if known is not None and known.fingerprint != fresh.fingerprint:
        return Rejected("idempotency_key_reused", "this customer used this key for another withdrawal before")
    if known is not None and known.status != Status.PENDING:
        return Done()
    pending = known or fresh
    # a new one's row is written in its last state only, its history has both
    first = rows_of(pending, NAME) if known is None else ()
    wish = judge(event, facts)
    if isinstance(wish, str):
        return _failed(pending, first, event.amount, facts.now, wish)
    transaction = held(
        pending._replace(amount=wish.amount),
        counted(pending.user_id, pending.chain, wish.amount, pending.requested_at, facts.limits),
    )
    ready = pending._replace(amount=wish.amount, recipient=wish.to, hold_id=transaction.id)
    after, rows = moved(ready, Status.SIGNING, facts.now, NAME)
    return _done(first, rows, _accepted(after))._replace(
        postings=(transaction,), if_refused=partial(_answered, pending, first, event.amount, facts.now)
    )


def judge(event: WithdrawalRequested, facts: Facts) -> _Wish | str:
    """What was asked for, or the code of the first rule that it breaks; what the ledger's hold refuses comes later."""
    chain, policy = event.chain, facts.policy
    if event.user_id in facts.frozen:
        return "frozen_customer"
    rails: dict[str, Mapping[str, str | None]] = {Rail.CHAIN: policy.tokens}
    if policy.custodian:
        rails[Rail.CIRCLE] = policy.custodian
    if event.rail not in rails:
        return "unsupported_rail"
    tokens = rails[event.rail]
    if chain not in tokens:
        return "unsupported_network"
    if not is_supported(chain, event.asset):
        return "unsupported_token"
    try:
        amount = parse_amount(event.amount)
    except ValueError:
        return "too_many_decimals" if _TOO_FINE.fullmatch(event.amount) else "bad_amount"
    if amount == 0:
        return "bad_amount"
    try:
        to = check_address(chain, event.to)
    except ChainError:
        return "bad_address"
    if to in _ZERO:
        return "zero_address"
    if to == tokens[chain]:
        return "token_contract"
    if to in facts.own:
        return "own_wallet"
    if to in facts.denied:
        return "denied_address"
    if amount < facts.limits[minimum(chain)]:
        return "below_minimum"
    if amount > facts.limits[maximum(chain)]:
        return "above_maximum"
    return _Wish(amount, to)


def _accepted(withdrawal: Withdrawal) -> Emit:
    event = WithdrawalAccepted.known(
        withdrawal_id=withdrawal.id,
        user_id=withdrawal.user_id,
        rail=Rail(withdrawal.rail),
        chain=Chain(withdrawal.chain),
        asset=withdrawal.asset,
        amount=withdrawal.amount,
        to=withdrawal.recipient,
    )
    return Emit(WITHDRAWALS_ACCEPTED, withdrawal.chain, event, withdrawal.id)


_Rows = tuple[tuple[Table, Row], ...]


def _answered(pending: Withdrawal, first: _Rows, amount: str, now: datetime, refusal: PostingRefused) -> Outcome:
    """What a refusal of the hold means. One that no customer can cause is a bug of ours: a dead letter."""
    if isinstance(refusal, LimitExceeded):
        return _failed(pending, first, amount, now, exceeded(refusal.counter))
    if isinstance(refusal, (InsufficientFunds, ClosedAccount)):
        return _failed(pending, first, amount, now, refusal.code)
    return Rejected(refusal.code, str(refusal))


def _failed(pending: Withdrawal, first: _Rows, amount: str, now: datetime, code: str) -> Done:
    after, rows = moved(pending, Status.FAILED, now, NAME, code)
    return _done(first, rows, settled(after, amount=amount))


def _done(first: _Rows, rows: _Rows, emit: Emit) -> Done:
    row, line = rows
    if first:
        return Done(inserts=(row, first[1], line), emits=(emit,))
    return Done(inserts=(line,), upserts=(row,), emits=(emit,))


class AcceptWithdrawals:
    """Loads the facts."""

    def __init__(self, policy: WithdrawalPolicy) -> None:
        self._policy = policy
        self._fallback = policy.limits(policy.chains)

    async def load(self, connection: Connection, events: Sequence[Received], _prepared: object, at: datetime) -> Facts:
        wanted = [received.event for received in events if isinstance(received.event, WithdrawalRequested)]
        withdrawals = await lock(connection, {withdrawal_id(e.user_id, e.idempotency_key) for e in wanted})
        limits = {name: int(value) for name, value in await connection.fetch(_sql.limits)}
        frozen = {row[0] for row in await connection.fetch(_sql.frozen, sorted({e.user_id for e in wanted}))}
        own: set[str] = set()
        denied: set[str] = set()
        for chains, addresses in alike(_addresses(wanted, self._policy.chains)):
            own |= {row[0] for row in await connection.fetch(_sql.own_addresses, chains, addresses)}
            denied |= {row[0] for row in await connection.fetch(_sql.denied_addresses, chains, addresses)}
        limits = {**self._fallback, **limits}
        return Facts(at, self._policy, limits, frozenset(own), frozenset(denied), withdrawals, frozenset(frozen))


def _addresses(events: Iterable[WithdrawalRequested], known: Collection[str]) -> Iterable[tuple[str, str]]:
    """(chain, canonical address) of what was asked for on the chains that are known."""
    for event in events:
        if event.chain in known:
            with suppress(ChainError):  # judge refuses it
                yield event.chain, check_address(event.chain, event.to)


def stage(policy: WithdrawalPolicy) -> Stage[Facts]:
    return Stage(
        name=NAME,
        source=WITHDRAWALS_REQUESTED,
        load=AcceptWithdrawals(policy).load,
        decide=decide,
        fold=fold,
        emits=(WITHDRAWALS_ACCEPTED, WITHDRAWALS_SETTLED),
        figures=count_ends,
    )
