"""`verify` finds every kind of damage that somebody with SQL can do, and nothing where there is none."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

import orjson
import pytest

from agents.deposits import credit_deposits
from agents.deposits.credit_deposits import DepositPolicy
from agents.item import read_item
from agents.stage import settle
from ledger.accounts import buffer, spendable
from ledger.checkpoint import Checkpoint
from ledger.commit import claim_owners, link, lock_owners, lock_writer, seal
from ledger.posting import Transaction, credit, debit
from ledger.rows import Connection
from ledger.store import blocks_of, lock
from ledger.verify import verify, verify_ledger
from tests.support import ledger_rig
from tests.support.ledger_rig import AT, broken, connect_to
from topics.catalog import DEPOSITS_NOTIFIED
from topics.envelope import value_of
from topics.events import DepositNotified, Evidence

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection
filled, books = ledger_rig.filled, ledger_rig.books

STAGE = credit_deposits.stage(DepositPolicy(minimum=1, chains_read=frozenset({"MATIC"})))
ADDRESS = "0x" + "1" * 40


class Record:
    """A raw record of deposits.notified."""

    def __init__(self, offset: int, amount: int, chain: str = "ETH", evidence: Evidence = Evidence.COMPLETE) -> None:
        event = DepositNotified(
            source="circle", transfer_id=f"t{offset}", chain=chain, tx_hash=f"0x{offset:064x}", to=ADDRESS,
            asset="USDC", amount=amount, evidence=evidence,
        )  # fmt: skip
        self.topic, self.partition, self.offset, self.timestamp = DEPOSITS_NOTIFIED.name, 0, offset, 1_780_000_000_000
        self.key, self.value, self.headers = ADDRESS.encode(), value_of(event), []


async def settle_all(connection: Connection, *records: Any) -> None:
    async with connection.transaction():
        epochs, _ = await claim_owners(connection, STAGE.name, [(DEPOSITS_NOTIFIED.name, 0)], AT)
    for one in records:
        await settle(connection, STAGE, [read_item(STAGE, one)], epochs, AT, None)


async def fill(dsn: str) -> None:
    """Three deposits of one customer, two of them final."""
    connection: Connection = await connect_to(dsn)()
    await connection.execute(
        "INSERT INTO wallets SELECT c, $1, 'ada', 'w', now() FROM unnest($2::text[]) AS c", ADDRESS, ["ETH", "MATIC"]
    )
    await settle_all(connection, Record(0, 5), Record(1, 7), Record(2, 9, "MATIC"), Record(3, 1, "SOL"))
    await connection.execute("DELETE FROM outbox; UPDATE deposits SET updated_at = now()")
    await connection.close()


async def test_undamaged_books_hold_and_say_how_much_was_looked_at(books: Connection) -> None:
    results = {result.number: result for result in await verify(books)}
    assert [number for number in results if not results[number].holds] == []
    assert {number: result.checked for number, result in results.items()} == {
        1: 5, 2: 4, 3: 4, 5: 3, 6: 3, 7: 0, 8: 0, 9: 5, 10: 4, 11: 5, 13: 0, 14: 0,
    }  # fmt: skip


async def test_an_empty_database_holds(connection: Connection) -> None:
    assert await broken(connection) == set()


ENTRY = "account_id = (SELECT id FROM accounts WHERE owner = 'ada') AND version"
TX = f"(SELECT transaction_id FROM entries WHERE {ENTRY} = %d)"
BOTH = "type IN ('usdc_balance', 'system_buffer_usdc')"
SIGN = "CASE owner WHEN 'ada' THEN 1 ELSE -1 END"
COLUMNS = "account_id, transaction_id, version, at, seq, direction, amount, balance_after"
INSERTED = (
    "WITH t AS (INSERT INTO transactions (id, kind, reference, fingerprint, at, batch)"
    " SELECT gen_random_uuid(), 'gift', 'x', fingerprint, at, %s FROM transactions LIMIT 1 RETURNING id, at),"
    " e AS (INSERT INTO entries (account_id, version, transaction_id, seq, direction, amount, balance_after, at)"
    " SELECT a.id, version + 1, t.id, 0, CASE owner WHEN 'ada' THEN 'd' ELSE 'c' END, 1,"
    f" balance + {SIGN}, t.at FROM accounts a, t WHERE {BOTH})"
    f" UPDATE accounts SET balance = balance + {SIGN}, version = version + 1 WHERE {BOTH}"
)
CONSISTENT = {
    "an amount on both sides with all later balances": (
        {11},
        f"UPDATE entries e SET amount = amount + CASE WHEN transaction_id = {TX % 2} THEN 1 ELSE 0 END,"
        f" balance_after = balance_after + {SIGN} FROM accounts a WHERE a.id = e.account_id AND {BOTH} AND e.version >= 2;"
        f"UPDATE accounts SET balance = balance + {SIGN} WHERE {BOTH}",
    ),
    "a transaction deleted with all that came of it": (
        {11},
        f"DELETE FROM deposits WHERE chain = 'MATIC'; DELETE FROM transactions WHERE id = {TX % 3};"
        " DELETE FROM entries WHERE transaction_id NOT IN (SELECT id FROM transactions);"
        f"UPDATE accounts SET balance = balance - 9 * {SIGN}, version = 2 WHERE {BOTH}",
    ),
    "a balanced transaction inserted into a commit": ({11}, INSERTED % "batch"),
    "a balanced transaction inserted as a commit of its own": ({11}, INSERTED % "9999"),
    "a balanced transaction inserted as one from before commits had numbers": ({11}, INSERTED % "NULL"),
    "two transactions that changed their commits": (
        {11},
        "UPDATE transactions a SET batch = b.batch FROM transactions b"
        f" WHERE (a.id, b.id) IN (({TX % 1}, {TX % 2}), ({TX % 2}, {TX % 1}))",
    ),
    "two entries that changed their order": (
        {11},
        "UPDATE entries a SET transaction_id = b.transaction_id, amount = b.amount,"
        f" balance_after = CASE a.version WHEN 1 THEN {SIGN} * b.amount ELSE a.balance_after END"
        " FROM entries b JOIN accounts o ON o.id = b.account_id"
        f" WHERE a.account_id = b.account_id AND {BOTH} AND (a.version, b.version) IN ((1, 2), (2, 1))",
    ),
    "what a transaction is about": ({5, 11}, f"UPDATE transactions SET reference = 'x' WHERE id = {TX % 1}"),
    "when an entry was made": ({11}, f"UPDATE entries SET at = at + interval '1 second' WHERE {ENTRY} = 1"),
    "a batch of an audit row": ({11}, "UPDATE audit SET batch = batch + 1000 WHERE position = 2"),
    "a ledger hash of an audit row": ({11}, "UPDATE audit SET ledger = 'x' WHERE position = 2"),
    "the last commit's audit row with its owner row": (
        {11},
        "DELETE FROM audit WHERE position = 5;"
        "UPDATE owners o SET position = 4, head = a.head FROM audit a WHERE a.position = 4;"
        "DELETE FROM audit WHERE position = 4;"
        "UPDATE owners o SET position = 3, head = a.head FROM audit a WHERE a.position = 3",
    ),
}  # fmt: skip
DAMAGE = {
    **CONSISTENT,
    "an entry's amount": ({1, 3, 11}, f"UPDATE entries SET amount = amount + 1 WHERE {ENTRY} = 2"),
    "an entry's direction": ({1, 3, 11}, f"UPDATE entries SET direction = 'c' WHERE {ENTRY} = 2"),
    "an entry's balance": ({3, 11}, f"UPDATE entries SET balance_after = balance_after + 1 WHERE {ENTRY} = 2"),
    "two entries that cancel out": (
        {3, 11}, "UPDATE entries SET amount = amount + 1 WHERE transaction_id ="
        f" (SELECT transaction_id FROM entries WHERE {ENTRY} = 2)",
    ),
    "an entry deleted": ({1, 3, 11}, f"DELETE FROM entries WHERE {ENTRY} = 2"),
    "the last entry deleted": ({1, 3, 11}, f"DELETE FROM entries WHERE {ENTRY} = 3"),
    "a whole transaction's entries deleted": (
        {3, 11}, f"DELETE FROM entries WHERE transaction_id = (SELECT transaction_id FROM entries WHERE {ENTRY} = 2)",
    ),
    "an entry inserted": (
        {1, 3, 11},
        f"INSERT INTO entries ({COLUMNS}) SELECT account_id, transaction_id, 4, at, 9, 'd', 1, balance_after + 1"
        f" FROM entries WHERE {ENTRY} = 3",
    ),
    "an entry and its balance inserted": (
        {1, 2, 11},
        f"WITH e AS (INSERT INTO entries ({COLUMNS}) SELECT account_id, transaction_id, 4, at, 9, 'd', 1, balance_after + 1"
        f" FROM entries WHERE {ENTRY} = 3)"
        " UPDATE accounts SET balance = balance + 1, version = 4 WHERE owner = 'ada'",
    ),
    "a balance": ({2, 3}, "UPDATE accounts SET balance = balance + 1 WHERE owner = 'ada'"),
    "two balances that cancel out": (
        {3}, "UPDATE accounts SET balance = balance + CASE owner WHEN 'ada' THEN 1 ELSE -1 END"
        " WHERE type IN ('usdc_balance', 'system_buffer_usdc')",
    ),
    "an account's version": ({3}, "UPDATE accounts SET version = version + 1 WHERE owner = 'ada'"),
    "a gap of versions": (
        {3, 11},
        f"WITH e AS (UPDATE entries SET version = 4 WHERE {ENTRY} = 3)"
        " UPDATE accounts SET version = 4 WHERE owner = 'ada'",
    ),
    "an account deleted": ({1, 2, 3}, "DELETE FROM accounts WHERE owner = 'ada'"),
    "a deposit's second credit": (
        {5, 11}, "INSERT INTO transactions (id, fingerprint, at, kind, reference)"
        " SELECT gen_random_uuid(), fingerprint, at, kind, reference"
        " FROM transactions WHERE kind = 'deposit' LIMIT 1",
    ),
    "a credit without its deposit's generation": ({5}, "UPDATE deposits SET generation = 2 WHERE chain = 'MATIC'"),
    "a deposit that claims to be final": ({5}, "UPDATE deposits SET status = 'finalized' WHERE chain = 'MATIC'"),
    "a deposit that claims to be reversed": ({5}, "UPDATE deposits SET status = 'reversed' WHERE chain = 'MATIC'"),
    "a deposit row deleted": ({5}, "DELETE FROM deposits WHERE chain = 'MATIC'"),
    "a record that nobody emitted": (
        {9}, "INSERT INTO outbox (stage, topic, partitions, at, record)"
        " VALUES ('s', 't', '{0}', now() - interval '61 minutes', '')",
    ),
    "an event scheduled that is done": (
        {10}, "INSERT INTO schedule SELECT stage, event_id, 2, 't', NULL, '', '[]', 'x', now() FROM inbox LIMIT 1",
    ),
    "an event to be repeated that is not scheduled": (
        {10}, "UPDATE inbox SET outcome = 'retry' WHERE event_id = (SELECT event_id FROM inbox LIMIT 1)",
    ),
    "one transfer credited as two deposits": (
        {5}, "UPDATE deposits SET block_hash = '0xb', log_index = 7, chain = 'ETH'",
    ),
    "a deposit that is not judged for days": (
        {6}, "UPDATE deposits SET updated_at = now() - interval '2 days' WHERE chain = 'MATIC'",
    ),
    "a repeat that was due an hour ago": (
        {13}, "WITH i AS (UPDATE inbox SET outcome = 'retry' WHERE event_id = (SELECT event_id FROM inbox LIMIT 1)"
        " RETURNING stage, event_id) INSERT INTO schedule"
        " SELECT stage, event_id, 2, 't', NULL, '', '[]', 'x', now() - interval '2 hours' FROM i",
    ),
    "a call that nobody concludes": (
        {13}, "INSERT INTO calls (id, stage, partner, operation, idempotency_key, request, fingerprint, state, created_at)"
        " VALUES (gen_random_uuid(), 's', 'p', 'o', gen_random_uuid(), '{}', '', 'open', now() - interval '2 hours')",
    ),
    "a call's member that nobody takes": (
        {13}, "INSERT INTO call_members (stage, event_id, item, context, queued_at)"
        " VALUES ('s', gen_random_uuid(), 'i', '{}', now() - interval '2 hours')",
    ),
    "an event scheduled that nobody has seen": (
        {10}, "INSERT INTO schedule VALUES ('s', gen_random_uuid(), 2, 't', NULL, '', '[]', 'x', now())",
    ),
    "an audit row's digest": ({11}, "UPDATE audit SET digest = 'x' WHERE position = 2"),
    "who did it": ({11}, "UPDATE audit SET actor = 'somebody' WHERE position = 2"),
    "when it was done": ({11}, "UPDATE audit SET at = at + interval '1 second' WHERE position = 2"),
    "what it was for": ({11}, """UPDATE audit SET summary = '{"done": 2}' WHERE position = 2"""),
    "an audit row's head": ({11}, "UPDATE audit SET head = 'x' WHERE position = 2"),
    "an audit row deleted": ({11}, "DELETE FROM audit WHERE position = 2"),
    "the first audit row deleted": ({11}, "DELETE FROM audit WHERE position = 1"),
    "the last audit row deleted": ({11}, "DELETE FROM audit WHERE position = 5"),
    "all audit rows deleted": ({11}, "DELETE FROM audit"),
    "audit rows reordered": (
        {11},
        "UPDATE audit a SET digest = b.digest, head = b.head FROM audit b"
        " WHERE (a.position, b.position) IN ((2, 3), (3, 2))",
    ),
    "an audit row inserted": (
        {11}, "INSERT INTO audit SELECT stage, topic, partition, 6, at, actor, summary, digest, head"
        " FROM audit WHERE position = 5",
    ),
    "an owner's head": ({11}, "UPDATE owners SET head = 'x'"),
    "an owner row deleted": ({11}, "DELETE FROM owners"),
}  # fmt: skip


@pytest.mark.parametrize(("wanted", "statement"), DAMAGE.values(), ids=[name.replace(" ", "_") for name in DAMAGE])
async def test_damage_is_found(wanted: set[int], statement: str, books: Connection) -> None:
    done = await books.execute(statement)
    assert not done.endswith(" 0"), "the damage was done"
    assert await broken(books) == wanted
    for result in await verify(books, rows_max=1):
        assert len(result.offending) == (result.number in wanted)


# -- since a checkpoint -------------------------------------------------------------------------------------------------


async def since(connection: Connection, checkpoint: Checkpoint) -> set[int]:
    results, _ = await verify_ledger(connection, since=checkpoint)
    return {result.number for result in results if not result.holds}


async def post_at(connection: Connection, reference: str) -> None:
    """One more commit, which moves a base unit to ada."""
    async with connection.transaction():
        owners = await lock_writer(connection, "cli")
        legs = (debit(spendable("ada"), 1), credit(buffer(), 1))
        transaction = Transaction(uuid.uuid4().hex, "gift", reference, legs)
        fold = await lock(connection, [transaction], AT)
        fold.post(transaction)
        blocks = blocks_of(fold, owners[0].batch)
        await seal(connection, "cli", owners, blocks=blocks, messages=[], at=fold.at, actor="x", summary={})


async def test_since_a_checkpoint_only_what_was_committed_after_it_is_looked_at(books: Connection) -> None:
    results, checkpoint = await verify_ledger(books)
    assert {r.number: r.checked for r in results} == {1: 5, 2: 4, 3: 4, 11: 5}
    assert Checkpoint.load(checkpoint.dump()) == checkpoint
    assert await since(books, checkpoint) == set()
    for n in range(3):
        await post_at(books, str(n))
    results, later = await verify_ledger(books, since=checkpoint)
    assert all(result.holds for result in results)
    assert {r.number: r.checked for r in results} == {1: 3, 2: 4, 3: 4, 11: 3}
    assert later.heads.keys() - checkpoint.heads.keys() == {("cli", "-", 0)}
    full, same = await verify_ledger(books)
    assert same == later
    assert all(result.holds for result in full)


NEW = "account_id = (SELECT id FROM accounts WHERE owner = 'ada') AND version"
AFTER = {
    "an entry's amount": ({1, 3, 11}, f"UPDATE entries SET amount = 2 WHERE {NEW} = 5"),
    "an entry's balance": ({3, 11}, f"UPDATE entries SET balance_after = 99 WHERE {NEW} = 5"),
    "an account": ({2, 3}, "UPDATE accounts SET balance = balance + 1 WHERE owner = 'ada'"),
    "a transaction inserted with all that comes of it": ({11}, INSERTED % "9999"),
    "the past cut off": ({11}, "DELETE FROM audit WHERE stage = 'credit_deposits' AND position > 2;"
        "UPDATE owners SET position = 2, head = (SELECT head FROM audit WHERE stage = 'credit_deposits' AND position = 2)"
        " WHERE stage = 'credit_deposits'"),
    "a head of the past": ({11}, "UPDATE audit SET head = 'x' WHERE stage = 'credit_deposits' AND position = 5"),
}  # fmt: skip


@pytest.mark.parametrize(("wanted", "statement"), AFTER.values(), ids=[name.replace(" ", "_") for name in AFTER])
async def test_damage_since_a_checkpoint_is_found(wanted: set[int], statement: str, books: Connection) -> None:
    _, checkpoint = await verify_ledger(books)
    for n in range(3):
        await post_at(books, str(n))
    assert await since(books, checkpoint) == set()
    await books.execute(statement)
    assert await since(books, checkpoint) == wanted


async def test_a_past_that_was_forged_with_all_its_hashes_is_found_by_an_older_checkpoint(books: Connection) -> None:
    for n in range(2):
        await post_at(books, str(n))
    _, checkpoint = await verify_ledger(books)
    await books.execute("UPDATE audit SET actor = 'nobody' WHERE stage = 'cli' AND position = 1")
    head = b""
    rows = await books.fetch("SELECT * FROM audit WHERE stage = 'cli' ORDER BY position")
    for row in rows:
        seals = (row["batch"], row["ledger"], row["logs"])
        head = link(head, row["digest"], row["at"], row["actor"], orjson.loads(row["summary"]), seals)
        await books.execute("UPDATE audit SET head = $1 WHERE stage = 'cli' AND position = $2", head, row["position"])
    await books.execute("UPDATE owners SET head = $1 WHERE stage = 'cli'", head)
    await books.execute("DELETE FROM outbox")
    assert await broken(books) == set(), "with every hash forged the database alone cannot tell"
    assert await since(books, checkpoint) == {11}


async def test_a_commit_of_several_partitions_is_sealed_in_each_chain(books: Connection) -> None:
    keys = [("t", n) for n in range(3)]
    epochs, _ = await claim_owners(books, "several", keys, AT)
    owners = await lock_owners(books, "several", epochs)
    legs = (debit(spendable("ada"), 1), credit(buffer(), 1))
    transactions = [Transaction(f"{n:032x}", "gift", "", legs) for n in range(2)]
    fold = await lock(books, transactions, AT)
    for transaction in transactions:
        fold.post(transaction)
    blocks = blocks_of(fold, owners[0].batch)
    await seal(books, "several", owners, blocks=blocks, messages=[], at=fold.at, actor="x", summary={})
    await books.execute("DELETE FROM outbox")
    assert await broken(books) == set()
    assert len({owner.batch for owner in owners}) == 1
    await books.execute("UPDATE transactions SET kind = 'gifts' WHERE id = $1", f"{0:032x}")
    (result,) = [r for r in await verify(books) if not r.holds]
    assert "several t[0] position 2, several t[1] position 2, several t[2] position 2" in result.offending[0]


async def test_what_the_version_before_wrote_holds_and_what_claims_to_be_of_it_does_not(books: Connection) -> None:
    """Its rows have no batch; their links are as they were. A transaction without one needs a commit of its time."""
    head = await books.fetchval("SELECT head FROM owners")
    at = AT + timedelta(minutes=30)
    older = link(head, b"d" * 32, at, "x", {}, (None, None, None))
    await books.execute(
        "INSERT INTO audit (stage, topic, partition, position, at, actor, summary, digest, head)"
        " SELECT stage, topic, partition, 6, $1, 'x', '{}', $2, $3 FROM owners", at, b"d" * 32, older,
    )  # fmt: skip
    await books.execute("UPDATE owners SET position = 6, head = $1", older)
    gift = (
        "INSERT INTO transactions (id, kind, reference, fingerprint, at)"
        " SELECT gen_random_uuid(), 'gift', 'x', gen_random_uuid(), $1"
    )
    await books.execute(gift, at)
    assert await broken(books) == set()
    await books.execute(gift, at + timedelta(1))
    assert await broken(books) == {11}


async def test_progress_is_told_and_rows_are_printed_up_to_the_limit(books: Connection) -> None:
    told: list[str] = []
    await books.execute("UPDATE entries SET balance_after = balance_after + 1")
    results, _ = await verify_ledger(books, rows_max=3, progress=lambda what, _done, _total: told.append(what))
    assert {len(result.offending) for result in results if not result.holds} == {3}
    assert len(set(told)) >= 2
