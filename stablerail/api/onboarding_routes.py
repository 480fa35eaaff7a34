"""/v1/onboarding and /v1/wallets: how far a customer's wallets are, and the stream of its changes. Scope `read`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any, Final, Literal

import structlog
from fastapi import Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from ledger.commit import TRANSIENT
from ledger.sql import load
from stablerail.answers import Answer
from stablerail.api import reads
from stablerail.api.auth import needs
from stablerail.api.models import Wallet
from stablerail.api.routes import problem, router_of
from stablerail.keys import Connection, Scope
from stablerail.problems import Problem
from topics.events import Chain

log = structlog.get_logger()
_SQL = load("stablerail.api", "onboarding.sql")

LOOK_S: Final = 1.0
"""Between two looks of a stream."""
STREAM_S_MAX: Final = 300.0
"""Then the client comes again by itself, with what it saw last."""

_ENDS: Final[tuple[type[Exception], ...]] = (Problem, *TRANSIENT)
"""Of a stream."""

Status = Literal["pending", "ready", "failed"]
UserId = Annotated[
    str,
    Query(
        description="your own id of the customer", min_length=1, max_length=200, pattern=r"^[\x21-\x7e][\x20-\x7e]*$",
        examples=["user_42"],
    ),
]  # fmt: skip
_UNKNOWN: Final = ("unknown_user", "This customer was never approved, and has no wallet.")
_UNKNOWN_USER: Final = problem(404, *_UNKNOWN, "Not Found")

router = router_of(Scope.READ)


class ChainStatus(Answer):
    chain: str = Field(examples=["SOL"])
    status: Status
    address: str | None = Field(description="where it is ready")
    error: str | None = Field(description="why it failed: a stable code", examples=["partner_refused"])


class WalletsStatus(Answer):
    user_id: str = Field(examples=["user_42"])
    status: Status = Field(description="failed when a chain failed and none is pending")
    chains: list[ChainStatus]


class OnboardingStatus(WalletsStatus):
    frozen: bool = Field(description="the approval was taken back: deposits are credited, nothing is withdrawn")
    attempts: int = Field(description="attempts of the job since it was last queued")
    next_attempt_at: datetime | None = Field(description="when it waits after a failed attempt")
    error: str | None = Field(description="of the last attempt that failed")
    version: int = Field(description="grows with every change")


class Addresses(Answer):
    user_id: str = Field(examples=["user_42"])
    addresses: list[Wallet]


async def status_of(connection: Connection, user_id: str) -> OnboardingStatus | None:
    """None for a customer that we do not know."""
    rows = await connection.fetch(_SQL.chains, user_id)
    job = await connection.fetchrow(_SQL.job, user_id)
    if job is None and not rows:
        return None
    chains = [
        ChainStatus(chain=row["chain"], status=_shown(row["status"]), address=row["address"], error=row["error"])
        for row in rows
    ]
    states = {chain.status for chain in chains}
    whole: Status = "pending" if "pending" in states or not states else "failed" if "failed" in states else "ready"
    facts: dict[str, Any] = dict(job) if job else {"attempts": 0, "next_attempt_at": None, "error": None, "version": 0}
    frozen = bool(await connection.fetchval(_SQL.frozen, user_id))
    return OnboardingStatus(user_id=user_id, status=whole, chains=chains, frozen=frozen, **facts)


def _shown(status: str) -> Status:
    return "ready" if status == "ready" else "failed" if status == "failed" else "pending"


async def _found(request: Request, user_id: str) -> OnboardingStatus:
    async with reads.snapshot(request.app.state.pool) as connection:
        found = await status_of(connection, user_id)
    if found is None:
        raise Problem(404, *_UNKNOWN)
    return found


@router.get(
    "/onboarding/status", tags=["customers"], summary="How far a customer's onboarding is", responses=_UNKNOWN_USER
)
async def read_onboarding_status(request: Request, user_id: UserId) -> OnboardingStatus:
    """Each chain pending, ready or failed, and the job that makes the wallets: its attempts, and when it tries again."""
    return await _found(request, user_id)


@router.get(
    "/wallets/status", tags=["customers"], summary="A customer's wallets, chain by chain", responses=_UNKNOWN_USER
)
async def read_wallets_status(request: Request, user_id: UserId) -> WalletsStatus:
    """Pending, ready or failed per chain, with the address where it is ready."""
    found = await _found(request, user_id)
    return WalletsStatus(user_id=found.user_id, status=found.status, chains=found.chains)


@router.get("/wallets/addresses", tags=["customers"], summary="A customer's addresses", responses=_UNKNOWN_USER)
async def read_wallet_addresses(
    request: Request, user_id: UserId, chain: Annotated[Chain | None, Query(description="only this chain's")] = None
) -> Addresses:
    """Where the customer can deposit; only what is ready."""
    async with reads.snapshot(request.app.state.pool) as connection:
        found = await reads.wallets(connection, user_id)
    if found is None:
        raise Problem(404, *_UNKNOWN)
    wanted = [wallet for wallet in found.wallets if chain is None or wallet.chain == chain]
    return Addresses(user_id=user_id, addresses=wanted)


@router.get(
    "/onboarding/events",
    tags=["customers"],
    summary="A customer's onboarding as it changes: server-sent events",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "`status` events, each the whole status"},
        204: {"description": "it has ended and the caller saw the end: do not come again"},
        **_UNKNOWN_USER,
    },
)
async def stream_onboarding(
    request: Request,
    user_id: UserId,
    last_event_id: Annotated[str | None, Header(description="the last event's id, as browsers send it")] = None,
) -> Response:
    """One event at once and one with every change, with the version as its id, until nothing is pending any more."""
    first = await _found(request, user_id)
    if first.status != "pending" and last_event_id == str(first.version):
        return Response(status_code=204)
    return StreamingResponse(_events(request, first, last_event_id), media_type="text/event-stream")


async def _events(request: Request, now: OnboardingStatus, last: str | None) -> AsyncIterator[str]:
    deadline = asyncio.get_running_loop().time() + STREAM_S_MAX
    while True:
        if str(now.version) != last:
            last = str(now.version)
            yield f"id: {last}\nevent: status\ndata: {now.model_dump_json()}\n\n"
        else:
            yield ": still so\n\n"
        if now.status != "pending" or asyncio.get_running_loop().time() > deadline:
            return
        if request.app.state.stopping():  # who waits for the last answer serves nobody meanwhile
            return
        await asyncio.sleep(LOOK_S)
        try:
            await needs(Scope.READ)(request, None)  # the key may have been revoked meanwhile
            now = await _found(request, now.user_id)
        except _ENDS as error:  # the answer has begun: it ends, and the client comes again
            why = error.code if isinstance(error, Problem) else type(error).__name__
            log.warning("stream_ends", error=why)
            return
