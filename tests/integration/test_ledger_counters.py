"""Counters on a real PostgreSQL: an excess is a refusal, exact whoever counts at once, and a refused posting counts nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ledger.accounts import buffer, spendable
from ledger.book import Atomic, Request, Result, post
from ledger.counters import Count
from ledger.errors import GroupRefused, InsufficientFunds, LimitExceeded
from ledger.posting import Transaction, credit, debit
from ledger.rows import Connection
from ledger.store import Posted
from tests.support import ledger_rig
from tests.support.ledger_rig import AT, assert_holds, connect_to, differences, dump, rebuild

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection

DAY = "withdrawn ada 2026-07-01"


def fund(number: int, amount: int, *counts: Count, user: str = "ada") -> Transaction:
    legs = (debit(spendable(user), amount), credit(buffer(), amount))
    return Transaction(f"{number:032x}", "test", "", legs, counts=counts)


def spend(number: int, amount: int, *counts: Count) -> Transaction:
    legs = (credit(spendable("ada"), amount), debit(buffer(), amount))
    return Transaction(f"{number:032x}", "test", "", legs, counts=counts)


def up_to(limit: int, change: int = 40) -> Count:
    return Count(DAY, change, limit)


async def say(connection: Connection, *requests: Request) -> list[Result]:
    return (await post(connection, "test", requests, AT)).results


async def counters(connection: Connection) -> dict[str, int]:
    return {name: int(value) for name, value in await connection.fetch("SELECT name, value FROM counters")}


async def test_an_excess_is_refused_with_its_facts_and_its_neighbours_count(connection: Connection) -> None:
    first, second, third, other = await say(
        connection,
        fund(1, 10, up_to(100)),
        fund(2, 10, up_to(100)),
        fund(3, 10, up_to(100)),
        fund(4, 10, up_to(100, 20), Count("all", 1)),
    )
    assert isinstance(third, LimitExceeded)
    assert (third.counter, third.used, third.wanted, third.limit) == (DAY, 80, 40, 100)
    assert [isinstance(result, Posted) for result in (first, second, other)] == [True] * 3
    assert await counters(connection) == {DAY: 100, "all": 1}
    (refused,) = await say(connection, fund(5, 10, up_to(100, 1)))
    assert isinstance(refused, LimitExceeded)
    (back,) = await say(connection, fund(6, 10, Count(DAY, -70, 0)))
    assert isinstance(back, Posted), "what is taken back is never refused"
    assert await counters(connection) == {DAY: 30, "all": 1}
    await assert_holds(connection)


async def test_a_refused_transaction_or_group_counts_nothing(connection: Connection) -> None:
    alone, one, two = await say(
        connection,
        spend(1, 10, up_to(100)),
        Atomic((fund(2, 10, up_to(100)), spend(3, 11, up_to(100), Count("all", 1)))),
    )
    assert isinstance(alone, InsufficientFunds)
    assert isinstance(one, GroupRefused)
    assert isinstance(two, InsufficientFunds)
    assert await counters(connection) == {}


async def test_a_repeat_counts_once_whatever_it_would_count_towards_now(connection: Connection) -> None:
    await say(connection, fund(1, 10, up_to(100)))
    (again,) = await say(connection, fund(1, 10, Count("another day", 40, 1)))
    assert isinstance(again, Posted)
    assert again.existed
    assert await counters(connection) == {DAY: 40}


async def test_many_who_count_at_once_never_pass_the_limit_and_leave_nothing_of_it(
    dsn: str, connection: Connection
) -> None:
    async def work(worker: int) -> int:
        own: Connection = await connect_to(dsn)()
        posted = 0
        for n in range(8):
            number = 100 * worker + n + 1
            requests = [fund(number, 10, up_to(1_000), user=f"user {worker}")]
            (result,) = (await post(own, f"writer {worker}", requests, AT)).results
            posted += isinstance(result, Posted)
        await own.close()
        return posted

    posted = await asyncio.gather(*map(work, range(6)))
    assert sum(posted) == 25, "a thousand by forties, of forty-eight that were tried"
    assert await counters(connection) == {DAY: 1_000}
    await assert_holds(connection)


async def test_counters_are_rebuilt_from_the_records(connection: Connection, databases: Callable[[], str]) -> None:
    await say(connection, fund(1, 10, up_to(100)))
    await say(connection, fund(2, 10, up_to(100)))
    other: Connection = await connect_to(databases())()
    await rebuild(other, [tuple(row) for row in await connection.fetch("SELECT seq, record FROM outbox ORDER BY seq")])
    assert differences(await dump(connection), await dump(other)) == {}
    await other.close()
