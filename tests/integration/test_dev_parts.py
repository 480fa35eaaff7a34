"""The embedded parts are real, and none of them outlives the process that started it."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import NoError, TopicAlreadyExistsError
from dotenv import dotenv_values

from stablerail.dev.anvil import Anvil, RpcRefused
from stablerail.dev.errors import NotRunning, PartFailed
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.parts import Parts, dev_down
from stablerail.dev.postgres import Postgres
from stablerail.dev.processes import Child, free_port, scratch_directory
from stablerail.dev.usdc import Usdc

ROOT = Path(__file__).parents[2]
TEN_MB = 10 * 1024 * 1024
TRANSFER_TOPIC = "0xddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"


def new_address() -> str:
    return "0x" + secrets.token_hex(20)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float = 100) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


async def create_topic(bootstrap: str, name: str, replicas: int = 1) -> None:
    """Asks until it is there: a broker that has just come may not know the others yet."""
    admin, done = AIOKafkaAdminClient(bootstrap_servers=bootstrap), (NoError.errno, TopicAlreadyExistsError.errno)
    await admin.start()
    try:
        async with asyncio.timeout(100):
            while (await admin.create_topics([NewTopic(name, 1, replicas)])).topic_errors[0][1] not in done:
                await asyncio.sleep(0.1)
    finally:
        await admin.close()


async def produce(bootstrap: str, topic: str, *values: bytes) -> None:
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", max_request_size=2 * TEN_MB) as producer:
        for value in values:
            await producer.send_and_wait(topic, value)


async def consume(bootstrap: str, topic: str, count: int) -> list[bytes]:
    options = {"auto_offset_reset": "earliest", "fetch_max_bytes": 2 * TEN_MB, "max_partition_fetch_bytes": 2 * TEN_MB}
    async with AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, **options) as consumer, asyncio.timeout(100):
        return [(await consumer.getone()).value for _ in range(count)]


async def test_the_broker_takes_a_record_of_ten_megabytes(kafka: Kafka, topic_prefix: str) -> None:
    topic = topic_prefix + "large"
    await create_topic(kafka.bootstrap, topic)
    record = secrets.token_bytes(TEN_MB)
    await produce(kafka.bootstrap, topic, record)
    assert await consume(kafka.bootstrap, topic, 1) == [record]


async def test_a_broker_killed_and_started_again_has_what_it_acknowledged(scratch: Path, tools: Tools) -> None:
    with Kafka(scratch / "kafka-killed", tools) as broker:
        await create_topic(broker.bootstrap, "kept")
        await produce(broker.bootstrap, "kept", b"1", b"2", b"3")
        broker.kill(1)
        assert not broker.is_running()
        await asyncio.to_thread(broker.start)  # from a thread that ends: the broker must not end with it
        assert await consume(broker.bootstrap, "kept", 3) == [b"1", b"2", b"3"]


async def test_three_brokers_serve_on_when_one_is_killed(scratch: Path, tools: Tools) -> None:
    with Kafka(scratch / "kafka-three", tools, nodes=3) as cluster:
        await create_topic(cluster.bootstrap, "kept", replicas=3)
        await produce(cluster.bootstrap, "kept", b"before")
        cluster.kill(2)
        await produce(cluster.bootstrap, "kept", b"after")
        assert await consume(cluster.bootstrap, "kept", 2) == [b"before", b"after"]
        cluster.start(2)
        assert cluster.is_running(2)


def test_a_broker_that_cannot_start_is_refused_with_its_own_words(scratch: Path, tools: Tools) -> None:
    broker = Kafka(scratch / "kafka-refused", tools, props={"log.segment.bytes": "many"})
    with pytest.raises(PartFailed, match=r"Kafka node 1 ended with 1: .*log\.segment\.bytes"):
        broker.start()


async def test_each_test_has_an_empty_database_of_its_own(database: str, postgres: Postgres) -> None:
    assert database != postgres.dsn
    connection = await asyncpg.connect(database)
    assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
    await connection.close()


async def test_committed_rows_survive_a_server_that_is_killed(scratch: Path, tools: Tools) -> None:
    with Postgres(scratch / "postgres-killed", tools, {"wal_level": "logical"}) as server:
        dsn = server.create_database("kept")
        connection = await asyncpg.connect(dsn)
        await connection.execute("CREATE TABLE t AS SELECT 1 AS n")
        server.kill()
        server.settings["work_mem"] = "5MB"
        server.start()
        server.stop_immediately()
        server.start()
        connection.terminate()
        connection = await asyncpg.connect(dsn)
        assert await connection.fetchval("SELECT n FROM t") == 1
        assert await connection.fetchval("SHOW work_mem") == "5MB"
        assert await connection.fetchval("SHOW wal_level") == "logical"
        await connection.close()


async def test_the_database_is_closed_to_who_lacks_its_password(postgres: Postgres) -> None:
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(postgres.dsn.replace(postgres.password, "guess"))


async def test_usdc_moves_and_refuses_as_circles_own_contract_does(usdc: Usdc) -> None:
    wallet, other = new_address(), new_address()
    await usdc.transfer(wallet, 5_000_000)
    await usdc.anvil.wait_mined(await usdc.transfer(other, 1_500_000, sender=wallet))
    assert (await usdc.balance_of(wallet), await usdc.balance_of(other)) == (3_500_000, 1_500_000)
    await usdc.blacklist(wallet)
    with pytest.raises(RpcRefused, match="Blacklistable: account is blacklisted"):
        await usdc.transfer(wallet, 1)


async def test_one_transaction_makes_several_transfers_to_one_wallet(usdc: Usdc) -> None:
    wallet = new_address()
    receipt = await usdc.anvil.wait_mined(await usdc.transfer_many([(wallet, 7), (wallet, 9), (wallet, 7)]))
    logs = [log for log in receipt["logs"] if log["topics"][0] == TRANSFER_TOPIC]
    assert [int(log["data"], 16) for log in logs] == [7, 9, 7]
    assert {log["topics"][2][-40:] for log in logs} == {wallet[2:]}
    assert await usdc.balance_of(wallet) == 23


async def test_the_chain_mines_on_request_and_on_a_timer(scratch: Path, tools: Tools) -> None:
    with Anvil(scratch / "anvil-timed", tools, chain_id=137, block_time_s=0.2) as chain:
        assert int(await chain.rpc("eth_chainId"), 16) == 137
        head = await chain.mine(12)
        async with asyncio.timeout(100):
            while int(await chain.rpc("eth_blockNumber"), 16) < head + 2:
                await asyncio.sleep(0.05)


def test_a_child_started_by_a_thread_outlives_the_thread(scratch: Path) -> None:
    children: list[Child] = []
    thread = threading.Thread(target=lambda: children.append(Child(["sleep", "60"], log=scratch / "sleep.log")))
    thread.start()
    thread.join()
    assert is_alive(children[0].pid)
    assert children[0].stop(timeout_s=100) == 128 + signal.SIGTERM
    assert not is_alive(children[0].pid)


def test_a_child_that_will_not_hear_is_killed(scratch: Path) -> None:
    log = scratch / "deaf.log"
    child = Child(["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 0.1; done"], log=log)
    wait_until(lambda: "deaf" in log.read_text())
    assert child.stop(timeout_s=0.3) == 128 + signal.SIGKILL


def test_a_program_that_does_not_exist_is_named_in_the_log(scratch: Path) -> None:
    child = Child(["/no/such/program"], log=scratch / "absent.log")
    assert child.wait(100) == 127
    assert "cannot run /no/such/program" in (scratch / "absent.log").read_text()


def test_a_drawn_port_is_below_the_range_of_outgoing_connections() -> None:
    assert all(20_000 <= free_port() < 32_000 for _ in range(20))


def test_a_scratch_directory_is_gone_at_the_end() -> None:
    with scratch_directory() as directory:
        (directory / "file").write_text("x")
    assert not directory.exists()


OWNER = """
import asyncio, json, sys, time
from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import fetch
from stablerail.dev.kafka import Kafka
from stablerail.dev.parts import Parts, dev_down
from stablerail.dev.postgres import Postgres
from stablerail.dev.processes import scratch_directory

