"""The ledger's answers as people and programs get them, the same from the API and the CLI: models, CSV, streamed JSON."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from ledger import reading
from ledger.reading import PostedTransaction, ReferenceCursor
from ledger.statement import Line, Statement
from topics.money import format_amount

_TIME: Final = re.compile(
    r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?(?:Z|[+-]\d\d:\d\d))?", re.ASCII | re.IGNORECASE
)
STATEMENT_COLUMNS: Final = (
    "at", "shard", "version", "transaction_id", "kind", "reference", "direction", "amount", "balance",
)  # fmt: skip


def parse_time(text: Any) -> datetime:
    """RFC 3339 with a zone, or a date, which is its midnight in UTC. Raises ValueError saying what is expected."""
    try:
        if type(text) is not str or _TIME.fullmatch(text) is None:
            raise ValueError
        time = datetime.fromisoformat(text.upper())
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("a time is RFC 3339 with a zone, such as 2026-11-25T14:00:00Z, or a date") from None


def format_time(time: datetime) -> str:
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def side(direction: str) -> Literal["debit", "credit"]:
    return "debit" if direction == "d" else "credit"


# -- shapes -------------------------------------------------------------------------------------------------------------

Decimal = Annotated[str, Field(description="decimal string", pattern=r"^-?\d+\.\d{6}$", examples=["25.000000"])]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", examples=["6f1c2f6f0d0c4c38a3c1f0c4a6a8d7e1"])]


class Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class Held(Answer):
    """What a customer has of one asset."""

    asset: str = Field(examples=["USDC"])
    available: Decimal = Field(description="spendable now: the account usdc_balance")
    pending: Decimal = Field(description="held or reserved: pending_withdrawal and pending_investment")
    total: Decimal = Field(description="of all accounts")
    accounts: dict[str, Decimal] = Field(
        description="balance by account type", examples=[{"usdc_balance": "25.000000"}]
    )


class OwnerBalances(Answer):
    user_id: str = Field(examples=["user_42"])
    balances: list[Held]


_ACCOUNT = "system.custody_usdc[MATIC]:USDC"
AccountText = Annotated[str, Field(description="owner.type:ASSET or owner.type[shard]:ASSET", examples=[_ACCOUNT])]


class AccountBalance(Answer):
    """Debits − credits of one account, all its shards together unless one was named."""

    account: AccountText
    at: datetime | None = Field(description="the time it was asked for; null = now, or at the transaction")
    transaction_id: Hex | None = Field(description="the transaction it was asked for")
    balance: Decimal
    shards: dict[str, Decimal] = Field(description="balance by shard", examples=[{"MATIC": "25.000000"}])


class StatementLine(Answer):
    at: datetime
    shard: str = Field(examples=["MATIC"])
    version: int = Field(description="the shard's lines are numbered from 1 without a gap")
    transaction_id: Hex
    kind: str = Field(examples=["deposit"])
    reference: str = Field(description="what the transaction is about, such as a deposit's id")
    direction: Literal["debit", "credit"]
    amount: Decimal
    balance: Decimal = Field(description="of the account after this line, all its shards together")


class StatementPage(Answer):
    """One page. Opening and closing balance are the whole period's, the same on every page."""

    model_config = ConfigDict(frozen=True, validate_by_name=True)

    account: AccountText
    from_: datetime | None = Field(alias="from", description="null = from the beginning")
    to: datetime | None = Field(description="lines before it; null = until the first page was read")
    opening_balance: Decimal
    closing_balance: Decimal
    line_count: int = Field(description="lines of the whole period")
    lines: list[StatementLine]
    next: str | None = Field(description="cursor of the next page; null = this was the last")


class LedgerEntry(Answer):
    account: AccountText
    direction: Literal["debit", "credit"]
    amount: Decimal
    balance_after: Decimal = Field(description="of this shard")
    version: int


class LedgerTransaction(Answer):
    """One balanced movement with all its lines, the company's own too."""

    id: Hex
    kind: str = Field(examples=["deposit"])
    reference: str
    at: datetime
    entries: list[LedgerEntry]


class LedgerTransactions(Answer):
    transactions: list[LedgerTransaction] = Field(description="oldest first")
    next: str | None = Field(description="cursor of the next page; null = this was the last")


class TrialBalanceLine(Answer):
    """All accounts of one asset and type."""

    asset: str = Field(examples=["USDC"])
    type: str = Field(examples=["usdc_balance"])
    accounts: int = Field(description="how many there are, shards counted")
    debit: Decimal = Field(description="sum of the balances above zero")
    credit: Decimal = Field(description="sum of the balances below zero, as a positive amount")
    balance: Decimal


