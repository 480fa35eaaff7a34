"""/v1/withdrawals: asked for and cancelled with the scope `withdraw`, read with `read`; /v1/admin/limits with `admin`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import Depends, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from agents.withdrawals import requests
from agents.withdrawals.errors import RequestRefused
from agents.withdrawals.requests import Answered
from agents.withdrawals.withdrawal import Status
from ledger.limits import list_limits, set_limits
from stablerail.api import models, reads, withdrawal_reads
from stablerail.api.auth import needs
from stablerail.api.routes import problem, router_of
from stablerail.keys import Key, Scope
from stablerail.problems import Problem
from topics.events import WithdrawalRequested
from topics.money import format_amount, parse_amount

REPLAYED: Final = "Idempotency-Replayed"
_STATUS: Final = {"idempotency_key_reused": 409, "not_cancellable": 409, "unknown_withdrawal": 404}
"""Of each refusal's code; 422 where it is not named."""

WithdrawalId = Annotated[UUID, Path(description="the withdrawal's id", examples=["6f1c2f6f0d0c4c38a3c1f0c4a6a8d7e1"])]
IdempotencyKey = Annotated[
    str,
    Header(
        description="your own name of this withdrawal, unique among the customer's for ever",
        min_length=1,
        max_length=200,
        pattern=r"^[\x21-\x7e][\x20-\x7e]*$",
        examples=["payout-7"],
    ),
]
_TEXT: Final = r"^[^\x00-\x1f\x7f]+$"

_UNKNOWN: Final = problem(404, "unknown_withdrawal", "there is no withdrawal with this id", "Not Found")
_BAD_CURSOR: Final = ("bad_cursor", "`after` is not a cursor of ours; take it from `next`.")
_REUSED: Final = problem(
    409, "idempotency_key_reused", "this customer used this key for another withdrawal before", "Conflict"
)
_LATE: Final = problem(409, "not_cancellable", "the withdrawal is broadcasting; it can be cancelled before", "Conflict")
_UNKNOWN_LIMIT: Final = problem(422, "unknown_limit", "There is no limit of this name.", "Unprocessable Content")

reading = router_of(Scope.READ)
asking = router_of(Scope.WITHDRAW)
administering = router_of(Scope.ADMIN)


async def on_request_refused(_request: Request, error: Exception) -> JSONResponse:
    """What cannot be asked for, as a problem with the refusal's own code."""
    assert isinstance(error, RequestRefused)
    return Problem(_STATUS.get(error.code, 422), error.code, str(error)).response()


def _actor(key: Key) -> str:
    return f"key:{key.id}"


@asking.post(
    "/withdrawals",
    status_code=202,
    tags=["withdrawals"],
    summary="Ask for a withdrawal",
    responses={
        202: {
            "headers": {
                "Location": {"description": "where to look", "schema": {"type": "string"}},
                REPLAYED: {"description": "true: the key was used for this before", "schema": {"type": "string"}},
            }
        },
        **_REUSED,
    },
)
async def request_withdrawal(
    request: Request,
    response: Response,
    wish: models.WithdrawalWish,
    idempotency_key: IdempotencyKey,
    key: Annotated[Key, Depends(needs(Scope.WITHDRAW))],
) -> models.Withdrawal:
    """It is stored when this answers, and decided after that: `GET /v1/withdrawals/{id}` tells. The same key with the same
    contents, as often as you like, is one withdrawal and answers with it as it now is; with other contents it is refused.
    503 `journal_unavailable`: it is stored, and waits for Kafka; ask again with the same key."""
    event = WithdrawalRequested(idempotency_key=idempotency_key, **wish.model_dump(mode="json"))
    journal = request.app.state.journal
    journal.check()
    async with request.app.state.pool.acquire(timeout=reads.ACQUIRE_TIMEOUT_S) as connection:
        answered = await requests.request(
            connection, event, datetime.now(UTC), actor=_actor(key), traceparent=request.state.traceparent
        )
    await journal.take(answered.sealed)
    response.headers["Location"] = f"/v1/withdrawals/{answered.withdrawal.id}"
    return _answer(answered, response)


