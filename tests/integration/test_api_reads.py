"""The API on real PostgreSQL, with the schema the migrations make."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

import asyncpg
import httpx
import pytest
from starlette.requests import Request
from structlog.testing import capture_logs

from agents.deposits.deposit import transaction_ids
from agents.looking import until_up
from ledger.accounts import Account, buffer, spendable
from ledger.migrate import upgrade
from ledger.posting import Balance, Marks
from ledger.rows import Op, block, write
from ledger.store import account_row
from ledger.tables import ACCOUNTS, DEPOSIT_REPORTS, DEPOSITS, ENTRIES, TRANSACTIONS, WALLET_REQUESTS, WALLETS
from stablerail import servers
from stablerail.api import create_api, onboarding_routes, reads, withdrawal_reads
from stablerail.config import load_settings
from stablerail.dev.postgres import Postgres
from stablerail.keys import Scope, authenticate, create_key, list_keys, revoke_key
from tests.support.invariants import end_database, may_break
from tests.support.ledger_rig import until
from tests.support.patience import PATIENCE_S
from tests.support.proxies.postgres import PostgresProxy

SCHEMA = "stablerail"
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
ADDRESS = "0x5b38da6a701c568545dcfcb03fcb875f56beddc4"
PROBLEM = "application/problem+json"


def named(number: int) -> str:
    return uuid.UUID(int=number).hex


@pytest.fixture(scope="module")
def migrated(postgres: Postgres) -> Iterator[str]:
    """A database with our tables, to copy from."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    dsn = postgres.create_database(name)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, upgrade(dsn, SCHEMA)).result()
    yield name
    end_database(postgres, name)


@pytest.fixture
async def pool(postgres: Postgres, migrated: str) -> AsyncGenerator[asyncpg.Pool]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    dsn = postgres.create_database(name, template=migrated)
    may_break(dsn, "deposits without postings, to see how they are read")
    async with asyncpg.create_pool(dsn, min_size=1, max_size=4, server_settings={"search_path": SCHEMA}) as pool:
        yield pool
    end_database(postgres, name)


def client_of(pool: asyncpg.Pool, token: str | None = None) -> httpx.AsyncClient:
    app = create_api(load_settings(env_file=None), pool)
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api", headers=headers)


@pytest.fixture
async def client(pool: asyncpg.Pool) -> AsyncGenerator[httpx.AsyncClient]:
    async with pool.acquire() as connection:
        created = await create_key(connection, [Scope.READ], "the tests")
    async with client_of(pool, created.token.get_secret_value()) as client:
        yield client


async def add_wallet(pool: asyncpg.Pool, user_id: str = "user_42") -> None:
    async with pool.acquire() as connection:
        await write(
            connection,
            [
                block(WALLETS, Op.INSERT, [("MATIC", ADDRESS, user_id, "wallet-1", NOON)]),
                block(
                    WALLET_REQUESTS,
                    Op.INSERT,
                    [(user_id, "MATIC", "ready", NOON, NOON, None), (user_id, "SOL", "requested", NOON, None, None)],
                ),
            ],
        )


async def add_account(pool: asyncpg.Pool, account: Account, balance: int) -> None:
    row = account_row(account, Balance(balance, 1), NOON)
    async with pool.acquire() as connection:
        await write(connection, [block(ACCOUNTS, Op.UPSERT, [row])])


async def add_deposits(pool: asyncpg.Pool, rows: list[dict[str, Any]], user_id: str = "user_42") -> None:
    stored = [
        (
            *(each["id"], 0, "MATIC", f"0x{number:064x}", ADDRESS, "USDC"),
            *(each.get("amount", 25_000_000), user_id, each.get("status", "credited"), 1, ""),
            *("0x" + "ab" * 32, 100 + number, number),
            *(each.get("credited_at", NOON), each.get("finalized_at"), NOON),
            *(each.get("sender"), each.get("held"), None),
        )
        for number, each in enumerate(rows)
    ]
    async with pool.acquire() as connection:
        await write(connection, [block(DEPOSITS, Op.INSERT, stored)])


