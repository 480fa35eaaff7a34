"""Looking at the database again and again, on a connection of one's own that may be lost; waiting for what a process needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, NoReturn

import structlog

from ledger.commit import TRANSIENT, lost_not_cancelled
from ledger.rows import Connection

_log = structlog.get_logger()
START_WAIT_S_MAX: Final = 5.0


async def until_up(
    reach: Callable[[], Awaitable[None]], waits: str, away: tuple[type[Exception], ...] = TRANSIENT
) -> None:
    """Returns when `reach` has: what a process needs may start after it. `waits`: the log's word while one of `away` comes; whatever
    else comes is raised."""
    wait_s = 0.2
    while True:
        try:
            return await reach()
        except away as error:
            _log.warning(waits, error=type(error).__name__)
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 2, START_WAIT_S_MAX)


class Kept:
    """A connection of one's own for reading, opened when it is needed and again when it was lost. For one at a time."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]]) -> None:
        self._connect = connect
        self._connection: Connection | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Connection]:
        """Raises TRANSIENT, after which the connection is given up: the driver may have lost count of it."""
        try:
            with lost_not_cancelled():
                if self._connection is None or self._connection.is_closed():
                    self._connection = await self._connect()
                yield self._connection
        except TRANSIENT:
            self.close()
            raise

    def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()


async def look_again_and_again(
    connect: Callable[[], Awaitable[Connection]],
    look: Callable[[Connection], Awaitable[None]],
    pause_s: float,
    unseen: str,
) -> NoReturn:
    """A database that is away is waited for; `unseen`: the log's word for that. Whatever else `look` raises is raised."""
    kept = Kept(connect)
    try:
        while True:
            try:
                async with kept.open() as connection:
                    await look(connection)
            except TRANSIENT as error:
                _log.warning(unseen, error=type(error).__name__)
            await asyncio.sleep(pause_s)
    finally:
        kept.close()
