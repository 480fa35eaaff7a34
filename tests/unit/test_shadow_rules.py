"""Shadow mode without a database: names and amounts of a legacy table, first phases, what stands in the way, its alerts."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from ledger.accounts import AccountType
from ledger.legacy import Legacy
from ledger.shadow import Mirror, Phase, mirror_of, mirrored, whole
from ledger.shadow_elsewhere import Elsewhere
from ledger.shadow_phases import State, clean_since, first_phase, in_the_way
from stablerail import metric_list
from stablerail.config import ConfigError, load_settings
from stablerail.metrics import Metrics
from stablerail.shadow import mirror_for

AT = datetime(2026, 7, 10, tzinfo=UTC)
USDC = AccountType.USDC_BALANCE
RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "shadow.rules.yml"
TESTS = RULES.with_name("shadow.rules.test.yml")


def legacy_of(**other: Any) -> Legacy:
    given: dict[str, Any] = {
        "table": "public.balances", "user_column": "user_id", "user_type": "text", "columns": {USDC: "usdc"},
        "integer": False, "digits": 6,
    } | other  # fmt: skip
    return Legacy(**given)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"table": "balances"}, "schema.table"),
        ({"table": 'public.b"; DROP TABLE x; --'}, "no name"),
        ({"user_column": "user id"}, "no name"),
        ({"columns": {}}, "at least one"),
        ({"columns": {USDC: "user_id"}}, "twice"),
        ({"columns": {AccountType.WORLD_USDC: "world"}}, "no account of a customer"),
        ({"digits": 7}, "digits"),
    ],
)
def test_a_wrong_name_is_refused(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        legacy_of(**wrong)


def test_what_the_table_cannot_keep_is_cut_off() -> None:
    assert [legacy_of(digits=digits).shown(12_345_678) for digits in (6, 2, 0)] == [12_345_678, 12_340_000, 12_000_000]
    assert [whole(Decimal(text)) for text in ("5.9", "NaN", "Infinity")] == [5, 0, 0]


def test_settings_give_the_first_phase_and_a_wrong_one_stops_the_start() -> None:
    table = {"legacy_table": "public.balances", "legacy_columns": '{"usdc_balance": "usdc"}'}
    mirror = mirror_for(load_settings(env_file=None, ledger_shadow_mode=True, **table))
    assert mirror is not None
    assert mirror.legacy == legacy_of()
    assert mirror_for(load_settings(env_file=None)) is None
    elsewhere = {"legacy_url": "postgresql://other/db", **table}
    assert mirror_for(load_settings(env_file=None, **elsewhere)) is None, "only reconciled"
    assert isinstance(mirror_for(load_settings(env_file=None, ledger_shadow_mode=True, **elsewhere)), Elsewhere)
    for wrong, name in (
        ({"ledger_shadow_mode": True}, "LEGACY_TABLE"),
        ({"legacy_table": "balances"}, "LEGACY_TABLE"),
        ({"balance_source": "both"}, "BALANCE_SOURCE"),
        ({"legacy_columns": "{"}, "LEGACY_COLUMNS"),
    ):
        with pytest.raises(ConfigError, match=f"STABLERAIL_{name}"):
            load_settings(env_file=None, **wrong)
    said = [
        first_phase(shadow=shadow, strict=strict, source=source)
        for shadow, strict, source in (
            (False, False, "legacy"), (True, True, "legacy"), (True, False, "ledger"), (True, True, "ledger"),
            (False, True, "ledger"),
        )
    ]  # fmt: skip
    assert said == list(Phase)


def test_only_a_connection_of_a_mirror_has_one() -> None:
    mirror = Mirror(legacy_of())
    assert mirrored(None) is asyncpg.Connection
    assert mirror_of(mirrored(mirror)) is mirror
    assert mirror_of(object()) is None


def test_what_stands_in_the_way_is_the_time_since_the_last_difference() -> None:
    state = State(Phase.SHADOW, 3, AT, "ann")
    day = timedelta(days=1)
    assert in_the_way(State(), None, AT) == []
    assert clean_since(State(), None) is None
    assert in_the_way(state, None, AT + 6.5 * day) == ["clean since 2026-07-10 00:00:00 UTC, 156 h of 168 h"]
    assert in_the_way(state, AT + day, AT + 7 * day) == ["clean since 2026-07-11 00:00:00 UTC, 144 h of 168 h"]
    assert in_the_way(state, AT - day, AT + 7 * day) == []
    assert in_the_way(State(Phase.OFF, 1, AT), None, AT) == []
    assert in_the_way(State(Phase.CUT_OVER, 1, AT), None, AT) == ["there is no phase after cut_over"]


def test_the_metrics_have_the_names_that_dashboards_know_and_no_customer() -> None:
    made = Metrics()
    made.shadow_written(1.5, ok=True)
    made.shadow_written(1.5, ok=False)
    made.shadow_read("ledger", 0.7)
    made.shadow_differs("usdc_balance")
    text = made.render().decode()
    for line in (
        "ledger_write_success_rate 0.5",
        "shadow_mode_write_lag_ms_count 2.0",
        'balance_query_duration_ms_count{source="ledger"} 1.0',
        'ledger_shadow_discrepancy_count_total{account_type="usdc_balance"} 1.0',
    ):
        assert line in text


def test_alerts_are_about_metrics_that_we_have() -> None:
    code = re.sub(r"#.*|(?:summary|description): .*", "", RULES.read_text())
    named = set(re.findall(r"\b(?:ledger|balance|shadow)_[a-z_]+", code))
    ours = (metric_list.SHADOW_DISCREPANCIES, metric_list.WRITE_SUCCESS, metric_list.BALANCE_QUERY_MS)
    assert {re.sub("_total$|_bucket$", "", name) for name in named} == {metric.name for metric in ours}
    assert re.findall(r"alert: (\w+)", code) == [
        "HighDiscrepancyRate", "LedgerWriteFailures", "PerformanceDegradation", "LegacyTableWaits",
    ]  # fmt: skip


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: the alerts were not tried (Debian package `prometheus`)")
    for arguments in (["check", "rules", RULES], ["test", "rules", TESTS]):
        done = subprocess.run([promtool, *map(str, arguments)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
