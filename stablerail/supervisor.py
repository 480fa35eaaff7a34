"""Movements as child processes: restarted with back-off when they stop, stopped when we are.

Whose first process finds its settings wrong ends us and the others, as settings that are wrong at a glance do before anything starts.
Who finds them wrong later is tried again: others are at work.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence

import structlog

from stablerail.config import EXIT_CONFIG

_log = structlog.get_logger()

LOOK_S = 1.0
"""Between two looks of a child at whether its supervisor lives."""
STEADY_S = 60.0
"""A child that ran so long starts anew without waiting."""


async def supervise(
    movements: Sequence[str], first_port: int, *, restart_wait_s_max: float, shutdown_timeout_s: float
) -> int:
    """Runs one worker process per movement until SIGTERM or SIGINT, or wrong settings; the exit code: 0 when all ended well."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    keepers = [
        _keep(movement, first_port + index, stopping, restart_wait_s_max, shutdown_timeout_s)
        for index, movement in enumerate(movements)
    ]
    codes = await asyncio.gather(*keepers)
    # one that SIGTERM met before it could listen had nothing in hand
    return max((abs(code) for code in codes if code != -signal.SIGTERM), default=0)


async def _keep(movement: str, port: int, stopping: asyncio.Event, wait_s_max: float, shutdown_timeout_s: float) -> int:
    wait_s, first = 0.5, True
    while True:
        started = asyncio.get_running_loop().time()
        try:
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "stablerail.cli", "worker", movement, "--port", str(port)),
                *("--supervisor", str(os.getpid())),
                process_group=0,
            )
        except OSError as error:  # no process or memory is left for one more; the others go on
            _log.warning("worker.not_started", movement=movement, reason=error.strerror, wait_s=wait_s)
        else:
            ended = asyncio.create_task(child.wait())
            stop = asyncio.create_task(stopping.wait())
            await asyncio.wait({ended, stop}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.is_set():
                return await _end(child, ended, shutdown_timeout_s)
            stop.cancel()
            if first and child.returncode == EXIT_CONFIG:
                _log.critical("supervisor.stops", movement=movement, reason="its settings are wrong: it says which")
                stopping.set()
                return EXIT_CONFIG
            first = False
            if asyncio.get_running_loop().time() - started > STEADY_S:
                wait_s = 0.5
            _log.warning("worker.restarts", movement=movement, exit_code=child.returncode, wait_s=wait_s)
        await _sleep_unless(stopping, wait_s)
        if stopping.is_set():
            return 0
        wait_s = min(wait_s * 2, wait_s_max)


async def ends_with(supervisor: int) -> None:
    """Ends this process as SIGTERM does when it is the child of `supervisor` no more: who died without a word starts anew, with others."""
    while os.getppid() == supervisor:  # noqa: ASYNC110  (a parent is no event)
        await asyncio.sleep(LOOK_S)
    _log.warning("worker.orphaned", supervisor=supervisor)
    os.kill(os.getpid(), signal.SIGTERM)


async def _end(child: asyncio.subprocess.Process, ended: asyncio.Task[int], timeout_s: float) -> int:
    if child.returncode is None:
        child.terminate()
    try:
        return await asyncio.wait_for(asyncio.shield(ended), timeout_s + 5)
    except TimeoutError:
        child.kill()
        await ended
        return 1


async def _sleep_unless(event: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return
