"""What cannot be posted, or closed."""

from __future__ import annotations

from datetime import datetime

from ledger.errors.base import LedgerError


class PostingRefused(LedgerError):
    """Base of refusals: the caller's transaction was not posted, its neighbours are not touched."""

    code = "posting_refused"


class InsufficientFunds(PostingRefused):
    """The account would fall below zero."""

    code = "insufficient_funds"

    def __init__(self, account: str, available: int, wanted: int) -> None:
        super().__init__(f"{account}: {wanted} wanted, {available} available (base units)")
        self.account, self.available, self.wanted = account, available, wanted


class UnknownAccount(PostingRefused):
    """The account is not on the chart of accounts (ledger/accounts.py): its type, or that owner or shard for the type."""

    code = "unknown_account"

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not on the chart of accounts")
        self.name = name


class WrongAsset(PostingRefused):
    """The chart of accounts keeps accounts of that type in another asset."""

    code = "wrong_asset"

    def __init__(self, account: str, asset: str) -> None:
        super().__init__(f"{account} is not kept in {asset}")
        self.account, self.asset = account, asset


class ClosedAccount(PostingRefused):
    """The account was closed."""

    code = "closed_account"

    def __init__(self, account: str, closed_at: datetime) -> None:
        super().__init__(f"{account} is closed since {closed_at.isoformat()}")
        self.account, self.closed_at = account, closed_at


class AmountOutOfRange(PostingRefused):
    """An amount is not 1 … limit, or a balance would pass the limit on either side of zero."""

    code = "amount_out_of_range"

    def __init__(self, amount: int, limit: int) -> None:
        super().__init__(f"{amount} is out of range; amounts are 1 to {limit}, balances at most that far from zero")
        self.amount, self.limit = amount, limit


class Unbalanced(PostingRefused):
    """Debits and credits of an asset differ: a mistake in a rule of ours, or of whoever made the legs."""

    code = "unbalanced"

    def __init__(self, asset: str, difference: int) -> None:
        super().__init__(f"debits − credits of {asset} is {difference}, not 0")
        self.asset, self.difference = asset, difference


class LegsOutOfRange(PostingRefused):
    """A transaction moves nothing, or in more steps than an entry's number can tell apart."""

    code = "legs_out_of_range"

    def __init__(self, count: int, count_max: int) -> None:
        super().__init__(f"a transaction has 1 to {count_max} entries, not {count}")
        self.count, self.count_max = count, count_max


class TransactionReused(PostingRefused):
    """A transaction id that was used for other contents. `stored` and `given` are their fingerprints, in hex."""

    code = "transaction_reused"

    def __init__(self, transaction_id: str, stored: str, given: str) -> None:
        super().__init__(f"transaction {transaction_id} exists with other contents: {stored}, given {given}")
        self.transaction_id, self.stored, self.given = transaction_id, stored, given


class GroupRefused(PostingRefused):
    """An atomic group stands or falls together: `transaction_id` is the member that was refused, for `cause`."""

    code = "group_refused"

    def __init__(self, transaction_id: str, cause: PostingRefused) -> None:
        super().__init__(f"transaction {transaction_id} of the same group was refused: {cause.code}")
        self.transaction_id, self.cause = transaction_id, cause


class LimitExceeded(PostingRefused):
    """A counter would pass its limit."""

    code = "limit_exceeded"

    def __init__(self, counter: str, used: int, wanted: int, limit: int) -> None:
        super().__init__(f"{counter}: {wanted} wanted, {used} of {limit} used")
        self.counter, self.used, self.wanted, self.limit = counter, used, wanted, limit


class UnknownHold(PostingRefused):
    """No hold has this id."""

    code = "unknown_hold"

    def __init__(self, hold_id: str) -> None:
        super().__init__(f"there is no hold {hold_id}")
        self.hold_id = hold_id


class HoldEnded(PostingRefused):
    """The hold was posted in full, voided, or has expired (also when the expiry is not posted yet)."""

    code = "hold_ended"

    def __init__(self, hold_id: str, state: str, ended_at: datetime) -> None:
        super().__init__(f"hold {hold_id} is {state} since {ended_at.isoformat()}")
        self.hold_id, self.state, self.ended_at = hold_id, state, ended_at


class HoldExceeded(PostingRefused):
    """More is to be captured than the hold still holds."""

    code = "hold_exceeded"

    def __init__(self, hold_id: str, remaining: int, wanted: int) -> None:
        super().__init__(f"hold {hold_id}: {wanted} wanted, {remaining} remaining (base units)")
        self.hold_id, self.remaining, self.wanted = hold_id, remaining, wanted


class HoldNotDue(PostingRefused):
    """The hold's time has not come, or it has none."""

    code = "hold_not_due"

    def __init__(self, hold_id: str, expires_at: datetime | None) -> None:
        super().__init__(f"hold {hold_id} expires {expires_at.isoformat() if expires_at else 'never'}")
        self.hold_id, self.expires_at = hold_id, expires_at


class UnknownTransaction(PostingRefused):
    """The transaction that is to be reversed does not exist."""

    code = "unknown_transaction"

    def __init__(self, transaction_id: str) -> None:
        super().__init__(f"there is no transaction {transaction_id}")
        self.transaction_id = transaction_id


class NotReversible(PostingRefused):
    """A reversal is not reversed (post the movement again, under an id of its own), nor is a hold's opening or release
    (void the hold, or open another)."""

    code = "not_reversible"

    def __init__(self, transaction_id: str, why: str) -> None:
        super().__init__(f"transaction {transaction_id} cannot be reversed: it is {why}")
        self.transaction_id, self.why = transaction_id, why


class ReversalExceeded(PostingRefused):
    """More of one of the original's entries is to be reversed than is left of it. `seq` None: nothing is left of any."""

    code = "reversal_exceeded"

    def __init__(self, transaction_id: str, seq: int | None, left: int, wanted: int) -> None:
        where = "nothing is left" if seq is None else f"entry {seq}: {wanted} wanted, {left} left (base units)"
        super().__init__(f"transaction {transaction_id}: {where}")
        self.transaction_id, self.seq, self.left, self.wanted = transaction_id, seq, left, wanted


class AccountInUse(LedgerError):
    """An account is closed only at balance zero, and when no open hold may give money back to it."""

    code = "account_in_use"

    def __init__(self, account: str, balance: int, holds: int) -> None:
        super().__init__(f"{account} has a balance of {balance} base units and {holds} open holds")
        self.account, self.balance, self.holds = account, balance, holds
