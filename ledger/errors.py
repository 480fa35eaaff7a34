"""What the ledger refuses, and what stops a commit.

LedgerError (code)
 ├── PostingRefused            the posting is an impossible wish; nothing was written
 │    ├── InsufficientFunds    account, available, wanted
 │    ├── Unbalanced           asset, difference
 │    └── TransactionReused    the id exists with other contents
 ├── Fenced                    the partition has another owner; nothing was written, and the batch is not ours any more
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


class Unbalanced(PostingRefused):
    """Debits and credits of an asset differ, or an amount is not above zero: a mistake in a rule of ours."""

    code = "unbalanced"

    def __init__(self, asset: str, difference: int) -> None:
        super().__init__(f"debits − credits of {asset} is {difference}, not 0")
        self.asset, self.difference = asset, difference


class TransactionReused(PostingRefused):
    """A transaction id that was used for other contents."""

    code = "transaction_reused"

    def __init__(self, transaction_id: UUID) -> None:
        super().__init__(f"transaction {transaction_id} exists with other contents")
        self.transaction_id = transaction_id


class Fenced(LedgerError):
    """Another worker owns the partition: an owner row is not at our epoch."""

    code = "fenced"

    def __init__(self, stage: str, lost: tuple[tuple[str, int], ...]) -> None:
        super().__init__(f"{stage} does not own {', '.join(f'{topic}[{partition}]' for topic, partition in lost)}")
        self.stage, self.lost = stage, lost


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

    code = "unknown_account"

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no account {name}")
        self.name = name


class TransactionNotFound(ReadRefused):
    """No transaction has this id."""

    code = "unknown_transaction"

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
