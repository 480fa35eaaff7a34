"""What is made while PostgreSQL carries a statement out: otherwise the two take turns, each waiting for the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

Found = TypeVar("Found")
Made = TypeVar("Made")

SENT_TURNS: Final = 2
"""Turns of the loop in which a statement leaves: its task begins, then what it wrote is sent."""


async def sent(statement: Coroutine[Any, Any, Found]) -> asyncio.Task[Found]:
    """The statement on its way. Whoever has the task awaits it before the connection is used again, whatever happens."""
    task = asyncio.create_task(statement)
    try:
        for _ in range(SENT_TURNS):
            await asyncio.sleep(0)
    except BaseException:
        task.cancel()
        await ended(task)
        raise
    return task


async def ended(task: asyncio.Task[Any]) -> None:
    """When the connection is free again, for a rollback."""
    await asyncio.gather(task, return_exceptions=True)


async def beside(statement: Coroutine[Any, Any, Found], make: Callable[[], Made]) -> tuple[Found, Made]:
    """What the statement finds, and what was made meanwhile."""
    task = await sent(statement)
    try:
        made = make()
    except BaseException:
        await ended(task)
        raise
    return await task, made
