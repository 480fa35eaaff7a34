"""/v1/accounts and /v1/ledger on real PostgreSQL: the books as they are, in JSON and in CSV, and what is refused."""

from __future__ import annotations

import csv
import io
import uuid
from collections.abc import AsyncGenerator, Callable
from urllib.parse import quote

import asyncpg
import httpx
import pytest

from stablerail.answers import STATEMENT_COLUMNS, format_time, parse_time
from stablerail.api import create_api
from stablerail.config import load_settings
from stablerail.keys import Scope, create_key
from tests.support import ledger_rig
from tests.support.books import BUFFER, CUSTODY, START, TICK, WORLD, Books, some_books, spendable
from topics.money import format_amount

databases = ledger_rig.databases
ROWS_ARE_MADE_UP = "a history of postings that speak of deposits which are nowhere"
PROBLEM = "application/problem+json"


@pytest.fixture
async def pool(databases: Callable[[], str]) -> AsyncGenerator[asyncpg.Pool]:
    async with asyncpg.create_pool(
        databases(), min_size=1, max_size=4, server_settings={"search_path": "stablerail"}
    ) as pool:
        yield pool


@pytest.fixture
async def books(pool: asyncpg.Pool) -> Books:
    made = some_books(21, 150)
    async with pool.acquire() as connection:
        await made.store(connection)
    return made


@pytest.fixture
async def client(pool: asyncpg.Pool) -> AsyncGenerator[httpx.AsyncClient]:
    async with pool.acquire() as connection:
        token = (await create_key(connection, [Scope.READ], "the tests")).token.get_secret_value()
    transport = httpx.ASGITransport(create_api(load_settings(env_file=None), pool))
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://api", headers=headers) as client:
        yield client


def path_of(account: object, what: str) -> str:
    return f"/v1/accounts/{quote(str(account), safe='')}/{what}"


