"""Why a request about a withdrawal is refused at once.

RequestRefused (code)
 ├── KeyReused          idempotency_key_reused  the customer used this key for another withdrawal
 ├── ReservedUser       reserved_user           the user id is the company's own
 ├── UnknownWithdrawal  unknown_withdrawal
 ├── NotRaisable        not_raisable            why: no other attempt of its nonce is signed (agents/withdrawals/raising.py)
 ├── NotCancellable     not_cancellable         status: it may be on its way, or has ended
 ├── NonceNotTaken      nonce_not_taken         it is not proven that somebody else used it (agents/withdrawals/foreign.py)
 ├── LaneRestored       lane_restored           the lane was not compared with its chain since the database was restored
 ├── LaneNotCounted     lane_not_counted        opening it would skip nonces on one endpoint's stored word
 ├── LaneRetired        lane_retired            its key signs nothing for us any more
 └── LaneInFlight       lane_in_flight          the chain has not ended all of its nonces yet

Of what two people say of a withdrawal (agents/withdrawals/ended_by_people.py), CorrectionRefused of the ledger:
 ├── NotOnItsWay        not_on_its_way          it has ended, ends by itself, or nothing of it was signed or asked for
 ├── MayStillBePaid     may_still_be_paid       one of its transactions, or of Circle's transfers, has not ended
 ├── WasPaid            was_paid                its recipient has got something
 └── PaymentNotProven   payment_not_proven      the transaction that is named is no payment of it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ledger.errors import CorrectionRefused


class RequestRefused(Exception):
    """The root. Nothing was written."""

    code: ClassVar[str] = "request_refused"


class KeyReused(RequestRefused):
    code = "idempotency_key_reused"

    def __init__(self) -> None:
        super().__init__("this customer used this key for another withdrawal before")


class ReservedUser(RequestRefused):
    code = "reserved_user"

    def __init__(self, user_id: str) -> None:
        super().__init__(f"{user_id!r} is the company's own")


class UnknownWithdrawal(RequestRefused):
    code = "unknown_withdrawal"

    def __init__(self) -> None:
        super().__init__("there is no withdrawal with this id")


class NotCancellable(RequestRefused):
    code = "not_cancellable"

    def __init__(self, status: str) -> None:
        super().__init__(f"the withdrawal is {status}; it can be cancelled while it is pending or signing")
        self.status = status


class LaneRestored(RequestRefused):
    code = "lane_restored"

    def __init__(self, lane: str) -> None:
        super().__init__(
            f"{lane} waits to be compared with its chain: `stablerail recovery open --lane {lane}`; where that cannot tell and you"
            " can, `stablerail lanes resume --force --reason …`"
        )


class LaneNotCounted(RequestRefused):
    code = "lane_not_counted"

    def __init__(self, lane: str, next_nonce: int, count: int) -> None:
        super().__init__(
            f"{lane} would go on from {count} instead of {next_nonce}, which an endpoint said once, and none answers now; try it"
            " again when one does; where you know it is so, `stablerail lanes resume --force --reason …`"
        )


class NotRaisable(RequestRefused):
    code = "not_raisable"

    def __init__(self, why: str) -> None:
        super().__init__(f"no other attempt is signed for it: {why}")
        self.why = why


class NonceNotTaken(RequestRefused):
    code = "nonce_not_taken"


class LaneRetired(RequestRefused):
    code = "lane_retired"

    def __init__(self, lane: str) -> None:
        super().__init__(f"{lane} is retired, for good; `stablerail lanes add` makes a lane of another key")


class LaneInFlight(RequestRefused):
    code = "lane_in_flight"

    def __init__(self, lane: str, nonces: Sequence[int]) -> None:
        super().__init__(
            f"{len(nonces)} of {lane}'s nonces are not final yet, {nonces[0]} to {nonces[-1]}: `stablerail lanes drain` it, and"
            " retire it when they are"
        )


class NotOnItsWay(CorrectionRefused):
    code = "not_on_its_way"


class MayStillBePaid(CorrectionRefused):
    code = "may_still_be_paid"


class WasPaid(CorrectionRefused):
    code = "was_paid"


class PaymentNotProven(CorrectionRefused):
    code = "payment_not_proven"