async def test_a_deposit_counts_at_once_and_is_marked_until_it_is_final(
    pool: asyncpg.Pool, client: httpx.AsyncClient
) -> None:
    await add_account(pool, spendable("user_42"), 75_000_001)
    await add_account(pool, buffer(), -75_000_001)
    await add_deposits(
        pool,
        [
            {"id": named(1), "amount": 25_000_001},
            {"id": named(2), "amount": 50_000_000, "status": "finalized", "finalized_at": NOON},
            {"id": named(3), "amount": 9_000_000, "status": "reversed", "finalized_at": NOON},
            {"id": named(4), "amount": 7_000_000, "status": "pending", "credited_at": None},
        ],
    )
    answer = await client.get("/v1/users/user_42/balances")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == {
        "user_id": "user_42",
        "balances": [
            {
                "asset": "USDC",
                "available": "75.000001",
                "pending": "0.000000",
                "total": "75.000001",
                "not_final": "25.000001",
                "accounts": {"usdc_balance": "75.000001"},
            }
        ],
    }


async def test_what_is_held_is_in_the_total_and_not_available(pool: asyncpg.Pool, client: httpx.AsyncClient) -> None:
    await add_account(pool, spendable("user_42"), 10_000_000)
    # a type of the next order: the API shows whatever accounts there are
    async with pool.acquire() as connection:
        await connection.execute(
            "INSERT INTO accounts VALUES (gen_random_uuid(), 'user_42', 'pending_withdrawal', 'USDC', '', 5000000, 1, now())"
        )
    (balance,) = (await client.get("/v1/users/user_42/balances")).json()["balances"]
    assert (balance["available"], balance["pending"], balance["total"]) == ("10.000000", "5.000000", "15.000000")
    assert balance["accounts"] == {"pending_withdrawal": "5.000000", "usdc_balance": "10.000000"}


async def test_a_customer_with_a_wallet_and_no_deposit_has_zero(pool: asyncpg.Pool, client: httpx.AsyncClient) -> None:
    await add_wallet(pool)
    (balance,) = (await client.get("/v1/users/user_42/balances")).json()["balances"]
    assert (balance["available"], balance["total"], balance["not_final"]) == ("0.000000",) * 3


async def test_balances_far_beyond_a_double_are_exact(pool: asyncpg.Pool, client: httpx.AsyncClient) -> None:
    await add_account(pool, spendable("whale"), 2**96 + 1)
    (balance,) = (await client.get("/v1/users/whale/balances")).json()["balances"]
    assert balance["available"] == "79228162514264337593543.950337"


async def test_nobody_is_known_by_the_companys_own_name(pool: asyncpg.Pool, client: httpx.AsyncClient) -> None:
    await add_account(pool, buffer(), -1)
    for path in ("balances", "wallets", "deposits"):
        for user in ("system", "stranger"):
            answer = await client.get(f"/v1/users/{user}/{path}")
            assert (answer.status_code, answer.json()["code"]) == (404, "unknown_user")
            assert answer.headers["content-type"] == PROBLEM


async def test_wallets_that_exist_and_wallets_still_awaited(pool: asyncpg.Pool, client: httpx.AsyncClient) -> None:
    await add_wallet(pool)
    answer = (await client.get("/v1/users/user_42/wallets")).json()
    assert answer["wallets"] == [
        {"chain": "MATIC", "address": ADDRESS, "wallet_id": "wallet-1", "created_at": "2026-11-21T12:00:00Z"}
    ]
    assert answer["awaited"] == [{"chain": "SOL", "status": "requested"}]