async def test_an_accounts_balance_now_at_a_time_and_at_a_transaction(books: Books, client: httpx.AsyncClient) -> None:
    for name in books.names():
        answer = (await client.get(path_of(name, "balance"))).json()
        assert answer["balance"] == format_amount(books.balance(name))
        assert (answer["account"], answer["at"], answer["transaction_id"]) == (str(name), None, None)
    at = books.times()[len(books.times()) // 2]
    answer = (await client.get(path_of(CUSTODY, "balance"), params={"at": format_time(at)})).json()
    assert answer == {
        "account": "system.custody_usdc:USDC",
        "at": format_time(at),
        "transaction_id": None,
        "balance": format_amount(books.balance(CUSTODY, at)),
        "shards": {
            chain: format_amount(books.balance(CUSTODY._replace(shard=chain), at)) for chain in ("ETH", "MATIC")
        },
    }
    row = books.of(spendable("ada"))[7]
    answer = (await client.get(path_of(row.account, "balance"), params={"transaction": row.transaction_id.hex})).json()
    assert (answer["balance"], answer["transaction_id"]) == (format_amount(row.after), row.transaction_id.hex)


async def test_a_statement_is_paged_by_the_cursors_it_gives(books: Books, client: httpx.AsyncClient) -> None:
    times = books.times()
    period = {"from": format_time(times[3]), "to": format_time(times[-3])}
    rows = [row for row in books.of(BUFFER) if times[3] <= row.at < times[-3]]
    for limit in (1, 40, 1_000):
        balance, lines, after = books.balance(BUFFER, times[3] - TICK), [], None
        first = balance
        while True:
            params = {**period, "limit": str(limit)} | ({"after": after} if after else {})
            page = (await client.get(path_of(BUFFER, "statement"), params=params)).json()
            assert (page["from"], page["to"], page["line_count"]) == (period["from"], period["to"], len(rows))
            assert page["opening_balance"] == format_amount(first)
            assert page["closing_balance"] == format_amount(first + sum(row.change for row in rows))
            lines += page["lines"]
            after = page["next"]
            if after is None or len(lines) > 30 * limit:
                break
        for row, line in zip(rows, lines, strict=after is None):
            balance += row.change
            assert line == {
                "at": format_time(row.at),
                "shard": row.account.shard,
                "version": row.version,
                "transaction_id": row.transaction_id.hex,
                "kind": row.kind,
                "reference": row.reference,
                "direction": "debit" if row.direction == "d" else "credit",
                "amount": format_amount(row.amount),
                "balance": format_amount(balance),
            }


async def test_a_page_is_of_a_hundred_lines_unless_another_number_is_asked_for(
    books: Books, client: httpx.AsyncClient
) -> None:
    page = (await client.get(path_of(BUFFER, "statement"))).json()
    assert len(page["lines"]) == 100
    assert page["next"] is not None
    assert (page["from"], page["to"], page["opening_balance"]) == (None, None, "0.000000")


async def test_csv_is_the_whole_statement_between_its_opening_and_its_closing_balance(
    books: Books, client: httpx.AsyncClient, pool: asyncpg.Pool
) -> None:
    strange = 'says "hi", twice\nand = more'
    books.post([(spendable("ada"), 5), (WORLD, -5)], START, strange)
    async with pool.acquire() as connection:
        await books.store(connection)
    for name in (BUFFER, spendable("ada"), spendable("eve.usdc:x")):
        answer = await client.get(path_of(name, "statement"), headers={"Accept": "text/csv"})
        assert answer.headers["content-type"].startswith("text/csv")
        header, opening, *lines, closing = csv.reader(io.StringIO(answer.text, newline=""))
        assert tuple(header) == STATEMENT_COLUMNS
        assert (opening[4], opening[8]) == ("opening_balance", "0.000000")
        assert (closing[4], closing[8]) == ("closing_balance", format_amount(books.balance(name)))
        assert len(lines) == len(books.of(name))
        balance = 0
        for row, (at, shard, version, id_, kind, reference, side, amount, after) in zip(
            books.of(name), lines, strict=True
        ):
            balance += row.change
            assert (parse_time(at), shard, int(version), uuid.UUID(id_)) == (
                row.at, row.account.shard, row.version, row.transaction_id,
            )  # fmt: skip
            assert (kind, reference, side) == (row.kind, row.reference, {"d": "debit", "c": "credit"}[row.direction])
            assert (amount, after) == (format_amount(row.amount), format_amount(balance))
    assert pool.get_idle_size() == pool.get_size()


async def test_a_transaction_is_read_by_its_id_and_by_what_it_is_about(books: Books, client: httpx.AsyncClient) -> None:
    row = books.rows[40]
    lines = [each for each in books.rows if each.transaction_id == row.transaction_id]
    answer = (await client.get(f"/v1/ledger/transactions/{row.transaction_id}")).json()
    assert answer["id"] == row.transaction_id.hex
    assert (answer["kind"], answer["reference"], answer["at"]) == (row.kind, row.reference, format_time(row.at))
    assert [(e["version"], e["amount"], e["balance_after"]) for e in answer["entries"]] == [
        (each.version, format_amount(each.amount), format_amount(each.after)) for each in lines
    ]
    seen, params = [], {"reference": row.reference, "limit": "1"}
    while True:
        page = (await client.get("/v1/ledger/transactions", params=params)).json()
        seen += page["transactions"]
        if page["next"] is None:
            break
        params["after"] = page["next"]
    assert answer in seen
    assert {each["id"] for each in seen} == {r.transaction_id.hex for r in books.rows if r.reference == row.reference}
    nothing = await client.get("/v1/ledger/transactions", params={"reference": "never"})
    assert nothing.json() == {"transactions": [], "next": None}


async def test_the_trial_balance_sums_to_zero_per_asset(books: Books, client: httpx.AsyncClient) -> None:
    at = books.times()[9]
    for params in ({}, {"at": format_time(at)}):
        answer = (await client.get("/v1/ledger/trial-balance", params=params)).json()
        assert set(answer["differences"].values()) == {"0.000000"}
        lines = {line["type"]: line for line in answer["lines"]}
        held = sum(books.balance(spendable(u), at if params else None) for u in ("ada", "bob", "eve.usdc:x"))
        assert (lines["usdc_balance"]["debit"], lines["usdc_balance"]["credit"]) == (format_amount(held), "0.000000")


async def test_what_is_held_or_reserved_is_pending(pool: asyncpg.Pool, client: httpx.AsyncClient) -> None:
    books, ada = Books(), spendable("ada")
    books.post([(ada, 10_000_000), (WORLD, -10_000_000)], START)
    for kind, amount in (("pending_withdrawal", 3), ("pending_investment", 4)):
        books.post([(ada._replace(type=kind), amount), (ada, -amount)], START)
    async with pool.acquire() as connection:
        await books.store(connection)
    (held,) = (await client.get("/v1/users/ada/balances")).json()["balances"]
    assert (held["available"], held["pending"], held["total"]) == ("9.999993", "0.000007", "10.000000")


async def test_what_makes_no_sense_is_a_problem_with_a_stable_code(books: Books, client: httpx.AsyncClient) -> None:
    page = (await client.get(path_of(BUFFER, "statement"), params={"limit": 5})).json()
    ada, other = path_of(spendable("ada"), ""), books.of(spendable("bob"))[0].transaction_id
    for path, status, code in (
        (path_of("ada", "balance"), 422, "bad_account"),
        (path_of("ada.usdc_balance", "statement"), 422, "bad_account"),
        (path_of("a\0.usdc_balance:USDC", "balance"), 422, "bad_account"),
        (path_of("x" * 401, "balance"), 422, "invalid_request"),
        (path_of("nobody.usdc_balance:USDC", "balance"), 404, "account_not_found"),
        (path_of("system.system_buffer_usdc[77]:USDC", "statement"), 404, "account_not_found"),
        (f"{ada}balance?at=2026-11-25T14:00:00", 422, "invalid_request"),
        (f"{ada}balance?at=1763700000", 422, "invalid_request"),
        (f"{ada}balance?transaction=7", 422, "invalid_request"),
        (f"{ada}balance?at=2026-01-01&transaction={other}", 422, "invalid_request"),
        (f"{ada}balance?transaction={other}", 404, "not_on_account"),
        (f"{ada}balance?transaction={uuid.UUID(int=1)}", 404, "transaction_not_found"),
        (f"{ada}statement?from=2026-02-01&to=2026-01-01", 422, "bad_period"),
        (f"{ada}statement?from=yesterday", 422, "invalid_request"),
        (f"{ada}statement?limit=0", 422, "invalid_request"),
        (f"{ada}statement?limit=1001", 422, "invalid_request"),
        (f"{ada}statement?after=", 400, "bad_cursor"),
        (f"{ada}statement?after=nonsense", 400, "bad_cursor"),
        (f"{ada}statement?after={page['next']}", 400, "bad_cursor"),
        (path_of(BUFFER, f"statement?from=2026-01-01&after={page['next']}"), 400, "bad_cursor"),
        (f"/v1/ledger/transactions/{uuid.UUID(int=1)}", 404, "transaction_not_found"),
        ("/v1/ledger/transactions/7", 422, "invalid_request"),
        ("/v1/ledger/transactions", 422, "invalid_request"),
        ("/v1/ledger/transactions?reference=%00", 422, "invalid_request"),
        ("/v1/ledger/transactions?reference=x&after=nonsense", 400, "bad_cursor"),
        ("/v1/ledger/trial-balance?at=then", 422, "invalid_request"),
    ):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (status, code), path
        assert answer.headers["content-type"] == PROBLEM
    for params in ({"limit": "5"}, {"after": page["next"]}):
        answer = await client.get(path_of(BUFFER, "statement"), params=params, headers={"Accept": "text/csv"})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    wrong = (await client.get(f"{ada}balance?at=noon")).json()["errors"]
    assert wrong[0]["field"] == "query.at"
    assert "RFC 3339" in wrong[0]["message"]


async def test_without_a_valid_key_the_ledger_is_closed(pool: asyncpg.Pool) -> None:
    transport = httpx.ASGITransport(create_api(load_settings(env_file=None), pool))
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        for path in (path_of(BUFFER, "balance"), path_of("x", "statement"), "/v1/ledger/trial-balance"):
            answer = await client.get(path, headers={"Accept": "text/csv"})
            assert (answer.status_code, answer.json()["code"]) == (401, "missing_key")
