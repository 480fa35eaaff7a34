"""The supervisor over real processes: a stand-in for the worker that crashes, waits or does not listen."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from stablerail.dev.processes import free_port
from stablerail.supervisor import supervise
from tests.support.ledger_rig import until

# `python -m stablerail.cli` finds this one first: the working directory stands before everything else.
STAND_IN = """
import os, signal, sys, time
_, command, movement, option, port, *supervisor = sys.argv
signal.signal(signal.SIGTERM, signal.SIG_IGN if movement == "deaf" else signal.SIG_DFL)
if movement == "steady":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if movement == "failing_at_the_end":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(70))
with open("/proc/self/stat") as stat:
    born_s = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
with open("starts", "a") as log:
    log.write(f"{command} {movement} {option} {port} {os.getpid()} {born_s}\\n")
if movement == "crashing":
    sys.exit(70)
if movement == "wrong" or movement == "wrong_later" and open("starts").read().count(movement) > 1:
    sys.exit(78)
if movement == "wrong_later":
    sys.exit(0)
supervisor = os.getppid()
while os.getppid() == supervisor:
    time.sleep(0.05)
"""


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stablerail").mkdir()
    (tmp_path / "stablerail" / "__init__.py").touch()
    (tmp_path / "stablerail" / "cli.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    (tmp_path / "starts").touch()
    return tmp_path / "starts"


def lines(starts: Path, movement: str) -> list[list[str]]:
    return [line.split() for line in starts.read_text().splitlines() if line.split()[1] == movement]


def run(*movements: str, wait_s_max: float = 0.6, shutdown_timeout_s: float = 100) -> asyncio.Task[int]:
    return asyncio.create_task(
        supervise(movements, 7000, restart_wait_s_max=wait_s_max, shutdown_timeout_s=shutdown_timeout_s)
    )


def alive(pid: str) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_a_crashed_child_is_restarted_with_back_off_and_the_others_go_on(starts: Path) -> None:
    task = run("crashing", "steady")
    await until(lambda: len(lines(starts, "crashing")) >= 4 and lines(starts, "steady"), "three restarts")
    times = [float(line[5]) for line in lines(starts, "crashing")]
    waits = [after - before for before, after in pairwise(times)]
    assert waits[0] > 0.48  # the kernel's clock has hundredths
    assert all(wait > 0.58 for wait in waits[1:]), "doubled, up to the limit"
    assert len(lines(starts, "steady")) == 1
    assert [line[:4] for line in lines(starts, "steady")] == [["worker", "steady", "--port", "7001"]]
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, 100)  # the code depends on what the crashing one was doing just then
    assert not alive(lines(starts, "steady")[0][4])


async def test_wrong_settings_end_all_with_their_code(starts: Path) -> None:
    """Nothing that starts them anew makes them right, and who looks at exit codes sees that."""
    with capture_logs() as told:
        assert await asyncio.wait_for(run("steady", "wrong"), 100) == 78
    assert [line["movement"] for line in told if line["event"] == "supervisor.stops"] == ["wrong"]
    assert not any(alive(line.split()[4]) for line in starts.read_text().splitlines())


async def test_settings_that_become_wrong_later_leave_the_others_at_work(starts: Path) -> None:
    task = run("steady", "wrong_later")
    await until(lambda: len(lines(starts, "wrong_later")) >= 4 and lines(starts, "steady"), "three restarts")
    assert not task.done()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, 100)


def test_the_children_of_a_supervisor_that_was_killed_end(tmp_path: Path) -> None:
    """Those that wait for a broker, here; who is at work ends as at SIGTERM."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("STABLERAIL_")},
        "STABLERAIL_DATABASE_URL": "postgresql://nobody:x@127.0.0.1:1/none",
        "STABLERAIL_KAFKA_BOOTSTRAP": "127.0.0.1:1",
        "STABLERAIL_DATADIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "stablerail.cli", "worker", "investing", "treasury", "--port", str(free_port())]
    supervisor = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children")
        assert supervisor.stderr is not None
        for line in supervisor.stderr:
            if b"worker.waits" in line and b'"movement":"' in line and len(children.read_text().split()) == 2:
                break
        supervisor.kill()
        supervisor.wait()
        assert b"worker.orphaned" in supervisor.stderr.read(), "to its end, which is that of all who write there"
    finally:
        supervisor.kill()
        supervisor.wait()
        if supervisor.stderr is not None:
            supervisor.stderr.close()


async def test_a_signal_ends_all_and_the_worst_exit_code_is_told(starts: Path) -> None:
    task = run("steady", "failing_at_the_end", "early")
    await until(lambda: len(starts.read_text().splitlines()) == 3, "three starts")
    os.kill(os.getpid(), signal.SIGINT)
    assert await asyncio.wait_for(task, 100) == 70
    assert not any(alive(line.split()[4]) for line in starts.read_text().splitlines())


async def test_a_child_that_does_not_listen_is_killed_after_its_time(
    starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = run("deaf", shutdown_timeout_s=-4.5)  # and five seconds more for what a worker does last
    await until(lambda: lines(starts, "deaf"), "the start")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(task, 100) == 1
    assert not alive(lines(starts, "deaf")[0][4])


async def test_a_child_that_cannot_be_started_is_tried_again(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = sys.executable
    monkeypatch.setattr(sys, "executable", str(starts / "no_directory"))
    with capture_logs() as told:
        task = run("steady", "early")
        await until(lambda: len(told) >= 4, "two tries of each")
        assert {line["event"] for line in told} == {"worker.not_started"}
        monkeypatch.setattr(sys, "executable", python)
        await until(lambda: len(starts.read_text().splitlines()) == 2, "both starts")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(task, 100) == 0


async def test_a_child_killed_by_an_operator_is_started_again(starts: Path) -> None:
    task = run("steady")
    await until(lambda: lines(starts, "steady"), "the start")
    os.kill(int(lines(starts, "steady")[0][4]), signal.SIGKILL)
    await until(lambda: len(lines(starts, "steady")) == 2, "another start")
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, 100)  # the code depends on what the crashing one was doing just then
