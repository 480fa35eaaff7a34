"""Workers as processes on real Kafka and PostgreSQL: what they show, how they end, and what they say when they cannot."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import NewTopic

from stablerail.config import load_settings
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.processes import Child, free_port, port_is_free, tail
from stablerail.topics_admin import admin, create_missing
from stablerail.worker import faust_app
from stablerail.workers import seen
from tests.integration.test_runbook import day, follow
from tests.support import ledger_rig
from tests.support.ledger_rig import connect_to
from topics.catalog import CHAIN_HEADS, DEPOSITS_NOTIFIED, TOPICS

databases, dsn = ledger_rig.databases, ledger_rig.dsn

WAIT_S = 100.0


class Program:
    """`stablerail worker …` as a child, and its pages."""

    def __init__(self, directory: Path, environment: dict[str, str], *arguments: str) -> None:
        self.port = free_port()
        self.log = directory / f"{self.port}.log"
        command = [sys.executable, "-m", "stablerail.cli", "worker", "--port", str(self.port), *arguments]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("STABLERAIL_")}
        own = {
            "STABLERAIL_DATADIR": str(directory),
            "STABLERAIL_LOG_FORMAT": "json",
            "STABLERAIL_WORKER_UNASSIGNED_TIMEOUT_S": "2",
            "STABLERAIL_KAFKA_SESSION_TIMEOUT_S": "3",
        }
        self.child = Child(command, log=self.log, env={**inherited, **own, **environment})

    async def get(self, path: str, *, json_wanted: bool = False) -> tuple[int, str]:
        """Status and body; (0, "") where nobody listens."""
        headers = {"accept": "application/json"} if json_wanted else {}
        async with aiohttp.ClientSession() as session:
            try:
                async with session.get(f"http://127.0.0.1:{self.port}{path}", headers=headers) as answer:
                    return answer.status, await answer.text()
            except (aiohttp.ClientError, OSError):
                return 0, ""

    async def until(self, condition: Callable[[], Awaitable[Any]], what: str) -> Any:
        deadline = asyncio.get_running_loop().time() + WAIT_S
        while not (found := await condition()):
            said = tail(self.log)
            assert self.child.returncode is None, f"the worker ended with {self.child.returncode}: {said}"
            assert asyncio.get_running_loop().time() < deadline, f"{what} did not happen: {said}"
            await asyncio.sleep(0.1)
        return found

    async def until_assigned(self) -> None:
        async def assigned() -> bool:
            status, body = await self.get("/flow", json_wanted=True)
            return status == 200 and all(figures["partitions"] for figures in json.loads(body))

        await self.until(assigned, "the assignment")

    async def until_unready(self, why: str) -> None:
        """Until /readyz says so of the assignment. It may say something else first: that nothing is assigned yet."""

        async def trouble() -> bool:
            status, body = await self.get("/readyz")
            return status == 503 and why in json.loads(body)["trouble"].get("assignment", "")

        await self.until(trouble, f"being unready: {why}")


@pytest.fixture
async def start(kafka: Kafka, dsn: str, topic_prefix: str, tmp_path: Path) -> AsyncIterator[Callable[..., Program]]:
    started: list[Program] = []

    def make(*arguments: str, **environment: str) -> Program:
        base = {
            "STABLERAIL_KAFKA_BOOTSTRAP": kafka.bootstrap,
            "STABLERAIL_DATABASE_URL": dsn,
            "STABLERAIL_TOPIC_PREFIX": topic_prefix,
        }
        started.append(Program(tmp_path, {**base, **environment}, *(arguments or ("deposits",))))
        return started[-1]

    yield make
    for program in started:
        if program.child.returncode is None:
            await asyncio.to_thread(program.child.kill)


def listening(port: int) -> set[str]:
    """Addresses that have the port open, from the kernel."""
    found = set()
    for file, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add(socket.inet_ntop(family, b"".join(words)))
    return found


async def test_a_worker_shows_itself_on_loopback_only_and_ends_well_on_sigterm(
    start: Callable[..., Program], kafka: Kafka, topic_prefix: str, dsn: str
) -> None:
    async with admin(kafka.bootstrap) as client:
        await create_missing(client, topic_prefix, 1)
    worker = start("deposits", STABLERAIL_KAFKA_SESSION_TIMEOUT_S="60")  # what comes twice is counted twice
    await worker.until_assigned()
    assert listening(worker.port) == {"127.0.0.1"}
    assert json.loads((await worker.get("/healthz"))[1]) == {"status": "ok"}

    async def ready() -> bool:
        return await worker.get("/readyz") == (200, '{"status":"ready","trouble":{}}')

    await worker.until(ready, "being ready")
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap)
    await producer.start()
    for n in range(20):
        await producer.send(DEPOSITS_NOTIFIED.named(topic_prefix), b"not json", key=b"%d" % n)
    await producer.stop()

    async def refused() -> bool:
        figures = json.loads((await worker.get("/flow", json_wanted=True))[1])
        return any(f["stage"] == "credit_deposits" and f["refused"] == f["events_in"] == 20 for f in figures)

    await worker.until(refused, "twenty refusals")
    status, page = await worker.get("/flow")
    assert status == 200
    assert "credit_deposits" in page
    assert "finalize_deposits" in page

    async def metrics_of_a_ready_one() -> str:
        status, page = await worker.get("/metrics")
        return page if status == 200 and 'stablerail_worker_ready{movement="deposits"} 1.0' in page else ""

    metrics = await worker.until(metrics_of_a_ready_one, "metrics that say it is ready")
    assert 'stablerail_stage_events_total{outcome="rejected",stage="credit_deposits"} 20.0' in metrics
    assert 'stablerail_dead_letters_total{code="not_json",topic="deposits.notified.dlq"} 20.0' in metrics
    for path in ("/table/", "/router/", "/table/x/y", "/graph/", "/stats/x"):
        assert (await worker.get(path))[0] == 404, path

    assert await asyncio.to_thread(worker.child.stop, timeout_s=100) == 0
    connection = await connect_to(dsn)()
    assert await connection.fetchval("SELECT count(*) FROM inbox WHERE outcome = 'rejected'") == 20
    assert await connection.fetchval("SELECT count(*) FROM outbox") == 0, "nothing is left for another"
    await connection.close()
    assert "worker.stopped" in worker.log.read_text()


async def test_the_runbooks_day_of_a_blown_fuse(
    start: Callable[..., Program], kafka: Kafka, topic_prefix: str, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with admin(kafka.bootstrap) as client:
        await create_missing(client, topic_prefix, 1)
    worker = start("deposits", STABLERAIL_FUSE_RUN_EVENTS_MAX="5")
    await worker.until_assigned()
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap)
    await producer.start()
    for _ in range(20):
        await producer.send(DEPOSITS_NOTIFIED.named(topic_prefix), b"not json", key=b"one")
    await producer.stop()

    connection = await connect_to(dsn)()

    async def told() -> bool:
        return "fuse" in str([one.trouble for one in await seen(connection)])

    await worker.until(told, "the fuse")

    async def waiting() -> bool:
        figures = json.loads((await worker.get("/flow", json_wanted=True))[1])
        return any(f["stage"] == "credit_deposits" and f["lag"] >= 15 for f in figures)

    await worker.until(waiting, "the events that wait being told, though none was settled yet")
    settings = {"DATABASE_URL": dsn, "KAFKA_BOOTSTRAP": kafka.bootstrap, "TOPIC_PREFIX": topic_prefix}
    for name, value in settings.items():
        monkeypatch.setenv(f"STABLERAIL_{name}", value)
    await follow(day("A fuse is blown"), {}, monkeypatch)
    assert await asyncio.to_thread(worker.child.wait, 100) == 0
    assert await connection.fetchval("SELECT count(*) FROM inbox") <= 5, (
        "the topic is not emptied into the dead letters"
    )
    await connection.close()


async def test_a_worker_whose_topics_are_missing_says_so(start: Callable[..., Program]) -> None:
    worker = start()
    await worker.until_unready("no partition")
    assert (await worker.get("/healthz"))[0] == 200, "a restart would not help"
    assert await asyncio.to_thread(worker.child.stop, timeout_s=100) == 0


async def test_a_worker_whose_port_another_has_says_so_and_ends(start: Callable[..., Program]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        worker = start("treasury", "--port", str(other.getsockname()[1]))
        assert await asyncio.to_thread(worker.child.wait, 100) == 70
    assert "worker.port_taken" in worker.log.read_text()


async def test_a_worker_that_may_not_write_where_it_must_names_the_setting(start: Callable[..., Program]) -> None:
    worker = start("treasury", STABLERAIL_DATADIR="/proc/none")
    assert await asyncio.to_thread(worker.child.wait, 100) == 78
    assert "STABLERAIL_DATADIR: must be writable" in tail(worker.log, lines=1)


async def test_a_worker_that_the_database_does_not_let_in_is_to_be_started_again(
    start: Callable[..., Program], dsn: str
) -> None:
    worker = start("treasury", STABLERAIL_DATABASE_URL=f"{dsn}_that_is_not_there")
    assert await asyncio.to_thread(worker.child.wait, 100) == 70
    assert "worker.crashed" in tail(worker.log, lines=1)


async def test_a_worker_that_still_waits_for_kafka_ends_when_it_is_told_to(start: Callable[..., Program]) -> None:
    """Also as the first process of a container, which no signal ends that it does not handle."""
    worker = start("treasury", STABLERAIL_KAFKA_BOOTSTRAP="127.0.0.1:1")

    async def waits() -> bool:
        return "worker.waits" in worker.log.read_text()

    await worker.until(waits, "waiting")
    assert await asyncio.to_thread(worker.child.stop, timeout_s=100) == 0


def test_a_full_disk_is_no_wrong_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"):
        faust_app("treasury", load_settings(env_file=None, datadir=str(tmp_path)), free_port())


async def test_a_worker_whose_key_is_in_a_store_that_does_not_answer_is_to_be_started_again(
    start: Callable[..., Program],
) -> None:
    worker = start(
        "withdrawals",
        STABLERAIL_RPC_URLS='{"MATIC": ["http://127.0.0.1:1"]}',
        STABLERAIL_USDC_CONTRACTS=json.dumps({"MATIC": "0x" + "1" * 40}),
        STABLERAIL_WITHDRAWAL_CHAINS="MATIC",
        STABLERAIL_WITHDRAWAL_KEYSTORE="kms:alias/hot",
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
        AWS_REGION="eu-west-1",
        AWS_ACCESS_KEY_ID="x",
        AWS_SECRET_ACCESS_KEY="x",
    )
    assert await asyncio.to_thread(worker.child.wait, 100) == 70
    said = tail(worker.log, lines=1)
    assert "key_unavailable: STABLERAIL_WITHDRAWAL_KEYSTORE: kms:alias/hot: " in said


async def test_of_two_workers_for_one_partition_the_idle_one_says_so_and_takes_over(
    start: Callable[..., Program], kafka: Kafka, topic_prefix: str
) -> None:
    async with admin(kafka.bootstrap) as client:
        topics = [CHAIN_HEADS, DEPOSITS_NOTIFIED]
        await client.create_topics([NewTopic(topic.named(topic_prefix), 1, 1) for topic in topics])
        await create_missing(client, topic_prefix, 1)
    first = start()
    await first.until_assigned()
    second = start()

    async def one_is_idle() -> list[Program]:
        """[the idle one, the busy one]; nobody owns anything while they share it out."""
        said = [(await program.get("/readyz"), program) for program in (first, second)]
        found = [program for (status, _), program in sorted(said, key=lambda one: -one[0][0])]
        is_so = sorted(status for (status, _), _ in said) == [200, 503] and any(
            "no partition" in text for (_, text), _ in said
        )
        return found if is_so else []

    idle, busy = await second.until(one_is_idle, "one of them being idle")
    assert await asyncio.to_thread(busy.child.stop, timeout_s=100) == 0
    await idle.until_assigned()

    async def ready() -> bool:
        return (await idle.get("/readyz"))[0] == 200

    await idle.until(ready, "being ready")


async def test_a_worker_that_the_broker_refuses_for_its_session_timeout_says_so(
    start: Callable[..., Program], tools: Tools, tmp_path: Path, topic_prefix: str
) -> None:
    with Kafka(tmp_path / "strict", tools, props={"group.min.session.timeout.ms": 6000}) as strict:
        async with admin(strict.bootstrap) as client:
            await create_missing(client, topic_prefix, 1)
        worker = start(STABLERAIL_KAFKA_BOOTSTRAP=strict.bootstrap)
        await worker.until_unready("no partition")
        assert "InvalidSessionTimeout" in worker.log.read_text()


async def test_a_worker_waits_for_a_database_and_a_broker_that_come_later(
    start: Callable[..., Program], tmp_path: Path
) -> None:
    worker = start(STABLERAIL_KAFKA_BOOTSTRAP="127.0.0.1:1")

    async def waits() -> bool:
        return "worker.waits" in worker.log.read_text()

    await worker.until(waits, "saying that it waits")
    assert await asyncio.to_thread(worker.child.stop, timeout_s=100) != 70


async def test_every_movement_under_one_supervisor_ends_on_sigterm(
    start: Callable[..., Program], kafka: Kafka, topic_prefix: str
) -> None:
    async with admin(kafka.bootstrap) as client:
        await create_missing(client, topic_prefix, 1)
    while not port_is_free(1 + (port := free_port())):  # the second movement's
        pass
    program = start("chains", "deposits", "--port", str(port))
    second = Program.__new__(Program)
    program.port, second.__dict__ = port, {**program.__dict__, "port": port + 1}
    await second.until_assigned()

    async def ready() -> bool:
        return (await program.get("/readyz"))[0] == 200

    await program.until(ready, "being ready")
    assert await asyncio.to_thread(program.child.stop, timeout_s=100) == 0
    assert (await program.get("/healthz"))[0] == (await second.get("/healthz"))[0] == 0
    assert program.log.read_text().count('"worker.stopped"') == 2


async def test_a_worker_of_which_one_stage_has_no_topic_says_so(
    start: Callable[..., Program], kafka: Kafka, topic_prefix: str
) -> None:
    async with admin(kafka.bootstrap) as client:
        await create_missing(client, topic_prefix, 1, [topic for topic in TOPICS if topic is not CHAIN_HEADS])
    worker = start()
    await worker.until_unready("finalize_deposits has no partition")
