"""The alerts of reconciliation: what they are about exists, and they fire when they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.test_onboarding_rules import served

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "reconcile.rules.yml"
TESTS = RULES.with_name("reconcile.rules.test.yml")


def test_alerts_are_about_metrics_that_we_have() -> None:
    code = re.sub(r"#.*|summary: .*", "", RULES.read_text())
    assert set(re.findall(r"\bstablerail_[a-z_]+", code)) <= served().keys()


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: the alerts were not tried (Debian package `prometheus`)")
    for arguments in (["check", "rules", RULES], ["test", "rules", TESTS]):
        done = subprocess.run([promtool, *map(str, arguments)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
