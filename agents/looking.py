"""Looking at the database again and again, on a connection of one's own that may be lost; waiting for what a process needs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

import asyncpg
import structlog

from ledger.commit import TRANSIENT, lost_not_cancelled
from ledger.rows import Connection

_log = structlog.get_logger()
_AGAIN: Final[tuple[type[Exception], ...]] = (*TRANSIENT, asyncpg.InterfaceError)
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


async def look_again_and_again(
    connect: Callable[[], Awaitable[Connection]],
    look: Callable[[Connection], Awaitable[None]],
    pause_s: float,
    unseen: str,
) -> NoReturn:
    """A database that is away is waited for; `unseen`: the log's word for that. Whatever else `look` raises is raised."""
    connection: Connection | None = None
    try:
        while True:
            try:
                with lost_not_cancelled():
                    if connection is None or connection.is_closed():
                        connection = await connect()
                    await look(connection)
            except _AGAIN as error:
                if connection is not None:
                    connection.terminate()
                _log.warning(unseen, error=type(error).__name__)
            await asyncio.sleep(pause_s)
    finally:
        if connection is not None:
            connection.terminate()