async def test_a_deposit_tells_who_reported_it_and_what_it_did(pool: asyncpg.Pool, client: httpx.AsyncClient) -> None:
    account, deposit_id, later = spendable("user_42"), named(7), NOON + timedelta(minutes=2)
    await add_account(pool, account, 25_000_000)
    await add_account(pool, buffer(), -25_000_000)
    await add_deposits(pool, [{"id": deposit_id, "status": "finalized", "finalized_at": later}])
    group = deposit_id[:28] + "0000"
    credit_id, final_id, *_ = transaction_ids(deposit_id, 1)
    async with pool.acquire() as connection:
        await write(
            connection,
            [
                block(
                    DEPOSIT_REPORTS,
                    Op.INSERT,
                    [
                        (named(31), "circle", "tx-1", group, deposit_id, "complete", None, later),
                        (named(32), "scanner", "0xab:3", group, deposit_id, "confirmed", "0x" + "ab" * 32, NOON),
                        (named(33), "circle", "tx-2", group, named(8), "complete", None, later),
                    ],
                ),
                block(
                    TRANSACTIONS,
                    Op.INSERT,
                    [
                        (credit_id, "deposit_credited", deposit_id, credit_id, NOON, *Marks(), None),
                        (final_id, "deposit_finalized", deposit_id, final_id, later, *Marks(), None),
                        (named(22), "deposit_credited", named(8), final_id, later, *Marks(), None),
                    ],
                ),
                block(
                    ENTRIES,
                    Op.INSERT,
                    [
                        (account.id, 1, credit_id, 0, "d", 25_000_000, 25_000_000, NOON),
                        (buffer().id, 1, credit_id, 1, "c", 25_000_000, -25_000_000, NOON),
                    ],
                ),
            ],
        )
    answer = (await client.get(f"/v1/deposits/{deposit_id}")).json()
    assert (answer["id"], answer["status"], answer["amount"]) == (deposit_id, "finalized", "25.000000")
    assert (answer["user_id"], answer["to"], answer["chain"]) == ("user_42", ADDRESS, "MATIC")
    assert (answer["credited_at"], answer["finalized_at"]) == ("2026-11-21T12:00:00Z", "2026-11-21T12:02:00Z")
    assert [(r["source"], r["transfer_id"], r["evidence"]) for r in answer["reports"]] == [
        ("scanner", "0xab:3", "confirmed"),
        ("circle", "tx-1", "complete"),
    ]
    credited, finalized = answer["transactions"]
    assert (credited["id"], credited["kind"]) == (credit_id, "deposit_credited")
    assert credited["entries"] == [
        {
            "account": "usdc_balance",
            "asset": "USDC",
            "direction": "debit",
            "amount": "25.000000",
            "balance_after": "25.000000",
            "version": 1,
        }
    ]
    assert (finalized["kind"], finalized["entries"]) == ("deposit_finalized", [])
    dashed = await client.get(f"/v1/deposits/{uuid.UUID(deposit_id)}")
    assert dashed.json() == answer


async def test_deposits_are_paged_newest_first_and_a_new_one_moves_no_later_page(
    pool: asyncpg.Pool, client: httpx.AsyncClient
) -> None:
    # three waiting, then eleven of which five share the microsecond of one batch
    waiting = [{"id": named(100 + i), "status": "pending", "credited_at": None} for i in range(3)]
    batch = [{"id": named(200 + i), "credited_at": NOON} for i in range(5)]
    single = [{"id": named(300 + i), "credited_at": NOON + timedelta(microseconds=1 + i)} for i in range(6)]
    await add_deposits(pool, [*waiting, *batch, *single])
    await add_deposits(pool, [{"id": named(900)}], user_id="somebody_else")
    await add_wallet(pool)
    everything = (await client.get("/v1/users/user_42/deposits")).json()
    ids = [deposit["id"] for deposit in everything["deposits"]]
    newest_first = [*(named(100 + i) for i in (2, 1, 0)), *(named(300 + i) for i in range(5, -1, -1))]
    assert ids == [*newest_first, *(named(200 + i) for i in range(4, -1, -1))]
    assert everything["next"] is None

    for limit in (1, 2, 4, 7, 14):
        seen: list[str] = []
        after: str | None = None
        while True:
            params = {"limit": limit} if after is None else {"limit": limit, "after": after}
            page = (await client.get("/v1/users/user_42/deposits", params=params)).json()
            assert 0 < len(page["deposits"]) <= limit
            seen += [deposit["id"] for deposit in page["deposits"]]
            after = page["next"]
            if after is None:
                break
        assert seen == ids, limit

    first = (await client.get("/v1/users/user_42/deposits", params={"limit": 5})).json()
    await add_deposits(pool, [{"id": named(500), "credited_at": NOON + timedelta(hours=1)}])
    second = await client.get("/v1/users/user_42/deposits", params={"limit": 5, "after": first["next"]})
    assert [deposit["id"] for deposit in second.json()["deposits"]] == ids[5:10]