tools = fetch()
with scratch_directory() as directory:
    broker, server, chain = Kafka(directory / "k", tools), Postgres(directory / "p", tools), Anvil(directory / "a", tools)
    pids = [part.start().pid for part in (server, chain)] + [broker.start().pid()]
    print(json.dumps({"directory": str(directory), "pids": pids}), flush=True)
    time.sleep(600)
"""


def test_nothing_is_left_when_the_owner_is_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        started = json.loads(owner.stdout.readline())
        backends = [int(p) for p in os.listdir("/proc") if p.isdigit() and _parent(int(p)) == started["pids"][0]]
        assert backends, "PostgreSQL has background processes"
        assert all(map(is_alive, started["pids"]))
        owner.kill()
    wait_until(lambda: not any(map(is_alive, started["pids"] + backends)))
    wait_until(lambda: not Path(started["directory"]).exists())


UP = "from pathlib import Path; from stablerail.dev.parts import dev_up; import sys; dev_up(Path(sys.argv[1]))"


def test_up_prints_its_settings_and_down_stops_it_from_another_process(scratch: Path) -> None:
    directory = scratch / "up, é"
    with pytest.raises(NotRunning):
        dev_down(directory)
    command = [sys.executable, "-c", UP, str(directory)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        printed = "".join(up.stdout.readline() for _ in range(5))
        file = directory / "env"
        assert printed == file.read_text()
        settings = dotenv_values(file)
        assert json.loads(settings["STABLERAIL_CHAIN_IDS"] or "") == {"MATIC": 80002}
        sourced = ["sh", "-c", '. "$0" && printf %s "$STABLERAIL_RPC_URLS"', str(file)]
        assert subprocess.check_output(sourced, text=True) == settings["STABLERAIL_RPC_URLS"]
        again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert "parts already run in" in again.stderr
        pids = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _names(pid, directory)]
        assert len(pids) >= 3
        dev_down(directory, timeout_s=100)
        assert up.wait(100) == 0
    wait_until(lambda: not any(map(is_alive, pids)))
    with pytest.raises(NotRunning):
        dev_down(directory)


# With a stand-in for initdb that never ends.
STARTING = """
import dataclasses, sys
from pathlib import Path
from stablerail.dev import parts
tools = dataclasses.replace(parts.fetch(), postgres_bin=Path(sys.argv[2]))
parts.fetch = lambda console: tools
parts.dev_up(Path(sys.argv[1]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_nothing_is_left_of_what_was_still_starting(tmp_path: Path, number: int, code: int) -> None:
    directory, told = tmp_path / "up", tmp_path / "pid"
    initdb = tmp_path / "initdb"
    initdb.write_text(f"#!/bin/sh\necho $$ > {told}.new && mv {told}.new {told}\nexec sleep 600\n")
    initdb.chmod(0o755)
    command = [sys.executable, "-c", STARTING, str(directory), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as up:
        wait_until(lambda: told.exists() or up.poll() is not None)
        up.send_signal(number)
        assert up.wait(100) == code
        assert up.stdout is not None
        assert up.stdout.read() == ""
    wait_until(lambda: not is_alive(int(told.read_text())))
    wait_until(lambda: not any(_names(int(pid), directory) for pid in filter(str.isdigit, os.listdir("/proc"))))


def test_a_directory_that_takes_nothing_is_named_without_a_traceback(tmp_path: Path) -> None:
    (file := tmp_path / "file").touch()
    command = [sys.executable, "-m", "stablerail.cli", "dev", "up", "--directory", str(file)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr == f"[Errno 17] File exists: '{file}'\n"


async def test_each_start_begins_empty(scratch: Path, tools: Tools) -> None:
    directory = scratch / "again"
    for _ in range(2):
        async with Parts(directory, tools, block_time_s=1) as parts:
            assert parts.failure() is None
            with pytest.raises(asyncpg.InvalidCatalogNameError):
                await asyncpg.connect(parts.postgres.dsn_of("kept"))
            await asyncio.to_thread(parts.postgres.create_database, "kept")
            await parts.anvil.wait_mined(await parts.usdc.transfer(new_address(), 1))
            await asyncio.to_thread(parts.kafka.kill)
            assert parts.failure() == "Kafka"


async def test_a_directory_with_anything_else_in_it_is_not_emptied(scratch: Path, tools: Tools) -> None:
    (scratch / "thesis").mkdir()
    (scratch / "thesis" / "chapter1").write_text("x")
    with pytest.raises(PartFailed, match="holds chapter1"):
        await Parts(scratch / "thesis", tools).start()
    assert (scratch / "thesis" / "chapter1").exists()


def _names(pid: int, directory: Path) -> bool:
    """Whether the process was told this directory, in its arguments or its environment."""
    try:
        told = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return str(directory).encode() in told


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
