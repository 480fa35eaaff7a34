"""Kafka, PostgreSQL and a chain with USDC together in one directory: what `make demo` and `stablerail dev up` run on.

Each start begins empty. The chain cannot be kept (anvil holds it in memory), and a ledger that remembers deposits of a
chain that is gone would be wrong for a reason nobody wants to study.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from rich.console import Console

from stablerail.dev.anvil import Anvil
from stablerail.dev.errors import NotRunning, PartFailed
from stablerail.dev.fetch import Tools, fetch
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from stablerail.dev.usdc import Usdc, deploy

DIRECTORY = Path(".dev/parts")
BLOCK_TIME_S = 2  # Polygon's
DOWN_TIMEOUT_S = 30.0


class Parts:
    """`async with Parts(directory, tools) as parts:` `parts.kafka`, `.postgres`, `.anvil`, `.usdc`.

    Refuses with PartFailed a directory in which other parts run, or which holds anything that is not of parts.
    """

    def __init__(self, directory: Path, tools: Tools, *, block_time_s: int = BLOCK_TIME_S) -> None:
        self.directory = directory.absolute()
        self._tools = tools
        self._block_time_s = block_time_s
        self._lock: IO[str] | None = None
        self.kafka: Kafka
        self.postgres: Postgres
        self.anvil: Anvil
        self.usdc: Usdc

    async def start(self) -> Self:
        self._lock = _claim(self.directory)
        try:
            self.kafka = Kafka(self.directory / "kafka", self._tools)
            self.postgres = Postgres(self.directory / "postgres", self._tools)
            self.anvil = Anvil(self.directory / "anvil", self._tools)
            for outcome in await self._started():
                if isinstance(outcome, BaseException):
                    raise outcome
            self.usdc = await deploy(self.anvil, self._tools.contracts)
            await self.anvil.mine_every(self._block_time_s)
        except BaseException:
            self.stop()
            raise
        env = self.directory / "env"
        env.touch(mode=0o600)
        env.write_text("".join(f"{line}\n" for line in self.lines()))
        return self

    async def _started(self) -> list[Any]:
        """What came of each start: whatever comes of it, none is still starting when this returns or raises."""
        starts: tuple[Callable[[], object], ...] = (self.kafka.start, self.postgres.start, self.anvil.start)
        starting = asyncio.gather(*(asyncio.to_thread(start) for start in starts), return_exceptions=True)
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            while not starting.done():
                await asyncio.to_thread(self._end)
                await asyncio.wait([starting], timeout=0.05)
            raise

    def stop(self) -> None:
        """Ends what runs; the directory stays, with logs and data, until the next start."""
        self._end()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _end(self) -> None:
        for name in ("anvil", "kafka", "postgres"):
            if (part := getattr(self, name, None)) is not None:
                part.stop()

    def environment(self) -> Mapping[str, str]:
        """The settings of a program that uses these parts (see stablerail/config.py)."""
        return {
            "STABLERAIL_KAFKA_BOOTSTRAP": self.kafka.bootstrap,
            "STABLERAIL_DATABASE_URL": self.postgres.dsn,
            "STABLERAIL_RPC_URLS": json.dumps({"MATIC": [self.anvil.rpc_url]}),
            "STABLERAIL_CHAIN_IDS": json.dumps({"MATIC": self.anvil.chain_id}),
            "STABLERAIL_USDC_CONTRACTS": json.dumps({"MATIC": self.usdc.address}),
        }

    def lines(self) -> list[str]:
        """The environment, quoted so that a shell and `.env` both read it."""
        return [f"{name}={shlex.quote(value)}" for name, value in self.environment().items()]

    def failure(self) -> str | None:
        """The name of a part that ended by itself, None while all run."""
        running = {
            "Kafka": self.kafka.is_running(),
            "PostgreSQL": self.postgres.is_running,
            "anvil": self.anvil.is_running,
        }
        return next((name for name, runs in running.items() if not runs), None)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.stop)


def dev_up(directory: Path = DIRECTORY, console: Console | None = None, *, block_time_s: int = BLOCK_TIME_S) -> None:
    """Fetches, starts, prints the settings, and stays until Ctrl-C, SIGTERM or `dev_down`. Raises DevError."""
    console = console or Console()
    tools = fetch(console=console)
    asyncio.run(until_signal(_stay_up(Parts(directory, tools, block_time_s=block_time_s), console)))


async def until_signal(work: Coroutine[Any, Any, None]) -> None:
    """Cancels the work at SIGINT or SIGTERM, and lets it clean up; more signals change nothing."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    task, interrupt = asyncio.create_task(work), asyncio.create_task(told.wait())
    await asyncio.wait({task, interrupt}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        interrupt.cancel()
        return task.result()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return None


async def _stay_up(parts: Parts, console: Console) -> None:
    async with parts:
        for line in parts.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        told = f"the same in {parts.directory / 'env'}; Ctrl-C or `stablerail dev down` stops"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
        while True:
            if ended := parts.failure():
                raise PartFailed(f"{ended} ended by itself", f"logs: {parts.directory}")
            await asyncio.sleep(0.5)


def dev_down(directory: Path = DIRECTORY, timeout_s: float = DOWN_TIMEOUT_S) -> None:
    """Stops the `dev up` (or demo) of that directory, whichever shell it runs in. Raises NotRunning, PartFailed."""
    lock = directory.absolute() / "lock"
    if not lock.exists() or _is_released(lock):
        raise NotRunning(f"no parts run in {directory}")
    pid = int(lock.read_text())
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while not _is_released(lock):
        if time.monotonic() > deadline:
            raise PartFailed(f"process {pid} still runs after {timeout_s:g} s", f"kill -9 {pid} ends its parts too")
        time.sleep(0.05)


def _claim(directory: Path) -> IO[str]:
    """An emptied directory and the lock on it, which the kernel releases when this process ends."""
    directory.mkdir(parents=True, exist_ok=True)
    known = {"lock", "env", "kafka", "postgres", "anvil"}
    if foreign := sorted({path.name for path in directory.iterdir()} - known):
        raise PartFailed(f"{directory} holds {foreign[0]}, which is not of ours", "use another directory")
    lock = (directory / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise PartFailed(f"parts already run in {directory}", "stablerail dev down, or use another directory") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    for name in known - {"lock"}:
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return lock


def _is_released(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