async def walked(client: httpx.AsyncClient, path: str, of: str, **params: str | int) -> list[dict[str, Any]]:
    """All of a list, page by page."""
    seen: list[dict[str, Any]] = []
    while True:
        answer = await client.get(path, params=params)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        seen += page[of]
        if page["next"] is None:
            return seen
        assert len(page[of]) == params["limit"]
        params["after"] = page["next"]


async def test_everybodys_deposits_are_walked_through_by_filters_and_each_is_on_one_page(
    pool: asyncpg.Pool, client: httpx.AsyncClient
) -> None:
    statuses = ("pending", "credited", "orphaned", "finalized", "reversed", "parked", "vanished")
    rows = [
        {"id": named(100 + n), "status": statuses[n % 7], "held": "denied" if n % 7 == 5 else None} for n in range(35)
    ]
    await add_deposits(pool, rows[:20])
    await add_deposits(pool, rows[20:], user_id="somebody")
    everybody = await walked(client, "/v1/deposits", "deposits", limit=6)
    assert [deposit["id"] for deposit in everybody] == [row["id"] for row in rows]
    for status in statuses:
        found = await walked(client, "/v1/deposits", "deposits", limit=2, status=status)
        assert [deposit["id"] for deposit in found] == [row["id"] for row in rows if row["status"] == status]
    both = await walked(client, "/v1/deposits", "deposits", limit=1, status="parked", user_id="somebody", chain="MATIC")
    assert [(deposit["id"], deposit["held"]) for deposit in both] == [(named(126), "denied"), (named(133), "denied")]
    assert await walked(client, "/v1/deposits", "deposits", limit=9, chain="ETH") == []
    assert await walked(client, "/v1/deposits", "deposits", limit=9, user_id="stranger") == []
    # what comes while it is walked through doubles nothing and hides nothing that was there
    first = (await client.get("/v1/deposits", params={"limit": 30})).json()
    await add_deposits(pool, [{"id": named(1)}, {"id": named(999)}])
    rest = await walked(client, "/v1/deposits", "deposits", limit=30, after=first["next"])
    assert [deposit["id"] for deposit in rest] == [named(100 + n) for n in range(30, 35)] + [named(999)]


async def test_rare_deposits_are_found_by_their_index_however_many_others_there_are(pool: asyncpg.Pool) -> None:
    async with pool.acquire() as connection:
        await connection.execute("SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off")
        await connection.execute(f"PREPARE listed (text, text, text, uuid, int) AS {reads._SQL.listed_odd}")
        plan = await connection.fetch("EXPLAIN EXECUTE listed(NULL, NULL, 'parked', NULL, 51)")
    assert "deposits_odd" in "".join(row[0] for row in plan)


async def test_open_withdrawals_are_found_by_their_index_however_many_have_ended(pool: asyncpg.Pool) -> None:
    async with pool.acquire() as connection:
        await connection.execute(
            "INSERT INTO withdrawals (id, fingerprint, version, user_id, idempotency_key, rail, chain, asset, amount, recipient,"
            " status, requested_at, updated_at, settled_at) SELECT gen_random_uuid(), gen_random_uuid(), 1, 'u', n::text, 'chain',"
            " 'ETH', 'USDC', 1, '', CASE n WHEN 1 THEN 'manual_review' ELSE 'completed' END, now(), now(),"
            " CASE n WHEN 1 THEN NULL ELSE now() END FROM generate_series(1, 3000) AS x(n)"
        )
        await connection.execute("ANALYZE withdrawals; SET plan_cache_mode = force_generic_plan")
        query = withdrawal_reads._SQL.page_of_open
        await connection.execute(f"PREPARE page_of_open (text, text, timestamptz, uuid, int) AS {query}")
        plan = await connection.fetch("EXPLAIN EXECUTE page_of_open('manual_review', NULL, NULL, NULL, 51)")
    assert "withdrawals_unsettled" in "".join(row[0] for row in plan)


