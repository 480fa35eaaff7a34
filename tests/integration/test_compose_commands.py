"""What docker-compose.kafka.yml runs in its containers, run here as it is written: only addresses and folders differ."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from stablerail.dev.anvil import Anvil
from stablerail.dev.errors import PartFailed
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import SHORT_LIVED, Kafka
from stablerail.dev.processes import Child, free_port, port_answers, port_is_free, tail, wait_ready
from stablerail.dev.usdc import deploy_at
from stablerail.movements import MOVEMENTS
from stablerail.topics_admin import admin
from tests.support.containers import KafkaContainer
from tests.support.in_process import until
from tests.unit.test_containers import COMPOSE, ONCE, PROGRAMS, SERVICES

Translate = Callable[[str], str]
USDC = SERVICES["usdc"]["command"][-1]


def worker_ports(taken: set[int]) -> int:
    """The first of as many free ports in a row as there are movements, none of those that are to be another's."""
    while True:
        first = free_port()
        row = range(first, first + len(MOVEMENTS))
        if taken.isdisjoint(row) and all(map(port_is_free, row)):
            return first


def command(service: Mapping[str, Any], translate: Translate) -> list[str]:
    words = [*service.get("entrypoint", ["stablerail"]), *service["command"]]
    programs = {"python": [sys.executable], "stablerail": [sys.executable, "-m", "stablerail.cli"]}
    return [*programs[words[0]], *map(translate, words[1:])]


def environment(service: Mapping[str, Any], translate: Translate, prefix: str) -> dict[str, str]:
    """Nothing of this process's own but what finds Python."""
    own = {name: os.environ[name] for name in ("PATH", "SSL_CERT_FILE") if name in os.environ}
    given = {name: translate(value) for name, value in service.get("environment", {}).items()}
    # In its container a program has the ports, and in its network the names, to itself.
    apart = {
        "STABLERAIL_TOPIC_PREFIX": prefix,
        "STABLERAIL_GROUP_PREFIX": prefix,
        "STABLERAIL_WORKER_PORT": translate("6066"),
        "STABLERAIL_BRIDGE_PORT": translate("8081"),
        "STABLERAIL_API_PORT": translate("8080"),
    }
    return {**own, **given, **apart}


@pytest.fixture
def translate(kafka: Kafka, database: str, tmp_path: Path, tools: Tools) -> Translate:
    """From what a container sees to what is here."""
    ports = {port: free_port() for port in ("7101", "7102", "8080", "8081")}
    first = worker_ports(set(ports.values()))
    here = {
        COMPOSE["x-settings"]["STABLERAIL_DATABASE_URL"]: database,
        "kafka:9093": kafka.bootstrap,
        "/contracts": str(tools.contracts),
        "/tmp/stablerail": str(tmp_path / "data"),
        "0.0.0.0": "127.0.0.1",
        "//circle:": "//127.0.0.1:",
        "//bridge:": "//127.0.0.1:",
        **{name: str(port) for name, port in ports.items()},
        **{str(6066 + number): str(first + number) for number in range(len(MOVEMENTS))},
    }

    def translated(text: str) -> str:
        # all at once: what one word became may hold another, as port 26066 does
        there = "|".join(map(re.escape, sorted(here, key=len, reverse=True)))
        return re.sub(there, lambda found: here[found[0]], text)

    translated.here = here  # type: ignore[attr-defined]
    return translated


