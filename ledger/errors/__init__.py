"""What the ledger refuses, and what stops a commit.

LedgerError (code)
 ├── PostingRefused            the posting is an impossible wish; nothing was written, and its id may be used again
 │    ├── InsufficientFunds    account, available, wanted
 │    ├── UnknownAccount       name
 │    ├── WrongAsset           account, asset
 │    ├── ClosedAccount        account, closed_at
 │    ├── AmountOutOfRange     amount, limit
 │    ├── Unbalanced           asset, difference
 │    ├── LegsOutOfRange       count, count_max
 │    ├── TransactionReused    transaction_id, stored, given: the id exists with other contents
 │    ├── GroupRefused         transaction_id, cause: another member of the atomic group was refused
 │    ├── LimitExceeded        counter, used, wanted, limit
 │    ├── UnknownHold          hold_id
 │    ├── HoldEnded            hold_id, state, ended_at
 │    ├── HoldExceeded         hold_id, remaining, wanted
 │    ├── HoldNotDue           hold_id, expires_at
 │    ├── UnknownTransaction   transaction_id
 │    ├── NotReversible        transaction_id, why
 │    └── ReversalExceeded     transaction_id, seq, left, wanted
 ├── AccountInUse              account, balance, holds: it cannot be closed
 ├── CorrectionRefused         a correction that may not be asked for or decided so; nothing moved
 │    ├── SameActor            actor
 │    ├── CorrectionDecided    correction_id, state, decided_by
 │    ├── CorrectionReused     correction_id
 │    ├── UnknownCorrection    correction_id
 │    ├── UnknownUser          users
 │    ├── ReasonMissing        length_max
 │    ├── ActorMissing
 │    ├── MoneyHeld            account, held, left
 │    ├── NothingLeft          reference, left, wanted
 │    ├── OtherCommand         correction_id, kind: it ends a withdrawal
 │    └── BadLegs              count, count_max
 ├── OrderRefused              what contradicts what is known of an order; nothing moved
 │    ├── UnknownOrder         order_id
 │    ├── OrderReused          order_id
 │    ├── OrderNotReserved     order_id
 │    ├── OrderOverfilled      order_id, amount, filled
 │    ├── FillReused           order_id, fill_id, stored, given
 │    └── FillsDisagree        order_id, total, filled
 ├── LegacyAway                the legacy table is in a server that does not answer
 ├── LegacyUnusable            setting: the legacy table is not as it is configured
 ├── PhaseRefused              phase, reasons: shadow mode does not move on
 ├── BalancesDisagree          accounts: strict, and ledger and legacy table differ
 ├── ACopy                     a database that was rebuilt to look at may tell nobody anything
 ├── DatabaseBehind            an old backup: the journal has what the database has not
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
 ├── JournalBroken             a record that cannot be: edited, missing, or of an unknown version
 │    └── NoRecord             a message in the journal that is none of ours
 ├── HistoriesDiffer           a database and the journal have two commits at one place
 ├── DatabaseAhead             a database has commits that the journal lacks: it is not lost
 ├── DatabaseBusy              somebody works in the database that is to be rebuilt
 └── SchemaOutdated            the database's schema is not the program's
"""

from ledger.errors.base import LedgerError
from ledger.errors.commits import (
    ACopy,
    DatabaseAhead,
    DatabaseBehind,
    DatabaseBusy,
    Fenced,
    HistoriesDiffer,
    JournalBroken,
    NoRecord,
    RecordTooLarge,
    RoleRefused,
    SchemaOutdated,
)
from ledger.errors.corrections import (
    ActorMissing,
    BadLegs,
    CorrectionDecided,
    CorrectionRefused,
    CorrectionReused,
    MoneyHeld,
    NothingLeft,
    OtherCommand,
    ReasonMissing,
    SameActor,
    UnknownCorrection,
    UnknownUser,
)
from ledger.errors.orders import (
    FillReused,
    FillsDisagree,
    OrderNotReserved,
    OrderOverfilled,
    OrderRefused,
    OrderReused,
    UnknownOrder,
)
from ledger.errors.postings import (
    AccountInUse,
    AmountOutOfRange,
    ClosedAccount,
    GroupRefused,
    HoldEnded,
    HoldExceeded,
    HoldNotDue,
    InsufficientFunds,
    LegsOutOfRange,
    LimitExceeded,
    NotReversible,
    PostingRefused,
    ReversalExceeded,
    TransactionReused,
    Unbalanced,
    UnknownAccount,
    UnknownHold,
    UnknownTransaction,
    WrongAsset,
)
from ledger.errors.questions import (
    AccountNotFound,
    BadAccountName,
    BadCursor,
    BadPeriod,
    NotOnAccount,
    ReadRefused,
    TransactionNotFound,
)
from ledger.errors.shadow import BalancesDisagree, LegacyAway, LegacyUnusable, PhaseRefused

__all__ = [
    "ACopy",
    "AccountInUse",
    "AccountNotFound",
    "ActorMissing",
    "AmountOutOfRange",
    "BadAccountName",
    "BadCursor",
    "BadLegs",
    "BadPeriod",
    "BalancesDisagree",
    "ClosedAccount",
    "CorrectionDecided",
    "CorrectionRefused",
    "CorrectionReused",
    "DatabaseAhead",
    "DatabaseBehind",
    "DatabaseBusy",
    "Fenced",
    "FillReused",
    "FillsDisagree",
    "GroupRefused",
    "HistoriesDiffer",
    "HoldEnded",
    "HoldExceeded",
    "HoldNotDue",
    "InsufficientFunds",
    "JournalBroken",
    "LedgerError",
    "LegacyAway",
    "LegacyUnusable",
    "LegsOutOfRange",
    "LimitExceeded",
    "MoneyHeld",
    "NoRecord",
    "NotOnAccount",
    "NotReversible",
    "NothingLeft",
    "OrderNotReserved",
    "OrderOverfilled",
    "OrderRefused",
    "OrderReused",
    "OtherCommand",
    "PhaseRefused",
    "PostingRefused",
    "ReadRefused",
    "ReasonMissing",
    "RecordTooLarge",
    "ReversalExceeded",
    "RoleRefused",
    "SameActor",
    "SchemaOutdated",
    "TransactionNotFound",
    "TransactionReused",
    "Unbalanced",
    "UnknownAccount",
    "UnknownCorrection",
    "UnknownHold",
    "UnknownOrder",
    "UnknownTransaction",
    "UnknownUser",
    "WrongAsset",
]
