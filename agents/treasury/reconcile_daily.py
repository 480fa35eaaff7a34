"""Reconciles once a day, in one worker of the deployment.

Due is what the last stored run says, by hand or by a worker: a restart neither skips nor doubles one. A run that could not ask
everybody is made again an hour later. It is stored when it has ended, on the connection that holds the leader's lock: who lost
the lock stores nothing, and who takes over begins anew.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final

import structlog
from aiokafka.errors import KafkaError

from agents.lone_writer import LoneWriter
from agents.services import Services, tell
from ledger.reconciling import WRITER, Found, Run, commit, last_whole, newest
from ledger.rows import Connection

_log = structlog.get_logger()

LOOK_S: Final = 60.0

Tell = Callable[[Run | None, datetime | None], None]
"""Is told of the last run, and when everything was last compared; None of a worker that does not lead."""


class ReconcileDaily:
    """`work` never returns."""

    def __init__(self, services: Services, compare: Callable[[Found], Awaitable[None]], tell: Tell) -> None:
        """`compare` finds what differs; it raises what a database that is away raises."""
        self._services, self._compare, self._tell = services, compare, tell
        self._writer = LoneWriter(WRITER, services)

    async def work(self) -> None:
        await self._writer.rounds(self._work, _failed, (KafkaError,), lambda: self._tell(None, None))

    async def _work(self, connection: Connection) -> float:
        if await self.due(connection):
            await self.run(connection)
        return LOOK_S

    async def due(self, connection: Connection) -> bool:
        runs = await newest(connection)
        if not runs:
            return True
        self._tell(runs[0], await last_whole(connection))
        return runs[0].due_at <= self._services.clock()

    async def run(self, connection: Connection) -> Run:
        started_at, found = self._services.clock(), Found()
        await self._compare(found)
        run, sealed = await commit(connection, found, started_at, self._services.clock(), WRITER)
        await tell(self._services, sealed)
        self._tell(run, await last_whole(connection))
        for gap in run.gaps:
            _log.warning("reconcile.gap", comparison=gap.comparison, about=gap.about, reason=gap.reason)
        log = _log.error if run.differences else _log.info
        log("ledger.reconciled", run=run.id, differences=run.differences, gaps=len(run.gaps))
        return run


def _failed(error: Exception) -> float:
    _log.warning("reconcile.retry", error=type(error).__name__)
    return LOOK_S
