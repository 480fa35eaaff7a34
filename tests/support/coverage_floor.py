"""Judges coverage at the end of a run that `coverage run` measures, before pytest's closing line.

Without `coverage run` it does nothing. The floor is `fail_under` in pyproject.toml.
"""

from __future__ import annotations

import io

import coverage
import pytest

_SAYS = pytest.StashKey[str]()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    running = coverage.Coverage.current()
    if running is None or session.config.option.collectonly:
        return
    running.stop()
    running.save()
    combined = coverage.Coverage()
    combined.combine()  # with what measured child processes have written
    combined.save()
    table = io.StringIO()
    total = combined.report(file=table, skip_covered=True, sort="cover")
    floor = float(combined.get_option("report:fail_under") or 0)
    says = f"coverage {total:.1f} %, floor {floor:g} %"
    if total < floor:
        says = f"{table.getvalue()}{says}: below the floor"
        if session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    session.config.stash[_SAYS] = says


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if says := config.stash.get(_SAYS, None):
        terminalreporter.section("coverage")
        terminalreporter.write_line(says)
