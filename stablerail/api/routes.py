"""/v1: a user's balances, wallets and deposits; one deposit with its history. Read only, scope `read`."""

from __future__ import annotations

from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Query, Request

from stablerail.api import models, reads
from stablerail.api.auth import needs
from stablerail.api.compared import Compared
from stablerail.api.detail import DetailedBalances, detailed
from stablerail.keys import Scope
from stablerail.problems import MEDIA_TYPE, Problem
from topics.events import Chain

# in paths as {user_id:path}: an id may hold slashes
UserId = Annotated[
    str,
    Path(
        description="your own id of the customer",
        min_length=1,
        max_length=200,
        pattern=r"^[\x21-\x7e][\x20-\x7e]*$",
        examples=["user_42"],
    ),
]
DepositId = Annotated[UUID, Path(description="the deposit's id", examples=["6f1c2f6f0d0c4c38a3c1f0c4a6a8d7e1"])]
After = Annotated[
    str | None,
    Query(description="the `next` of the page before", max_length=300, examples=["MTc2MzcwMDAwMDAwMDAwMC42Zg"]),
]
OfUser = Annotated[
    str | None,
    Query(description="only this customer's", min_length=1, max_length=200, pattern=r"^[\x21-\x7e][\x20-\x7e]*$"),
]
OfChain = Annotated[Chain | None, Query(description="only on this chain")]
Limit = Annotated[int, Query(description="deposits on a page", ge=1, le=200)]


def problem(status: int, code: str, detail: str, title: str) -> dict[int | str, dict[str, Any]]:
    """One problem answer for OpenAPI."""
    example = {"type": "about:blank", "title": title, "status": status, "code": code, "detail": detail}
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": f"{title}: `{code}`", "content": {MEDIA_TYPE: {"schema": schema, "example": example}}}
    }


_UNKNOWN_USER: Final = ("unknown_user", "No wallet and no account belongs to this user.")
_DISAGREE: Final = ("balance_discrepancy", "Ledger and legacy table differ, and the phase is strict.")
_LEGACY_AWAY: Final = ("legacy_away", "the legacy table's server: it has not answered lately")
_UNKNOWN_DEPOSIT: Final = ("unknown_deposit", "There is no deposit with this id.")
_BAD_CURSOR: Final = ("bad_cursor", "`after` is not a cursor of ours; take it from `next`.")


def router_of(scope: Scope) -> APIRouter:
    """For endpoints under /v1 that need the scope."""
    lacks = f"This API key does not have the scope {scope.value}."
    return APIRouter(
        prefix="/v1",
        dependencies=[Depends(needs(scope))],
        responses={
            **problem(401, "invalid_key", "This API key is malformed, unknown, wrong or revoked.", "Unauthorized"),
            **problem(403, "insufficient_scope", lacks, "Forbidden"),
            **problem(422, "invalid_request", "Some fields are missing or wrong; see errors.", "Unprocessable Content"),
            **problem(503, "database_unavailable", "The database does not answer; try again.", "Service Unavailable"),
        },
    )


router = router_of(Scope.READ)


@router.get(
    "/users/{user_id:path}/balances",
    tags=["customers"],
    summary="What a customer has",
    responses={
        **problem(404, *_UNKNOWN_USER, "Not Found"),
        **problem(409, *_DISAGREE, "Conflict"),
        **problem(503, *_LEGACY_AWAY, "Service Unavailable"),
    },
)
async def read_balances(
    request: Request,
    user_id: UserId,
    detail: Annotated[bool, Query(description="with what is held and why, and positions at the broker")] = False,
    alpaca_account_id: Annotated[UUID | None, Query(description="the customer's account there, with `detail`")] = None,
) -> DetailedBalances | models.Balances:
    """Balances by asset and account type. A deposit counts as `available` at once and as `not_final` until its chain
    has confirmed it to the depth we wait for; `pending` is held or reserved, `total` is everything. In detail: what the broker
    does not tell is null, and `gaps` says why; the rest is answered all the same."""
    if detail:
        view = await detailed(request.app.state.pool, request.app.state.broker, user_id, alpaca_account_id)
        if view is None:
            raise Problem(404, *_UNKNOWN_USER)
        return view
    compared = Compared()
    async with reads.snapshot(request.app.state.pool) as connection:
        found = await reads.balances(connection, user_id, compared.balances)
    await compared.settle(request.app.state.pool)
    if found is None:
        raise Problem(404, *_UNKNOWN_USER)
    return found


