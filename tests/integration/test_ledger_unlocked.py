"""A few plain transactions are posted without a lock before: read, then one statement that writes if nothing has changed. What
others do between the two, on a real PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from ledger import book
from ledger.accounts import Account, AccountType, buffer, spendable
from ledger.book import Atomic, close_account, post
from ledger.commit import Overtaken, read_writer, seal
from ledger.errors import ClosedAccount, InsufficientFunds
from ledger.holds import hold
from ledger.posting import Transaction, credit, debit
from ledger.rows import Connection, Op, block
from ledger.store import Posted
from ledger.tables import CHAIN_CURSORS
from tests.support import ledger_rig
from tests.support.ledger_rig import AT, assert_holds, balance, connect_to, differences, dump, rebuild

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection

ADA, BOB, EVE = spendable("ada"), spendable("bob"), spendable("eve")


def fund(number: int, amount: int, user: Account = ADA) -> Transaction:
    return Transaction(f"{number:032x}", "test", "", (debit(user, amount), credit(buffer(), amount)))


def pay(number: int, amount: int, to: Account = BOB) -> Transaction:
    return Transaction(f"{number:032x}", "test", "", (debit(to, amount), credit(ADA, amount)))


@asynccontextmanager
async def statements(connection: Connection) -> AsyncIterator[list[str]]:
    """What is sent meanwhile."""
    sent: list[str] = []

    def note(query: Any) -> None:
        sent.append(query.query)

    connection.add_query_logger(note)
    try:
        yield sent
        await asyncio.sleep(0)  # the driver tells it of the last a turn later
    finally:
        connection.remove_query_logger(note)


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Awaitable[Any]]], None]:
    """Has something done after the next post has read, and before it writes."""

    def do(what: Callable[[], Awaitable[Any]]) -> None:
        async def read(*args: Any) -> Any:
            monkeypatch.setattr(book, "read_writer", read_writer)
            found = await read_writer(*args)
            await what()
            return found

        monkeypatch.setattr(book, "read_writer", read)

    return do


async def test_it_is_two_statements_and_no_transaction_around_them(connection: Connection) -> None:
    await post(connection, "test", [fund(1, 50)], AT)
    for requests in ([pay(2, 1)], [pay(3, 1), pay(4, 1), Atomic((pay(5, 1), pay(6, 1)))]):
        async with statements(connection) as sent:
            await post(connection, "test", requests, AT)
        assert len(sent) == 2
        assert not any("BEGIN" in query for query in sent)
    await assert_holds(connection)


@pytest.mark.parametrize("what", ["a hold", "too many", "a repeat", "a refusal", "a new writer"])
async def test_all_else_goes_under_locks(what: str, connection: Connection) -> None:
    await post(connection, "test", [fund(1, 50)], AT)
    requests = {
        "a hold": [
            hold(f"{9:032x}", "h", "w", source=ADA, pending=Account("ada", AccountType.PENDING_WITHDRAWAL), amount=5)
        ],
        "too many": [pay(100 + number, 1) for number in range(book.UNLOCKED_MAX + 1)],
        "a repeat": [fund(1, 50)],
        "a refusal": [pay(9, 51)],
        "a new writer": [pay(9, 1)],
    }[what]
    async with statements(connection) as sent:
        batch = await post(connection, "other" if what == "a new writer" else "test", requests, AT)
    assert any("BEGIN" in query for query in sent)
    if what == "a repeat":
        assert [isinstance(result, Posted) and result.existed for result in batch.results] == [True]
    elif what == "a refusal":
        assert [type(result) for result in batch.results] == [InsufficientFunds]
    else:
        assert all(isinstance(result, Posted) and not result.existed for result in batch.results)
    await assert_holds(connection)


@pytest.mark.parametrize("what", ["spends", "opens the account", "goes before", "posts the same"])
async def test_what_another_did_between_reading_and_writing_is_seen(
    what: str,
    dsn: str,
    connection: Connection,
    between: Callable[[Callable[[], Awaitable[Any]]], None],
    databases: Callable[[], str],
) -> None:
    first = await post(connection, "test", [fund(1, 50)], AT)
    other: Connection = await connect_to(dsn)()
    writer, meanwhile = {
        "spends": ("other", pay(2, 45, EVE)),
        "opens the account": ("other", fund(2, 5, BOB)),
        "goes before": ("test", fund(2, 5, EVE)),  # a program that was started twice
        "posts the same": ("other", pay(3, 10)),
    }[what]
    others: list[Any] = []

    async def do() -> None:
        others.append(await post(other, writer, [meanwhile], AT))

    between(do)
    batch = await post(connection, "test", [pay(3, 10)], AT)
    if what == "spends":
        (refusal,) = batch.results
        assert isinstance(refusal, InsufficientFunds)
        assert vars(refusal)["available"] == 5
        assert batch.sealed is None
        assert await balance(connection, ADA) == 5
    else:
        (posted,) = batch.results
        assert isinstance(posted, Posted)
        assert posted.existed == (what == "posts the same")
        assert await balance(connection, ADA) == 40
        assert await balance(connection, BOB) == (15 if what == "opens the account" else 10)
    await assert_holds(connection)
    sealed = sorted((b.sealed.seq, b.sealed.record) for b in (first, *others, batch) if b.sealed is not None)
    copy: Connection = await connect_to(databases())()
    await rebuild(copy, sealed)
    # the new writer's owner row and the account's are in it, in the order that they depend on each other
    assert differences(await dump(copy), await dump(connection)) == {}
    await copy.close()
    await other.close()


async def test_an_account_closed_between_reading_and_writing_takes_nothing(
    dsn: str, connection: Connection, between: Callable[[Callable[[], Awaitable[Any]]], None]
) -> None:
    await post(connection, "test", [fund(1, 50), pay(2, 50), fund(3, 1, BOB)], AT)
    other: Connection = await connect_to(dsn)()
    between(lambda: close_account(other, "people", ADA, AT, actor="ops", reason="asked for"))
    assert [type(result) for result in (await post(connection, "test", [fund(4, 5)], AT)).results] == [ClosedAccount]
    assert await balance(connection, ADA) == 0
    await assert_holds(connection)
    await other.close()


@pytest.mark.parametrize("account", [ADA, None])
async def test_who_is_at_a_row_is_waited_for_under_locks(
    account: Account | None, dsn: str, connection: Connection
) -> None:
    """The statement itself waits for nobody: two that each have what the other wants would wait for ever."""
    await post(connection, "test", [fund(1, 50)], AT)
    other, third = await connect_to(dsn)(), await connect_to(dsn)()
    async with other.transaction():
        if account is None:
            await other.execute("SELECT FROM owners WHERE stage = 'test' FOR UPDATE")
        else:
            await other.execute("SELECT FROM accounts WHERE id = $1 FOR UPDATE", account.id)
        async with statements(connection) as sent:
            posting = asyncio.create_task(post(connection, "test", [pay(2, 10)], AT))
            while not await third.fetchval("SELECT cardinality(pg_blocking_pids($1))", connection.get_server_pid()):
                await asyncio.sleep(0.01)
            assert not posting.done()
            assert any("BEGIN" in query for query in sent)
    assert [isinstance(result, Posted) for result in (await posting).results] == [True]
    await assert_holds(connection)
    for one in (other, third):
        await one.close()


@pytest.mark.parametrize("wrong", ["position", "head", "version", "account"])
async def test_nothing_at_all_is_written_where_anything_is_not_as_it_was_read(
    wrong: str, connection: Connection
) -> None:
    """Not even what would be sent ahead for its size."""
    await post(connection, "test", [fund(1, 50), fund(2, 5, BOB)], AT)
    owners, rows = await read_writer(connection, "test", [ADA.id, BOB.id])
    assert [row[2] for row in rows] == [1, 1]
    versions = {ADA.id: 1, BOB.id: 2 if wrong == "version" else 1}
    if wrong == "account":
        versions[EVE.id] = 1
    if wrong == "position":
        await connection.execute("UPDATE owners SET position = position + 1 WHERE stage = 'test'")
    if wrong == "head":
        await connection.execute("UPDATE owners SET head = 'x' WHERE stage = 'test'")
    before = await dump(connection)
    large = [(f"chain {n}", {"text": "x" * 1_000}, AT) for n in range(100)]
    about = {"blocks": [block(CHAIN_CURSORS, Op.INSERT, large)], "messages": [], "at": AT, "actor": "me", "summary": {}}
    with pytest.raises(Overtaken):
        await seal(connection, "test", owners, **about, unlocked=versions)  # type: ignore[arg-type]
    assert differences(before, await dump(connection)) == {}
    assert await connection.fetchval("SELECT count(*) FROM outbox") == 1
    if wrong in ("version", "account"):
        done = await seal(connection, "test", owners, **about, unlocked={ADA.id: 1, BOB.id: 1})  # type: ignore[arg-type]
        assert await connection.fetchval("SELECT max(seq) FROM outbox") == done.seq
        assert await connection.fetchval("SELECT count(*) FROM chain_cursors") == 100


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
async def test_many_writers_of_one_account_lose_and_repeat_nothing(
    isolation: str, dsn: str, connection: Connection
) -> None:
    """Whatever isolation the database's owner has set."""
    await post(connection, "test", [fund(1, 1_000)], AT)
    owner, database = await ledger_rig.owner(dsn), dsn.rpartition("/")[2]
    await owner.execute(f"ALTER DATABASE {database} SET default_transaction_isolation = '{isolation}'")
    await owner.close()
    others = [await connect_to(dsn)() for _ in range(6)]

    async def writer(number: int, one: Connection) -> int:
        done = 0
        for turn in range(30):
            id = 1_000 * (number + 1) + turn
            (result,) = (await post(one, f"w{number}", [pay(id, 1 + turn % 9)], AT)).results
            done += 1 + turn % 9 if isinstance(result, Posted) else 0
        return done

    spent = await asyncio.gather(*[writer(number, one) for number, one in enumerate(others)])
    assert await balance(connection, ADA) == 1_000 - sum(spent)
    assert await balance(connection, BOB) == sum(spent)
    assert await connection.fetchval("SELECT count(*) FROM transactions") == 181
    await assert_holds(connection)
    for one in others:
        await one.close()


async def test_a_statement_that_fails_leaves_nothing_and_the_same_may_be_sent_again(dsn: str) -> None:
    connection: Connection = await connect_to(dsn)()
    await post(connection, "test", [fund(1, 50)], AT)
    owner = await ledger_rig.owner(dsn)
    await owner.execute("ALTER TABLE outbox ADD CONSTRAINT none CHECK (stage <> 'test') NOT VALID")
    with pytest.raises(asyncpg.CheckViolationError):
        await post(connection, "test", [pay(2, 10)], AT)
    assert await balance(connection, ADA) == 50
    await owner.execute("ALTER TABLE outbox DROP CONSTRAINT none")
    (result,) = (await post(connection, "test", [pay(2, 10)], AT)).results
    assert isinstance(result, Posted)
    assert not result.existed
    await assert_holds(connection)
    await owner.close()
    await connection.close()
