"""Two minutes of chaos with one seed. `make chaos SECONDS=… SEED=…` runs it for as long as anyone likes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.chaos.rig import ROOT

SEED = 11
SECONDS = 120


# Not beside the other tests yet: it wants both cores for itself.
@pytest.mark.skipif(not os.environ.get("STABLERAIL_TEST_CHAOS"), reason="only where STABLERAIL_TEST_CHAOS is set")
@pytest.mark.timeout(900)
def test_two_minutes_of_chaos_leave_every_balance_and_payment_as_it_must_be() -> None:
    command = [sys.executable, "-m", "tests.chaos", "--seconds", str(SECONDS), "--seed", str(SEED), "--target", "20"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=840)
    assert ran.returncode == 0, f"exit code {ran.returncode}\n{ran.stdout[-20_000:]}\n{ran.stderr[-5_000:]}"
