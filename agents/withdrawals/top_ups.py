"""What a top-up of a lane's gas is: its row, its transaction, and the coins it moves in the ledger. Pure.

Amounts have 6 decimals, as all money of ours: a top-up is whole millionths of a coin.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

from agents.withdrawals.desks import Desk
from agents.withdrawals.withdrawal import TOP_UP, Attempt, AttemptStatus
from chain.fees import NOTHING_GAS, Fees
from chain.transactions import unsigned_call
from ledger.accounts import gas_coins
from ledger.posting import Transaction, credit, debit

OPEN: Final = "open"
DONE: Final = "done"
FAILED: Final = "failed"

WEI: Final = 10**12
"""Of a millionth of a coin."""


@dataclass(frozen=True)
class TopUpPolicy:
    """For a chain, in millionths of its coin."""

    below: int
    """A lane that has less is given some."""
    upto: int
    """So much it then has."""
    day_max: int
    """Most that is given on a day (UTC), to all lanes together."""
    low: int
    """The gas account itself is low below it."""


class TopUp(NamedTuple):
    """A row of `gas_top_ups`."""

    chain: str
    signer: str
    """The gas account."""
    nonce: int
    """Its own: one top-up has one nonce for life."""
    lane: str
    """The signer that is given the coins."""
    amount: int
    state: str
    block_number: int | None
    signed_at: datetime
    ended_at: datetime | None


def unsigned(desk: Desk, top_up: TopUp, n: int, offer: Fees, now: datetime) -> Attempt:
    """The n-th attempt of its nonce, as `Desks.complete` signs it."""
    fields = unsigned_call(
        chain_id=desk.chain_id,
        nonce=top_up.nonce,
        priority_fee=offer.priority_fee,
        max_fee=offer.max_fee,
        gas_limit=NOTHING_GAS,
        to=top_up.lane,
        data=b"",
        value=top_up.amount * WEI,
    )
    return Attempt(
        top_up.chain, "", top_up.signer, top_up.nonce, n, TOP_UP, None, fields, NOTHING_GAS, offer.max_fee,
        offer.priority_fee, AttemptStatus.SIGNED.value, None, None, None, now, None, now, 1,
    )  # fmt: skip


def given(top_up: TopUp) -> Transaction:
    """At finality. Fees are in no account, those of withdrawals neither."""
    place = f"{top_up.chain}:{top_up.signer}:{top_up.nonce}"
    id = hashlib.blake2b(place.encode(), digest_size=16, person=b"gas top-up").hexdigest()
    legs = (
        debit(gas_coins(f"{top_up.chain}:{top_up.lane}"), top_up.amount),
        credit(gas_coins(f"{top_up.chain}:{top_up.signer}"), top_up.amount),
    )
    return Transaction(id, "gas_top_up", place, legs)
