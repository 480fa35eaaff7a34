"""`stablerail lanes`, and what a worker says of a hot wallet that it cannot open."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from ledger.rows import Connection, Op, block, write
from ledger.tables import LANES
from stablerail.config import ConfigError, Settings, load_settings
from stablerail.dev.kafka import Kafka
from stablerail.dev.keystore import write_keystore
from stablerail.hot_wallets import gas_account, hot_wallet
from stablerail.policies import fee_policy
from stablerail.topics_admin import admin, create_missing
from tests.integration import test_cli
from tests.integration.test_cli import Callable, Result
from tests.integration.test_runbook import day, follow
from tests.support import ledger_rig
from tests.support.ledger_rig import AT, connect_to
from topics.catalog import JOURNAL
from topics.events import Chain

databases, dsn, run, clean = ledger_rig.databases, ledger_rig.dsn, test_cli.run, test_cli.clean

SIGNER = "0x" + "5" * 40
LANE = f"MATIC:{SIGNER}"
PASSWORD = "what-opens-it"


@pytest.fixture
def lane(dsn: str, kafka: Kafka, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One lane, which found that somebody else uses its key."""

    async def fill() -> None:
        connection: Connection = await connect_to(dsn)()
        row = ("MATIC", SIGNER, 7, 9, "paused", "foreign_nonce", 3, AT)
        await write(connection, [block(LANES, Op.INSERT, [row])])
        await connection.close()
        async with admin(kafka.bootstrap) as client:
            await create_missing(client, topic_prefix, 1, [JOURNAL])

    asyncio.run(fill())
    monkeypatch.setenv("STABLERAIL_DATABASE_URL", dsn)
    monkeypatch.setenv("STABLERAIL_KAFKA_BOOTSTRAP", kafka.bootstrap)
    monkeypatch.setenv("STABLERAIL_TOPIC_PREFIX", topic_prefix)


def test_a_person_sees_opens_and_pauses_a_lane(lane: None, run: Callable[..., Result]) -> None:
    assert "foreign_nonce" in run("lanes", "list").output
    resume = ("lanes", "open", LANE.upper().replace("0X", "0x"), "--actor", "ann")
    refused = run(*resume)
    assert (refused.exit_code != 0, "lane_not_counted" in refused.stderr) == (True, True), refused.output
    opened = run(*resume, "--force", "--reason", "I read the chain myself")
    assert (opened.exit_code, opened.output.endswith("is open\n")) == (0, True), opened.output
    listed = run("lanes", "list").output
    assert "foreign_nonce" not in listed
    assert " 9 " in listed, "it goes on where the chain is"
    paused = run("lanes", "pause", LANE, "--reason", "the key moves", "--actor", "ann")
    assert (paused.exit_code, paused.output) == (0, f"{LANE} is paused\n")
    assert "the key moves" in run("lanes", "list").output
    wrong = run("lanes", "pause", LANE, "--reason", "low_gas", "--actor", "ann")
    assert (wrong.exit_code, "bad_reason" in wrong.stderr) == (2, True)
    unknown = run("lanes", "open", "MATIC:0x1", "--actor", "ann")
    assert (unknown.exit_code, "unknown_lane" in unknown.stderr) == (1, True)


