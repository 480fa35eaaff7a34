"""PostgreSQL stopped at once while batches are posted: what was acknowledged is there, and nothing is half."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import asyncpg
import pytest

from ledger.accounts import buffer
from ledger.book import Atomic, Request, post
from ledger.commit import TRANSIENT
from ledger.migrate import upgrade
from ledger.posting import Transaction
from ledger.rows import Connection
from ledger.store import Posted
from stablerail.dev.fetch import Tools
from stablerail.dev.postgres import Postgres
from tests.support.ledger_model import Wishes
from tests.support.ledger_rig import AT, assert_holds, connect_to, until

WRITERS, STOPS = 4, 3
BATCHES_BEFORE_STOP = 25


@pytest.fixture
def server(tmp_path: Path, tools: Tools) -> Iterator[Postgres]:
    """With fsync: what it says is written is on the disk."""
    with Postgres(tmp_path / "postgres", tools, {"fsync": "on", "synchronous_commit": "on"}) as started:
        yield started


async def test_a_server_stopped_at_once_keeps_what_was_acknowledged_and_nothing_half(server: Postgres) -> None:
    await upgrade(server.dsn, "stablerail")
    acknowledged: list[tuple[Transaction, Posted]] = []
    answers = 0
    unanswered: list[list[Request]] = []
    shared = Wishes(Random(0), ["ada", "bob", "cyd"], [buffer()])
    writers = [
        Wishes(Random(n), shared.users, shared.buffers, name=str(n), holds=shared.holds, posted=shared.posted)
        for n in range(WRITERS)
    ]

    async def write(number: int, connection: Connection) -> None:
        """Until the server is gone. What got no answer is asked again by the next connection."""
        while True:
            wishes = [writers[number].next() for _ in range(8)]
            requests: list[Request] = [Atomic((wishes[0], wishes[1])), *wishes[2:]]
            if not await ask(connection, number, requests):
                unanswered.append(requests)
                return

    async def ask(connection: Connection, number: int, requests: list[Request]) -> bool:
        try:
            batch = await post(connection, f"writer {number}", requests, AT)
        except (*TRANSIENT, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        nonlocal answers
        answers += 1
        for wish, result in zip(members(requests), batch.results, strict=True):
            if isinstance(result, Posted) and not result.existed:
                acknowledged.append((wish, result))
                writers[number].learn(wish)
        return True

    for stop in range(1, STOPS + 1):
        connections = [await connect_to(server.dsn)() for _ in range(WRITERS)]  # each before the server is gone
        tasks = [asyncio.create_task(write(number, each)) for number, each in enumerate(connections)]
        wanted = stop * WRITERS * BATCHES_BEFORE_STOP
        await until(lambda wanted=wanted: answers >= wanted, "enough batches")
        await asyncio.to_thread(server.stop_immediately)
        await asyncio.gather(*tasks)
        await asyncio.to_thread(server.start)
        connection: Connection = await connect_to(server.dsn)()
        await check(connection, acknowledged, unanswered)
        unanswered.clear()
        await assert_holds(connection)
        await connection.close()


def members(requests: list[Request]) -> list[Transaction]:
    return [t for request in requests for t in (request.transactions if isinstance(request, Atomic) else (request,))]


async def check(
    connection: Connection, acknowledged: list[tuple[Transaction, Posted]], unanswered: list[list[Request]]
) -> None:
    rows = await connection.fetch("SELECT replace(transaction_id::text, '-', ''), count(*) FROM entries GROUP BY 1")
    lines = {id: count for id, count in rows}  # noqa: C416
    for transaction, result in acknowledged:
        assert lines.pop(transaction.id, 0) == len(result.entries), "acknowledged, and not there"
    asked = {transaction.id for batch in unanswered for transaction in members(batch)}
    assert lines.keys() <= asked, "there, and nobody asked for it"
    commits = await connection.fetchrow(
        "SELECT sum((summary->>'posted')::int), (SELECT count(*) FROM transactions), count(*), (SELECT count(*) FROM outbox)"
        " FROM audit"
    )
    assert commits is not None
    assert commits[0] == commits[1], "half of a batch"
    assert commits[2] == commits[3]
    # the same batches again: what was committed without an answer is answered now, the rest happens now
    for number, batch in enumerate(unanswered):
        again = await post(connection, f"again {number}", batch, AT)
        for wish, result in zip(members(batch), again.results, strict=True):
            if isinstance(result, Posted) and (not result.existed or wish.id in lines):
                assert result.existed == (wish.id in lines)
                lines.pop(wish.id, None)
                acknowledged.append((wish, result))
    assert lines == {}, "committed, and never answered"
    balances: Counter[str] = Counter()
    for _, result in acknowledged:
        for entry in result.entries:
            balances[entry.account_id] += entry.amount if entry.direction == "d" else -entry.amount
    stored = await connection.fetch("SELECT replace(id::text, '-', ''), balance::text FROM accounts")
    assert {id: int(balance) for id, balance in stored} == balances
