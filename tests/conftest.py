"""Fixtures every test may ask for, and which tests share a process.

The suite runs in a few processes (`make test`) that share a broker and a database server; each has a chain of its own. A
file's tests stay together; so do all that share the product of the `story` fixture.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, settings

from stablerail.dev import processes
from stablerail.telemetry import QUIET_LOGGERS
from tests.support.accepting import close_what_a_closed_server_accepted
from tests.support.memory import keep_files_in_memory
from tests.support.parts import (
    anvil,
    database,
    kafka,
    postgres,
    scratch,
    shared_parts,
    start_shared,
    tools,
    topic_prefix,
    usdc,
)

__all__ = ["anvil", "database", "kafka", "postgres", "scratch", "shared_parts", "tools", "topic_prefix", "usdc"]

# Hundreds of workers start. Where nobody may keep what was compiled, each compiles the whole product: a fifth of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

close_what_a_closed_server_accepted()
keep_files_in_memory()

# The same examples in every run, however slow the machine: a run that failed fails again.
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


_run = ExitStack()
_shared_parts: list[Path] = []


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A program that a test runs in this process sets up its logging, to a stream that ends with the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in QUIET_LOGGERS}
    yield
    root.handlers[:], root.level = handlers, level
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)
    structlog.reset_defaults()


def pytest_configure(config: pytest.Config) -> None:
    """A run has a directory of its own, and each of its processes a share of the ports.

    At the end of a run that keeps nothing pytest removes the directories of all runs of this user, also of those that go on. And a
    port that was drawn by one process is free to the others until something listens.
    """
    given = getattr(config, "workerinput", None)
    if given is None:
        own = _run.enter_context(processes.scratch_directory("pytest-"))
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(own)
    else:
        share = len(processes.PORTS) // given["workercount"]
        first = int(given["workerid"].removeprefix("gw")) % given["workercount"] * share
        processes.PORTS = processes.PORTS[first : first + share]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Before each of the processes of a run is started, in the one that starts them."""
    if not _shared_parts:
        _shared_parts.append(start_shared(_run))
    node.workerinput["shared_parts"] = str(_shared_parts[0])


def pytest_unconfigure() -> None:
    _run.close()


# Whose lines are run in processes of their own, where nothing is counted, or the same ones thousands of times: counting
# doubles what a line costs.
UNCOUNTED = (
    "tests/e2e/",
    "tests/integration/test_benchmarks_smoke.py",
    "tests/integration/test_lanes_under_faults.py",
    "tests/integration/test_ledger_model.py",
    "tests/integration/test_transfers_under_faults.py",
    "tests/integration/test_wallet_chaos.py",
    "tests/unit/test_chain_scan.py",
    "tests/unit/test_withdrawal_model.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(UNCOUNTED):
            item.add_marker(pytest.mark.no_cover)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What `--dist loadgroup` is meant for; with pytest 9.2 that mode of xdist 3.8 deals each test out by itself, and every
    process then makes every module's fixtures."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "story" if "/story/" in file else file

    return Together(config, log)
