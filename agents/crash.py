"""Stopping for sure, and remembering which event it was.

An exception that leaves a Faust agent acknowledges its event; a shutdown that hangs keeps its partitions. So a process
that met a bug ends at once: nothing is acknowledged after the failure, the supervisor starts a new one with back-off.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from datetime import datetime
from typing import Any, Final, NoReturn

import structlog

from ledger.errors import ACopy, DatabaseBehind
from ledger.rows import Connection

EXIT_BUG: Final = 70
"""EX_SOFTWARE: the supervisor restarts; an operator sees a bug, not a shutdown."""


class Stop:
    """Ends the process now. Tests may give `ends=False` and look at `reason`."""

    def __init__(self, *, ends: bool = True) -> None:
        self._ends = ends
        self.reason: str | None = None

    @property
    def stopping(self) -> bool:
        return self.reason is not None

    def __call__(self, reason: str, error: BaseException | None = None) -> None:
        if self.reason is None:
            self.reason = reason
            about: dict[str, Any] = {"exc_info": error}
            # their text says what is to be done; where they were raised says nothing
            if isinstance(error, ACopy | DatabaseBehind):
                about = {"code": error.code}
            structlog.get_logger().critical("process.stops", reason=reason, **about)
            if self._ends:
                exit_now(EXIT_BUG)


def exit_now(code: int) -> NoReturn:
    """os._exit with the logs flushed: no handler, no commit timer, no finalizer runs any more."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Watchdog(threading.Thread):
    """Ends a process whose event loop stands still: it neither works nor gives its partitions back.

    `beat` from the loop; a daemon thread looks. A process that was frozen and woken may be ended too: it starts afresh.
    """

    def __init__(self, limit_s: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._limit_s = limit_s
        self._beaten_at = time.monotonic()

    def beat(self) -> None:
        self._beaten_at = time.monotonic()

    def run(self) -> None:
        while (still_s := time.monotonic() - self._beaten_at) < self._limit_s:
            time.sleep(min(self._limit_s - still_s, 1.0))
        structlog.get_logger().critical("process.stops", reason=f"the event loop stood still for {still_s:.0f} s")
        exit_now(EXIT_BUG)


class Crashes:
    """How often the event at an offset stopped a process, kept in the database (declared outside). Another event there begins anew."""

    MAX: Final = 3
    """At the third time the event is isolated: a dead letter, and the partition goes on."""

    def __init__(self, stage: str) -> None:
        self._stage = stage

    async def count(self, connection: Connection, item: Any, error: Exception, at: datetime) -> int:
        """Counts one more crash of the item and returns how many there were."""
        times: int = await connection.fetchval(
            'INSERT INTO crashes AS c (stage, topic, partition, "offset", count, error, last_at, event)'
            " VALUES ($1, $2, $3, $4, 1, $5, $6, $7::text::uuid)"
            ' ON CONFLICT (stage, topic, partition, "offset") DO UPDATE'
            " SET count = CASE WHEN c.event <> excluded.event THEN 1 ELSE c.count + 1 END, error = excluded.error,"
            " last_at = excluded.last_at, event = excluded.event RETURNING count",
            self._stage,
            item.topic,
            item.partition,
            item.offset,
            type(error).__name__,  # its text may hold what the event held
            at,
            item.position_uid,
        )
        return times
