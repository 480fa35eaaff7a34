"""What is read from PostgreSQL is what the most naive reading of the same history gives."""

from __future__ import annotations

import random
import re
import uuid
from contextlib import nullcontext
from datetime import datetime, timedelta
from itertools import pairwise

import pytest

from ledger import reading
from ledger.errors import AccountNotFound, BadCursor, BadPeriod, NotOnAccount, TransactionNotFound
from ledger.reading import AccountName
from ledger.rows import Connection
from ledger.statement import Line, Statement, open_statement, pages, read_page, resume_statement
from tests.support import ledger_rig
from tests.support.books import BUFFER, CUSTODY, START, TICK, WORLD, Books, Row, some_books, spendable
from tests.support.ledger_rig import owner

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection
ROWS_ARE_MADE_UP = "a history of postings that speak of deposits which are nowhere"


def lines_of(rows: list[Row], opening: int = 0) -> list[Line]:
    """The model's lines."""
    lines, balance = [], opening
    for row in rows:
        balance += row.change
        lines.append(
            Line(
                *(row.at, row.account.shard or "", row.version, row.transaction_id, row.kind, row.reference),
                *(row.direction, row.amount, balance),
            )
        )
    return lines


async def read_all(
    connection: Connection, name: AccountName, limit: int, since: datetime | None, until: datetime | None
) -> list[Line]:
    """Page by page, each resumed from the text of the one before, as a caller of the API does."""
    statement = await open_statement(connection, name, since, until)
    found: list[Line] = []
    while True:
        lines, behind = await read_page(connection, statement, limit)
        assert 0 < len(lines) <= limit or behind.ended
        assert behind.opening == statement.opening
        assert behind.closing == statement.closing
        found += lines
        cursor = behind.cursor()
        if cursor is None:
            assert behind.balance == behind.closing
            assert len(found) == statement.lines
            return found
        statement = await resume_statement(connection, name, since, until, cursor)
        assert statement == behind


@pytest.mark.parametrize("seed", [1, 2])
async def test_the_balance_at_every_time_is_the_sum_of_what_was_posted_until_then(
    seed: int, connection: Connection
) -> None:
    books = some_books(seed)
    await books.store(connection)
    times = books.times()
    asked = sorted({time + shift for time in times for shift in (-TICK, timedelta(), TICK)})
    for name in books.names():
        assert (await reading.balance(connection, name)).balance == books.balance(name)
        changes, held, expected = {row.at: 0 for row in books.rows}, 0, {}
        for row in books.of(name):
            changes[row.at] += row.change
        for time in asked:
            held += changes.get(time, 0)
            expected[time] = held
        for time in random.Random(seed).sample(asked, min(len(asked), 60)):
            assert (await reading.balance(connection, name, at=time)).balance == expected[time], (name, time)
        assert (await reading.balance(connection, name, at=times[-1])).balance == books.balance(name)