async def test_everybodys_wallets_are_walked_through(pool: asyncpg.Pool, client: httpx.AsyncClient) -> None:
    rows = [(chain, f"0x{n:02}", f"user_{n % 3}", f"w{n}", NOON) for chain in ("ETH", "MATIC") for n in range(7)]
    async with pool.acquire() as connection:
        await write(connection, [block(WALLETS, Op.INSERT, rows)])
    found = await walked(client, "/v1/wallets", "wallets", limit=3)
    assert [(w["chain"], w["address"], w["user_id"], w["wallet_id"]) for w in found] == [row[:4] for row in rows]
    mine = await walked(client, "/v1/wallets", "wallets", limit=2, user_id="user_0", chain="MATIC")
    assert [w["address"] for w in mine] == ["0x00", "0x03", "0x06"]


async def test_what_makes_no_sense_is_a_problem_with_a_stable_code(client: httpx.AsyncClient) -> None:
    for path, status, code in (
        ("/v1/deposits/not-an-id", 422, "invalid_request"),
        (f"/v1/deposits/{named(404)}", 404, "unknown_deposit"),
        ("/v1/users/user_42/deposits?limit=0", 422, "invalid_request"),
        ("/v1/users/user_42/deposits?limit=201", 422, "invalid_request"),
        ("/v1/users/user_42/deposits?after=nonsense", 400, "bad_cursor"),
        ("/v1/users/user_42/deposits?after=", 400, "bad_cursor"),
        ("/v1/deposits?after=nonsense", 400, "bad_cursor"),
        ("/v1/deposits?after=%C3%BC", 400, "bad_cursor"),
        ("/v1/wallets?after=", 400, "bad_cursor"),
        ("/v1/wallets?after=AAAA", 400, "bad_cursor"),
        ("/v1/deposits?status=gone", 422, "invalid_request"),
        ("/v1/wallets?chain=DOGE", 422, "invalid_request"),
        ("/v1/users/%00/balances", 422, "invalid_request"),
        ("/v1/users/%D0%B6/balances", 422, "invalid_request"),
        (f"/v1/users/{'u' * 201}/balances", 422, "invalid_request"),
    ):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (status, code), path
        assert answer.headers["content-type"] == PROBLEM


async def test_an_operators_order_that_makes_no_sense_is_a_problem_with_a_stable_code(pool: asyncpg.Pool) -> None:
    async with pool.acquire() as connection:
        created = await create_key(connection, [Scope.ADMIN], "the tests")
    async with client_of(pool, created.token.get_secret_value()) as client:
        for path, body in (
            ("dlq/redrive", {"topic": "a\0b"}),
            ("dlq/redrive", {"code": "\0"}),
            ("dlq/redrive", {"topic": "\ud800"}),
            ("workers/trigger", {"user_id": "a\0b"}),
            ("workers/trigger", {"user_id": "\ud800"}),
        ):
            said = json.dumps(body)  # which escapes half of a surrogate pair
            answer = await client.post(f"/v1/admin/{path}", content=said, headers={"Content-Type": "application/json"})
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), said
        for since in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
            answer = await client.get("/v1/admin/dlq", params={"since": since})
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), since
        for since in ("2026-11-21T12:00:00", "2026-11-21T12:00:00+14:00", "2026-11-21"):
            assert (await client.get("/v1/admin/dlq", params={"since": since})).status_code == 200


async def test_an_id_with_slashes_is_read_as_any_other(pool: asyncpg.Pool, client: httpx.AsyncClient) -> None:
    user = "org/7/balances"
    await add_wallet(pool, user)
    await add_account(pool, spendable(user), 5)
    path = quote(user, safe="")
    (wallet,) = (await client.get(f"/v1/users/{path}/wallets")).json()["wallets"]
    assert wallet["address"] == ADDRESS
    (balance,) = (await client.get(f"/v1/users/{path}/balances")).json()["balances"]
    assert balance["available"] == "0.000005"
    assert (await client.get(f"/v1/users/{path}/deposits")).json() == {"deposits": [], "next": None}
    account = await client.get(f"/v1/accounts/{path}.usdc_balance:USDC/balance")
    assert account.json()["balance"] == "0.000005"
    statement = await client.get(f"/v1/accounts/{path}.usdc_balance:USDC/statement")
    assert statement.json()["account"] == f"{user}.usdc_balance:USDC"
    assert 'route="/v1/users/{user_id}/wallets"' in (await client.get("/metrics")).text


