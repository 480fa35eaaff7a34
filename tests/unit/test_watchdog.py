"""A process whose event loop stands still is ended."""

from __future__ import annotations

import subprocess
import sys

from agents.crash import EXIT_BUG

STANDS = """
import asyncio, time
from agents.crash import Watchdog

async def main():
    Watchdog(0.5).start()
    time.sleep(100)

asyncio.run(main())
"""

# With a clock of its own: how fast the machine is decides nothing. It goes on 20 limits, and each of its steps is looked at.
GOES_ON = """
import asyncio, time
from types import SimpleNamespace
from agents import crash

now_s, looks = 0.0, 0

def look(_seconds):
    global looks
    looks += 1
    time.sleep(0.001)

crash.time = SimpleNamespace(monotonic=lambda: now_s, sleep=look)

async def main():
    global now_s
    watchdog = crash.Watchdog(0.5)
    watchdog.start()
    for _ in range(25):
        now_s += 0.4
        seen = looks
        while looks < seen + 2:  # the second one begins after the step
            await asyncio.sleep(0)
        watchdog.beat()
    print("lived", flush=True)
    now_s += 0.6
    time.sleep(100)

asyncio.run(main())
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)


def test_a_loop_that_stands_still_ends_the_process() -> None:
    done = run(STANDS)
    assert done.returncode == EXIT_BUG
    assert "stood still" in done.stdout + done.stderr


def test_a_loop_that_goes_on_is_left_alone_until_it_stands_still() -> None:
    done = run(GOES_ON)
    assert done.returncode == EXIT_BUG
    assert done.stdout.startswith("lived")
    assert "stood still for 1 s" in done.stdout + done.stderr
