"""Workers that begin with the product's modules loaded, as copies (fork) of one process that loaded them: to load them is most of
what a worker's start costs, and crash tests start hundreds.

What runs is `stablerail …`, in a process, session and group of its own, which the tests kill, stop and freeze as any other. How it is
started from nothing is for the tests of the demo, the story and test_worker_process.py.
"""

from __future__ import annotations

import array
import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from stablerail.dev import guard
from stablerail.dev.processes import Child
from stablerail.dev.stack import Stack

ROOT = Path(__file__).parents[2]
REQUEST_BYTES_MAX = 200_000
_FDS = 3
"""Sent with a request: what its owner keeps open, where the pid and the exit code are told, and the log."""


class WarmChild(Child):
    """As `Child([sys.executable, "-m", "stablerail.cli", *arguments])`."""

    def __init__(self, arguments: Sequence[str], *, log: Path, env: Mapping[str, str]) -> None:
        owner_read, owner_write = os.pipe()
        told_read, told_write = os.pipe()
        with log.open("ab") as output:
            fds = array.array("i", [owner_read, told_write, output.fileno()])
            request = json.dumps([[*arguments], dict(env)]).encode()
            assert len(request) <= REQUEST_BYTES_MAX
            _loaded().sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        os.close(owner_read)
        os.close(told_write)
        guard = _Told(told_read)
        self._begun(log, guard, owner_write, guard.pid)


class WarmStack(Stack):
    """A product whose programs are such copies; the sandboxes are not."""

    def _spawn(self, name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        if [*arguments[:2]] == ["-m", "stablerail.cli"]:
            env = {**os.environ, **self.environment, **(environment or {})}
            self.children[name] = WarmChild(arguments[2:], log=self.directory / f"{name}.log", env=env)
        else:
            super()._spawn(name, arguments, environment)


class _Told:
    """What a guard that is nobody's child here tells of its child, in the words of `Popen`."""

    def __init__(self, told_fd: int) -> None:
        self._told = told_fd
        self._code: int | None = None
        self.pid = self._read()

    def poll(self) -> int | None:
        if self._code is None and select.select([self._told], [], [], 0)[0]:
            self._code = self._read()
            os.close(self._told)
        return self._code

    def _read(self) -> int:
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._told, 1)
            assert byte, "the guard, or the process that has loaded the product, is gone"
            line += byte
        return int(line)

    def wait(self, timeout_s: float | None) -> int:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("warm", timeout_s or 0)
            time.sleep(0.01)
        return code


_connections: list[socket.socket] = []


def _loaded() -> socket.socket:
    """To this process's one that has loaded the product; it ends with this one."""
    if not _connections:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * REQUEST_BYTES_MAX)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", "tests.support.warm", str(theirs.fileno())],
                cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        _connections.append(ours)

        def end() -> None:
            ours.close()
            process.wait()

        atexit.register(end)
    return _connections[0]


# -- the one that has loaded it ------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> None:
    """Until the other side is gone."""
    import gc

    import stablerail.cli
    import stablerail.wiring
    import stablerail.worker  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a copy has only the thread that made it"
    gc.freeze()
    guards: set[int] = set()
    while True:
        request, fds, *_ = socket.recv_fds(connection, REQUEST_BYTES_MAX, _FDS)
        if not request:
            return
        guards -= {pid for pid in guards if os.waitpid(pid, os.WNOHANG)[0]}
        pid = os.fork()
        if pid == 0:
            connection.close()
            _guard(*json.loads(request), *fds)
        guards.add(pid)
        for fd in fds:
            os.close(fd)


def _guard(arguments: list[str], env: dict[str, str], owner_fd: int, told_fd: int, log_fd: int) -> NoReturn:
    """As stablerail/dev/guard.py, whose child is a copy."""
    os.setsid()
    guard_pid = os.getpid()

    def exec_child(_command: list[str], _guard_pid: int) -> NoReturn:
        os.close(owner_fd)
        os.close(told_fd)
        _become(arguments, env, log_fd, guard_pid)

    report = os.dup(told_fd)  # closed by `run` once the pid is told
    code = guard.run(owner_fd, report, signal.SIGTERM, 3, [], exec_child)
    with suppress(BrokenPipeError):  # its owner is gone
        os.write(told_fd, f"{code}\n".encode())
    os._exit(0)


def _become(arguments: list[str], env: dict[str, str], log_fd: int, guard_pid: int) -> NoReturn:
    code = 1
    try:
        if not guard.tie(guard_pid):
            os._exit(127)
        for standard in (1, 2):
            os.dup2(log_fd, standard)
        os.close(log_fd)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = ["stablerail", *arguments]
        from stablerail.cli import app

        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as given:
        serve(given)
