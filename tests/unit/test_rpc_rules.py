"""The alerts of the RPC endpoints: what they are about exists, and they fire when they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from chain.health import OK, OUTVOTED, STATES
from stablerail import metric_list, metrics

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "rpc.rules.yml"
TESTS = RULES.with_name("rpc.rules.test.yml")


def test_alerts_are_about_metrics_and_states_that_we_have() -> None:
    code = re.sub(r"#.*|(?:summary|description): .*", "", RULES.read_text())
    assert set(re.findall(r"\bstablerail_[a-z_]+", code)) <= {metric.name for metric in metric_list.ALL}
    states = {one for matched in re.findall(r'state=~?"([^"]+)"', code) for one in matched.split("|")}
    assert states <= set(STATES)


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: the alerts were not tried (Debian package `prometheus`)")
    for arguments in (["check", "rules", RULES], ["test", "rules", TESTS]):
        done = subprocess.run([promtool, *map(str, arguments)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_endpoint_is_in_one_state_at_a_time() -> None:
    told = metrics.Metrics()
    for state in (OUTVOTED, OK):
        told.rpc_endpoint("MATIC", "1 https://a.example", state)
        shown = {
            one: told.registry.get_sample_value(
                metric_list.RPC_ENDPOINT_STATE.name, {"chain": "MATIC", "endpoint": "1 https://a.example", "state": one}
            )
            for one in STATES
        }
        assert shown == {one: float(one == state) for one in STATES}