async def run_job(name: str, translate: Translate, prefix: str) -> None:
    words, env = command(SERVICES[name], translate), environment(SERVICES[name], translate, prefix)
    ran = await asyncio.to_thread(subprocess.run, words, env=env, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, f"{name}: {ran.stderr[-2000:]}"


@asynccontextmanager
async def running(name: str, translate: Translate, prefix: str, directory: Path) -> AsyncIterator[None]:
    """The service, healthy by its own health check."""
    service = SERVICES[name]
    env = environment(service, translate, prefix)
    child = Child(command(service, translate), log=directory / f"{name}.log", env=env)
    check = [sys.executable, *(translate(word) for word in service["healthcheck"]["test"][2:])]
    ports = [int(word.split("/")[2].partition(":")[2]) for word in check[3:]]

    async def healthy() -> bool:
        assert child.returncode is None, f"{name} ended: {tail(child.log)}"
        if not all(map(port_answers, ports)):
            return False  # for less than a process costs
        ran = await asyncio.to_thread(subprocess.run, check, capture_output=True, timeout=200)
        if ran.returncode != 0:
            await asyncio.sleep(1)  # a check is a process, and takes from the ones that it waits for
        return ran.returncode == 0

    try:
        await until(healthy, f"{name} healthy by its own check", timeout_s=300)
        yield
    finally:
        await asyncio.to_thread(child.stop)


async def test_everything_the_compose_file_runs_becomes_healthy_and_works_together(
    translate: Translate, tmp_path: Path, tools: Tools, topic_prefix: str
) -> None:
    with Anvil(tmp_path / "anvil", tools, block_time_s=0.5) as chain:
        translate.here["http://anvil:8545"] = chain.rpc_url  # type: ignore[attr-defined]
        await asyncio.gather(*(run_job(name, translate, topic_prefix) for name in ONCE))
        await run_job("usdc", translate, topic_prefix)
        assert await chain.rpc("eth_getCode", USDC, "latest") != "0x"
        order = ("kyc", "circle", *PROGRAMS)
        assert set(order) == {name for name, service in SERVICES.items() if "build" in service} - ONCE
        async with asyncio.TaskGroup() as group, aiohttp.ClientSession() as http:
            healthy = {name: asyncio.Event() for name in order}
            done = asyncio.Event()

            async def run(name: str) -> None:
                async with running(name, translate, topic_prefix, tmp_path):
                    healthy[name].set()
                    await done.wait()

            for name in order:
                group.create_task(run(name))
            await asyncio.gather(*(event.wait() for event in healthy.values()))
            review = {"externalUserId": "ada", "answer": "GREEN"}
            url = translate("http://127.0.0.1:7102/_control/review")
            assert (await http.post(url, json=review)).status == 202
            calls = translate("http://127.0.0.1:7101/_control/calls")

            async def wallets_asked_for() -> bool:
                async with http.get(calls) as answer:
                    return "POST /v1/w3s/developer/wallets" in await answer.text()

            await until(wallets_asked_for, "an approval that went through bridge, Kafka and worker to Circle")
            done.set()


async def test_a_health_check_fails_when_what_it_asks_is_not_ready() -> None:
    async def not_ready(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(not_ready, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for name in PROGRAMS:
            words = SERVICES[name]["healthcheck"]["test"]
            check = [sys.executable, *words[2:4], f"http://127.0.0.1:{port}/readyz"]
            assert (await asyncio.to_thread(subprocess.run, check, capture_output=True)).returncode == 1, name


async def test_usdc_is_not_deployed_where_the_chain_would_give_it_another_address(tmp_path: Path, tools: Tools) -> None:
    with Anvil(tmp_path / "anvil", tools) as chain:
        admin = (await chain.rpc("eth_accounts"))[9]
        await chain.rpc("anvil_setNonce", admin, "0x5")
        with pytest.raises(PartFailed, match="the chain gave USDC the address 0x"):
            await deploy_at(chain, tools.contracts, USDC)
        await chain.rpc("anvil_setCode", USDC, "0x60006000526020" + "6000f3")  # answers 0: no token that anybody has
        with pytest.raises(PartFailed, match="no USDC that was wholly deployed"):
            await deploy_at(chain, tools.contracts, USDC)


def broker_of_the_compose_file(_directory: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The compose file's variables, and what is another address here."""
    given = {name: str(value) for name, value in SERVICES["kafka"]["environment"].items()}
    ports = {port: str(free_port()) for port in ("9092", "9093", "9094")}
    return given, {
        "kafka:": "127.0.0.1:",
        ":9092": f":{ports['9092']}",
        ":9093": f":{ports['9093']}",
        ":9094": f":{ports['9094']}",
    }


def broker_of_the_tests(directory: Path) -> tuple[dict[str, str], dict[str, str]]:
    return KafkaContainer(directory).environment(), {":9094": f":{free_port()}"}


@pytest.mark.parametrize("broker", [broker_of_the_compose_file, broker_of_the_tests])
async def test_the_images_entry_point_makes_of_its_variables_a_broker_that_serves_on_every_listener(
    broker: Callable[[Path], tuple[dict[str, str], dict[str, str]]], tmp_path: Path, tools: Tools
) -> None:
    """Into an empty folder: in the container it is a tmpfs, all else is read-only."""
    variables, here = broker(tmp_path)
    for name in variables:
        for there, now in here.items():
            variables[name] = variables[name].replace(there, now)
    variables |= {"KAFKA_LOG_DIRS": str(tmp_path / "data"), "CLUSTER_ID": "5L6g3nShT-eMCtK--X86sw"}
    folders = {name: tmp_path / name for name in ("default", "mounted", "final")}
    for folder in folders.values():
        folder.mkdir()
    java: list[str | Path] = [tools.java, "-cp", os.pathsep.join(map(str, tools.jars))]
    arguments = [word for name, folder in folders.items() for word in (f"--{name}-configs-dir", folder)]
    setup = [*java, "kafka.docker.KafkaDockerWrapper", "setup", *arguments]
    ran = await asyncio.to_thread(subprocess.run, setup, env=variables, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    command = [*java[:1], *SHORT_LIVED, *java[1:], "kafka.Kafka", folders["final"] / "server.properties"]

    async def is_healthy(address: str) -> bool:
        check = [
            word.replace("kafka/9093", address.replace(":", "/")) for word in SERVICES["kafka"]["healthcheck"]["test"]
        ]
        return (await asyncio.to_thread(subprocess.run, check[1:], capture_output=True)).returncode == 0

    advertised = [each.partition("://")[2] for each in variables["KAFKA_ADVERTISED_LISTENERS"].split(",")]
    assert not await is_healthy(advertised[0])
    child = Child(command, log=tmp_path / "broker.log", orphan_signal=signal.SIGKILL)
    try:
        for bootstrap in advertised:
            port = int(bootstrap.rpartition(":")[2])
            await asyncio.to_thread(wait_ready, child, "Kafka", partial(port_answers, port), 60)
            assert await is_healthy(bootstrap)
            async with admin(bootstrap) as client:
                cluster = await client.describe_cluster()
            assert [f"{each['host']}:{each['port']}" for each in cluster["brokers"]] == [bootstrap]
    finally:
        await asyncio.to_thread(child.kill)
