"""What the product gives up after seconds, so that somebody else goes on or asks again, is here given up by nobody: a test has nobody
else, and its process may stand still for as long. Tests of such a time-out set their own."""

from __future__ import annotations

import pytest

from stablerail import cli_base
from stablerail.api import app, auth, journal, reads, worker_routes
from tests.support.patience import ENVIRONMENT, PATIENCE_S


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for module in (reads, auth, worker_routes):
        monkeypatch.setattr(module, "ACQUIRE_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(app, "READY_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(journal, "ANSWER_S_MAX", PATIENCE_S)
    monkeypatch.setattr(cli_base, "JOURNAL_WAIT_S", PATIENCE_S)
