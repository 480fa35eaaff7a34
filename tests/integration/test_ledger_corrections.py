"""Corrections by two people, the logs they leave, and what is found when somebody edits those."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import UUID

import pytest

from ledger.accounts import SHORTFALL, Account, AccountType, spendable
from ledger.audit_logs import Log, Wanted, every, page
from ledger.book import post
from ledger.commit import lock_writer, seal
from ledger.corrections import (
    SUSPENSE,
    approve,
    assign_suspense,
    find,
    list_corrections,
    reject,
    request,
)
from ledger.errors import InsufficientFunds, LedgerError
from ledger.holds import hold, void
from ledger.posting import Leg, Transaction, credit, debit
from ledger.rows import Connection, Op, block, write
from ledger.sql import load
from ledger.tables import WALLETS
from ledger.verify import verify_logs
from tests.support import ledger_rig
from tests.support.ledger_rig import AT, assert_holds, balance, connect_to, differences, dump, owner, rebuild, unguard

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection

ADA = spendable("ada")
ID = "c" * 32
LATER = AT + timedelta(hours=1)


@pytest.fixture
async def books(connection: Connection) -> AsyncIterator[Connection]:
    """Ada is a customer without money; suspense holds 50."""
    await write(connection, [block(WALLETS, Op.INSERT, [("ETH", "0x1", "ada", "w", AT)])])
    await request(connection, "1" * 32, [debit(SUSPENSE, 50), credit(SHORTFALL, 50)], "found", "ann", AT)
    await approve(connection, "1" * 32, "bob", AT)
    yield connection
    await assert_holds(connection)


async def logged(connection: Connection) -> list[tuple[str, str, str, str | None]]:
    found = await page(connection, Wanted(resource_id=ID), None, 100)
    return [(one.log.actor, one.log.action, one.log.status, one.log.error) for one in found]


async def code_of(refused: object) -> str:
    with pytest.raises(LedgerError) as caught:
        await refused  # type: ignore[misc]
    return caught.value.code


async def test_money_in_suspense_becomes_a_customers_when_a_second_person_says_so(books: Connection) -> None:
    asked = await assign_suspense(books, ID, "ada", 30, "mail of 1 July", "ann", AT, reference="deposit-7")
    assert (asked.state, await balance(books, ADA)) == ("requested", None)
    done = await approve(books, ID, "bob", LATER)
    assert (await balance(books, ADA), await balance(books, SUSPENSE)) == (30, 20)
    assert (done.state, done.requested_by, done.decided_by) == ("approved", "ann", "bob")
    assert await find(books, ID) == done
    kind, reference, count = await books.fetchrow(
        "SELECT kind, reference, (SELECT count(*) FROM entries WHERE transaction_id = t.id) FROM transactions t"
        " WHERE id = $1", done.transaction_id,
    )  # fmt: skip
    assert (kind, reference, count) == ("suspense_assigned", "deposit-7", 2)
    assert await logged(books) == [
        ("ann", "correction.requested", "done", None), ("bob", "correction.approved", "done", None),
    ]  # fmt: skip


async def test_whoever_asked_cannot_approve_and_the_attempt_is_logged(books: Connection) -> None:
    await assign_suspense(books, ID, "ada", 30, "mine", "ann", AT)
    for same in ("ann", "Ann"):
        assert await code_of(approve(books, ID, same, AT)) == "same_actor"
    assert await balance(books, ADA) is None
    assert (await find(books, ID)).state == "requested"
    assert (await logged(books))[1:] == [
        ("ann", "correction.approved", "refused", "same_actor"), ("Ann", "correction.approved", "refused", "same_actor"),
    ]  # fmt: skip


async def test_asking_and_approving_twice_does_it_once(books: Connection) -> None:
    first = await assign_suspense(books, ID, "ada", 30, "once", "ann", AT)
    assert await assign_suspense(books, ID, "ada", 30, "once", "ann", LATER) == first
    assert await code_of(assign_suspense(books, ID, "ada", 31, "once", "ann", AT)) == "correction_reused"
    done = await approve(books, ID, "bob", AT)
    assert await approve(books, ID, "eve", LATER) == done
    assert await balance(books, ADA) == 30
    assert len(await logged(books)) == 2
    assert await code_of(reject(books, ID, "bob", LATER)) == "correction_decided"


async def test_what_was_parked_is_assigned_once(books: Connection) -> None:
    legs = [debit(SUSPENSE, 40), credit(SHORTFALL, 40)]
    await request(books, "4" * 32, legs, "of an unknown sender", "ann", AT, reference="deposit-7")
    await approve(books, "4" * 32, "bob", AT)
    await assign_suspense(books, ID, "ada", 30, "mail", "ann", AT, reference="deposit-7")
    again = assign_suspense(books, "2" * 32, "ada", 30, "mail", "eve", AT, reference="deposit-7")
    assert await code_of(again) == "nothing_left", "30 of 40 are asked for"
    await approve(books, ID, "bob", AT)
    again = assign_suspense(books, "2" * 32, "ada", 11, "mail", "eve", AT, reference="deposit-7")
    assert await code_of(again) == "nothing_left", "30 of 40 are hers"
    await assign_suspense(books, "2" * 32, "ada", 10, "the rest", "eve", AT, reference="deposit-7")
    await approve(books, "2" * 32, "bob", AT)
    await assign_suspense(books, "3" * 32, "ada", 51, "ticket 9", "eve", AT, reference="ticket 9")
    assert await code_of(approve(books, "3" * 32, "bob", AT)) == "insufficient_funds", "suspense has 50"
    assert await balance(books, ADA) == 40


@pytest.mark.parametrize(
    ("query", "types", "values", "index"),
    [
        (
            load("ledger", "sql/corrections.sql").parked,
            "text, uuid",
            f"'deposit-7', '{UUID(SUSPENSE.id)}'",
            "transactions_reference",
        ),
        (
            load("stablerail", "operations.sql").shortfalls,
            "uuid, text",
            f"'{UUID(SHORTFALL.id)}', NULL",
            "deposits_pkey",
        ),
    ],
    ids=["parked", "owed"],
)
async def test_a_persons_question_reads_no_whole_table(
    books: Connection, query: str, types: str, values: str, index: str
) -> None:
    """It is asked in the commit that all corrections queue for, and in ten millions of rows."""
    await books.execute(f"SET enable_seqscan = off; PREPARE asked ({types}) AS {query}")
    plan = "".join(row[0] for row in await books.fetch(f"EXPLAIN EXECUTE asked({values})"))
    assert index in plan, plan


async def test_what_a_hold_holds_is_not_taken_from_under_it(books: Connection) -> None:
    """Whoever was paid meanwhile could not be debited."""
    pending = Account("ada", AccountType.PENDING_WITHDRAWAL)
    funds = Transaction("f" * 32, "top_up", "", (debit(ADA, 50), credit(SHORTFALL, 50)))
    held = hold("a" * 32, "hold", "w", source=ADA, pending=pending, amount=30, expires_at=None)
    await post(books, "api", [funds, held], AT)
    await request(books, ID, [debit(ADA, 30), credit(pending, 30)], "it looks stuck", "ann", AT)
    assert await code_of(approve(books, ID, "bob", AT)) == "money_held"
    assert (await balance(books, ADA), await balance(books, pending)) == (20, 30)
    assert (await logged(books))[-1] == ("bob", "correction.approved", "refused", "money_held")
    await post(books, "api", [void("b" * 32, "void", "w", hold_id=held.id)], AT)
    assert await code_of(approve(books, ID, "bob", AT)) == "insufficient_funds"


async def test_of_many_who_approve_at_once_one_posts(books: Connection, dsn: str) -> None:
    await assign_suspense(books, ID, "ada", 30, "once", "ann", AT)
    connections = [await connect_to(dsn)() for _ in range(5)]
    done = await asyncio.gather(*(approve(one, ID, f"bob{n}", AT) for n, one in enumerate(connections)))
    assert len({one.decided_by for one in done}) == 1
    assert await balance(books, ADA) == 30
    assert len(await logged(books)) == 2
    for one in connections:
        await one.close()


async def test_a_correction_that_the_ledger_refuses_stays_open_and_is_approved_when_there_is_money(
    books: Connection,
) -> None:
    await request(books, ID, [credit(ADA, 10), debit(SHORTFALL, 10)], "taken back", "ann", AT)
    with pytest.raises(InsufficientFunds):
        await approve(books, ID, "bob", AT)
    assert (await logged(books))[-1] == ("bob", "correction.approved", "refused", "insufficient_funds")
    await assign_suspense(books, "2" * 32, "ada", 10, "now", "ann", AT)
    await approve(books, "2" * 32, "bob", AT)
    await approve(books, ID, "bob", AT)
    assert await balance(books, ADA) == 0


@pytest.mark.parametrize(
    ("legs", "reason", "actor", "code"),
    [
        ([debit(ADA, 2), credit(SUSPENSE, 1)], "why", "ann", "unbalanced"),
        ([debit(ADA, 0), credit(SUSPENSE, 0)], "why", "ann", "amount_out_of_range"),
        ([debit(ADA, -1), credit(SUSPENSE, -1)], "why", "ann", "amount_out_of_range"),
        ([debit(Account("ada", "usdc_balance", "USD"), 1), credit(SUSPENSE, 1)], "why", "ann", "wrong_asset"),
        ([debit(ADA, 1)], "why", "ann", "bad_legs"),
        ([debit(spendable("adda"), 1), credit(SUSPENSE, 1)], "why", "ann", "unknown_user"),
        ([debit(ADA, 1), credit(SUSPENSE, 1)], " ", "ann", "reason_missing"),
        ([debit(ADA, 1), credit(SUSPENSE, 1)], "why", "", "actor_missing"),
    ],
)
async def test_what_cannot_be_a_correction_is_refused_when_it_is_asked_for(
    legs: list[Leg], reason: str, actor: str, code: str, connection: Connection
) -> None:
    await write(connection, [block(WALLETS, Op.INSERT, [("ETH", "0x1", "ada", "w", AT)])])
    assert await code_of(request(connection, ID, legs, reason, actor, AT)) == code
    assert await connection.fetchval("SELECT count(*) FROM corrections") == 0


async def test_a_rejected_correction_is_never_posted(books: Connection) -> None:
    await assign_suspense(books, ID, "ada", 30, "a slip", "ann", AT)
    withdrawn = await reject(books, ID, "ann", AT)
    assert (withdrawn.state, await reject(books, ID, "bob", AT)) == ("rejected", withdrawn)
    assert await code_of(approve(books, ID, "bob", AT)) == "correction_decided"
    assert await balance(books, ADA) is None
    assert [one.id for one in await list_corrections(books, "rejected")] == [ID]
    assert await code_of(approve(books, "9" * 32, "bob", AT)) == "unknown_correction"


async def test_corrections_and_logs_are_rebuilt_from_their_records(books: Connection, databases: object) -> None:
    await assign_suspense(books, ID, "ada", 30, "mail", "ann", AT)
    await approve(books, ID, "bob", AT)
    records = [tuple(row) for row in await books.fetch("SELECT seq, record FROM outbox ORDER BY seq")]
    other = await connect_to(databases())()  # type: ignore[operator]
    await write(other, [block(WALLETS, Op.INSERT, [("ETH", "0x1", "ada", "w", AT)])])
    await rebuild(other, records)
    assert differences(await dump(books), await dump(other)) == {}
    assert (await verify_logs(other)).holds
    await other.close()


LOGS_DAMAGED = {
    "a log's actor": "UPDATE audit_logs SET actor = 'eve' WHERE n = 1",
    "what was before": """UPDATE audit_logs SET before = '{"a": 2}' WHERE n = 1""",
    "a log deleted": "DELETE FROM audit_logs WHERE n = 1",
    "the last log deleted": "DELETE FROM audit_logs WHERE batch = (SELECT max(batch) FROM audit_logs)",
    "all logs deleted": "DELETE FROM audit_logs",
    "a log inserted": "INSERT INTO audit_logs SELECT batch, 9, at, actor, action, resource, resource_id, NULL, NULL, 'done'"
    " FROM audit_logs WHERE n = 1",
    "a log of no commit": "INSERT INTO audit_logs SELECT 9999, 0, at, actor, action, resource, resource_id, NULL, NULL,"
    " 'done' FROM audit_logs LIMIT 1",
    "two logs reordered": "UPDATE audit_logs SET n = -n; UPDATE audit_logs SET n = 1 + n",
    "two logs that changed their commits": "UPDATE audit_logs SET batch = -batch;"
    "UPDATE audit_logs SET batch = batch - (SELECT sum(DISTINCT batch) FROM audit_logs)",
    "an audit row's hash of logs": "UPDATE audit SET logs = NULL",
    "a log's commit and its owner row cut off": "DELETE FROM audit WHERE position = 2;"
    "UPDATE owners SET position = 1, head = (SELECT head FROM audit WHERE position = 1)",
}


async def test_whatever_is_done_to_a_log_is_found(connection: Connection, dsn: str) -> None:
    for n in (1, 2):
        async with connection.transaction():
            owners = await lock_writer(connection, "cli")
            logs = [
                Log(
                    "ann",
                    f"thing.made{n}",
                    "thing",
                    f"{n}.{m}",
                    {"b": 1, "a": ["é", None, True]},
                    {"z": {}},
                    address="::1",
                )
                for m in (0, 1)
            ]
            await seal(connection, "cli", owners, blocks=[], messages=[], at=AT, actor="ann", summary={}, logs=logs)
    assert (await verify_logs(connection)).holds
    by_hand = await owner(dsn)
    for name, statement in LOGS_DAMAGED.items():
        transaction = by_hand.transaction(isolation="repeatable_read")
        await transaction.start()
        await unguard(by_hand)
        await by_hand.execute(statement)
        assert not (await verify_logs(by_hand)).holds, name
        await transaction.rollback()
    await by_hand.close()
    async with connection.transaction():
        stored = [one.log async for one in every(connection, Wanted(actor="ann", since=AT, until=LATER))]
    assert [log.resource_id for log in stored] == ["1.0", "1.1", "2.0", "2.1"]
    assert stored[0].before == {"b": 1, "a": ["é", None, True]}
    first = await page(connection, Wanted(resource="thing"), None, 3)
    rest = await page(connection, Wanted(resource="thing"), first[-1].cursor, 3)
    assert [one.log.resource_id for one in (*first, *rest)] == ["1.0", "1.1", "2.0", "2.1"]
    assert await page(connection, Wanted(action="thing.made2", until=AT), None, 3) == []
