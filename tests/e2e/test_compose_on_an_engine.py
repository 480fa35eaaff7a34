"""docker-compose.kafka.yml on a container engine, where there is one: the images built, the story, a stop and a start.

Only with STABLERAIL_TEST_PARTS=containers, and where the engine has the images that are not built here: nothing is pulled.
The ports are the compose file's own.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.support import containers
from tests.unit.test_containers import DOCKERFILE, ROOT, SERVICES

PROJECT = "stablerail-test"
PAYER = "0x70997970C51812dc3A010C7d01b50e0d17dc79C8"


def docker(*words: str) -> str:
    ran = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, f"docker {' '.join(words)}: {(ran.stdout + ran.stderr)[-3000:]}"
    return ran.stdout


def compose(*words: str) -> str:
    return docker("compose", "--file", str(ROOT / "docker-compose.kafka.yml"), "--project-name", PROJECT, *words)


def up() -> None:
    compose("up", "--detach", "--wait", "--wait-timeout", "600")


def ask(url: str, body: Any = None, key: str = "") -> Any:
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    with urlopen(Request(url, body and json.dumps(body).encode(), headers), timeout=10) as answer:
        return json.load(answer)


def until(holds: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 60
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within a minute: {what}"
        time.sleep(0.5)
    return found


@pytest.fixture
def product() -> Iterator[None]:
    """The compose file's services, healthy; nothing is left of them."""
    if not containers.wanted():
        pytest.skip(f"{containers.VARIABLE} is not containers")
    images = {service["image"] for service in SERVICES.values() if "build" not in service}
    images |= set(re.findall(r"^FROM (\S+:\S+)", DOCKERFILE, re.MULTILINE))
    for command in (["compose", "version"], ["image", "inspect", *sorted(images)]):
        try:
            ran = subprocess.run(["docker", *command], capture_output=True, text=True, timeout=60)
        except OSError as error:
            pytest.skip(f"no container engine: {error}")
        if ran.returncode != 0:
            pytest.skip(f"docker {' '.join(command)}: {ran.stderr.strip()[-300:]}")
    volumes = docker("volume", "ls", "--quiet")
    try:
        compose("build", "usdc")  # without BuildKit, all at once would each build the image
        up()
        yield
        assert "Read-only file system" not in compose("logs")
    finally:
        compose("down", "--volumes")
    assert docker("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}") == ""
    assert docker("volume", "ls", "--quiet") == volumes


def test_the_story_in_containers_and_again_after_a_stop(product: None) -> None:
    key = compose("exec", "-T", "api", "stablerail", "keys", "create", "--scope", "read").split()[-1]
    api = "http://127.0.0.1:8080/v1/users/ada"
    ask("http://127.0.0.1:7102/_control/review", {"externalUserId": "ada", "answer": "GREEN"})

    def wallet() -> str | None:
        with suppress(HTTPError):  # 404: she is not known yet
            wallets = {each["chain"]: each["address"] for each in ask(f"{api}/wallets", key=key)["wallets"]}
            return wallets.get("MATIC")
        return None

    def total() -> str:
        statuses = {each["status"] for each in ask(f"{api}/deposits", key=key)["deposits"]}
        balances = ask(f"{api}/balances", key=key)["balances"]
        return balances[0]["total"] if statuses == {"finalized"} else ""

    def send(amount: int) -> None:
        usdc = SERVICES["usdc"]["command"][-1]
        call = ("transfer(address,uint256)", address, str(amount))
        compose("exec", "-T", "anvil", "cast", "send", "--unlocked", "--from", PAYER, usdc, *call)

    address = until(wallet, "wallets")
    send(12_500_000)
    until(lambda: total() == "12.500000", "a deposit that is final")
    compose("stop")
    up()
    assert total() == "12.500000"
    send(1_000_000)
    until(lambda: total() == "13.500000", "a deposit after the start")
    compose("exec", "-T", "worker", "stablerail", "verify")
