"""What customers and operators see of wallet provisioning, over HTTP and by the command line."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import httpx
import pytest
from typer.testing import CliRunner

from connectors.circle.sandbox.gate import Weather
from ledger.roles import ROLE
from ledger.rows import Op, block, write
from ledger.tables import WALLET_REQUESTS
from stablerail.api import create_api
from stablerail.api.onboarding_routes import status_of
from stablerail.cli import app
from stablerail.config import load_settings
from stablerail.dev.kafka import Kafka
from stablerail.keys import Scope, create_key, revoke_key
from stablerail.metrics import Metrics
from stablerail.workers import tell
from tests.integration import test_cli
from tests.support.in_process import SCHEMA, until
from tests.support.wallet_rig import Rig, wallet_rig
from topics.catalog import WALLETS_FROZEN
from topics.events import WalletsFrozen

clean = test_cli.clean


@pytest.fixture
async def rig(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Rig]:
    async with wallet_rig(database, kafka.bootstrap, topic_prefix) as it:
        yield it


@pytest.fixture
async def api(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    """With an admin's key."""
    settings = {"search_path": SCHEMA, "role": ROLE}
    monkeypatch.setenv("STABLERAIL_KAFKA_BOOTSTRAP", rig.at.bootstrap)
    monkeypatch.setenv("STABLERAIL_TOPIC_PREFIX", rig.at.prefix)
    monkeypatch.setenv("STABLERAIL_DATABASE_URL", rig.at.dsn)
    async with asyncpg.create_pool(rig.at.dsn, min_size=1, max_size=3, server_settings=settings) as pool:
        async with pool.acquire() as connection:
            made = await create_key(connection, [Scope.ADMIN], "the tests")
        headers = {"Authorization": f"Bearer {made.token.get_secret_value()}"}
        created = create_api(load_settings(env_file=None), pool)
        transport = httpx.ASGITransport(created)
        await created.state.journal.start()
        async with httpx.AsyncClient(transport=transport, base_url="http://api", headers=headers) as client:
            yield client
        await created.state.journal.stop()


def events(body: str) -> list[tuple[str, dict[str, object]]]:
    """(id, data) of each event of a stream."""
    found = []
    for one in body.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in one.splitlines() if not line.startswith(":"))
        if fields:
            assert fields["event"] == "status"
            found.append((fields["id"], json.loads(fields["data"])))
    return found


