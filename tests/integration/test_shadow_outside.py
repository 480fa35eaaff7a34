"""Shadow mode as people and customers see it: the API's balances phase by phase, and `stablerail shadow …`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from ledger import funds, shadow_phases
from ledger.rows import Connection
from ledger.shadow import Mirror, Phase
from stablerail.cli import app
from stablerail.config import load_settings
from stablerail.keys import Scope, create_key
from stablerail.metrics import Metrics
from stablerail.servers import api_app, reach
from tests.integration.test_shadow import AT, MAKE, legacy_of, product_of
from tests.support import ledger_rig
from tests.support.ledger_rig import connect_to, owner
from tests.support.patience import ENVIRONMENT

databases, dsn = ledger_rig.databases, ledger_rig.dsn

TABLE = {
    "legacy_table": "public.balances",
    "legacy_columns": '{"usdc_balance": "usdc", "pending_investment": "reserved", "fiat_exposure": "power"}',
}
Run = Callable[..., Result]


@pytest.fixture
async def admin(dsn: str) -> AsyncIterator[Connection]:
    made = await owner(dsn)
    await made.execute(MAKE)
    yield made
    await made.close()


async def test_the_api_tells_what_the_phase_says_and_strict_refuses(dsn: str, admin: Connection) -> None:
    metrics, mirror = Metrics(), Mirror(legacy_of())
    settings = load_settings(
        env_file=None, database_url=dsn, ledger_shadow_mode=True, kafka_bootstrap="127.0.0.1:1", **TABLE
    )
    token = (await create_key(admin, [Scope.READ], "the tests")).token.get_secret_value()
    await reach(settings)
    served: Any = api_app(settings, metrics)
    transport = httpx.ASGITransport(app=served)
    headers = {"Authorization": f"Bearer {token}"}
    plain = await connect_to(dsn)()
    async with (
        served.router.lifespan_context(served),
        httpx.AsyncClient(transport=transport, base_url="http://api", headers=headers) as client,
    ):
        product = await product_of(dsn, mirror)
        await funds.credit_usdc(product, "w", "ada", 2_000_000, AT, reference="d1")
        await admin.execute("INSERT INTO public.balances (user_id, usdc) VALUES ('old', 7)")

        async def available(user: str, **query: str) -> Any:
            answer = await client.get(f"/v1/users/{user}/balances", params=query)
            found = answer.json()
            if answer.status_code != 200:
                return answer.status_code, found["code"]
            return next(one["available"] for one in found["balances"] if one["asset"] == "USDC")

        assert [await available("ada"), await available("old")] == ["2.000000", "7.000000"]
        await admin.execute("UPDATE public.balances SET usdc = 3 WHERE user_id = 'ada'")
        assert await available("ada") == "3.000000"
        await shadow_phases.move(plain, mirror, 1, AT, actor="ann", force="a drill")
        assert await available("ada") == "2.000000"
        await shadow_phases.move(plain, mirror, 1, AT, actor="ann", force="a drill")
        assert await available("ada") == (409, "balance_discrepancy")
        assert await available("ada", detail="true") == (409, "balance_discrepancy")
        assert await available("nobody") == (404, "unknown_user")
        await shadow_phases.move(plain, mirror, 1, AT, actor="ann", force="a drill")
        assert await available("ada") == "2.000000"
        assert await plain.fetchval("SELECT count(*) FROM shadow_discrepancies WHERE user_id = 'ada'") == 1
        text = metrics.render().decode()
        assert 'ledger_shadow_discrepancy_count_total{account_type="usdc_balance"} 5.0' in text
        assert 'balance_query_duration_ms_count{source="legacy"} 1.0' in text
        for one in (plain, product):
            await one.close()


async def test_the_api_does_not_start_with_a_legacy_table_that_cannot_be_used(dsn: str) -> None:
    given = {"database_url": dsn, "kafka_bootstrap": "127.0.0.1:1", "ledger_shadow_mode": "true", **TABLE}
    api = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "stablerail.cli", "api"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **{f"STABLERAIL_{name.upper()}": value for name, value in given.items()}},
    )
    said = (await api.communicate())[0].decode()
    assert (api.returncode, len(said.splitlines()), "Traceback" in said) == (70, 1, False), said
    assert "STABLERAIL_LEGACY_TABLE: there is no table" in said


@pytest.fixture
def run(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in os.environ.keys() - ENVIRONMENT.keys():
        if name.startswith("STABLERAIL_") and not name.startswith("STABLERAIL_TEST_"):
            monkeypatch.delenv(name)
    given = {"database_url": dsn, "kafka_bootstrap": "127.0.0.1:1", "actor": "ann", **TABLE}
    for name, value in given.items():
        monkeypatch.setenv(f"STABLERAIL_{name.upper()}", value)
    monkeypatch.setattr("stablerail.cli_base.JOURNAL_WAIT_S", 0.1)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["shadow", *arguments])


async def _begin(dsn: str) -> None:
    admin = await owner(dsn)
    await admin.execute(MAKE)
    await admin.execute("INSERT INTO public.balances (user_id, usdc) VALUES ('ada', 5), ('odd', -1)")
    await admin.close()


async def _first(dsn: str) -> None:
    connection = await connect_to(dsn)()
    await shadow_phases.begin(connection, Phase.OFF, AT, "settings")
    await connection.close()


def test_the_commands_say_what_they_did_and_what_stands_in_the_way(
    run: Run, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(code: int, *arguments: str) -> str:
        done = run(*arguments)
        assert (done.exit_code, "Traceback" in done.output) == (code, False), done.output
        return " ".join(done.output.split())

    assert "legacy_unusable: STABLERAIL_LEGACY_TABLE" in said(1, "status")
    asyncio.run(_begin(dsn))
    assert "none yet" in said(0, "status")
    assert "no phase yet" in said(1, "advance")
    asyncio.run(_first(dsn))
    assert "phase: off since 2026-07-01 12:00:00 UTC, by settings" in said(0, "status")
    text = said(1, "backfill")
    assert "2 customers, 1 accounts opened" in text
    assert "not opened: odd.usdc_balance: ledger 0, legacy -1" in text
    assert "phase: shadow" in said(0, "advance", "--at", "2026-07-02T00:00:00")
    text = said(1, "advance", "--at", "2026-07-03T00:00:00")
    assert "in the way: clean since 2026-07-02 00:00:00 UTC, 24 h of 168 h" in text
    assert "in the way: balances differ now: odd.usdc_balance" in text
    text = said(0, "status", "--at", "2026-07-03T01:00:00")
    assert "clean since: 2026-07-03 00:00:00 UTC in the way: clean since" in text
    assert "odd usdc_balance 0 -1" in text
    assert "--force needs --reason" in said(2, "advance", "--force")
    assert "phase: ledger" in said(0, "advance", "--force", "--reason", "known")
    assert "phase: shadow" in said(0, "retreat")
    assert "Invalid value" in said(2, "status", "--at", "yesterday")
    monkeypatch.delenv("STABLERAIL_LEGACY_TABLE")
    assert "STABLERAIL_LEGACY_TABLE: must name a table" in said(78, "status")
