"""The alerts: what they are about exists, and they fire when they should (promtool, where it is installed)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from connectors.webhooks.bridge import Metrics as BridgeMetrics
from stablerail import metric_list
from stablerail.metrics import Metrics

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "stablerail.rules.yml"
TESTS = RULES.with_name("stablerail.rules.test.yml")
ORDERS, ORDERS_TESTS = (RULES.with_name(f"orders.{kind}.yml") for kind in ("rules", "rules.test"))
WITHDRAWALS, WITHDRAWALS_TESTS = (RULES.with_name(f"withdrawals.{kind}.yml") for kind in ("rules", "rules.test"))


def test_alerts_are_about_metrics_that_we_have() -> None:
    registry = CollectorRegistry()
    BridgeMetrics(registry)
    bridge = {f"{family.name}_total" if family.type == "counter" else family.name for family in registry.collect()}
    ours = {f"{metric.name}_total" if metric.kind == "counter" else metric.name for metric in metric_list.ALL}
    code = re.sub(r"#.*|description: .*", "", RULES.read_text() + WITHDRAWALS.read_text() + ORDERS.read_text())
    named = set(re.findall(r"\bstablerail_[a-z_]+", code))
    assert named <= ours | bridge
    assert re.findall(r"alert: (\w+)", code) == [
        "DepositProcessingFailure",
        "DepositUnclear",
        "BufferDiscrepancy",
        "LowSystemBuffer",
        "WithdrawalStuck",
        "WithdrawalInReview",
        "LanePaused",
        "GasAccountLow",
        "OrderOverdue",
    ]


def test_what_an_alert_waits_for_is_there_before_it_rises() -> None:
    """A series that begins at its first rise has, to Prometheus, not risen."""
    there = [
        (sample.name, sample.labels)
        for family in Metrics().registry.collect()
        for sample in family.samples
    ]  # fmt: skip
    rules = "".join(path.read_text() for path in RULES.parent.glob("*.rules.yml"))
    waited = set(re.findall(r"increase\((\w+)(?:\{(.*?)\})?\[", rules))
    assert len(waited) > 8
    for name, selector in waited - {found for found in waited if found[0].startswith("stablerail_webhooks")}:
        wanted = {label: values.split("|") for label, values in re.findall(r'(\w+)=~?"([^"]*)"', selector)}
        for label, values in wanted.items():
            assert set(values) <= {labels.get(label) for other, labels in there if other == name}, (name, label)
        assert name in {other for other, _ in there}, name
    assert Metrics().registry.get_sample_value("ledger_write_success_rate") == 1, "LedgerWriteFailures"


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: the alerts were not tried (Debian package `prometheus`)")
    for arguments in (
        ["check", "rules", RULES, WITHDRAWALS, ORDERS],
        ["test", "rules", TESTS, WITHDRAWALS_TESTS, ORDERS_TESTS],
    ):
        done = subprocess.run([promtool, *map(str, arguments)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
