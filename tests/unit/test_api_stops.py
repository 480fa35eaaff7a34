"""The API's process ends when its database turns out not to be the deployment's."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from agents.crash import EXIT_BUG, Stop
from ledger.errors import DatabaseBehind
from stablerail import servers
from stablerail.config import load_settings

BEHIND = DatabaseBehind(7, datetime(2026, 7, 1, tzinfo=UTC))


def test_the_api_that_finds_an_old_backup_while_it_serves_stops_and_says_what_is_to_be_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Server:
        should_exit = False

        def __init__(self, app: Any, *_: Any) -> None:
            self.journal = app.state.journal

        async def serve(self) -> None:
            self.journal._found_unfit(BEHIND)
            assert self.should_exit

    async def nothing(*_: Any) -> None:
        return None

    journal = servers.Journal(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setattr(servers, "api_app", lambda *_: SimpleNamespace(state=SimpleNamespace(journal=journal)))
    monkeypatch.setattr(servers, "_server", Server)
    monkeypatch.setattr(servers, "reach", nothing)
    with capture_logs() as logs, pytest.raises(SystemExit) as stopped:
        servers.run_api(load_settings(env_file=None, database_url="postgresql://127.0.0.1:1/none"))
    assert stopped.value.code == EXIT_BUG
    assert [(log["event"], log["code"]) for log in logs] == [("api.stops", "database_behind")]


def test_a_process_that_stops_for_its_database_says_the_remedy_and_no_traceback() -> None:
    with capture_logs() as logs:
        Stop(ends=False)(f"sweeper: {BEHIND!r}", BEHIND)
    assert [(log["event"], log["code"], "exc_info" in log) for log in logs] == [
        ("process.stops", "database_behind", False)
    ]
    assert "rebuild --take-over" in logs[0]["reason"]
