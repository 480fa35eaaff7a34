"""What is made while a statement runs: the connection is free afterwards, however it ends."""

from __future__ import annotations

import asyncio

import pytest

from ledger.beside import beside, sent


class _Statement:
    """Runs until it is told to end."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.end = asyncio.Event()
        self.ended = False

    async def run(self) -> str:
        self.begun.set()
        try:
            await self.end.wait()
        finally:
            self.ended = True
        return "found"


async def test_it_is_made_while_the_statement_runs() -> None:
    statement = _Statement()

    def make() -> str:
        assert statement.begun.is_set()
        assert not statement.ended
        statement.end.set()
        return "made"

    assert await beside(statement.run(), make) == ("found", "made")


async def test_what_cannot_be_made_waits_for_the_statement() -> None:
    statement = _Statement()

    def make() -> str:
        asyncio.get_running_loop().call_soon(statement.end.set)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await beside(statement.run(), make)
    assert statement.ended


async def test_who_is_cancelled_before_it_left_takes_the_statement_along() -> None:
    statement = _Statement()
    sending = asyncio.create_task(sent(statement.run()))
    await statement.begun.wait()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert statement.ended
