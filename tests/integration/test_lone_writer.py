"""The loop that every lone writer has: what comes again is tried again, and a bug is never slept over."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from aiokafka.errors import KafkaConnectionError

from agents import lone_writer
from agents.crash import Stop
from agents.lone_writer import LoneWriter
from ledger.commit import TRANSIENT
from ledger.rows import Connection
from tests.support import ledger_rig
from tests.support.ledger_rig import connect_to, until

databases, dsn = ledger_rig.databases, ledger_rig.dsn


async def nothing() -> None: ...


def writer(dsn: str, silence_s: float | None = None) -> tuple[LoneWriter, Stop]:
    stop = Stop(ends=False)
    services: Any = SimpleNamespace(connect=connect_to(dsn), stop=stop, relay=SimpleNamespace(journal=nothing))
    return LoneWriter("one", services, silence_s), stop


async def end(*writers: LoneWriter) -> None:
    for one in writers:
        if one._connection is not None:
            await one._connection.close()


async def test_what_comes_again_is_tried_again_and_a_bug_stops_the_process(dsn: str) -> None:
    one, stop = writer(dsn)
    fails: list[BaseException | None] = [
        asyncio.CancelledError(),  # of asyncpg, whose connection died while it was made; nobody cancelled us
        ConnectionResetError("away"),
        asyncpg.InterfaceError("lost"),
        KafkaConnectionError("away"),
        None,
        KeyError("x"),
    ]
    told: list[Exception] = []

    async def look(_: Connection) -> float:
        if (error := fails.pop(0)) is not None:
            raise error
        return 0.0

    def failed(error: Exception) -> float:
        assert stop.reason is None
        told.append(error)
        return 0.0

    expected = fails[1:4]
    with pytest.raises(KeyError):
        await one.rounds(look, failed, (KafkaConnectionError,))
    assert isinstance(told[0], ConnectionResetError)
    assert (told[1:], fails, stop.reason) == (expected, [], "one: KeyError('x')")
    await end(one)


async def test_a_connection_that_the_driver_lost_count_of_is_given_up_and_made_anew(dsn: str) -> None:
    (one, _), (other, _) = writer(dsn), writer(dsn)
    led_by: list[Connection] = []

    async def look(connection: Connection) -> float:
        led_by.append(connection)
        if len(led_by) == 1:
            raise asyncpg.InternalClientError("got result for unknown protocol state 3")
        raise KeyError("enough")

    with pytest.raises(KeyError):
        await one.rounds(look, lambda _: 0.5)
    assert led_by[0] is not led_by[1]
    assert await other.lead() is None, "its lock is held anew"
    await end(one, other)


async def test_who_stands_by_is_told_and_does_nothing_until_the_leader_is_gone(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lone_writer, "STANDBY_S", 0.01)
    (leader, _), (other, stop) = writer(dsn), writer(dsn)
    assert await leader.lead() is not None
    stood_by = rounds = 0

    def standing_by() -> None:
        nonlocal stood_by
        stood_by += 1

    async def look(_: Connection) -> float:
        nonlocal rounds
        rounds += 1
        return 0.01

    task = asyncio.create_task(other.rounds(look, lambda _: 0.01, standing_by=standing_by))
    await until(lambda: stood_by > 1, "it stands by")
    assert rounds == 0
    await end(leader)
    await until(lambda: rounds > 1, "it leads")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert stop.reason is None
    await end(other)


async def test_who_leads_and_says_nothing_for_too_long_leads_no_more(dsn: str) -> None:
    """As a process that is frozen, whose system still answers for its connection."""
    (frozen, _), (other, _) = writer(dsn, silence_s=0.2), writer(dsn)
    connection = await frozen.lead()
    assert connection is not None
    async with asyncio.timeout(60):
        while await other.lead() is None:
            await asyncio.sleep(0.01)
    with pytest.raises(TRANSIENT):
        await connection.execute("SELECT 1")
    assert await frozen.lead() is None, "it stands by, on a connection that is made anew"
    await end(frozen, other)
