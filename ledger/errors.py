"""What the ledger refuses, and what stops a commit.

LedgerError (code)
 ├── PostingRefused            the posting is an impossible wish; nothing was written, and its id may be used again
 │    ├── InsufficientFunds    account, available, wanted
 │    ├── UnknownAccount       name
 │    ├── WrongAsset           account, asset
 │    ├── ClosedAccount        account, closed_at
 │    ├── AmountOutOfRange     amount, limit
 │    ├── Unbalanced           asset, difference
 │    ├── TransactionReused    transaction_id, stored, given: the id exists with other contents
 │    ├── GroupRefused         transaction_id, cause: another member of the atomic group was refused
 │    ├── UnknownHold          hold_id
 │    ├── HoldEnded            hold_id, state, ended_at
 │    ├── HoldExceeded         hold_id, remaining, wanted
 │    ├── HoldNotDue           hold_id, expires_at
 │    ├── UnknownTransaction   transaction_id
 │    ├── NotReversible        transaction_id, why
 │    └── ReversalExceeded     transaction_id, seq, left, wanted
 ├── AccountInUse              account, balance, holds: it cannot be closed
 ├── CorrectionRefused         a correction that may not be asked for or decided so; its code says why
 ├── Fenced                    the partition has another owner; nothing was written, and the batch is not ours any more
 ├── RoleRefused               the application's database role is missing, or not ours to use
 ├── RecordTooLarge            one event causes more than a commit may hold
 ├── ReadRefused               what was asked for cannot be answered
 │    ├── BadAccountName       name
 │    ├── AccountNotFound      name
 │    ├── TransactionNotFound  transaction_id
 │    ├── NotOnAccount         transaction_id, account: the transaction has no line there
 │    ├── BadPeriod            since, until
 │    └── BadCursor            not a cursor of ours, or of another question
 └── JournalBroken             a record that cannot be: edited, missing, or of an unknown version
"""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar
from uuid import UUID


class LedgerError(Exception):
    code: ClassVar[str] = "ledger_error"


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


class CorrectionRefused(LedgerError):
    """What people may not ask for or decide: same_actor, correction_decided, correction_reused, unknown_correction,
    unknown_user, reason_missing, actor_missing, bad_legs."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code  # type: ignore[misc]  # one class, several codes: nobody tells them apart by type


class Fenced(LedgerError):
    """Another worker owns the partition: an owner row is not at our epoch."""

    code = "fenced"

    def __init__(self, stage: str, lost: tuple[tuple[str, int], ...]) -> None:
        super().__init__(f"{stage} does not own {', '.join(f'{topic}[{partition}]' for topic, partition in lost)}")
        self.stage, self.lost = stage, lost


class RoleRefused(LedgerError):
    """The application's database role is missing, or our login may not act as it; the text says the remedy."""

    code = "role_refused"


class RecordTooLarge(LedgerError):
    """The commit record is over what the journal takes even in parts; the batch must be split."""

    code = "record_too_large"


class ReadRefused(LedgerError):
    """Base of questions that have no answer."""

    code = "read_refused"


class BadAccountName(ReadRefused):
    """The text does not name an account."""

    code = "bad_account"

    def __init__(self, name: str) -> None:
        super().__init__(f"{name!r} names no account: owner.type:ASSET, or owner.type[shard]:ASSET for one shard")
        self.name = name


class AccountNotFound(ReadRefused):
    """Nothing was ever posted to an account of this name."""

    code = "account_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no account {name}")
        self.name = name


class TransactionNotFound(ReadRefused):
    """No transaction has this id."""

    code = "transaction_not_found"

    def __init__(self, transaction_id: UUID) -> None:
        super().__init__(f"there is no transaction {transaction_id}")
        self.transaction_id = transaction_id


class NotOnAccount(ReadRefused):
    """The transaction did not move the account whose balance after it was asked for."""

    code = "not_on_account"

    def __init__(self, transaction_id: UUID, account: str) -> None:
        super().__init__(f"transaction {transaction_id} has no line on {account}; ask for the balance at its time")
        self.transaction_id, self.account = transaction_id, account


class BadPeriod(ReadRefused):
    """A period that ends before it begins."""

    code = "bad_period"

    def __init__(self, since: datetime, until: datetime) -> None:
        super().__init__(f"the period ends {until.isoformat()}, before it begins {since.isoformat()}")
        self.since, self.until = since, until


class BadCursor(ReadRefused):
    """The cursor is not ours, or belongs to another account or period."""

    code = "bad_cursor"

    def __init__(self) -> None:
        super().__init__("not a cursor of this list; take it from the page before, and change nothing else")


class JournalBroken(LedgerError):
    """A journal record is edited, missing, incomplete or of an unknown version."""

    code = "journal_broken"
