"""A process whose event loop stands still is ended."""

from __future__ import annotations

import subprocess
import sys

from agents.crash import EXIT_BUG

STANDS = """
import asyncio, time
from agents.crash import Watchdog

async def main():
    watchdog = Watchdog(0.5)
    watchdog.start()
    for _ in range(30):
        watchdog.beat()
        await asyncio.sleep(0.05)
    print("lived", flush=True)
    {then}

asyncio.run(main())
"""


def run(then: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", STANDS.format(then=then)], capture_output=True, text=True, timeout=200)


def test_a_loop_that_stands_still_ends_the_process() -> None:
    done = run("time.sleep(20)")
    assert done.returncode == EXIT_BUG
    assert done.stdout.startswith("lived")
    assert "stood still" in done.stdout + done.stderr


def test_a_loop_that_goes_on_is_left_alone() -> None:
    assert run("pass").returncode == 0
