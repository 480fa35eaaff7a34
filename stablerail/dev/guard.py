"""Stands between an owner and one child, so that the child ends when the owner does, even by SIGKILL.

Run as a script by `processes.Child`, with the standard library only. The owner holds the write end of a pipe; the kernel
closes it whenever and however the owner ends. PR_SET_PDEATHSIG alone would not do: it fires when the *thread* that
started the child ends, and brokers are started from worker threads too. Between guard and child it is right, because the
guard has one thread, and it covers the guard's own death.

    guard.py OWNER_FD REPORT_FD ORPHAN_SIGNAL GRACE_S COMMAND…   run COMMAND; report its pid; exit with its code
    guard.py OWNER_FD REPORT_FD remove DIRECTORY                 remove DIRECTORY once the owner is gone
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

PR_SET_PDEATHSIG = 1


def exec_child(command: list[str], guard_pid: int) -> NoReturn:
    """In the forked child; never returns."""
    try:
        if tie(guard_pid):
            os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        os.write(2, f"cannot run {command[0]}: {error.strerror}\n".encode())
    os._exit(127)


def tie(guard_pid: int) -> bool:
    """In the forked child: own session, default signals, tied to the guard. False: the guard died before that took effect."""
    os.setsid()
    for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == guard_pid


def run(
    owner_fd: int,
    report_fd: int,
    orphan_signal: int,
    grace_s: float,
    command: list[str],
    become: Callable[[list[str], int], NoReturn] = exec_child,
) -> int:
    """`become`: what the forked child does."""
    guard_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        become(command, guard_pid)
    os.write(report_fd, f"{pid}\n".encode())
    os.close(report_fd)
    child_fd = os.pidfd_open(pid)
    ready, _, _ = select.select([owner_fd, child_fd], [], [])
    if child_fd not in ready:
        with suppress(ProcessLookupError):
            os.kill(pid, orphan_signal)
        if not select.select([child_fd], [], [], grace_s)[0]:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def remove(owner_fd: int, report_fd: int, directory: str) -> int:
    """Children of the same owner are ending meanwhile and may still write: stop when it has stayed away for a second."""
    os.write(report_fd, b"0\n")
    os.close(report_fd)
    os.read(owner_fd, 1)
    away = 0
    for _ in range(300):
        away = 0 if os.path.exists(directory) else away + 1
        if away == 10:
            return 0
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.1)
    return 1


if __name__ == "__main__":
    owner, report, what, *rest = sys.argv[1:]
    if what == "remove":
        sys.exit(remove(int(owner), int(report), rest[0]))
    sys.exit(run(int(owner), int(report), int(what), float(rest[0]), rest[1:]))