def test_the_runbooks_day_of_a_paused_lane(
    lane: None, dsn: str, run: Callable[..., Result], clean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_count_above_ours() -> None:
        connection: Connection = await connect_to(dsn)()
        await connection.execute("UPDATE lanes SET chain_nonce = next_nonce")
        await connection.close()

    asyncio.run(no_count_above_ours())
    monkeypatch.setenv("STABLERAIL_RPC_URLS", '{"MATIC": ["http://127.0.0.1:9"]}')
    monkeypatch.setenv("STABLERAIL_USDC_CONTRACTS", f'{{"MATIC": "{SIGNER}"}}')
    asyncio.run(follow(day("A lane is paused"), {"LANE": LANE}, monkeypatch))


def test_a_person_adds_drains_compares_and_retires_a_lane(
    lane: None, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = write_keystore(tmp_path / "wallet.json", PASSWORD)
    monkeypatch.setenv("STABLERAIL_RPC_URLS", '{"MATIC": ["http://127.0.0.1:9"]}')
    monkeypatch.setenv("STABLERAIL_USDC_CONTRACTS", f'{{"MATIC": "{SIGNER}"}}')
    monkeypatch.setenv("STABLERAIL_WITHDRAWAL_CHAINS", "MATIC")
    monkeypatch.setenv("STABLERAIL_WITHDRAWAL_KEYSTORE_PASSWORD", PASSWORD)
    add = ("lanes", "add", "MATIC", "--key", str(tmp_path / "wallet.json"), "--actor", "ann")
    added = run(*add, "--signer", address)
    assert (added.exit_code, added.output) == (0, f"MATIC:{address} is added\n"), added.output
    wrong = run(*add, "--signer", SIGNER)
    assert (wrong.exit_code, "wrong_signer" in wrong.stderr) == (1, True)
    compared = run("lanes", "sync", LANE)
    assert (compared.exit_code, "no endpoint answers" in compared.output) == (69, True), compared.output
    assert run("lanes", "drain", LANE, "--actor", "ann").output == f"{LANE} is draining\n"
    assert run("lanes", "retire", LANE, "--actor", "ann").output == f"{LANE} is retired\n"
    refused = run("lanes", "resume", LANE, "--actor", "ann")
    assert (refused.exit_code, "lane_retired" in refused.stderr) == (1, True)


def settings_of(keystore: Path, **more: str) -> Settings:
    return load_settings(env_file=None, withdrawal_keystore=keystore, withdrawal_keystore_password=PASSWORD, **more)


def test_a_hot_wallet_that_does_not_open_is_told_by_the_setting_at_fault_and_without_its_secrets(
    tmp_path: Path,
) -> None:
    keystore = tmp_path / "wallet.json"
    address = write_keystore(keystore, PASSWORD)
    assert hot_wallet(settings_of(keystore, withdrawal_signer=address)).address == address
    (tmp_path / "damaged.json").write_text(json.dumps({"version": 3}))
    wrong = [
        (load_settings(env_file=None), "WITHDRAWAL_KEYSTORE"),
        (settings_of(tmp_path / "none.json"), "WITHDRAWAL_KEYSTORE"),
        (settings_of(tmp_path / "damaged.json"), "WITHDRAWAL_KEYSTORE"),
        (settings_of(keystore, withdrawal_signer=SIGNER), "WITHDRAWAL_SIGNER"),
        (
            load_settings(env_file=None, withdrawal_keystore=keystore, withdrawal_keystore_password="a guess of mine"),
            "WITHDRAWAL_KEYSTORE_PASSWORD",
        ),
    ]
    for settings, name in wrong:
        with pytest.raises(ConfigError) as caught:
            hot_wallet(settings)
        assert caught.value.problems[0].name == f"STABLERAIL_{name}"
        assert PASSWORD not in str(caught.value)
        assert "a guess of mine" not in f"{caught.value} {settings!r}"


def test_the_account_that_gives_gas_has_a_key_of_its_own(tmp_path: Path) -> None:
    keystore, other = tmp_path / "wallet.json", tmp_path / "gas.json"
    write_keystore(keystore, PASSWORD)
    address = write_keystore(other, PASSWORD)
    wallet = hot_wallet(settings_of(keystore))
    assert gas_account(settings_of(keystore, gas_keystore=str(other)), wallet).address == address
    for given in ({}, {"gas_keystore": str(keystore)}, {"gas_keystore": str(tmp_path / "none.json")}):
        with pytest.raises(ConfigError) as caught:
            gas_account(settings_of(keystore, **given), wallet)
        assert [one.name for one in caught.value.problems] == ["STABLERAIL_GAS_KEYSTORE"]


def test_the_networks_fee_bounds_hold_unless_they_are_set() -> None:
    usual = fee_policy(load_settings(env_file=None), Chain.MATIC)
    assert usual.priority_floor == 25 * 10**9
    given = {"withdrawal_tip_floors_gwei": '{"MATIC": 30}', "withdrawal_fee_caps_gwei": '{"MATIC": 700}'}
    changed = fee_policy(load_settings(env_file=None, **given), Chain.MATIC)
    assert (changed.priority_floor, changed.max_fee_cap) == (30 * 10**9, 700 * 10**9)
