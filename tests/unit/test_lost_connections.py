"""A connection that dies while it is made: asyncpg cancels what waits for it, and no loop of ours may end for that."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

from stablerail.config import load_settings
from stablerail.connections import connector


@pytest.fixture
def connect() -> Any:
    return connector(load_settings(env_file=None, database_url="postgresql://u:p@127.0.0.1:1/d"))


async def test_it_is_a_lost_connection_to_whoever_opened_it(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def dies(*_: Any, **__: Any) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(asyncpg, "connect", dies)
    with pytest.raises(ConnectionResetError):
        await connect()


async def test_a_task_that_was_cancelled_while_it_waits_for_one_is_cancelled(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def never(*_: Any, **__: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncpg, "connect", never)
    waiting = asyncio.create_task(connect())
    await begun.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
