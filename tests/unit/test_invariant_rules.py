"""The alerts of the invariants: what they are about exists, and they fire when they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ledger.verify import VIEWS, Result
from stablerail import metric_list, metrics

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "invariants.rules.yml"
TESTS = RULES.with_name("invariants.rules.test.yml")
OFFENDING = "stablerail_invariant_offending"


def test_alerts_are_about_metrics_that_we_have() -> None:
    code = re.sub(r"#.*|(?:summary|description): .*", "", RULES.read_text())
    assert set(re.findall(r"\bstablerail_[a-z_]+", code)) <= {metric.name for metric in metric_list.ALL}
    assert set(re.findall(r"alert: (\w+)", code)) == {"InvariantBroken", "InvariantsNotChecked"}


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: the alerts were not tried (Debian package `prometheus`)")
    for arguments in (["check", "rules", RULES], ["test", "rules", TESTS]):
        done = subprocess.run([promtool, *map(str, arguments)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_invariant_is_a_metric_of_its_own_and_who_does_not_lead_has_none() -> None:
    told = metrics.Metrics()
    told.invariants([Result(one.number, one.name, 3, ("a row",) * (one.number == 7)) for one in VIEWS])
    for one in VIEWS:
        labels = {"number": str(one.number), "name": one.name}
        assert told.registry.get_sample_value(OFFENDING, labels) == (one.number == 7)
        checked = {"number": str(one.number)}
        assert told.registry.get_sample_value("stablerail_invariant_checked_timestamp_seconds", checked)
    told.invariants(())
    assert OFFENDING not in told.render().decode().replace(f"# HELP {OFFENDING}", "").replace(f"# TYPE {OFFENDING}", "")