class TrialBalance(Answer):
    at: datetime | None = Field(description="null = now")
    lines: list[TrialBalanceLine]
    differences: dict[str, Decimal] = Field(
        description="debits − credits by asset: each is zero, or the books are wrong", examples=[{"USDC": "0.000000"}]
    )


# -- from what the ledger says ---------------------------------------------------------------------------------------


def of_held(balance: reading.OwnerBalance) -> Held:
    return Held(
        asset=balance.asset,
        available=format_amount(balance.available),
        pending=format_amount(balance.pending),
        total=format_amount(balance.total),
        accounts={type_: format_amount(amount) for type_, amount in balance.by_type.items()},
    )


def of_balance(
    found: reading.AccountBalance, *, at: datetime | None = None, transaction_id: UUID | None = None
) -> AccountBalance:
    return AccountBalance(
        account=str(found.account),
        at=at,
        transaction_id=None if transaction_id is None else transaction_id.hex,
        balance=format_amount(found.balance),
        shards={shard: format_amount(balance) for shard, balance in found.by_shard.items()},
    )


def of_line(line: Line) -> StatementLine:
    return StatementLine(
        at=line.at,
        shard=line.shard,
        version=line.version,
        transaction_id=line.transaction_id.hex,
        kind=line.kind,
        reference=line.reference,
        direction=side(line.direction),
        amount=format_amount(line.amount),
        balance=format_amount(line.balance),
    )


def of_statement(statement: Statement, lines: Sequence[Line]) -> StatementPage:
    """The page `lines`, behind which `statement` stands."""
    return StatementPage(
        account=str(statement.account),
        from_=statement.since,
        to=statement.until,
        opening_balance=format_amount(statement.opening),
        closing_balance=format_amount(statement.closing),
        line_count=statement.lines,
        lines=[of_line(line) for line in lines],
        next=statement.cursor(),
    )


def of_transaction(found: PostedTransaction) -> LedgerTransaction:
    return LedgerTransaction(
        id=found.id.hex,
        kind=found.kind,
        reference=found.reference,
        at=found.at,
        entries=[
            LedgerEntry(
                account=str(line.account),
                direction=side(line.direction),
                amount=format_amount(line.amount),
                balance_after=format_amount(line.balance_after),
                version=line.version,
            )
            for line in found.lines
        ],
    )


def of_transactions(found: Sequence[PostedTransaction], after: ReferenceCursor | None) -> LedgerTransactions:
    transactions = [of_transaction(one) for one in found]
    return LedgerTransactions(transactions=transactions, next=None if after is None else after.text())


def of_trial_balance(found: reading.TrialBalance) -> TrialBalance:
    return TrialBalance(
        at=found.at,
        lines=[
            TrialBalanceLine(
                asset=line.asset,
                type=line.type,
                accounts=line.accounts,
                debit=format_amount(line.debit),
                credit=format_amount(line.credit),
                balance=format_amount(line.balance),
            )
            for line in found.lines
        ],
        differences={asset: format_amount(difference) for asset, difference in found.differences().items()},
    )


# -- text ---------------------------------------------------------------------------------------------------------------


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """RFC 4180."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


async def statement_csv(statement: Statement, pages: AsyncIterator[list[Line]]) -> AsyncIterator[str]:
    """The opening balance, the lines, the closing balance as the last row: without it the export was cut off."""
    opening, closing = format_amount(statement.opening), format_amount(statement.closing)
    begins = "" if statement.since is None else format_time(statement.since)
    ends = "" if statement.until is None else format_time(statement.until)
    yield csv_text([STATEMENT_COLUMNS, (begins, "", "", "", "opening_balance", "", "", "", opening)])
    async for lines in pages:
        yield csv_text(
            (
                *(format_time(line.at), line.shard, line.version, line.transaction_id.hex, line.kind, line.reference),
                *(side(line.direction), format_amount(line.amount), format_amount(line.balance)),
            )
            for line in lines
        )
    yield csv_text([(ends, "", "", "", "closing_balance", "", "", "", closing)])


async def statement_json(statement: Statement, pages: AsyncIterator[list[Line]]) -> AsyncIterator[str]:
    """The API's StatementPage with all its lines, as one document that is written while it is read."""
    whole = of_statement(statement, []).model_copy(update={"next": None})
    head, _, tail = whole.model_dump_json(by_alias=True).partition('"lines":[]')
    yield head + '"lines":['
    comma = ""
    async for lines in pages:
        yield comma + ",\n".join(of_line(line).model_dump_json() for line in lines)
        comma = ",\n"
    yield "]" + tail + "\n"
