"""/v1/admin/workers: how the workers are, restart them, run a customer's job now. Scope `admin`; every act is in the audit."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from agents.onboarding.control import trigger
from stablerail import workers
from stablerail.answers import Answer
from stablerail.api.auth import needs
from stablerail.api.models import Storable
from stablerail.api.reads import ACQUIRE_TIMEOUT_S
from stablerail.api.routes import problem
from stablerail.keys import Key, Scope
from stablerail.movements import MOVEMENTS
from stablerail.problems import Problem

_UNKNOWN: Final = ("unknown_user", "This customer was never approved, and has no wallet.")
_UNKNOWN_MOVEMENT: Final = ("unknown_movement", f"There are {', '.join(MOVEMENTS)}.")

Caller = Annotated[Key, Depends(needs(Scope.ADMIN))]
router = APIRouter(
    prefix="/v1/admin/workers",
    tags=["workers"],
    responses={
        **problem(401, "invalid_key", "This API key is malformed, unknown, wrong or revoked.", "Unauthorized"),
        **problem(403, "insufficient_scope", "This API key does not have the scope admin.", "Forbidden"),
        **problem(422, "invalid_request", "Some fields are missing or wrong; see errors.", "Unprocessable Content"),
        **problem(503, "database_unavailable", "The database does not answer; try again.", "Service Unavailable"),
    },
)


class WorkerStatus(Answer):
    id: str = Field(examples=["host-1:4711"])
    movement: str = Field(examples=["onboarding"])
    state: Literal["ready", "unready", "lost"] = Field(description="lost: not heard of for 15 s")
    trouble: dict[str, str] = Field(description="part -> why it does not work")
    started_at: datetime
    seen_at: datetime


class WorkersStatus(Answer):
    workers: list[WorkerStatus]
    jobs: dict[str, int] = Field(description="jobs of wallet provisioning by state")
    stuck: int = Field(description="under way for more than 30 minutes")


class WorkersMetrics(Answer):
    workers: dict[str, dict[str, float]] = Field(description="worker id -> metric -> value")


class WorkersHealth(Answer):
    status: Literal["ok"]


class RestartOrder(Answer):
    movement: str = Field(description="one movement's workers", examples=["onboarding"])


class TriggerOrder(Answer):
    user_id: Storable = Field(min_length=1, max_length=200, examples=["user_42"])


class Ordered(Answer):
    movement: str


class Triggered(Answer):
    user_id: str
    chains: list[str] = Field(description="what is due now; empty: nothing was failed or waiting")


def _now() -> datetime:
    return datetime.now(UTC)


def _connection(request: Request) -> Any:
    return request.app.state.pool.acquire(timeout=ACQUIRE_TIMEOUT_S)


@router.get("/status", summary="The workers and the jobs")
async def read_workers_status(request: Request, _caller: Caller) -> WorkersStatus:
    """Every worker that was heard of lately, and how many jobs stand where."""
    async with _connection(request) as connection:
        found = await workers.seen(connection)
        states, stuck = await workers.jobs(connection, _now())
    shown = [
        WorkerStatus(
            id=w.id, movement=w.movement, state=w.state, trouble=w.trouble, started_at=w.started_at,
            seen_at=w.seen_at,
        )
        for w in found
    ]  # fmt: skip
    return WorkersStatus(workers=shown, jobs=states, stuck=stuck)


@router.get("/metrics", summary="The workers' figures")
async def read_workers_metrics(request: Request, _caller: Caller) -> WorkersMetrics:
    """What each worker counts of jobs, calls and stages, at most some seconds old. Prometheus asks the workers themselves."""
    async with _connection(request) as connection:
        return WorkersMetrics(workers={worker.id: worker.figures for worker in await workers.seen(connection)})


@router.get(
    "/health",
    summary="Whether the workers are well",
    responses=problem(503, "workers_unhealthy", "onboarding: no worker was heard of for 15 s", "Service Unavailable"),
)
async def read_workers_health(request: Request, _caller: Caller) -> WorkersHealth:
    """503 with the reasons when a movement has no worker that works, or a job is stuck."""
    async with _connection(request) as connection:
        found = await workers.trouble(connection, _now())
    if found:
        raise Problem(503, "workers_unhealthy", "; ".join(f"{part}: {why}" for part, why in found.items()))
    return WorkersHealth(status="ok")


@router.post(
    "/restart",
    status_code=202,
    summary="Restart a movement's workers",
    responses=problem(404, *_UNKNOWN_MOVEMENT, "Not Found"),
)
async def restart_workers(request: Request, order: RestartOrder, caller: Caller) -> Ordered:
    """Each worker of the movement finishes what it has in hand, ends, and is started anew by whoever runs it."""
    if order.movement not in MOVEMENTS:
        raise Problem(404, *_UNKNOWN_MOVEMENT)
    journal = request.app.state.journal
    journal.check()
    async with _connection(request) as connection:
        sealed = await workers.restart(connection, [order.movement], f"key:{caller.id}", _now())
    await journal.take(sealed)
    return Ordered(movement=order.movement)


@router.post(
    "/trigger",
    status_code=202,
    summary="Run a customer's wallet job now",
    responses=problem(404, *_UNKNOWN, "Not Found"),
)
async def trigger_job(request: Request, order: TriggerOrder, caller: Caller) -> Triggered:
    """What failed, or waits for its next attempt, is due now. A call that was never answered is made again as it was."""
    journal = request.app.state.journal
    journal.check()
    async with _connection(request) as connection:
        found = await trigger(connection, order.user_id, f"key:{caller.id}", _now())
    if found is None:
        raise Problem(404, *_UNKNOWN)
    await journal.take(found.sealed)
    return Triggered(user_id=found.user_id, chains=list(found.chains))