@asking.post(
    "/withdrawals/{withdrawal_id}/cancel",
    tags=["withdrawals"],
    summary="Cancel a withdrawal",
    responses={**_UNKNOWN, **_LATE},
)
async def cancel_withdrawal(
    request: Request,
    response: Response,
    withdrawal_id: WithdrawalId,
    key: Annotated[Key, Depends(needs(Scope.WITHDRAW))],
) -> models.Withdrawal:
    """While nothing is signed for it, that is while it is `pending` or `signing`; what was held is the customer's again when
    this answers. Cancelling a cancelled one answers it."""
    journal = request.app.state.journal
    journal.check()
    async with request.app.state.pool.acquire(timeout=reads.ACQUIRE_TIMEOUT_S) as connection:
        answered = await requests.cancel(
            connection,
            withdrawal_id.hex,
            datetime.now(UTC),
            actor=_actor(key),
            traceparent=request.state.traceparent,
        )
    await journal.take(answered.sealed)
    return _answer(answered, response)


def _answer(answered: Answered, response: Response) -> models.Withdrawal:
    if answered.sealed is None:
        response.headers[REPLAYED] = "true"
    return withdrawal_reads.of_row(answered.withdrawal)


@reading.get(
    "/withdrawals/{withdrawal_id}",
    tags=["withdrawals"],
    summary="A withdrawal with its history",
    responses=_UNKNOWN,
)
async def read_withdrawal(request: Request, withdrawal_id: WithdrawalId) -> models.WithdrawalHistory:
    """Each state it had, and each transaction that was signed for it with hash, nonce, fees, block and confirmations."""
    async with reads.snapshot(request.app.state.pool) as connection:
        found = await withdrawal_reads.withdrawal(connection, withdrawal_id)
    if found is None:
        raise Problem(404, "unknown_withdrawal", "there is no withdrawal with this id")
    return found


@reading.get(
    "/withdrawals",
    tags=["withdrawals"],
    summary="Withdrawals, newest first",
    responses=problem(400, *_BAD_CURSOR, "Bad Request"),
)
async def list_withdrawals(
    request: Request,
    user_id: Annotated[str | None, Query(description="only this customer's", max_length=200, pattern=_TEXT)] = None,
    status: Annotated[Status | None, Query(description="only in this state")] = None,
    chain: Annotated[str | None, Query(description="only on this chain", max_length=200, pattern=_TEXT)] = None,
    after: Annotated[str | None, Query(description="the `next` of the page before", max_length=100)] = None,
    limit: Annotated[int, Query(description="withdrawals on a page", ge=1, le=200)] = 50,
) -> models.Withdrawals:
    """By the time they were asked for. Pass `next` as `after`, with the same filters, for the next page; what is asked for
    meanwhile appears on the first page and moves nothing on the later ones."""
    try:
        cursor = withdrawal_reads.Cursor.parse(after) if after is not None else None
    except ValueError:
        raise Problem(400, *_BAD_CURSOR) from None
    async with reads.snapshot(request.app.state.pool) as connection:
        return await withdrawal_reads.withdrawals(connection, user_id, status, chain, cursor, limit)


@administering.get("/admin/limits", tags=["administration"], summary="Every limit that holds")
async def read_limits(request: Request) -> models.Limits:
    """Those that somebody set, and the settings' where nobody did."""
    async with request.app.state.pool.acquire(timeout=reads.ACQUIRE_TIMEOUT_S) as connection:
        return await _limits(connection, request.app.state.known_limits)


@administering.put(
    "/admin/limits",
    tags=["administration"],
    summary="Change limits",
    responses=_UNKNOWN_LIMIT,
)
async def change_limits(
    request: Request, changes: models.LimitChanges, key: Annotated[Key, Depends(needs(Scope.ADMIN))]
) -> models.Limits:
    """Sets those that are named, all or none, and unsets those that are null; the others stay. They hold for what is decided
    from then on. Each change is a log of the audit."""
    known: dict[str, int] = request.app.state.known_limits
    if unknown := [name for name in changes.limits if name not in known]:
        raise Problem(422, "unknown_limit", f"{unknown[0][:100]!r} is none; there are {', '.join(known)}.")
    values = {name: None if text is None else parse_amount(text) for name, text in changes.limits.items()}
    journal = request.app.state.journal
    journal.check()
    async with request.app.state.pool.acquire(timeout=reads.ACQUIRE_TIMEOUT_S) as connection:
        sealed = await set_limits(connection, values, datetime.now(UTC), actor=_actor(key))
        found = await _limits(connection, known)
    await journal.take(sealed)
    return found


async def _limits(connection: Any, known: dict[str, int]) -> models.Limits:
    there = await list_limits(connection)
    return models.Limits(
        limits=[
            models.Limit(
                name=name,
                value=format_amount(there[name].value if name in there else default),
                default=format_amount(default),
                updated_by=there[name].updated_by if name in there else None,
                updated_at=there[name].updated_at if name in there else None,
            )
            for name, default in known.items()
        ]
    )