@router.get(
    "/users/{user_id:path}/wallets",
    tags=["customers"],
    summary="Where a customer can deposit",
    responses=problem(404, *_UNKNOWN_USER, "Not Found"),
)
async def read_wallets(request: Request, user_id: UserId) -> models.Wallets:
    """The customer's addresses, one per chain, and the chains whose wallet is still being made."""
    async with reads.snapshot(request.app.state.pool) as connection:
        found = await reads.wallets(connection, user_id)
    if found is None:
        raise Problem(404, *_UNKNOWN_USER)
    return found


@router.get(
    "/users/{user_id:path}/deposits",
    tags=["deposits"],
    summary="A customer's deposits, newest first",
    responses={
        **problem(400, *_BAD_CURSOR, "Bad Request"),
        **problem(404, *_UNKNOWN_USER, "Not Found"),
    },
)
async def list_deposits(request: Request, user_id: UserId, after: After = None, limit: Limit = 50) -> models.Deposits:
    """Pending deposits first, then by the time of their credit. Pass `next` as `after` for the next page; what is credited
    meanwhile appears on the first page and moves nothing on the later ones."""
    try:
        cursor = reads.Cursor.parse(after) if after is not None else None
    except ValueError:
        raise Problem(400, *_BAD_CURSOR) from None
    async with reads.snapshot(request.app.state.pool) as connection:
        found = await reads.deposits(connection, user_id, cursor, limit)
    if found is None:
        raise Problem(404, *_UNKNOWN_USER)
    return found


@router.get(
    "/deposits",
    tags=["deposits"],
    summary="Everybody's deposits, filtered",
    responses=problem(400, *_BAD_CURSOR, "Bad Request"),
)
async def list_all_deposits(
    request: Request,
    user_id: OfUser = None,
    chain: OfChain = None,
    status: Annotated[models.DepositStatus | None, Query(description="only of this status")] = None,
    after: After = None,
    limit: Limit = 50,
) -> models.ListedDeposits:
    """In the order of their ids, which says nothing and never changes: pass `next` as `after` until it is null, and each deposit
    that was there before the first page is on one page."""
    async with reads.snapshot(request.app.state.pool) as connection:
        try:
            return await reads.listed_deposits(connection, user_id, chain, status, after, limit)
        except ValueError:
            raise Problem(400, *_BAD_CURSOR) from None


@router.get(
    "/wallets",
    tags=["customers"],
    summary="Everybody's wallets, filtered",
    responses=problem(400, *_BAD_CURSOR, "Bad Request"),
)
async def list_all_wallets(
    request: Request,
    user_id: OfUser = None,
    chain: OfChain = None,
    after: After = None,
    limit: Annotated[int, Query(description="wallets on a page", ge=1, le=200)] = 50,
) -> models.ListedWallets:
    """In the order of chains and addresses. Pass `next` as `after` for the next page."""
    async with reads.snapshot(request.app.state.pool) as connection:
        try:
            return await reads.listed_wallets(connection, user_id, chain, after, limit)
        except ValueError:
            raise Problem(400, *_BAD_CURSOR) from None


@router.get(
    "/deposits/{deposit_id}",
    tags=["deposits"],
    summary="A deposit with its history",
    responses=problem(404, *_UNKNOWN_DEPOSIT, "Not Found"),
)
async def read_deposit(request: Request, deposit_id: DepositId) -> models.DepositHistory:
    """Its state, everyone who reported it, and each ledger transaction it caused, with the customer's lines."""
    async with reads.snapshot(request.app.state.pool) as connection:
        found = await reads.deposit(connection, deposit_id)
    if found is None:
        raise Problem(404, *_UNKNOWN_DEPOSIT)
    return found
