"""Settings: names, units, what stops the program, and that no secret is ever printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ledger.accounts import AccountType
from stablerail.config import (
    ALSO_CALLED,
    WITHOUT_EFFECT,
    ConfigError,
    Settings,
    load_settings,
    names_without_effect,
)
from stablerail.config_shown import describe, masked_url
from stablerail.config_values import duration_s
from stablerail.policies import deposit_policy
from topics.events import Chain

KEY = "TEST_API_KEY:0a1b2c:very-secret"


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in (*os.environ,):
        if name.startswith("STABLERAIL_") or name in ALSO_CALLED.values() or name in WITHOUT_EFFECT:
            monkeypatch.delenv(name)


def problems_of(error: pytest.ExceptionInfo[ConfigError]) -> dict[str, str]:
    return {problem.name: problem.expected for problem in error.value.problems}


def test_every_setting_has_a_default_and_a_line_of_help() -> None:
    settings = load_settings(env_file=None)
    rows = describe(settings)
    assert {row.name for row in rows} == {f"STABLERAIL_{name.upper()}" for name in Settings.model_fields}
    assert all(row.is_default for row in rows)
    assert all(row.help and "\n" not in row.help for row in rows)


def test_the_source_documents_names_are_accepted_and_ours_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCLE_API_KEY", KEY)
    monkeypatch.setenv("ONCHAIN_MIN_DEPOSIT_AMOUNT", "2.5")
    monkeypatch.setenv("ONCHAIN_DEPOSIT_POLL_INTERVAL", "30s")
    monkeypatch.setenv("WORKER_BASE_BACKOFF", "1m")
    monkeypatch.setenv("WORKER_MAX_BACKOFF", "30m")
    monkeypatch.setenv("WORKER_MAX_CONCURRENCY", "7")
    monkeypatch.setenv("STABLERAIL_CALL_CONCURRENCY_MAX", "3")
    settings = load_settings(env_file=None)
    assert settings.secret("circle_api_key") == KEY
    assert settings.deposit_minimum == 2_500_000
    assert (settings.scan_interval_s, settings.call_retry_first_s, settings.call_retry_max_s) == (30, 60, 1800)
    assert settings.call_concurrency_max == 3


def test_a_name_of_the_source_documents_that_does_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONCHAIN_WITHDRAWAL_TIMEOUT", "5m")
    assert [problem.name for problem in names_without_effect(None)] == ["ONCHAIN_WITHDRAWAL_TIMEOUT"]


def test_the_env_file_is_read_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / ".env"
    file.write_text("STABLERAIL_API_PORT=9001\nSTABLERAIL_BRIDGE_PORT=9002\nCIRCLE_API_KEY=from-file-1\nOTHER=1\n")
    monkeypatch.setenv("STABLERAIL_API_PORT", "9003")
    settings = load_settings(env_file=file)
    assert (settings.api_port, settings.bridge_port, settings.secret("circle_api_key")) == (9003, 9002, "from-file-1")


def test_an_env_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes(b"STABLERAIL_KAFKA_BOOTSTRAP=\xff\n")
    with pytest.raises(ConfigError, match="not UTF-8") as refused:
        load_settings(env_file=file)
    assert str(file) in str(refused.value)
    with pytest.raises(ConfigError, match="/proc/self/mem: cannot be read: Input/output error"):
        load_settings(env_file=Path("/proc/self/mem"))  # for root too


def test_a_misspelt_setting_stops_the_program_and_names_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STABLERAIL_NETWOK", "mainnet")
    monkeypatch.setenv("STABLERAIL_TEST_ANYTHING", "of the tools, not a setting")
    with pytest.raises(ConfigError) as error:
        load_settings(env_file=None)
    assert problems_of(error) == {"STABLERAIL_NETWOK": "no setting has this name; did you mean STABLERAIL_NETWORK?"}


def test_all_wrong_settings_are_named_at_once_and_no_value_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "STABLERAIL_NETWORK": "s3cr3tnet",
        "STABLERAIL_DATABASE_URL": "mysql://s3cr3t:s3cr3t@host/db",
        "STABLERAIL_CIRCLE_ENTITY_SECRET": "s3cr3t",
        "STABLERAIL_RPC_URLS": '{"MATIC": ["ftp://s3cr3t"]}',
        "STABLERAIL_CHAIN_IDS": "{s3cr3t",
        "STABLERAIL_PROVISIONED_CHAINS": "ETH,s3cr3t",
        "STABLERAIL_WORKER_PORT": "s3cr3t",
        "STABLERAIL_CALL_TIMEOUT_S": "s3cr3t",
        "STABLERAIL_DEPOSIT_MINIMUM": "1.0000001",
        "STABLERAIL_TOPIC_PREFIX": "s3cr3t/",
        "STABLERAIL_DATABASE_SCHEMA": 'x"; drop',
        "STABLERAIL_KAFKA_BOOTSTRAP": "s3cr3t",
        "STABLERAIL_USDC_CONTRACTS": '{"ETH": "0xa0B86991c6218b36c1d19D4a2e9Eb0cE3606eB48"}',
        "STABLERAIL_FINALITY_DEPTHS_BLOCKS": '{"ETH": 0}',
        "ONCHAIN_DEPOSIT_POLL_INTERVAL": "s3cr3t",
    }
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        load_settings(env_file=None)
    named = {name.split(" ")[0] for name in problems_of(error)}
    assert named == {name for name in wrong if name.startswith("STABLERAIL_")} | {"STABLERAIL_SCAN_INTERVAL_S"}
    assert "s3cr3t" not in str(error.value)
    assert "ONCHAIN_DEPOSIT_POLL_INTERVAL" in str(error.value)


def test_a_live_key_on_testnet_settings_and_the_reverse_stop_the_program() -> None:
    for network, key in (("testnet", "LIVE_API_KEY:a:b"), ("mainnet", "TEST_API_KEY:a:b")):
        with pytest.raises(ConfigError, match="belongs to the other one"):
            load_settings(env_file=None, network=network, circle_api_key=key)
    load_settings(env_file=None, network="mainnet", circle_api_key="LIVE_API_KEY:a:b")
    for network, key in (("testnet", "LIVE_API_KEY:a:b"), ("mainnet", "SAND_API_KEY:a:b")):
        with pytest.raises(ConfigError, match="belongs to the other one"):
            load_settings(env_file=None, network=network, circle_mint_api_key=key)
    with pytest.raises(ConfigError, match="is Circle's sandbox"):
        load_settings(env_file=None, network="mainnet", circle_mint_api_url="https://api-sandbox.circle.com")


@pytest.mark.parametrize("name", ["circle_api_url", "circle_mint_api_url", "alpaca_api_url"])
def test_on_mainnet_no_key_is_sent_in_the_clear_but_to_this_machine(name: str) -> None:
    with pytest.raises(ConfigError, match=f"STABLERAIL_{name.upper()} must be https"):
        load_settings(env_file=None, network="mainnet", **{name: "http://api.circle.example"})
    for url in ("https://api.circle.example", "http://127.0.0.1:8000", "http://[::1]:8000", "http://localhost"):
        load_settings(env_file=None, network="mainnet", **{name: url})
    load_settings(env_file=None, network="testnet", **{name: "http://sandbox:8000"})


def test_a_process_asks_only_for_what_it_needs_and_is_told_all_that_is_missing() -> None:
    settings = load_settings(env_file=None, database_url="postgresql://localhost/x")
    settings.require("database_url", "kafka_bootstrap")
    with pytest.raises(ConfigError) as error:
        settings.require("database_url", "circle_api_key", "rpc_urls")
    assert set(problems_of(error)) == {"STABLERAIL_CIRCLE_API_KEY (or CIRCLE_API_KEY)", "STABLERAIL_RPC_URLS"}
    with pytest.raises(ConfigError):
        settings.secret("circle_entity_secret")


def test_settings_that_contradict_each_other_stop_the_program() -> None:
    with pytest.raises(ConfigError, match="CALL_LEASE_S must be longer"):
        load_settings(env_file=None, call_lease_s="10s", call_timeout_s="10s")


def test_an_unknown_override_is_refused() -> None:
    with pytest.raises(ConfigError, match="no_such_setting"):
        load_settings(env_file=None, no_such_setting=1)


def test_one_chain_can_differ_without_unsetting_the_others() -> None:
    settings = load_settings(env_file=None, network="mainnet", chain_ids='{"MATIC": 31337}')
    assert settings.chain_ids == {Chain.ETH: 1, Chain.MATIC: 31337, Chain.AVAX: 43_114}
    token = settings.usdc_contracts[Chain.MATIC]
    assert load_settings(env_file=None, usdc_contracts={"MATIC": token}).usdc_contracts[Chain.MATIC] == token


def test_a_chain_is_not_read_without_its_usdc_contract() -> None:
    """A guessed contract would credit deposits of a worthless token."""
    endpoint, contract = {"MATIC": ["http://127.0.0.1:8545"]}, "0x" + "ab" * 20
    with pytest.raises(ConfigError, match=r"STABLERAIL_USDC_CONTRACTS must name USDC's contract on MATIC \(testnet\)"):
        load_settings(env_file=None, rpc_urls=endpoint)
    settings = load_settings(env_file=None, rpc_urls=endpoint, usdc_contracts={"MATIC": contract})
    assert settings.usdc_contracts[Chain.MATIC].lower() == contract


def test_lists_are_read_with_commas_or_as_json() -> None:
    for text in ("SOL, ETH", '["SOL", "ETH"]'):
        assert load_settings(env_file=None, provisioned_chains=text).provisioned_chains == (Chain.SOL, Chain.ETH)


def test_chains_we_have_endpoints_for_are_the_ones_we_read() -> None:
    settings = load_settings(env_file=None, network="mainnet", rpc_urls='{"MATIC": ["http://127.0.0.1:8545"]}')
    assert settings.read_chains == (Chain.MATIC,)
    with pytest.raises(ConfigError, match="RPC_URLS"):
        load_settings(env_file=None, rpc_urls='{"SOL": ["http://127.0.0.1:8545"]}')


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), ("30s", 30), ("10m", 600), ("500ms", 0.5), ("1.5h", 5400), ("1d", 86400)]
)
def test_durations_are_read_with_their_unit(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


def test_every_time_of_the_settings_may_have_a_unit() -> None:
    for field in Settings.model_fields:
        if field.endswith("_s") and not field.endswith("_per_s"):
            with pytest.raises(ConfigError, match="must be a duration"):
                load_settings(env_file=None, **{field: "soon"})
    assert load_settings(env_file=None, withdrawal_stuck_after_s="30m").withdrawal_stuck_after_s == 1_800


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1 week", "1e3", "s", "nan", "inf"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        duration_s(text)


def test_the_printed_settings_show_no_secret() -> None:
    settings = load_settings(
        env_file=None,
        circle_api_key=KEY,
        circle_entity_secret="ab" * 32,
        sumsub_webhook_secret="sumsub-s3cr3t",
        database_url="postgresql://rail:s3cr3t@db.internal:5432/rail?sslpassword=s3cr3t",
        rpc_urls={"ETH": ["https://user:s3cr3t@eth.example/v2/s3cr3t?k=s3cr3t"]},
        circle_api_url="https://user:s3cr3t@proxy.example/circle",
    )
    shown = {row.name: row.value for row in describe(settings)}
    printed = "\n".join(shown.values()) + repr(settings)
    assert not any(secret in "\n".join(shown.values()) for secret in ("s3cr3t", "very-secret", "abab"))
    assert KEY not in printed
    assert "sumsub-s3cr3t" not in printed
    assert shown["STABLERAIL_DATABASE_URL"] == "postgresql://rail:********@db.internal:5432/rail?********"
    assert shown["STABLERAIL_RPC_URLS"] == "ETH: https://********@eth.example/********"
    assert shown["STABLERAIL_DEPOSIT_MINIMUM"] == "1.000000 USDC"


@pytest.mark.parametrize("odd", ["s3/cr3t", "1/s3cr3t", "s3?cr3t", "1?s3cr3t", "s3#cr3t", "1#s3cr3t", "s3]cr3t"])
def test_a_password_that_is_not_escaped_is_refused_and_never_shown(odd: str) -> None:
    for name, url in {
        "database_url": f"postgresql://rail:{odd}@db.internal:5432/rail",
        "circle_api_url": f"https://rail:{odd}@proxy.example/circle",
    }.items():
        with pytest.raises(ConfigError) as refused:
            load_settings(env_file=None, **{name: url})
        (problem,) = refused.value.problems
        assert problem.name.startswith(f"STABLERAIL_{name.upper()}")
        assert "cr3t" not in str(refused.value)
        assert "cr3t" not in masked_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://rail:s3%2Fcr3t@one:5432,two:5433/rail",
        "postgresql://rail:s3cr3t@[fd00::1]:5432/rail?options=-c%20x%3Dy",
        "postgresql:///rail?host=/tmp&user=rail@tenant",
        "postgresql://rail@tenant:s3cr3t@db/rail",
    ],
)
def test_every_way_to_name_a_server_is_taken(url: str) -> None:
    given = url.replace("rail@tenant:", "rail%40tenant:").replace("user=rail@", "user=rail%40")
    assert load_settings(env_file=None, database_url=given).secret("database_url") == given


def test_amounts_are_shown_as_they_are_given() -> None:
    settings = load_settings(env_file=None, buffer_alert_threshold="7000.5", withdrawal_user_day_maximum="20")
    shown = {row.name.removeprefix("STABLERAIL_"): row.value for row in describe(settings)}
    assert shown["BUFFER_ALERT_THRESHOLD"] == "7000.500000 USDC"
    assert shown["DISCREPANCY_ALERT_THRESHOLD"] == "100.000000 USDC"
    assert shown["WITHDRAWAL_USER_DAY_MAXIMUM"] == "20.000000 USDC"
    assert shown["WITHDRAWAL_IN_FLIGHT_MAX"] == "16", "a count is no amount"


def test_a_secret_that_looks_like_a_url_is_none() -> None:
    names = ("sumsub_webhook_secret", "withdrawal_keystore_password", "circle_api_key", "alpaca_api_key")
    settings = load_settings(env_file=None, **dict.fromkeys(names, "c0rrect://h0rse-battery"))
    shown = {row.name: row.value for row in describe(settings)}
    for name in names:
        assert shown[f"STABLERAIL_{name.upper()}"] == "********", name


def test_a_url_without_credentials_is_shown_whole() -> None:
    assert masked_url("https://api.circle.com") == "https://api.circle.com"
    assert masked_url("postgresql://localhost/rail") == "postgresql://localhost/rail"


def test_a_hot_account_of_ours_has_as_many_rows_as_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, fiat = AccountType.SYSTEM_BUFFER_USDC, AccountType.SYSTEM_BUFFER_FIAT
    assert load_settings(env_file=None).shards_of(buffer) == 1
    monkeypatch.setenv("STABLERAIL_BUFFER_SHARDS", "4")
    monkeypatch.setenv("STABLERAIL_LEDGER_SHARDS", '{"system_buffer_fiat": 3}')
    settings = load_settings(env_file=None)
    assert (settings.shards_of(buffer), settings.shards_of(fiat)) == (4, 3)
    monkeypatch.setenv("STABLERAIL_LEDGER_SHARDS", '{"system_buffer_usdc": 2}')
    assert load_settings(env_file=None).shards_of(buffer) == 2


@pytest.mark.parametrize("given", ['{"usdc_balance": 2}', '{"custody_usdc": 2}', '{"system_buffer_usdc": 0}', "4"])
def test_only_accounts_of_ours_have_shards_and_a_chain_is_none(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STABLERAIL_LEDGER_SHARDS", given)
    with pytest.raises(ConfigError) as error:
        load_settings(env_file=None)
    assert [name.partition(".")[0] for name in problems_of(error)] == ["STABLERAIL_LEDGER_SHARDS"]


RPC = '{"MATIC": ["https://rpc.example"]}'
USDC = '{"MATIC": "0x3c499c542cEF5E3811e1192ce70d8cC03d5c3359"}'


def test_withdrawals_leave_by_the_mainnet_only_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(env_file=None).withdrawal_chains == ()
    given = {"network": "mainnet", "withdrawal_chains": "MATIC", "rpc_urls": RPC}
    with pytest.raises(ConfigError, match="STABLERAIL_ALLOW_MAINNET must be true"):
        load_settings(env_file=None, **given)
    # whatever the network is called, the id says what is signed for
    renamed = {**given, "network": "testnet", "chain_ids": '{"MATIC": 137}', "usdc_contracts": USDC}
    with pytest.raises(ConfigError, match="STABLERAIL_ALLOW_MAINNET must be true"):
        load_settings(env_file=None, **renamed)
    monkeypatch.setenv("STABLERAIL_ALLOW_MAINNET", "true")
    assert load_settings(env_file=None, **given).withdrawal_chains == (Chain.MATIC,)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"withdrawal_chains": "SOL"}, "STABLERAIL_WITHDRAWAL_CHAINS"),
        ({"withdrawal_chains": "MATIC", "rpc_urls": RPC}, "STABLERAIL_USDC_CONTRACTS"),
        ({"withdrawal_chains": "MATIC", "usdc_contracts": USDC}, "STABLERAIL_RPC_URLS"),
    ],
)
def test_a_chain_that_withdrawals_cannot_leave_by_is_named_with_what_it_lacks(given: dict[str, str], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load_settings(env_file=None, **given)


def test_top_ups_of_gas_are_by_chain_in_coins_and_in_order() -> None:
    where = {"withdrawal_chains": "MATIC", "rpc_urls": RPC, "usdc_contracts": USDC}
    limits = {"below": "5", "upto": "20.5", "day_max": "200"}
    settings = load_settings(env_file=None, **where, gas_top_ups=json.dumps({"MATIC": limits}))
    assert dict(settings.gas_top_ups[Chain.MATIC]) == {
        "below": 5_000_000, "upto": 20_500_000, "day_max": 200_000_000, "low": 0,
    }  # fmt: skip
    shown = {row.name: row.value for row in describe(settings)}
    assert shown["STABLERAIL_GAS_TOP_UPS"].startswith("MATIC: below 5.000000, upto 20.500000, day_max 200.000000")
    wrong: list[dict[str, str]] = [
        {**limits, "upto": "5"},
        {**limits, "day_max": "20"},
        {**limits, "most": "1"},
        {"below": "1"},
    ]
    for one in wrong:
        with pytest.raises(ConfigError, match="STABLERAIL_GAS_TOP_UPS"):
            load_settings(env_file=None, **where, gas_top_ups=json.dumps({"MATIC": one}))
    with pytest.raises(ConfigError, match="not in STABLERAIL_WITHDRAWAL_CHAINS"):
        load_settings(env_file=None, gas_top_ups=json.dumps({"MATIC": limits}))


def test_the_policy_of_deposits_is_by_chain_and_in_decimal_amounts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STABLERAIL_DEPOSIT_AT_FINALITY", "ETH,SOL")
    monkeypatch.setenv("STABLERAIL_DEPOSIT_INSTANT_MAX", '{"MATIC": "10000", "ETH": "0.5"}')
    monkeypatch.setenv("STABLERAIL_DEPOSIT_OUTSTANDING_MAX", '{"MATIC": "25000.000001"}')
    policy = deposit_policy(load_settings(env_file=None))
    assert policy.at_finality == {"ETH", "SOL"}
    assert policy.instant_max == {"MATIC": 10_000_000_000, "ETH": 500_000}
    assert policy.outstanding_max == {"MATIC": 25_000_000_001}
    shown = {row.name: row.value for row in describe(load_settings(env_file=None))}
    assert "MATIC: 10000.000000 USDC" in shown["STABLERAIL_DEPOSIT_INSTANT_MAX"]
    monkeypatch.setenv("STABLERAIL_DEPOSIT_INSTANT_MAX", '{"DOGE": "1"}')
    monkeypatch.setenv("STABLERAIL_DEPOSIT_OUTSTANDING_MAX", '{"MATIC": "1e3"}')
    with pytest.raises(ConfigError) as error:
        load_settings(env_file=None)
    assert set(problems_of(error)) == {"STABLERAIL_DEPOSIT_INSTANT_MAX", "STABLERAIL_DEPOSIT_OUTSTANDING_MAX"}
