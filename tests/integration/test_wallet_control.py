"""An operator's hand on wallet provisioning: a job run now, and a chain for everybody."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agents.onboarding import control
from agents.onboarding.control import backfill, trigger
from agents.recovery import store_dead_letters
from connectors.circle.sandbox.gate import Weather
from stablerail.dev.kafka import Kafka
from tests.integration.test_runbook import day, follow
from tests.support.in_process import running, until
from tests.support.wallet_rig import CHAINS, Rig, wallet_rig, with_policy
from topics.catalog import WALLETS_REQUESTED
from topics.events import Chain


@pytest.fixture
async def rig(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Rig]:
    async with wallet_rig(database, kafka.bootstrap, topic_prefix) as it:
        yield it


async def test_a_chain_that_failed_is_completed_by_trigger_after_the_repair(rig: Rig) -> None:
    rig.circle.sandbox.state.refused = {"SOL-DEVNET"}
    await rig.approve("kim")
    async with rig.worker():
        await rig.ended(Counter(failed=1), "all chains but one")
        assert await rig.chains("kim") == {"ETH": "ready", "SOL": "partner_refused", "APTOS": "ready", "MATIC": "ready"}
        rig.circle.sandbox.state.refused = set()
        connection = await rig.at.connect()
        found = await trigger(connection, "kim", "ann", rig.at.clock())
        assert found is not None
        assert found.chains == ("SOL",)
        await rig.ended(Counter(completed=1), "the repaired job")
        assert await trigger(connection, "nobody", "ann", rig.at.clock()) is None
        again = await trigger(connection, "kim", "ann", rig.at.clock())
        assert again is not None
        assert again.chains == ()
        await connection.close()
    assert set(rig.at_circle().values()) == {1}
    logs = await rig.at.observer.fetch(
        "SELECT actor, action FROM audit_logs WHERE resource_id = 'kim' ORDER BY at, batch, n"
    )
    assert ("ann", "wallet_job.triggered") in {tuple(log) for log in logs}
    assert [action for _, action in logs][-1] != "wallet_job.failed"


async def test_calls_that_were_given_up_are_opened_again_with_their_keys_and_make_nothing_twice(rig: Rig) -> None:
    rig.circle.sandbox.gate.weather = Weather(lost_replies=1.0)  # Circle acts and its answers are lost
    await rig.approve("kim", "lee")
    async with rig.worker(with_policy(attempts_max=2)):
        await rig.ended(Counter(failed=2), "given up", step_s=10)
        rig.circle.sandbox.gate.weather = Weather()
        connection = await rig.at.connect()
        for user in ("kim", "lee"):
            await trigger(connection, user, "ann", rig.at.clock())
        await connection.close()
        await rig.ended(Counter(completed=2), "after the repair")
    assert set(rig.at_circle().values()) == {1}


async def test_a_backfill_writes_over_no_wallet_that_was_promised_meanwhile(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.approve("kim", "lee")
    async with rig.worker():
        await rig.ended(Counter(completed=2), "their first wallets")
    other, connection = await rig.at.connect(), await rig.at.connect()
    load = control.load_users

    async def then_another(*args: Any) -> Any:
        monkeypatch.setattr(control, "load_users", load)
        facts = await load(*args)
        await other.execute("INSERT INTO wallet_requests VALUES ('kim', 'AVAX', 'pending', now(), NULL, NULL)")
        return facts

    monkeypatch.setattr(control, "load_users", then_another)
    assert [page async for page in backfill(connection, Chain.AVAX, "ann", rig.at.clock)] == [(1, 0)]
    asked = await rig.at.observer.fetch("SELECT item, request ->> 'user_id' FROM call_members WHERE item = 'AVAX'")
    assert [tuple(row) for row in asked] == [("AVAX", "lee")]
    for one in (other, connection):
        await one.close()


async def test_the_runbooks_day_after_a_partner_was_away(
    rig: Rig, database: str, kafka: Kafka, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.circle.sandbox.gate.weather = Weather(unavailable=1.0)
    await rig.approve("kim")
    async with rig.worker(with_policy(attempts_max=2)) as services:
        await rig.ended(Counter(failed=1), "given up", step_s=10)
        async with running(store_dead_letters.stage(WALLETS_REQUESTED.dlq), services, rig.at):

            async def letter() -> str | None:
                id: str | None = await rig.at.observer.fetchval("SELECT replace(id::text, '-', '') FROM dead_letters")
                return id

            names = {"USER": "kim", "LETTER": await until(letter, "the letter")}
        rig.circle.sandbox.gate.weather = Weather()
        settings = {"DATABASE_URL": database, "KAFKA_BOOTSTRAP": kafka.bootstrap, "TOPIC_PREFIX": topic_prefix}
        for name, value in settings.items():
            monkeypatch.setenv(f"STABLERAIL_{name}", value)
        await follow(day("A partner was away"), names, monkeypatch)
        await rig.ended(Counter(completed=1), "after the repair")
    assert set(rig.at_circle().values()) == {1}


async def test_a_job_that_waits_for_its_next_attempt_runs_when_it_is_triggered(rig: Rig) -> None:
    rig.circle.sandbox.gate.weather = Weather(unavailable=1.0)
    await rig.approve("kim")
    async with rig.worker():
        await rig.ended(Counter(retry=1), "it waits")
        rig.circle.sandbox.gate.weather = Weather()
        connection = await rig.at.connect()
        found = await trigger(connection, "kim", "ann", rig.at.clock())
        await connection.close()
        assert found is not None
        assert set(found.chains) == {chain.value for chain in CHAINS}
        await rig.ended(Counter(completed=1), "without waiting")


async def test_a_chain_added_later_is_made_for_everybody_also_when_the_command_was_cut_off(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.onboarding.control.PAGE", 4)
    users = [f"user-{n:02}" for n in range(10)]
    await rig.approve(*users)
    first = tuple(chain for chain in CHAINS if chain is not Chain.APTOS)
    async with rig.worker(chains=first):
        await rig.ended(Counter(completed=10), "three chains")
        connection = await rig.at.connect()
        async for done, left in backfill(connection, Chain.APTOS, "ann", rig.at.clock):
            assert (done, left) == (4, 6)
            break
        await connection.close()
        connection = await rig.at.connect()
        seen = [counts async for counts in backfill(connection, Chain.APTOS, "ann", rig.at.clock)]
        assert seen == [(4, 2), (6, 0)]
        assert [counts async for counts in backfill(connection, Chain.APTOS, "ann", rig.at.clock)] == []
        await connection.close()

        async def everybody() -> bool:
            return len(await rig.in_database()) == 10 * len(CHAINS)

        await until(everybody, "the fourth chain")
        await rig.ended(Counter(completed=10), "the jobs")
    assert rig.at_circle() == Counter({(user, chain.value): 1 for user in users for chain in CHAINS})
