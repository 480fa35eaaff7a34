"""After a restore nobody calls Circle before its wallets were compared with our calls: on real Kafka and PostgreSQL, by the commands."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import pytest
from click.testing import Result
from pydantic import SecretStr

from agents.recovery import restoring
from connectors.circle.client import CircleClient
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.gate import Fault
from stablerail.dev.kafka import Kafka
from tests.integration import test_cli
from tests.support.in_process import until
from tests.support.wallet_rig import CHAINS, Rig, wallet_rig

run, clean = test_cli.run, test_cli.clean

PATH = "/v1/w3s/developer/wallets"
Command = Callable[..., Any]


@pytest.fixture
async def rig(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Rig]:
    async with wallet_rig(database, kafka.bootstrap, topic_prefix) as it:
        yield it


@pytest.fixture
def recovery(rig: Rig, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`stablerail recovery …` as a person runs it."""
    settings = {
        "DATABASE_URL": rig.at.dsn,
        "KAFKA_BOOTSTRAP": rig.at.bootstrap,
        "TOPIC_PREFIX": rig.at.prefix,
        "CIRCLE_API_URL": rig.circle.base_url,
        "CIRCLE_API_KEY": TEST_API_KEY,
        "CIRCLE_ENTITY_SECRET": TEST_ENTITY_SECRET,
        "ACTOR": "ann",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"STABLERAIL_{name}", value)

    async def command(*arguments: str) -> tuple[int, str]:
        result = await asyncio.to_thread(run, "recovery", *arguments)
        return result.exit_code, result.output

    return command


async def close(rig: Rig) -> None:
    """The database as a rebuild leaves it."""
    connection = await rig.at.connect()
    assert await restoring.close(connection, rig.at.clock(), "ann", first_seq=1_000_000, records=7)
    await connection.close()


async def waiting(rig: Rig, count: int) -> None:
    wanted = f"SELECT count(*) = {count} FROM call_members WHERE call_id IS NULL"
    await until(lambda: rig.at.observer.fetchval(wanted), "they wait")


async def forget(rig: Rig, *users: str) -> None:
    """Wallets of these customers at Circle, made by calls that the database has lost."""
    key, secret = SecretStr(TEST_API_KEY), SecretStr(TEST_ENTITY_SECRET)
    async with CircleClient(rig.circle.base_url, key, secret) as client:
        within = await client.create_wallet_set(str(uuid4()), "customers")
        await client.create_wallets(str(uuid4()), within, ["MATIC-AMOY"], [(user, user) for user in users])


async def test_nobody_is_called_until_the_gate_is_opened_and_then_each_customer_gets_their_wallets_once(
    rig: Rig, recovery: Command
) -> None:
    await rig.approve("ada")
    async with rig.worker():
        await rig.ended(Counter(completed=1), "ada has wallets")
    await close(rig)
    async with rig.worker():
        await rig.approve("bob", "eve")
        await waiting(rig, 2)
        code, said = await recovery("status")
        assert (code, "partner:circle" in said, "never" in said) == (0, True, True), said
        assert await rig.jobs() == Counter(completed=1, queued=2)
        assert rig.calls == 1
        code, said = await recovery("open")
        assert (code, "partner:circle" in said, "4 wallets made since" in said) == (0, True, True), said
        await rig.ended(Counter(completed=3), "all have wallets")
    assert rig.at_circle() == Counter({(user, chain.value): 1 for user in ("ada", "bob", "eve") for chain in CHAINS})
    assert (await recovery("open"))[1].strip() == "nothing is closed"
    assert "nothing is closed" in (await recovery("status"))[1]


async def test_a_call_whose_answer_was_lost_is_no_stranger_and_is_repeated_with_its_key(
    rig: Rig, recovery: Command
) -> None:
    rig.circle.sandbox.gate.faults = [Fault(PATH, "lost_reply", times=1)]
    await rig.approve("ada")
    async with rig.worker():
        await until(lambda: rig.at.observer.fetchval("SELECT attempts > 0 FROM calls"), "the answer is lost")
    await close(rig)
    code, said = await recovery("open", "--partner", "circle")
    assert code == 0, said
    async with rig.worker():
        await rig.ended(Counter(completed=1), "ada has wallets", step_s=60)
    assert rig.at_circle() == Counter({("ada", chain.value): 1 for chain in CHAINS})


async def test_wallets_that_the_database_has_forgotten_keep_circle_closed_and_are_listed_until_a_person_says_why(
    rig: Rig, recovery: Command
) -> None:
    await forget(rig, "ghost", "shade")
    await close(rig)
    code, said = await recovery("open")
    assert code == 1
    assert "closed: wallets_unknown" in said
    for user in ("ghost", "shade"):
        (address,) = [w.address for w in rig.circle.sandbox.state.wallets.values() if w.ref_id == user]
        assert f"partner:circle: not known to the database: MATIC {address.lower()} of {user}" in said
    _, said = await recovery("status")
    assert "wallets_unknown: MATIC" in said
    rig.circle.sandbox.gate.faults = [Fault("/v1/w3s/wallets", "status", times=99)]
    code, said = await recovery("open", "--partner", "circle", "--accept-unknown", "--reason", "read by hand")
    assert (code, "not_reached" in said) == (1, True), "what was not seen cannot be accepted"
    rig.circle.sandbox.gate.faults = []
    for wrong in (
        ["--accept-unknown", "--reason", "x"],
        ["--partner", "circle", "--accept-unknown"],
    ):
        assert (await recovery("open", *wrong))[0] == 2, wrong
    code, said = await recovery("open", "--partner", "alpaca")
    assert (code, "not_closed: partner:alpaca" in said) == (1, True), said
    code, said = await recovery("open", "--partner", "circle", "--accept-unknown", "--reason", "read by hand")
    assert code == 0, said
    row = await rig.at.observer.fetchrow(
        "SELECT actor, after->>'told', after->>'unknown_count' FROM audit_logs WHERE action = 'recovery.compared'"
        " ORDER BY batch DESC LIMIT 1"
    )
    assert (row[0], "accepted: read by hand" in row[1], row[2]) == ("ann", True, "2")
    assert await rig.at.observer.fetchval("SELECT count(*) FROM gates") == 0
