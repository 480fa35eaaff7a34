"""What has no answer."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from ledger.errors.base import LedgerError


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