async def test_a_customer_sees_each_chain_become_ready_and_the_stream_ends_with_the_last(
    rig: Rig, api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stablerail.api.onboarding_routes.LOOK_S", 0.02)
    assert (await api.get("/v1/onboarding/status", params={"user_id": "kim"})).status_code == 404
    rig.circle.sandbox.gate.weather = Weather(unavailable=1.0)
    await rig.approve("kim")
    async with rig.worker():
        await rig.ended(Counter(retry=1), "the first attempt")
        said = (await api.get("/v1/onboarding/status", params={"user_id": "kim"})).json()
        assert (said["status"], said["attempts"], said["error"]) == ("pending", 1, "partner_unavailable")
        assert said["next_attempt_at"] is not None
        assert {chain["status"] for chain in said["chains"]} == {"pending"}
        streamed = asyncio.create_task(api.get("/v1/onboarding/events", params={"user_id": "kim"}, timeout=60))
        rig.circle.sandbox.gate.weather = Weather()
        rig.circle.sandbox.state.refused = {"SOL-DEVNET"}
        triggered = await api.post("/v1/admin/workers/trigger", json={"user_id": "kim"})
        assert (triggered.status_code, len(triggered.json()["chains"])) == (202, 4)
        await rig.ended(Counter(failed=1), "three of four")
        seen = events((await streamed).text)
    assert seen[-1][1]["status"] == "failed"
    assert len({key for key, _ in seen}) == len(seen)
    again = await api.get("/v1/onboarding/events", params={"user_id": "kim"}, headers={"Last-Event-ID": seen[-1][0]})
    assert again.status_code == 204
    wallets = (await api.get("/v1/wallets/status", params={"user_id": "kim"})).json()
    shown = {chain["chain"]: (chain["status"], chain["error"]) for chain in wallets["chains"]}
    assert shown == {
        "ETH": ("ready", None), "SOL": ("failed", "partner_refused"), "APTOS": ("ready", None), "MATIC": ("ready", None),
    }  # fmt: skip
    all_of_them = (await api.get("/v1/wallets/addresses", params={"user_id": "kim"})).json()["addresses"]
    assert [wallet["chain"] for wallet in all_of_them] == ["APTOS", "ETH", "MATIC"]
    one = (await api.get("/v1/wallets/addresses", params={"user_id": "kim", "chain": "ETH"})).json()["addresses"]
    assert one == [wallet for wallet in all_of_them if wallet["chain"] == "ETH"]
    logs = await rig.at.observer.fetch(
        "SELECT actor, address, user_agent FROM audit_logs WHERE action = 'wallet_job.triggered'"
    )
    assert [(actor[:4], address, agent[:5]) for actor, address, agent in logs] == [("key:", "127.0.0.1", "pytho")]


async def test_a_stream_ends_with_the_key_that_opened_it(
    rig: Rig, api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    async def looked(*args: Any) -> Any:
        nonlocal looks
        looks += 1
        return await status_of(*args)

    monkeypatch.setattr("stablerail.api.onboarding_routes.LOOK_S", 0.02)
    monkeypatch.setattr("stablerail.api.onboarding_routes.status_of", looked)
    connection = await rig.at.connect()
    request = block(WALLET_REQUESTS, Op.INSERT, [("kim", "SOL", "requested", datetime.now(UTC), None, None)])
    await write(connection, [request])
    made = await create_key(connection, [Scope.READ], "a reader")
    ask = {"params": {"user_id": "kim"}, "headers": {"Authorization": f"Bearer {made.token.get_secret_value()}"}}
    streamed = asyncio.create_task(api.get("/v1/onboarding/events", **ask))

    async def goes_on() -> bool:
        return looks >= 3

    await until(goes_on, "the stream goes on")
    assert await revoke_key(connection, made.key.id)
    seen = await asyncio.wait_for(streamed, 60)
    assert (seen.status_code, len(events(seen.text))) == (200, 1)
    assert (await api.get("/v1/onboarding/events", **ask)).status_code == 401
    await connection.close()


async def test_a_customer_who_is_rejected_later_is_frozen_and_it_is_told_and_logged(
    rig: Rig, api: httpx.AsyncClient
) -> None:
    await rig.approve("kim")
    async with rig.worker():
        await rig.ended(Counter(completed=1), "wallets")
        assert not (await api.get("/v1/onboarding/status", params={"user_id": "kim"})).json()["frozen"]
        await rig.reject("kim")

        async def frozen() -> bool:
            return bool((await api.get("/v1/onboarding/status", params={"user_id": "kim"})).json()["frozen"])

        await until(frozen, "it is frozen")
        (record,) = await until(lambda: rig.at.told(WALLETS_FROZEN), "it is told")
        assert WalletsFrozen.model_validate_json(record.value).frozen
    logs = await rig.at.observer.fetch("SELECT actor, resource_id FROM audit_logs WHERE action = 'wallets.frozen'")
    assert [tuple(log) for log in logs] == [("freeze_wallets", "kim")]


async def test_only_an_admin_may_touch_the_workers(rig: Rig, api: httpx.AsyncClient) -> None:
    connection = await rig.at.connect()
    reader = await create_key(connection, [Scope.READ], "a reader")
    await connection.close()
    mine = {"Authorization": f"Bearer {reader.token.get_secret_value()}"}
    for path in ("status", "metrics", "health"):
        assert (await api.get(f"/v1/admin/workers/{path}", headers=mine)).status_code == 403
    for path, body in (("restart", {"movement": "onboarding"}), ("trigger", {"user_id": "kim"})):
        assert (await api.post(f"/v1/admin/workers/{path}", headers=mine, json=body)).status_code == 403
    assert (await api.post("/v1/admin/workers/restart", json={"movement": "none"})).status_code == 404
    assert (await api.post("/v1/admin/workers/trigger", json={"user_id": "nobody"})).status_code == 404


async def test_workers_are_seen_their_trouble_is_told_and_a_restart_ends_them(
    rig: Rig, api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stablerail.workers.BEAT_S", 0.05)
    killed: list[int] = []
    monkeypatch.setattr("os.kill", lambda _pid, number: killed.append(number))
    trouble: dict[str, str] = {}
    telling = asyncio.create_task(tell(rig.at.connect, "onboarding", Metrics().registry, lambda: trouble))
    try:

        async def state() -> str | None:
            found = (await api.get("/v1/admin/workers/status")).json()["workers"]
            return found[0]["state"] if found else None

        assert await until(state, "it is seen") == "ready"
        assert (await api.get("/v1/admin/workers/health")).json() == {"status": "ok"}
        ((figures),) = (await api.get("/v1/admin/workers/metrics")).json()["workers"].values()
        assert figures["wallet_provisioning_active_jobs"] == 0
        trouble["provision_wallets"] = "circle refuses our credentials"

        async def unwell() -> bool:
            return (await api.get("/v1/admin/workers/health")).status_code == 503

        await until(unwell, "it says what is wrong")
        assert "credentials" in (await api.get("/v1/admin/workers/health")).json()["detail"]
        assert killed == []
        assert (await api.post("/v1/admin/workers/restart", json={"movement": "onboarding"})).status_code == 202

        async def ended() -> bool:
            return killed == [15]

        await until(ended, "SIGTERM, once")
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
    old = datetime.now(UTC) - timedelta(minutes=1)
    await rig.at.observer.execute("UPDATE workers SET seen_at = $1", old)
    assert await state() == "lost"
    logs = await rig.at.observer.fetch("SELECT action, resource_id FROM audit_logs WHERE resource = 'movement'")
    assert [tuple(log) for log in logs] == [("worker.restart_ordered", "onboarding")]


async def test_the_command_line_says_and_does_the_same(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "DATABASE_URL": rig.at.dsn, "KAFKA_BOOTSTRAP": rig.at.bootstrap, "TOPIC_PREFIX": rig.at.prefix, "ACTOR": "ann",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"STABLERAIL_{name}", value)
    rig.circle.sandbox.state.refused = {"SOL-DEVNET"}
    await rig.approve("kim")
    async with rig.worker():
        await rig.ended(Counter(failed=1), "three of four")

        async def command(*words: str) -> tuple[int, str]:
            result = await asyncio.to_thread(CliRunner().invoke, app, list(words))
            return result.exit_code, result.stdout

        code, said = await command("wallets", "status", "kim")
        assert (code, "partner_refused" in said) == (0, True)
        assert (await command("wallets", "status", "nobody"))[0] == 1
        rig.circle.sandbox.state.refused = set()
        assert await command("workers", "trigger", "kim") == (0, "due now: SOL\n")
        await rig.ended(Counter(completed=1), "all four")
        code, said = await command("wallets", "backfill", "--chain", "SOL")
        assert (code, said.startswith("SOL: 0 customers queued")) == (0, True)
        code, said = await command("workers", "status")
        assert (code, "jobs: 1 completed; 0 stuck" in said) == (0, True)
        assert (await command("workers", "restart", "onboarding"))[0] == 0
        assert (await command("workers", "restart", "none"))[0] == 2
        assert (await command("workers", "health"))[0] == 0
        assert (await command("workers", "metrics"))[0] == 0
