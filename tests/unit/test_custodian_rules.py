"""The alerts of withdrawals that Circle sends: what they are about exists, and they fire when they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from agents.withdrawals import custodian, settle_transfers, transfer_by_custodian
from stablerail import metric_list

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "custodian.rules.yml"
TESTS = RULES.with_name("custodian.rules.test.yml")


def test_alerts_are_about_stages_and_codes_that_we_have() -> None:
    code = re.sub(r"#.*|(?:summary|description): .*", "", RULES.read_text())
    named = {name.removesuffix("_total") for name in re.findall(r"\bstablerail_[a-z_]+", code)}
    assert named == {metric_list.STAGE_ALERTS.name}
    codes = {word for found in re.findall(r'code=~?"([\w|]+)"', code) for word in found.split("|")}
    assert codes == {settle_transfers.CONTRADICTED, settle_transfers.SHORT, custodian.SECOND_TRANSFER}
    stages = {word for found in re.findall(r'stage=~?"([\w|]+)"', code) for word in found.split("|")}
    assert stages == {settle_transfers.NAME, transfer_by_custodian.NAME}


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: the alerts were not tried (Debian package `prometheus`)")
    for arguments in (["check", "rules", RULES], ["test", "rules", TESTS]):
        done = subprocess.run([promtool, *map(str, arguments)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
