"""Why something is refused, for good: every code that a dead letter may have, whose affair it is, and what helps.

A customer's mistake is mostly no dead letter but an answer (`withdrawals.settled`). A code that is not here is taken for
ours, and may be sent again.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple


class Whose(StrEnum):
    """Who has to do something about it."""

    CUSTOMER = "customer"
    PRODUCER = "producer"
    """Whoever wrote the event."""
    PARTNER = "partner"
    """A vendor, a custodian, a chain."""
    OURS = "ours"


class Code(NamedTuple):
    whose: Whose
    meaning: str
    redrivable: bool = False
    """Sending the same event again can help, once something else has changed."""
    heals: bool = False
    """Time alone may bring that: it is sent again by itself, later and later."""
    remedy: str = ""
    """What helps instead, or before."""


_TRIGGER: Final = "`stablerail workers trigger USER` asks the partner again, with the same key"

CODES: Final[dict[str, Code]] = {
    # what could not be read
    "not_json": Code(Whose.PRODUCER, "the value is not JSON", remedy="the producer sends it right, with an id of its own"),
    "wrong_schema": Code(
        Whose.PRODUCER, "a field is missing, of another type or out of range", redrivable=True,
        remedy="redrive after a release that reads it; else the producer sends it right",
    ),
    "unsupported_version": Code(
        Whose.PRODUCER, "of a version that this release does not know", redrivable=True, remedy="redrive after the upgrade",
    ),
    "bad_envelope": Code(Whose.PRODUCER, "a CloudEvents header is not what the binary mode says"),
    "missing_key": Code(Whose.PRODUCER, "the message has no key"),
    "too_large": Code(Whose.PRODUCER, "the value is over the limit of an input"),
    "event_id_reused": Code(Whose.PRODUCER, "the id was settled before with other contents"),
    # webhooks that were signed and not understood
    "unknown_type": Code(Whose.PARTNER, "a notification of a kind that we do not know"),
    "unknown_state": Code(Whose.PARTNER, "a state that we do not know", remedy="poll_circle takes what becomes of it"),
    "bad_subscribe_url": Code(Whose.PARTNER, "a subscription to be confirmed at an address that is not Amazon's"),
    # the company's own accounts
    "reserved_user": Code(Whose.PRODUCER, "a user id that is the company's own"),
    # onboarding
    "partner_refused": Code(Whose.PARTNER, "the partner refused the request", remedy=_TRIGGER),
    "partner_unavailable": Code(Whose.PARTNER, "no answer at all attempts", remedy=_TRIGGER),
    "partner_outcome_unknown": Code(Whose.PARTNER, "no readable answer at all attempts", remedy=_TRIGGER),
    "partner_rate_limited": Code(Whose.PARTNER, "over the partner's rate at all attempts", remedy=_TRIGGER),
    "wallet_missing": Code(Whose.PARTNER, "the partner says it made a wallet and does not show it", remedy=_TRIGGER),
    "address_taken": Code(Whose.PARTNER, "the partner's new wallet has another customer's address"),
    # deposits
    "unknown_chain": Code(Whose.PRODUCER, "a chain that we have no wallets on", redrivable=True),
    "bad_address": Code(Whose.PRODUCER, "no address of its chain"),
    "bad_tx_hash": Code(Whose.PRODUCER, "no transaction hash of its chain"),
    "unsupported_token": Code(Whose.PRODUCER, "a token that we do not take there", redrivable=True),
    "unknown_wallet": Code(
        Whose.PRODUCER, "no wallet of ours has this address, or not yet", redrivable=True, heals=True,
    ),
    "too_many_transfers": Code(Whose.PRODUCER, "more equal transfers of one transaction than are counted"),
    "transfer_changed": Code(Whose.PRODUCER, "its source reported this transfer with other contents before"),
    # withdrawals
    "idempotency_key_reused": Code(Whose.CUSTOMER, "the customer used this key for another withdrawal before"),
    "not_cancellable": Code(Whose.CUSTOMER, "something is signed for it already"),
    "unknown_withdrawal": Code(Whose.OURS, "no such withdrawal is stored", redrivable=True),
    "unknown_transaction": Code(Whose.OURS, "no such transaction is stored", redrivable=True),
    "not_final": Code(Whose.OURS, "the attempt has no end yet", redrivable=True, heals=True),
    # investing
    "unknown_order": Code(
        Whose.PRODUCER, "no such order was placed, or not yet", redrivable=True, heals=True,
    ),
    "order_id_reused": Code(Whose.PRODUCER, "an order of this id was placed before with other contents"),
    "order_not_reserved": Code(
        Whose.PRODUCER, "a fill of an order that was rejected", remedy="the broker filled what nothing was reserved for: a correction (runbook)",
    ),
    "order_overfilled": Code(Whose.PRODUCER, "more is filled than was reserved", remedy="a correction, when the broker is right (runbook)"),
    "fill_id_reused": Code(
        Whose.PRODUCER, "this fill was told before with another amount", remedy="the broker changed it: a correction of the difference (runbook)",
    ),
    "fills_disagree": Code(
        Whose.PRODUCER, "an order's total is not what its fills sum up to", redrivable=True,
        remedy="the producer tells the total of the fills that it told, or the end without one",
    ),
    # the ledger's refusals, where the stage has no answer of its own for them
    "insufficient_funds": Code(Whose.CUSTOMER, "the account has less than that", redrivable=True),
    "limit_exceeded": Code(Whose.CUSTOMER, "over a limit", redrivable=True),
    "closed_account": Code(Whose.CUSTOMER, "the account is closed"),
    "unknown_account": Code(Whose.OURS, "the account does not exist", redrivable=True),
    "wrong_asset": Code(Whose.OURS, "the account is of another asset"),
    "unbalanced": Code(Whose.OURS, "debits and credits differ"),
    "legs_out_of_range": Code(Whose.OURS, "a transaction that moves nothing, or in too many steps"),
    "amount_out_of_range": Code(Whose.PRODUCER, "not an amount that an account can hold"),
    "transaction_reused": Code(Whose.OURS, "the transaction's id was used with other contents"),
    "unknown_hold": Code(Whose.OURS, "the hold does not exist", redrivable=True),
    "hold_ended": Code(Whose.OURS, "the hold has ended"),
    "hold_exceeded": Code(Whose.OURS, "more than is held"),
    "hold_not_due": Code(Whose.OURS, "the hold's time has not come", redrivable=True, heals=True),
    "group_refused": Code(Whose.OURS, "another transaction of its group was refused", redrivable=True),
    "not_reversible": Code(Whose.OURS, "the transaction cannot be reversed"),
    "reversal_exceeded": Code(Whose.OURS, "more than is left to reverse"),
    # a defect of ours
    "bug": Code(Whose.OURS, "the event stopped its worker again and again", redrivable=True, remedy="redrive after the release that mends it"),
}  # fmt: skip

UNKNOWN: Final = Code(Whose.OURS, "a code of another release", redrivable=True)


def nature(code: str) -> Code:
    """What a code means; of one that is not declared: ours."""
    return CODES.get(code, UNKNOWN)
