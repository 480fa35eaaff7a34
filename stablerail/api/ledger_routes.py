"""/v1/accounts and /v1/ledger: balances and statements of any account, transactions, the trial balance. Scope `read`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import Header, Path, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BeforeValidator

from ledger import reading
from ledger.errors import ReadRefused
from ledger.reading import AccountName, ReferenceCursor
from ledger.statement import LINES_MAX, open_statement, pages, read_page, resume_statement
from stablerail import answers
from stablerail.api import reads
from stablerail.api.routes import problem, router_of
from stablerail.keys import Scope
from stablerail.problems import Problem

CSV: Final = "text/csv"
PAGE_LINES: Final = 100
_STATUS: Final = {"account_not_found": 404, "transaction_not_found": 404, "not_on_account": 404, "bad_cursor": 400}
"""Of each refusal's code; 422 where it is not named."""

# in paths as {account:path}: an owner may hold slashes
AccountPath = Annotated[
    str,
    Path(
        description="owner.type:ASSET for all shards together, owner.type[shard]:ASSET for one",
        max_length=400,
        examples=["system.custody_usdc[MATIC]:USDC"],
    ),
]
Time = Annotated[datetime | None, BeforeValidator(answers.parse_time)]
At = Annotated[Time, Query(description="RFC 3339 with a zone, or a date (its midnight in UTC)")]
TransactionId = Annotated[UUID, Path(description="the transaction's id", examples=["6f1c2f6f0d0c4c38a3c1f0c4a6a8d7e1"])]
After = Annotated[str | None, Query(description="the `next` of the page before", max_length=8_000)]

_UNKNOWN_ACCOUNT: Final = problem(404, "account_not_found", "there is no account ada.usdc_balance:USDC", "Not Found")
_UNKNOWN_TRANSACTION: Final = problem(404, "transaction_not_found", "there is no transaction with this id", "Not Found")
_BAD_CURSOR: Final = problem(400, "bad_cursor", "not a cursor of this list", "Bad Request")

router = router_of(Scope.READ)


async def on_read_refused(_request: Request, error: Exception) -> JSONResponse:
    """What the ledger cannot answer, as a problem with the refusal's own code."""
    assert isinstance(error, ReadRefused)
    return Problem(_STATUS.get(error.code, 422), error.code, str(error)).response()


@router.get(
    "/accounts/{account:path}/balance",
    tags=["ledger"],
    summary="An account's balance, now or then",
    responses=_UNKNOWN_ACCOUNT,
)
async def read_account_balance(
    request: Request,
    account: AccountPath,
    at: At = None,
    transaction: Annotated[UUID | None, Query(description="after the last line of this transaction")] = None,
) -> answers.AccountBalance:
    """Now; after the last entry that is not later than `at`; or after a transaction's last line on this account. A name
    that is none is `bad_account` (422), a transaction without a line here `not_on_account` (404)."""
    name = AccountName.parse(account)
    if at is not None and transaction is not None:
        raise Problem(422, "invalid_request", "Ask for `at` or for `transaction`, not for both.")
    async with reads.snapshot(request.app.state.pool) as connection:
        if transaction is not None:
            found = await reading.balance_after(connection, name, transaction)
        else:
            found = await reading.balance(connection, name, at=at)
    return answers.of_balance(found, at=at, transaction_id=transaction)


@router.get(
    "/accounts/{account:path}/statement",
    tags=["ledger"],
    summary="An account's statement",
    response_model=answers.StatementPage,
    responses={
        200: {"content": {CSV: {"schema": {"type": "string"}, "example": ",".join(answers.STATEMENT_COLUMNS)}}},
        **_BAD_CURSOR,
        **_UNKNOWN_ACCOUNT,
    },
)
async def read_statement(
    request: Request,
    account: AccountPath,
    since: Annotated[Time, Query(alias="from", description="lines at this time or later")] = None,
    until: Annotated[Time, Query(alias="to", description="lines before this time")] = None,
    after: After = None,
    limit: Annotated[int | None, Query(description=f"lines on a page; {PAGE_LINES}", ge=1, le=LINES_MAX)] = None,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
) -> Any:
    """Lines by time, all shards merged. The first page fixes which lines there are: entries that come later are on no page
    of it, and opening and closing balance stay. Pass `next` as `after`, with the same account and period, for the next page.
    `Accept: text/csv` is the whole statement as one stream, whose last row is the closing balance."""
    pool, name = request.app.state.pool, AccountName.parse(account)
    whole = CSV in accept.lower()
    if whole and (after is not None or limit is not None):
        raise Problem(422, "invalid_request", "CSV is the whole statement: leave out `after` and `limit`.")
    async with reads.snapshot(pool) as connection:
        if after is None:
            statement = await open_statement(connection, name, since, until)
        else:
            statement = await resume_statement(connection, name, since, until, after)
        if not whole:
            lines, behind = await read_page(connection, statement, limit or PAGE_LINES)
            return answers.of_statement(behind, lines)
    stream = answers.statement_csv(statement, pages(lambda: pool.acquire(timeout=reads.ACQUIRE_TIMEOUT_S), statement))
    return StreamingResponse(
        stream, media_type=CSV, headers={"Content-Disposition": 'attachment; filename="statement.csv"'}
    )


@router.get(
    "/ledger/transactions/{transaction_id}",
    tags=["ledger"],
    summary="A transaction with its lines",
    responses=_UNKNOWN_TRANSACTION,
)
async def read_transaction(request: Request, transaction_id: TransactionId) -> answers.LedgerTransaction:
    """All its lines, in their order. They sum to zero per asset."""
    async with reads.snapshot(request.app.state.pool) as connection:
        return answers.of_transaction(await reading.transaction(connection, transaction_id))


@router.get(
    "/ledger/transactions",
    tags=["ledger"],
    summary="The transactions of a reference, oldest first",
    responses=_BAD_CURSOR,
)
async def list_transactions(
    request: Request,
    reference: Annotated[
        str,
        Query(
            description="what the transactions are about, such as a deposit's id",
            max_length=200,
            pattern=r"^[^\x00-\x1f\x7f]*$",
            examples=["6f1c2f6f0d0c4c38a3c1f0c4a6a8d7e1"],
        ),
    ],
    after: After = None,
    limit: Annotated[int, Query(description="transactions on a page", ge=1, le=200)] = 50,
) -> answers.LedgerTransactions:
    """With their lines; empty when no transaction has this reference."""
    cursor = None if after is None else ReferenceCursor.parse(after)
    async with reads.snapshot(request.app.state.pool) as connection:
        return answers.of_transactions(*await reading.transactions_of(connection, reference, limit, cursor))


@router.get("/ledger/trial-balance", tags=["ledger"], summary="The trial balance, now or then")
async def read_trial_balance(request: Request, at: At = None) -> answers.TrialBalance:
    """Per asset and account type; per asset it sums to zero. With `at` each account that has moved since is searched, some
    ten thousand a second: for old times of a large ledger use `stablerail ledger trial-balance`."""
    async with reads.snapshot(request.app.state.pool) as connection:
        return answers.of_trial_balance(await reading.trial_balance(connection, at))
