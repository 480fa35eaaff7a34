"""Worker processes, as the whole deployment sees them: each tells the database how it is, and hears there that it is to restart.

A restart is graceful: the process ends as by SIGTERM, and whoever runs it starts another.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, cast

import orjson
import structlog
from prometheus_client import CollectorRegistry

from agents.looking import look_again_and_again
from ledger.audit_logs import Log
from ledger.commit import TRANSIENT, Sealed, lock_writer, seal
from ledger.rows import Connection as Locked
from ledger.sql import load
from stablerail.keys import Connection
from stablerail.metrics import Metrics
from stablerail.movements import MOVEMENTS

_log = structlog.get_logger()
_SQL = load("stablerail", "workers.sql")

BEAT_S: Final = 2.0
LOST_S: Final = 15.0
"""A worker that was not heard of for so long does not work."""
STUCK_S: Final = 1_800.0
"""A job that has been under way for so long is looked at by a person."""
WATCH_S: Final = 30.0
WRITER: Final = "workers"
_SHOWN: Final = (
    "wallet_provisioning_",
    "stablerail_calls_total",
    "stablerail_breaker_state",
    "stablerail_stage_events_total",
)


@dataclass(frozen=True, slots=True)
class Worker:
    """A process as it was last seen."""

    id: str
    movement: str
    host: str
    pid: int
    started_at: datetime
    seen_at: datetime
    silent_s: float
    """Since then, by the server's clock."""
    trouble: dict[str, str]
    figures: dict[str, float]

    @property
    def state(self) -> Literal["ready", "unready", "lost"]:
        return "lost" if self.silent_s > LOST_S else "unready" if self.trouble else "ready"


async def tell(
    connect: Callable[[], Any], movement: str, registry: CollectorRegistry, trouble: Callable[[], dict[str, str]]
) -> None:
    """One worker's side; never returns. A database that is away is no reason to stop."""
    started = datetime.now(UTC)
    known: list[datetime | None] = []

    async def beat(connection: Connection) -> None:
        ordered = await _beat(connection, movement, started, trouble(), figures_of(registry))
        if known and known[-1] != ordered:  # no clock tells: they differ
            _log.info("worker.restart_ordered", movement=movement)
            os.kill(os.getpid(), signal.SIGTERM)
        known[:] = [ordered]

    await look_again_and_again(connect, beat, BEAT_S, "worker.beat_lost")


async def _beat(
    connection: Connection, movement: str, started: datetime, trouble: dict[str, str], figures: dict[str, float]
) -> datetime | None:
    """When the movement was last told to restart."""
    host, pid = socket.gethostname(), os.getpid()
    said = (orjson.dumps(one).decode() for one in (trouble, figures))
    ordered: datetime | None = await connection.fetchval(
        _SQL.beat, f"{host}:{pid}", movement, host, pid, started, *said, 4 * LOST_S
    )
    return ordered


def figures_of(registry: CollectorRegistry) -> dict[str, float]:
    """What operators ask for, as `name{label="value"}`."""
    found = {}
    for family in registry.collect():
        for sample in family.samples:
            if sample.name.startswith(_SHOWN) and not sample.name.endswith(("_created", "_bucket")):
                labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


async def seen(connection: Connection) -> list[Worker]:
    """Every worker that was seen lately, by movement."""
    return [
        Worker(**{**row, "trouble": orjson.loads(row["trouble"]), "figures": orjson.loads(row["figures"])})
        for row in await connection.fetch(_SQL.workers)
    ]


async def jobs(connection: Connection, now: datetime) -> tuple[dict[str, int], int]:
    """Jobs of wallet provisioning by state, and how many have been under way for too long."""
    rows = await connection.fetch(_SQL.jobs, now - timedelta(seconds=STUCK_S))
    return {state: count for state, count, _ in rows}, sum(stuck for *_, stuck in rows)


async def watch_jobs(connect: Callable[[], Any], clock: Callable[[], datetime], metrics: Metrics) -> None:
    """Shows how many jobs are stuck; never returns."""
    while True:
        try:
            connection = await connect()
            try:
                metrics.jobs_stuck((await jobs(connection, clock()))[1])
            finally:
                await connection.close()
        except TRANSIENT as error:
            _log.warning("jobs.not_counted", error=type(error).__name__)
        await asyncio.sleep(WATCH_S)


async def trouble(connection: Connection, now: datetime) -> dict[str, str]:
    """Why the deployment is not well; empty when it is."""
    found: dict[str, str] = {}
    by_movement: dict[str, list[Worker]] = {}
    for worker in await seen(connection):
        by_movement.setdefault(worker.movement, []).append(worker)
    for movement, workers in by_movement.items():
        if not any(worker.state == "ready" for worker in workers):
            why = "; ".join(f"{part}: {text}" for worker in workers for part, text in worker.trouble.items())
            found[movement] = why or f"no worker was heard of for {LOST_S:.0f} s"
    _, stuck = await jobs(connection, now)
    if stuck:
        found["jobs"] = f"{stuck} under way for more than {STUCK_S / 60:.0f} minutes"
    return found


async def restart(connection: Connection, movements: Sequence[str], actor: str, at: datetime) -> Sealed:
    """Every worker of these movements ends gracefully and is started anew by whoever runs it. ValueError for an unknown one."""
    unknown = [movement for movement in movements if movement not in MOVEMENTS]
    if unknown:
        raise ValueError(f"unknown movement {unknown[0][:40]}; there are {', '.join(MOVEMENTS)}")
    locked = cast(Locked, connection)
    async with connection.transaction():
        owners = await lock_writer(locked, WRITER)
        logs = []
        for movement in movements:
            await connection.execute(_SQL.order, movement, actor, at)
            logs.append(Log(actor, "worker.restart_ordered", "movement", movement))
        return await seal(
            locked,
            WRITER,
            owners,
            blocks=[],
            messages=[],
            at=at,
            actor=actor,
            summary={"restart": len(logs)},
            logs=logs,
        )