async def test_a_database_that_takes_no_writes_is_asked_again(pool: asyncpg.Pool) -> None:
    async with pool.acquire() as connection:
        created = await create_key(connection, [Scope.READ, Scope.WITHDRAW], "the tests")
        name = await connection.fetchval("SELECT current_database()")
        await connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    await pool.expire_connections()
    async with client_of(pool, created.token.get_secret_value()) as client:
        answer = await client.post(f"/v1/withdrawals/{named(1)}/cancel")
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
        assert (await client.get("/v1/withdrawals")).status_code == 200


async def test_what_others_hold_for_too_long_is_asked_for_again(pool: asyncpg.Pool, client: httpx.AsyncClient) -> None:
    async with pool.acquire() as connection:
        name = await connection.fetchval("SELECT current_database()")
        await connection.execute(f"ALTER DATABASE {name} SET lock_timeout = '50ms'")
    await pool.expire_connections()
    async with pool.acquire() as other, other.transaction():
        await other.execute("LOCK TABLE deposits")
        answer = await client.get("/v1/deposits")
    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
    assert answer.headers["retry-after"] == "2"
    assert (await client.get("/v1/deposits")).status_code == 200


async def test_a_stream_whose_database_goes_away_ends_and_its_client_comes_again(
    pool: asyncpg.Pool, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, look = 0, onboarding_routes._found

    async def counted(request: Request, user_id: str) -> onboarding_routes.OnboardingStatus:
        nonlocal looks
        found = await look(request, user_id)
        looks += 1
        return found

    monkeypatch.setattr(onboarding_routes, "LOOK_S", 0.01)
    monkeypatch.setattr(onboarding_routes, "_found", counted)
    await add_wallet(pool)
    async with pool.acquire() as connection:
        name = await connection.fetchval("SELECT current_database()")
        await connection.execute(f"ALTER DATABASE {name} SET lock_timeout = '50ms'")
    await pool.expire_connections()
    with capture_logs() as logs:
        async with pool.acquire() as other, other.transaction():
            streamed = asyncio.create_task(client.get("/v1/onboarding/events", params={"user_id": "user_42"}))
            await until(lambda: looks >= 2, "the stream has begun and looked again")
            await other.execute("SET lock_timeout = 0")  # a look may be reading just now
            await other.execute("LOCK TABLE wallet_requests")
            answer = await streamed
    assert (answer.status_code, answer.text.startswith("id: 0\nevent: status\n")) == (200, True)
    assert {"event": "stream_ends", "error": "LockNotAvailableError", "log_level": "warning"}.items() <= next(
        line for line in logs if line["event"] == "stream_ends"
    ).items()


async def test_without_a_valid_key_nothing_is_read(pool: asyncpg.Pool) -> None:
    async with pool.acquire() as connection:
        created = await create_key(connection, [Scope.READ], "to be revoked")
        token = created.token.get_secret_value()
        assert await authenticate(connection, f"Bearer {token}") == created.key
        assert await authenticate(connection, f"bearer {token}") == created.key
        assert await revoke_key(connection, created.key.id)
        assert not await revoke_key(connection, created.key.id)
        live = await create_key(connection, [Scope.READ], "live")
    wrong = live.token.get_secret_value()[:-1] + ("0" if live.token.get_secret_value()[-1] != "0" else "1")
    unknown = "sr_" + "0" * 16 + "_" + "0" * 64
    for path in ("/v1/users/user_42/balances", f"/v1/deposits/{named(1)}", "/v1/users/user_42/deposits?limit=0"):
        async with client_of(pool) as client:
            answer = await client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (401, "missing_key")
        assert answer.headers["www-authenticate"] == 'Bearer realm="stablerail"'
        for token in (created.token.get_secret_value(), wrong, unknown, "nonsense", ""):
            async with client_of(pool, token) as client:
                answer = await client.get(path)
            assert (answer.status_code, answer.json()["code"]) == (401, "invalid_key")
            assert 'error="invalid_token"' in answer.headers["www-authenticate"]


async def test_a_key_without_the_scope_is_told_which_one_it_lacks(pool: asyncpg.Pool) -> None:
    async with pool.acquire() as connection:
        other = await create_key(connection, [Scope.READ], "of a later kind")
        await connection.execute("UPDATE api_keys SET scope = '{withdraw}' WHERE id = $1", other.key.id)
        admin = await create_key(connection, [Scope.ADMIN], "admin")
    async with client_of(pool, other.token.get_secret_value()) as client:
        answer = await client.get("/v1/users/user_42/balances")
    assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_scope")
    assert 'scope="read"' in answer.headers["www-authenticate"]
    async with client_of(pool, admin.token.get_secret_value()) as client:
        assert (await client.get("/v1/users/user_42/balances")).json()["code"] == "unknown_user"


async def test_a_key_is_shown_once_and_stored_only_as_a_hash(pool: asyncpg.Pool) -> None:
    async with pool.acquire() as connection:
        first = await create_key(connection, [Scope.READ, Scope.ADMIN, Scope.READ], "console")
        second = await create_key(connection, [Scope.READ], "console")
        await revoke_key(connection, second.key.id)
        stored = str([dict(row) for row in await connection.fetch("SELECT * FROM api_keys")])
        listed = await list_keys(connection)
        for scopes, name in (([], "x"), ([Scope.READ], ""), ([Scope.READ], "n" * 101), ([Scope.READ], "a\nb")):
            with pytest.raises(ValueError, match="a key needs"):
                await create_key(connection, scopes, name)
    secret = first.token.get_secret_value().rpartition("_")[2]
    assert secret not in stored
    assert secret not in repr(first)
    assert [key.id for key in listed] == [first.key.id, second.key.id]
    assert listed[0].scopes == {"read", "admin"}
    assert listed[0].revoked_at is None
    assert listed[1].revoked_at is not None


async def test_it_is_ready_with_its_tables_and_counts_requests_by_route(
    pool: asyncpg.Pool, client: httpx.AsyncClient
) -> None:
    assert (await client.get("/readyz")).json() == {"status": "ready"}
    for user in ("a", "b"):
        await client.get(f"/v1/users/{user}/balances")
    metrics = await client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    line = (
        'stablerail_http_requests_total{app="api",method="GET",route="/v1/users/{user_id}/balances",status="404"} 2.0'
    )
    assert line in metrics.text


async def test_a_database_without_our_tables_is_not_ready(database: str) -> None:
    async with asyncpg.create_pool(database, min_size=1, max_size=1) as pool, client_of(pool) as client:
        answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")


async def test_no_look_takes_a_connection_for_good(pool: asyncpg.Pool, client: httpx.AsyncClient) -> None:
    await add_wallet(pool)
    answers = await asyncio.gather(*(client.get("/v1/users/user_42/balances") for _ in range(40)))
    # on a busy machine not all of them get one of four connections within two seconds; nor may those keep any
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert pool.get_idle_size() == pool.get_size()
    for _ in range(2 * pool.get_max_size()):
        assert (await client.get("/v1/users/user_42/balances")).status_code == 200
    assert pool.get_idle_size() == pool.get_size()


async def test_the_api_may_start_before_its_database(postgres: Postgres, migrated: str) -> None:
    dsn = postgres.dsn_of(migrated)
    server = urlsplit(dsn)
    with PostgresProxy(server.hostname or "", server.port or 0) as proxy, capture_logs() as logs:
        proxy.refuse(True)
        url = dsn.replace(f"{server.hostname}:{server.port}", proxy.address)
        settings = load_settings(env_file=None, database_url=url)
        up = asyncio.create_task(until_up(partial(servers.reach, settings), "api.waits"))
        async with asyncio.timeout(PATIENCE_S):
            while not logs:
                await asyncio.sleep(0.01)
            assert not up.done()
            proxy.refuse(False)
            await up
    assert {one["event"] for one in logs} == {"api.waits"}
