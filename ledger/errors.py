"""What the ledger refuses, and what stops a commit.

LedgerError (code)
 ├── PostingRefused            the posting is an impossible wish; nothing was written
 │    ├── InsufficientFunds    account, available, wanted
 │    ├── Unbalanced           asset, difference
 │    └── TransactionReused    the id exists with other contents
 ├── CorrectionRefused         a correction that may not be asked for or decided so; its code says why
 ├── Fenced                    the partition has another owner; nothing was written, and the batch is not ours any more
 ├── RoleRefused               the application's database role is missing, or not ours to use
 ├── RecordTooLarge            one event causes more than a commit may hold
 └── JournalBroken             a record that cannot be: edited, missing, or of an unknown version
"""

from __future__ import annotations

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


class JournalBroken(LedgerError):
    """A journal record is edited, missing, incomplete or of an unknown version."""

    code = "journal_broken"
