"""`stablerail demo` as a person starts it: the story to its end, and Ctrl-C while it stays up. Both run side by side."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from stablerail.dev.processes import Child
from stablerail.dev.toolchain import preflight

ROOT = Path(__file__).parents[2]
PATIENCE_S = 200.0
HOPS = (
    "POST /webhooks/kyc/sumsub",
    "kyc.approved",
    "wallets.requested",
    "POST /v1/w3s/developer/wallets",
    "wallets.provisioned",
    "USDC transfer, mined",
    "POST /webhooks/circle",
    "deposits.notified  by circle",
    "deposits.notified  by scanner",
    "deposits.credited",
    "GET /v1/users/{id}/balances",
    "chain.heads",
    "deposits.finalized",
    "POST /v1/withdrawals",
    "withdrawals.requested",
    "withdrawals.accepted",
    "transactions.signed",
    "kill -9 the withdrawals worker",
    "the worker, started again",
    "transactions.broadcast",
    "transactions.confirmed",
    "withdrawals.settled",
)

pytestmark = pytest.mark.timeout(2 * PATIENCE_S)


@dataclass(frozen=True)
class Demo:
    child: Child
    directory: Path

    def said(self) -> str:
        return self.child.log.read_text(errors="replace")

    def until(self, is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < deadline, f"{what} did not come: {self.said()}"
            time.sleep(0.1)


def start(directory: Path, *options: str) -> Demo:
    directory.mkdir()
    # Another deployment's settings in the shell and the folder: the demo must not take them.
    (directory / ".env").write_text("STABLERAIL_NETWORK=mainnet\n")
    given = {"PYTHONPATH": str(ROOT), "STABLERAIL_TOPIC_PREFIX": "other.", "CIRCLE_API_KEY": "LIVE_API_KEY:a:b"}
    command = ["env", "--chdir", directory, sys.executable, "-m", "stablerail.cli", "demo", *options]
    return Demo(Child(command, log=directory / "said", env={**os.environ, **given}, grace_s=20), directory)


@pytest.fixture(scope="module")
def demos(scratch: Path, tools: object) -> Iterator[tuple[Demo, Demo]]:
    """One that ends by itself, and one that stays."""
    started = [start(scratch / "demo-once", "--once")]
    try:
        started.append(start(scratch / "demo-stay"))
        yield started[0], started[1]
    finally:
        for demo in started:
            demo.child.stop(timeout_s=100)


def processes() -> dict[int, tuple[int, str]]:
    """pid -> (parent, start time) of all that runs."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                found[int(stat.parent.name)] = (int(fields[1]), fields[19])
    return found


def descendants(pid: int) -> dict[int, str]:
    """pid -> start time of every process below it."""
    running = processes()
    found: dict[int, str] = {}
    todo = {pid}
    while todo:
        todo = {child for child, (parent, _) in running.items() if parent in todo and child not in found}
        found |= {child: running[child][1] for child in todo}
    return found


def worker_of(demo: Demo, movement: bytes) -> list[int]:
    """The pid of a movement's worker, once there is one; not its guard's."""
    found = []
    for pid in descendants(demo.child.pid):
        with suppress(OSError):  # it has ended meanwhile
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if {movement, b"worker"} <= {*words} and not any(word.endswith(b"guard.py") for word in words):
                found.append(pid)
    return found


def still_running(before: dict[int, str]) -> set[int]:
    return {pid for pid, (_, started) in processes().items() if before.get(pid) == started}


def test_the_demo_tells_every_hop_and_ends_well_when_balance_chain_and_ledger_agree(demos: tuple[Demo, Demo]) -> None:
    once, _ = demos
    assert once.child.wait(PATIENCE_S) == 0, once.said()
    said = once.said()
    for hop in HOPS:
        assert re.search(rf"^✓ +[0-9.]+ s  {re.escape(hop)}  <- ", said, re.MULTILINE), f"{hop} is missing: {said}"
    assert "balance, chain and ledger agree" in said
    assert re.search(r"✓  transfers to it, by the chain's +1 ", said), "paid once"
    assert "✗" not in said


def test_ctrl_c_ends_a_staying_demo_and_all_it_started(demos: tuple[Demo, Demo]) -> None:
    _, stay = demos
    stay.until(lambda: "Up until Ctrl-C" in stay.said() or stay.child.returncode is not None, "the end of the story")
    before = descendants(stay.child.pid)
    # Kafka, PostgreSQL, anvil, two sandboxes, bridge, API, the workers, a guard each
    assert len(before) >= 2 * 11, stay.said()
    stay.child.send_signal(signal.SIGINT)
    assert stay.child.wait(PATIENCE_S) == 0, stay.said()
    stay.until(lambda: still_running(before) == set(), "the end of all it started")
    said = stay.said()
    assert "Traceback" not in said
    for promised in ("/docs", "/flow", "/metrics", "deposit.sh"):
        assert promised in said


def test_a_program_that_ends_by_itself_ends_the_demo_with_its_name_and_log(scratch: Path, tools: object) -> None:
    demo = start(scratch / "demo-failed")
    try:
        demo.until(lambda: "a worker per movement" in demo.said(), "the start")
        demo.until(lambda: bool(worker_of(demo, b"deposits")), "the worker")
        below = descendants(demo.child.pid)
        os.kill(worker_of(demo, b"deposits")[0], signal.SIGKILL)
        assert demo.child.wait(PATIENCE_S) == 1, demo.said()
        demo.until(lambda: still_running(below) == set(), "the end of all it started")
    finally:
        demo.child.stop(timeout_s=100)
    assert "deposits ended by itself with 137" in demo.said()
    assert "deposits.log" in demo.said()


def test_a_machine_that_lacks_something_is_told_so_before_anything_starts(scratch: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root needs setpriv, the one program that no wheel carries")
    toolchain = preflight()
    directory = scratch / "demo-bare"
    directory.mkdir()
    command = ["/usr/bin/env", "--chdir", directory, sys.executable, "-m", "stablerail.cli", "demo", "--once"]
    child = Child(command, log=directory / "said", env={"PYTHONPATH": str(ROOT), "PATH": str(toolchain.postgres_bin)})
    try:
        assert child.wait(PATIENCE_S) == 1
    finally:
        child.stop()
    said = (directory / "said").read_text()
    assert "setpriv is missing: install util-linux" in said
    assert not (directory / ".dev").exists()
