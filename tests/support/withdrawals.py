"""Withdrawals in the test's own process: the ground, accept_withdrawals' policy, the API as it is served, funded customers."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from agents.withdrawals.limits import WithdrawalPolicy
from agents.withdrawals.withdrawal import withdrawal_id
from ledger.accounts import Account, buffer, pending_withdrawal, spendable
from ledger.book import post
from ledger.posting import Transaction, credit, debit
from ledger.store import Posted
from ledger.verify import verify
from stablerail.config import Settings, load_settings
from stablerail.keys import Scope, create_key
from stablerail.metrics import Metrics
from stablerail.policies import withdrawal_policy
from stablerail.servers import api_app
from tests.support.in_process import SCHEMA, Ground, until
from tests.support.rebuild import differences, empty_database, rebuild
from topics.catalog import WITHDRAWALS_ACCEPTED, WITHDRAWALS_REQUESTED, WITHDRAWALS_SETTLED
from topics.envelope import headers_of
from topics.events import WithdrawalRequested, WithdrawalSettled
from topics.money import SCALE

TOPICS = (WITHDRAWALS_REQUESTED, WITHDRAWALS_ACCEPTED, WITHDRAWALS_SETTLED)
TOKEN = "0x41e94eb019c0762f9bfcf9fb1e58725bfb0e7582"
OUTSIDE = "0x5b38da6a701c568545dcfcb03fcb875f56beddc4"


def settings_of(at: Ground, **more: Any) -> Settings:
    return load_settings(
        env_file=None,
        **{
            "database_url": at.dsn,
            "kafka_bootstrap": at.bootstrap,
            "topic_prefix": at.prefix,
            "withdrawal_chains": "MATIC",
            "rpc_urls": '{"MATIC": ["http://127.0.0.1:1"]}',
            "usdc_contracts": json.dumps({"MATIC": TOKEN}),
            **more,
        },
    )


def policy_of(at: Ground, **more: Any) -> WithdrawalPolicy:
    """What the settings make of it."""
    return withdrawal_policy(settings_of(at, **more))


@asynccontextmanager
async def api_of(
    at: Ground, *scopes: Scope, address: str = "http://api", **more: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """The API as `stablerail api` serves it, and a client with a key of these scopes (all, when none is named)."""
    app = api_app(settings_of(at, **more), Metrics())
    connection = await at.connect()
    made = await create_key(connection, scopes or tuple(Scope), "the tests")
    await connection.close()
    headers = {"Authorization": f"Bearer {made.token.get_secret_value()}"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=address, headers=headers) as client,
    ):
        yield client


def wish(user_id: str = "ada", **fields: Any) -> dict[str, Any]:
    """The body of a request to the API."""
    return {"user_id": user_id, "chain": "MATIC", "asset": "USDC", "amount": "25.00", "to": OUTSIDE, **fields}


async def ask(client: httpx.AsyncClient, key: str, user_id: str = "ada", **fields: Any) -> httpx.Response:
    return await client.post("/v1/withdrawals", json=wish(user_id, **fields), headers={"Idempotency-Key": key})


async def tell(
    at: Ground, key: str, user_id: str = "ada", *, source: str | None = None, partition: int = 0, **fields: Any
) -> str:
    """As `ask`, by Kafka; the withdrawal's id. `source`: with an envelope of a producer of this name, and an id of its own."""
    body = {**wish(user_id, **fields), "idempotency_key": key}
    headers: list[tuple[str, bytes]] = []
    if source is not None:
        headers = headers_of(WithdrawalRequested.ce_type(), event_id=uuid.uuid4().hex, source=source, time=at.clock())
    value = json.dumps(body).encode()
    await at.send(WITHDRAWALS_REQUESTED, user_id.encode(), value, headers, partition)
    return withdrawal_id(user_id, key)


async def fund(at: Ground, user_id: str, amount: int) -> None:
    """The customer has so many base units more."""
    connection = await at.connect()
    legs = (debit(spendable(user_id), amount), credit(buffer(), amount))
    (result,) = (await post(connection, "tests", [Transaction(uuid.uuid4().hex, "test", "", legs)], at.clock())).results
    assert isinstance(result, Posted)
    await connection.close()


async def statuses(at: Ground, *ids: str) -> dict[str, tuple[str, str | None]]:
    """(status, code) of these withdrawals, or of all there are."""
    rows = await at.observer.fetch("SELECT replace(id::text, '-', ''), status, code FROM withdrawals")
    return {id: (status, code) for id, status, code in rows if not ids or id in ids}


async def decided(at: Ground, *ids: str) -> dict[str, tuple[str, str | None]]:
    """As `statuses`, when none of these is pending any more."""

    async def all_of_them() -> dict[str, tuple[str, str | None]]:
        found = await statuses(at, *ids)
        ready = len(found) == len(ids) and all(status != "pending" for status, _ in found.values())
        return found if ready else {}

    found: dict[str, tuple[str, str | None]] = await until(all_of_them, "every withdrawal is decided")
    return found


async def balance(at: Ground, account: Account) -> int:
    return int(await at.observer.fetchval("SELECT balance FROM accounts WHERE id = $1", account.id) or 0)


async def has(at: Ground, user_id: str) -> tuple[int, int]:
    """Whole USDC that the customer may spend, and that are held."""
    spend, held = await balance(at, spendable(user_id)), await balance(at, pending_withdrawal(user_id))
    return spend // SCALE, held // SCALE


async def settled(at: Ground, count: int) -> dict[str, WithdrawalSettled]:
    """What was told of the ends of withdrawals, by their ids, when there are so many of them."""

    async def so_many() -> list[Any]:
        found = await at.told(WITHDRAWALS_SETTLED)
        return found if len(found) >= count else []

    events = [WithdrawalSettled.model_validate_json(r.value) for r in (await until(so_many, "told") if count else [])]
    assert len({event.withdrawal_id for event in events}) == len(events) == count
    return {event.withdrawal_id: event for event in events}


async def assert_whole(at: Ground) -> None:
    """Every invariant holds (9 apart: what is on its way), and the journal rebuilds all of it."""
    await at.journaled()
    assert not [result for result in await verify(at.observer) if not result.holds and result.number != 9]
    async with empty_database(at.dsn) as empty:
        await rebuild(at.bootstrap, at.prefix, empty, SCHEMA)
        assert await differences(at.dsn, empty) == {}
