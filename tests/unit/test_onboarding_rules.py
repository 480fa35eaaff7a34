"""The alerts of wallet provisioning: what they are about exists, and they fire when they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from stablerail import metric_list

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "onboarding.rules.yml"
TESTS = RULES.with_name("onboarding.rules.test.yml")
NAMES = {
    "wallet_provisioning_jobs_processed_total": ("status",),
    "wallet_provisioning_job_duration_seconds": ("status",),
    "wallet_provisioning_job_retries_total": (),
    "wallet_provisioning_job_errors_total": ("error_type",),
    "wallet_provisioning_wallets_created_total": ("chain",),
    "wallet_provisioning_active_jobs": (),
    "wallet_provisioning_scheduler_running": (),
}
"""Of the source document, with their labels."""


def served() -> dict[str, tuple[str, ...]]:
    return {f"{m.name}_total" if m.kind == "counter" else m.name: m.labels for m in metric_list.ALL}


def test_the_seven_metrics_have_the_names_and_labels_that_dashboards_know() -> None:
    assert {name: labels for name, labels in served().items() if name.startswith("wallet_provisioning_")} == NAMES


def test_alerts_are_about_metrics_that_we_have() -> None:
    code = re.sub(r"#.*|summary: .*", "", RULES.read_text())
    named = set(re.findall(r"\b(?:stablerail|wallet_provisioning)_[a-z_]+", code))
    assert {re.sub(r"_seconds_(sum|count)$", "_seconds", name) for name in named} <= served().keys()
    assert len(re.findall(r"alert: (\w+)", code)) == 8


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: the alerts were not tried (Debian package `prometheus`)")
    for arguments in (["check", "rules", RULES], ["test", "rules", TESTS]):
        done = subprocess.run([promtool, *map(str, arguments)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