async def test_the_balance_at_a_time_is_right_for_every_length_of_an_account_and_every_entry(
    connection: Connection,
) -> None:
    """Around the landmarks, which are every sixteenth entry: accounts of 1 to 50 entries, of which several share a time."""
    books, steps, lengths = Books(), (1, 5, 50), range(1, 51)
    names = {(s, n): AccountName("system", f"t{s}", "USDC", str(n)) for s in steps for n in lengths}
    for (step, length), name in names.items():
        for number in range(length):
            books.post([(name, 2**number)], START + number // step * TICK)
    await books.store(connection)
    for step in steps:
        for time in [START + shift * TICK for shift in range(-1, 51)]:
            held = await reading.balance(connection, names[step, 1]._replace(shard=None), at=time)
            assert held.by_shard == {
                str(length): sum(2**n for n in range(length) if START + n // step * TICK <= time) for length in lengths
            }


@pytest.mark.parametrize("seed", [3, 4])
async def test_the_balance_at_a_transaction_is_that_of_its_last_line_in_the_statement(
    seed: int, connection: Connection
) -> None:
    books = some_books(seed, 120)
    await books.store(connection)
    for name in books.names():
        after = {line.transaction_id: line.balance for line in lines_of(books.of(name))}
        for transaction_id in random.Random(seed).sample(sorted(after), min(len(after), 40)):
            found = await reading.balance_after(connection, name, transaction_id)
            assert found.balance == after[transaction_id], (name, transaction_id)
    ada = spendable("ada")
    foreign = next(row for row in books.rows if row.account == spendable("bob")).transaction_id
    with pytest.raises(NotOnAccount) as refusal:
        await reading.balance_after(connection, ada, foreign)
    assert (refusal.value.transaction_id, refusal.value.account) == (foreign, str(ada))
    with pytest.raises(TransactionNotFound):
        await reading.balance_after(connection, ada, uuid.UUID(int=1))


async def test_what_nobody_posted_to_is_no_account(connection: Connection) -> None:
    books = some_books(5, 10)
    await books.store(connection)
    for name in (spendable("nobody"), BUFFER._replace(shard="77"), spendable("ada")._replace(asset="USD")):
        for at in (None, START):
            with pytest.raises(AccountNotFound):
                await reading.balance(connection, name, at=at)
        with pytest.raises(AccountNotFound):
            await reading.balance_after(connection, name, books.rows[0].transaction_id)
        with pytest.raises(AccountNotFound):
            await open_statement(connection, name)
    assert await reading.owner_balances(connection, "nobody") == {}


async def test_a_customers_balances_by_asset_and_type_are_one_query(connection: Connection) -> None:
    books, ada = Books(), spendable("ada")
    held, exposure = ada._replace(type="pending_withdrawal"), AccountName("ada", "fiat_exposure", "USD", "")
    books.post([(ada, 10**31), (BUFFER._replace(shard=""), -(10**31))], START)
    books.post([(held, 5), (ada, -5)], START)
    books.post([(exposure, 8), (AccountName("system", "system_buffer_fiat", "USD", ""), -8)], START)
    await books.store(connection)
    found = await reading.owner_balances(connection, "ada")
    assert {asset: one.by_type for asset, one in found.items()} == {
        "USD": {"fiat_exposure": 8},
        "USDC": {"usdc_balance": 10**31 - 5, "pending_withdrawal": 5},
    }
    assert (found["USDC"].available, found["USDC"].pending, found["USDC"].total) == (10**31 - 5, 5, 10**31)
    assert (found["USD"].available, found["USD"].pending, found["USD"].total) == (0, 0, 8)


async def test_pages_of_every_size_are_together_the_whole_statement(connection: Connection) -> None:
    books, draw = some_books(6, 150), random.Random(6)
    await books.store(connection)
    times = books.times()
    for name in books.names():
        periods = [(None, None), (times[0], times[-1] + TICK), (times[-1] + TICK, None), (None, START - TICK)]
        periods += [tuple(sorted(draw.choices(times, k=2))) for _ in range(2)]
        for since, until in periods:
            rows = books.of(name)
            opening = sum(row.change for row in rows if since is not None and row.at < since)
            inside = [row for row in rows if (since is None or row.at >= since) and (until is None or row.at < until)]
            statement = await open_statement(connection, name, since, until)
            expected = lines_of(inside, opening)
            assert statement.opening == opening
            assert statement.closing == opening + sum(row.change for row in inside)
            assert (statement.lines, statement.ended) == (len(inside), not inside)
            for limit in {1 if len(inside) < 50 else 37, draw.randrange(2, 60), 1_000}:
                assert await read_all(connection, name, limit, since, until) == expected


async def test_a_year_is_its_months_one_after_the_other(connection: Connection) -> None:
    books = some_books(8)
    await books.store(connection)
    times = books.times()
    cuts = [None, *times[:: max(len(times) // 6, 1)], None]
    found: list[Line] = []
    before = 0
    for since, until in pairwise(cuts):
        month = await open_statement(connection, BUFFER, since, until)
        assert month.opening == before
        found += await read_all(connection, BUFFER, 50, since, until)
        before = month.closing
    assert found == lines_of(books.of(BUFFER))


async def test_entries_that_come_while_a_statement_is_paged_are_on_none_of_its_pages(connection: Connection) -> None:
    books, draw = some_books(9), random.Random(9)
    await books.store(connection)
    expected = lines_of(books.of(BUFFER))
    statement = await open_statement(connection, BUFFER)
    found: list[Line] = []
    cursor: str | None = ""
    while cursor is not None:
        if cursor:
            statement = await resume_statement(connection, BUFFER, None, None, cursor)
        lines, behind = await read_page(connection, statement, 20)
        found += lines
        cursor = behind.cursor()
        assert behind.closing == statement.closing == expected[-1].balance
        # also in shards whose clock is behind what was read, and in one that did not exist
        shard = draw.choice(("0", "9", "new", ""))
        books.post([(BUFFER._replace(shard=shard), -9), (spendable("ada"), 9)], START)
        await books.store(connection)
    assert found == expected
    assert await read_all(connection, BUFFER, 99, None, None) == lines_of(books.of(BUFFER))


async def test_an_export_holds_one_page_and_no_snapshot(connection: Connection) -> None:
    books = some_books(10)
    await books.store(connection)
    statement = await open_statement(connection, BUFFER)
    sizes, found = [], []
    async for lines in pages(lambda: nullcontext(connection), statement, 64):
        sizes.append(len(lines))
        found += lines
        assert not connection.is_in_transaction()
        books.post([(BUFFER._replace(shard="0"), -9), (spendable("ada"), 9)], START)
        await books.store(connection)
    assert max(sizes) <= 64
    assert found[-1].balance == statement.closing
    assert len(found) == statement.lines


async def test_a_shard_is_read_alone_and_the_chains_of_custody_are_summed(connection: Connection) -> None:
    books = some_books(11)
    await books.store(connection)
    whole = await reading.balance(connection, CUSTODY)
    assert set(whole.by_shard) == {"ETH", "MATIC"}
    for chain, held in whole.by_shard.items():
        assert (await reading.balance(connection, CUSTODY._replace(shard=chain))).balance == held
    assert whole.balance == -(await reading.balance(connection, WORLD)).balance


async def test_a_cursor_of_another_account_or_period_and_a_period_that_ends_before_it_begins_are_refused(
    connection: Connection,
) -> None:
    books = some_books(12, 60)
    await books.store(connection)
    _, behind = await read_page(connection, await open_statement(connection, BUFFER), 3)
    cursor = behind.cursor()
    assert cursor is not None
    for name, since in ((BUFFER._replace(shard="0"), None), (CUSTODY, None), (BUFFER, START)):
        with pytest.raises(BadCursor):
            await resume_statement(connection, name, since, None, cursor)
    shard, *rest = behind.spans
    beyond = Statement(BUFFER, None, None, (shard._replace(last=10**9), *rest), 0, 0, 0).cursor()
    strange = Statement(BUFFER, None, None, (shard._replace(shard="none"), *rest), 0, 0, 0).cursor()
    for made in (beyond, strange):
        assert made is not None
        with pytest.raises(BadCursor):
            await resume_statement(connection, BUFFER, None, None, made)
    with pytest.raises(BadPeriod):
        await open_statement(connection, BUFFER, START, START - TICK)
    empty = await open_statement(connection, BUFFER, START, START)
    assert (empty.lines, empty.opening, empty.closing) == (0, 0, 0)


async def test_the_trial_balance_sums_to_zero_now_and_at_every_time(connection: Connection) -> None:
    books = some_books(13)
    await books.store(connection)
    singles = [name for name in books.names() if name.shard is not None]
    for at in (None, START - TICK, *random.Random(13).sample(books.times(), 12), books.times()[-1]):
        found = await reading.trial_balance(connection, at)
        assert set(found.differences().values()) <= {0}
        begun = [name for name in singles if at is None or any(row.at <= at for row in books.of(name))]
        expected = {}
        for name in begun:
            held = books.balance(name, at)
            accounts, debit, credit = expected.get((name.asset, name.type), (0, 0, 0))
            expected[name.asset, name.type] = (accounts + 1, debit + max(held, 0), credit + max(-held, 0))
        assert {(x.asset, x.type): (x.accounts, x.debit, x.credit) for x in found.lines} == expected
    await connection.execute("UPDATE accounts SET balance = balance + 3 WHERE owner = 'ada' AND asset = 'USDC'")
    assert (await reading.trial_balance(connection)).differences() == {"USD": 0, "USDC": 3}


async def test_transactions_are_read_with_all_their_lines_by_id_and_by_reference(connection: Connection) -> None:
    books = some_books(14, 90)
    books.post([(spendable("ada"), 1), (WORLD, -1)], START, "often")
    for _ in range(11):
        books.post([(spendable("ada"), 1), (WORLD, -1)], START, "often")
    await books.store(connection)
    expected: dict[uuid.UUID, list[Row]] = {}
    for row in books.rows:
        expected.setdefault(row.transaction_id, []).append(row)

    def same(found: reading.PostedTransaction) -> bool:
        rows = expected[found.id]
        return (found.at, found.kind, found.reference) == (rows[0].at, rows[0].kind, rows[0].reference) and [
            (str(line.account), *line[1:]) for line in found.lines
        ] == [
            (str(r.account._replace(shard=r.account.shard or None)), r.direction, r.amount, r.after, r.version)
            for r in rows
        ]

    for transaction_id in expected:
        assert same(await reading.transaction(connection, transaction_id))
    for reference in books.references():
        for limit in (1, 4, 12, 200):
            seen: list[reading.PostedTransaction] = []
            after: reading.ReferenceCursor | None = None
            while True:
                page, after = await reading.transactions_of(connection, reference, limit, after)
                seen += page
                if after is None:
                    break
            assert all(map(same, seen))
            wanted = {rows[0].transaction_id for rows in expected.values() if rows[0].reference == reference}
            assert len(seen) == len(wanted) == len({one.id for one in seen})
            assert [(one.at, one.id) for one in seen] == sorted((one.at, one.id) for one in seen)
    with pytest.raises(TransactionNotFound):
        await reading.transaction(connection, uuid.UUID(int=1))
    assert await reading.transactions_of(connection, "never", 5) == ([], None)


async def test_a_search_looks_at_a_few_entries_of_a_long_account(connection: Connection) -> None:
    """The plan is what makes it fast: two look-ups by key, no account is walked through."""
    books = some_books(15, 20)
    await books.store(connection)
    await connection.execute(
        "INSERT INTO entries (account_id, version, transaction_id, seq, direction, amount, balance_after, at)"
        " SELECT id, version + g, gen_random_uuid(), 0, 'c', 1, balance - g, updated_at + g * interval '1 millisecond'"
        " FROM accounts, generate_series(1, 20000) g WHERE type = 'world_usdc'"
    )
    await connection.execute(
        "UPDATE accounts SET version = version + 20000, balance = balance - 20000 WHERE type = 'world_usdc'"
    )
    await connection.execute("ANALYZE")
    at = await connection.fetchval("SELECT updated_at + interval '7 seconds' FROM accounts WHERE type = 'world_usdc'")
    statement = reading._sql.balances_of_shards_at
    for mode in ("force_custom_plan", "force_generic_plan"):
        await connection.execute(f"SET plan_cache_mode = {mode}")
        await connection.execute(f"PREPARE at_{mode} (text, text, text, timestamptz) AS {statement}")
        explained = await connection.fetch(
            "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, BUFFERS OFF)"
            f" EXECUTE at_{mode}('system', 'world_usdc', 'USDC', '{at.isoformat()}')"
        )
        plan = "\n".join(row[0] for row in explained)
        assert "using entries_landmarks" in plan
        assert "using entries_pkey" in plan
        assert "Function Scan" not in plan, "the function is part of the statement"
        assert all(int(number) < 16 for number in re.findall(r"Rows Removed by Filter: (\d+)", plan))


async def test_a_transactions_lines_are_found_by_their_time_however_many_entries_there_are(
    dsn: str, connection: Connection
) -> None:
    database = await owner(dsn)
    await database.execute(
        "INSERT INTO entries (account_id, version, transaction_id, seq, direction, amount, balance_after, at)"
        " SELECT md5('a')::uuid, g, gen_random_uuid(), 0, 'd', 1, g, now() + g * interval '1 millisecond'"
        " FROM generate_series(1, 200000) g"
    )
    await database.execute("VACUUM ANALYZE entries")
    await connection.execute(f"PREPARE lines (uuid[], timestamptz[]) AS {reading._sql.entries_of_transactions}")
    plan = "".join(row[0] for row in await connection.fetch("EXPLAIN EXECUTE lines('{}', '{}')"))
    assert "Seq Scan on entries" not in plan
    assert "entries_at" in plan
    await database.close()
