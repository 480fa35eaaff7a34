"""Children that end with their parent, and ports that nobody else takes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from stablerail.dev.errors import PartFailed

GUARD = Path(__file__).with_name("guard.py")

# Below the kernel's ephemeral range, so that no outgoing connection takes a port between the draw and the bind.
PORTS = range(20_000, 32_000)
_given: set[int] = set()
"""By this process: whoever is to listen there may still be starting."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now, and that this process has given to nobody else."""
    if len(_given) > len(PORTS) // 2:
        _given.clear()
    for _ in range(200):
        port = random.choice(PORTS)  # noqa: S311
        if port not in _given and port_is_free(port):
            _given.add(port)
            return port
    raise PartFailed("no free TCP port between 20000 and 31999")


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def port_answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Guard(Protocol):
    """What is asked of a guard's process, in the words of `Popen`."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


class Child:
    """A process in its own session whose output goes to a file, and which ends when this process ends (see guard.py).

    `pid` is the program's own, not the guard's. `orphan_signal` is what it gets when this process is gone; SIGKILL
    follows after `grace_s`.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        orphan_signal: int = signal.SIGTERM,
        grace_s: float = 3,
    ) -> None:
        arguments = [str(int(orphan_signal)), str(grace_s), *map(str, command)]
        self._begun(log, *_start_guard(arguments, log, env, cwd))

    def _begun(self, log: Path, guard: Guard, owner_fd: int, pid: int) -> None:
        """It runs below this guard as long as the descriptor is open."""
        self.log = log
        self._guard, self._owner_fd, self.pid = guard, owner_fd, pid
        self._closing = threading.Lock()
        try:
            self._pid_fd = os.pidfd_open(pid)
        except ProcessLookupError:  # it has ended already
            self._pid_fd = -1

    @property
    def returncode(self) -> int | None:
        """None while it runs; 128 + n when signal n ended it."""
        return self._guard.poll()

    def send_signal(self, number: int) -> None:
        if self._pid_fd >= 0 and self.returncode is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pid_fd, number)

    def wait(self, timeout_s: float | None = None) -> int:
        """The return code; raises TimeoutError."""
        try:
            code = self._guard.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"process {self.pid} still runs after {timeout_s} s") from None
        self._close()
        return code

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 10) -> int:
        """Ask with a signal, wait, then SIGKILL. A stopped (SIGSTOP) child is woken, or it could not hear."""
        self.send_signal(number)
        self.send_signal(signal.SIGCONT)
        try:
            return self.wait(timeout_s)
        except TimeoutError:
            return self.kill()

    def kill(self) -> int:
        self.send_signal(signal.SIGKILL)
        return self.wait(10)

    def _close(self) -> None:
        with self._closing:  # one thread may wait for the end while another stops it
            for descriptor in (self._owner_fd, self._pid_fd):
                if descriptor >= 0:
                    os.close(descriptor)
            self._owner_fd = self._pid_fd = -1


def _start_guard(
    arguments: list[str], log: Path | None, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> tuple[subprocess.Popen[bytes], int, int]:
    """The guard's process, the descriptor that keeps it waiting, and the pid it reports."""
    owner_read, owner_write = os.pipe()
    report_read, report_write = os.pipe()
    with open(log or os.devnull, "ab") as output:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), str(owner_read), str(report_write), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=env,
            cwd=cwd,
            pass_fds=(owner_read, report_write),
            start_new_session=True,
        )
    os.close(owner_read)
    os.close(report_write)
    with open(report_read, encoding="ascii") as report:
        line = report.readline()
    if not line:
        os.close(owner_write)
        raise PartFailed(f"the guard of {arguments[-1]} ended with {guard.wait()}")
    return guard, owner_write, int(line)


def wait_ready(child: Child, name: str, ready: Callable[[], bool], timeout_s: float) -> None:
    """Until `ready()`. Raises PartFailed with the log's end when the child ends or the time is over."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        code = child.returncode
        if code is not None:
            raise PartFailed(f"{name} ended with {code}: {tail(child.log)}", f"log: {child.log}")
        if time.monotonic() > deadline:
            raise PartFailed(f"{name} was not ready within {timeout_s:g} s: {tail(child.log)}", f"log: {child.log}")
        time.sleep(0.02)


def tail(log: Path, lines: int = 5) -> str:
    """What it says last, without the indented lines of stack traces."""
    said = log.read_text(errors="replace").splitlines() if log.exists() else []
    return " | ".join([line for line in said if line[:1].strip()][-lines:])


@contextmanager
def scratch_directory(prefix: str = "stablerail-") -> Iterator[Path]:
    """A temporary directory that is removed at the end, also when this process is killed."""
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        guard, owner_fd, _ = _start_guard(["remove", str(directory)], None)
    except BaseException:
        directory.rmdir()
        raise
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            guard.kill()
        os.close(owner_fd)
        guard.wait()
