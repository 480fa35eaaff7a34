"""Kafka's jars, anvil and USDC's bytecode, got once into a cache by the ordinary clients of their registries.

kafka.lock    what jgo resolves:          group:artifact:version  sha256  bytes
chain.lock    files of the npm packages:  path in node_modules    sha256  bytes
package.json, package-lock.json           what npm installs

Locks name no address: the registries are those the machine's own settings name. jgo only warns about a bad checksum and
keeps downloads that were cut off, and npm silently leaves out an optional package (anvil's binary is one) whose hash is
wrong; so everything is staged, compared with the locks, then renamed into place, and compared again before each use.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from stablerail.dev.errors import DevError, FetchFailed
from stablerail.dev.toolchain import Toolchain, preflight

HERE = Path(__file__).parent
CACHE_ENV = "STABLERAIL_DEV_CACHE"
DOWNLOADS_AT_ONCE = 8
DOWNLOAD_TRIES = 3
DOWNLOAD_TIMEOUT_S = 60  # jgo's own 10 s is short for the 10 MB jars


@dataclass(frozen=True)
class Locked:
    """One line of a lock file."""

    name: str
    sha256: str
    size_bytes: int

    @property
    def file_name(self) -> str:
        """`group:artifact:version` -> `artifact-version.jar`; a path -> its last part."""
        if ":" in self.name:
            _, artifact, version = self.name.split(":")
            return f"{artifact}-{version}.jar"
        return Path(self.name).name

    def matches(self, path: Path) -> bool:
        if not path.is_file() or path.stat().st_size != self.size_bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256


@dataclass(frozen=True)
class Tools:
    """Everything the parts are started from, checked."""

    java: Path
    postgres_bin: Path
    jars: tuple[Path, ...]
    anvil: Path
    contracts: Path
    """The directory of FiatTokenV2_2.json, FiatTokenProxy.json and SignatureChecker.json."""


def default_cache() -> Path:
    """`STABLERAIL_DEV_CACHE`, else `.cache/` beside the packages of a checkout, else the user's own cache."""
    if named := os.environ.get(CACHE_ENV):
        return Path(named).absolute()
    checkout = HERE.parent.parent
    if (checkout / "pyproject.toml").exists():
        return checkout / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stablerail"


def read_lock(path: Path) -> list[Locked]:
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines() if line)
    return [Locked(name, sha256, int(size)) for name, sha256, size in lines]


def fetch(cache: Path | None = None, console: Console | None = None) -> Tools:
    """The tools, downloading what the cache lacks. Safe beside other processes that do the same.

    Raises ToolsMissing before anything starts, FetchFailed with the file's name and the reason.
    """
    toolchain = preflight()
    cache = (cache or default_cache()).absolute()
    kafka, chain = read_lock(HERE / "kafka.lock"), read_lock(HERE / "chain.lock")
    jars, evm = cache / "kafka", cache / "chain"
    if not (_all_match(kafka, jars) and _all_match(chain, evm)):
        cache.mkdir(parents=True, exist_ok=True)
        with _only_one(cache), _staging(cache) as staging, _progress(console) as progress:
            _fetch_jars(kafka, jars, staging, progress)
            _fetch_chain(chain, evm, staging, toolchain, progress)
    return Tools(
        java=toolchain.java,
        postgres_bin=toolchain.postgres_bin,
        jars=tuple(sorted(jars / locked.file_name for locked in kafka)),
        anvil=evm / "anvil",
        contracts=evm,
    )


def _all_match(lock: list[Locked], directory: Path) -> bool:
    """Hashing all of it takes under 0.1 s; reading the sizes first finds what is absent sooner."""
    return all(locked.matches(directory / locked.file_name) for locked in lock)


@contextmanager
def _only_one(cache: Path) -> Iterator[None]:
    """One process fetches, the others wait and find it done. The kernel lets go when the holder dies."""
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _staging(cache: Path) -> Iterator[Path]:
    """Beside the final place, so that a rename moves; under the lock, so any left from a killed run is nobody's."""
    for left in cache.glob("staging-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="staging-", dir=cache) as directory:
        yield Path(directory)


@contextmanager
def _progress(console: Console | None) -> Iterator[Progress]:
    columns = (TextColumn("{task.description:32}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=console is None) as progress:
        yield progress


def _fetch_jars(lock: list[Locked], target: Path, staging: Path, progress: Progress) -> None:
    missing = [locked for locked in lock if not locked.matches(target / locked.file_name)]
    if not missing:
        return
    target.mkdir(parents=True, exist_ok=True)
    task = progress.add_task("Apache Kafka", total=len(missing))
    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
        jobs = [pool.submit(_fetch_jar, locked, target, staging) for locked in missing]
        try:
            for job in as_completed(jobs):
                job.result()
                progress.advance(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _fetch_jar(locked: Locked, target: Path, staging: Path) -> None:
    from jgo.maven import MavenContext  # 0.2 s, and needed once per machine

    reason = ""
    for _ in range(DOWNLOAD_TRIES):
        try:
            context = MavenContext(repo_cache=staging / "maven", timeout=DOWNLOAD_TIMEOUT_S)
            got = Path(context.create_dependency(locked.name).artifact.resolve())
        except Exception as error:  # jgo raises RuntimeError, requests' errors and OSError
            reason = f"{type(error).__name__}: {str(error)[-200:]}"
            continue
        if locked.matches(got):
            os.replace(got, target / locked.file_name)
            return
        reason = "what arrived is not what kafka.lock names"
        got.unlink()
    raise FetchFailed(f"cannot get {locked.name}: {reason}", "check the connection to the Maven repository, try again")


def _fetch_chain(lock: list[Locked], target: Path, staging: Path, toolchain: Toolchain, progress: Progress) -> None:
    if _all_match(lock, target):
        return
    task = progress.add_task("anvil and USDC's contracts", total=len(lock))
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, staging / name)
    # `npm ci` fails on anvil's packages for other platforms, which need not exist; `npm install` follows the lock too.
    command = [
        *toolchain.npm,
        "install",
        "--ignore-scripts",
        "--no-save",
        "--no-audit",
        "--no-fund",
        "--loglevel=error",
    ]
    path = os.pathsep.join([str(toolchain.node_directory), os.environ.get("PATH", os.defpath)])
    ran = _run(command, cwd=staging, env={**os.environ, "PATH": path})
    target.mkdir(parents=True, exist_ok=True)
    for locked in lock:
        got = staging / "node_modules" / locked.name
        if not locked.matches(got):
            what = "is not what chain.lock names" if got.exists() else f"did not arrive: {ran[-200:]}"
            raise FetchFailed(f"{locked.name} {what}", "check the connection to the npm registry, try again")
        if locked.file_name == "anvil":
            _run([str(got), "--version"], cwd=staging, env=dict(os.environ))
        os.replace(got, target / locked.file_name)
        progress.advance(task)


def _run(command: list[str], *, cwd: Path, env: dict[str, str]) -> str:
    """Its output. Raises FetchFailed with the end of it."""
    try:
        ran = subprocess.run(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=True
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip()[-400:]
        raise FetchFailed(f"{Path(command[0]).name} ended with {error.returncode}: {said}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchFailed(f"cannot run {command[0]}: {error}") from error
    return (ran.stdout + ran.stderr).strip()


def main() -> None:
    """Before a test run, so that a download counts against no test's time limit."""
    try:
        fetch(console=Console(stderr=True))
    except DevError as error:
        sys.exit(f"{error.code}: {error}")
    except OSError as error:
        sys.exit(f"{default_cache()} takes nothing: {error}")


if __name__ == "__main__":
    main()
