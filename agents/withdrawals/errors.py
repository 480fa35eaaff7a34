"""Why a request about a withdrawal is refused at once.

RequestRefused (code)
 ├── KeyReused          idempotency_key_reused  the customer used this key for another withdrawal
 ├── ReservedUser       reserved_user           the user id is the company's own
 ├── UnknownWithdrawal  unknown_withdrawal
 ├── NotRaisable        not_raisable            why: no other attempt of its nonce is signed (agents/withdrawals/raising.py)
 ├── NotCancellable     not_cancellable         status: it may be on its way, or has ended
 └── LaneRestored       lane_restored           the lane was not compared with its chain since the database was restored
"""

from __future__ import annotations

from typing import ClassVar


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
            " can, `stablerail lanes open --force --reason …`"
        )


class NotRaisable(RequestRefused):
    code = "not_raisable"

    def __init__(self, why: str) -> None:
        super().__init__(f"no other attempt is signed for it: {why}")
        self.why = why
