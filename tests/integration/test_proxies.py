"""The proxies in front of the real servers: what is held is exactly at the boundary it is said to be at."""

import asyncio
import io
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import pytest
from aiohttp import web
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from tests.support.proxies import (
    HttpProxy,
    KafkaProxy,
    PostgresProxy,
    commit,
    commit_after,
    http_request,
    offset_commit,
    produce,
    sql_contains,
)

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

# What asyncpg raises when its connection ends under it, depending on what it was doing.
LOST = (asyncpg.PostgresError, asyncpg.InterfaceError, ConnectionError)

# A worker in small: one transaction, then it says whether it was told of its end.
WORKER = """
import asyncio, asyncpg, sys

async def main():
    connection = await asyncpg.connect(sys.argv[1])
    async with connection.transaction():
        await connection.execute("INSERT INTO ledger (id) VALUES ($1)", 1)
    print("committed", flush=True)
    await connection.close()

asyncio.run(main())
"""


# PostgreSQL


@pytest.fixture
def pg(database: str) -> Iterator[PostgresProxy]:
    server = urlsplit(database)
    assert server.hostname is not None
    assert server.port is not None
    with PostgresProxy(server.hostname, server.port) as proxy:
        yield proxy


@pytest.fixture
async def observer(database: str) -> AsyncIterator[Connection]:
    """A connection past the proxy."""
    connection = await asyncpg.connect(database)
    await connection.execute("CREATE TABLE ledger (id int PRIMARY KEY, note text); CREATE TABLE outbox (id int)")
    yield connection
    await connection.close()


def through(proxy: PostgresProxy, dsn: str) -> str:
    return urlsplit(dsn)._replace(netloc=f"{urlsplit(dsn).netloc.rpartition('@')[0]}@{proxy.address}").geturl()


async def rows(observer: Connection) -> list[int]:
    return [row["id"] for row in await observer.fetch("SELECT id FROM ledger ORDER BY id")]


async def rows_at_rest(observer: Connection) -> list[int]:
    """The rows after every transaction that wrote to the table has ended."""
    await observer.execute("BEGIN; LOCK TABLE ledger; COMMIT")
    return await rows(observer)


async def insert(connection: Connection, *ids: int, outbox: bool = False) -> None:
    async with connection.transaction():
        for number in ids:
            await connection.execute("INSERT INTO ledger (id) VALUES ($1)", number)
        if outbox:
            await connection.execute("INSERT INTO outbox (id) VALUES ($1)", ids[0])


@pytest.mark.parametrize(("where", "seen"), [("request", []), ("reply", [1])])
async def test_a_row_is_visible_when_the_reply_to_commit_is_held_and_not_when_the_commit_is(
    pg: PostgresProxy, database: str, observer: Connection, where: Any, seen: list[int]
) -> None:
    client = await asyncpg.connect(through(pg, database))
    hold = pg.hold(commit(), where)
    work = asyncio.create_task(insert(client, 1))
    frame = await hold.wait_hit_async()
    assert (frame.kind, frame.before) == ("COMMIT", ("BEGIN;", "INSERT INTO ledger (id) VALUES ($1)"))
    assert await rows(observer) == seen
    assert not work.done()
    assert hold.release()
    await work
    assert await rows(observer) == [1]
    await client.close()


async def test_only_the_commit_of_the_transaction_that_wrote_to_the_outbox_is_held(
    pg: PostgresProxy, database: str, observer: Connection
) -> None:
    one, two = await asyncpg.connect(through(pg, database)), await asyncpg.connect(through(pg, database))
    hold = pg.hold(commit_after("insert into outbox"), nth=2)
    await insert(one, 1, outbox=True)
    await insert(two, 2)
    work = asyncio.create_task(insert(two, 3, outbox=True))
    await hold.wait_hit_async()
    await insert(one, 4)
    assert await rows(observer) == [1, 2, 4]
    assert pg.hits["COMMIT"] == 4
    hold.release()
    await work
    await one.close()
    await two.close()


async def test_a_prepared_statement_is_known_by_its_sql_each_time_it_is_executed(
    pg: PostgresProxy, database: str, observer: Connection
) -> None:
    client = await asyncpg.connect(through(pg, database))
    hold = pg.hold(sql_contains("insert into ledger"), nth=3)
    work = asyncio.create_task(insert(client, 1, 2, 3))
    frame = await hold.wait_hit_async()
    assert frame.kind == "INSERT"
    open_transactions = await observer.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"
    )
    assert open_transactions == 1
    hold.drop()
    with pytest.raises(LOST):
        await work
    assert await rows(observer) == []


async def test_many_executions_and_copies_pass_and_can_be_held_too(
    pg: PostgresProxy, database: str, observer: Connection
) -> None:
    client = await asyncpg.connect(through(pg, database))
    await client.executemany("INSERT INTO ledger (id) VALUES ($1)", [(number,) for number in range(100)])
    assert pg.hits["INSERT"] == 100
    hold = pg.hold(sql_contains('copy "ledger"'), "reply")
    records = [(number, "x" * 1000) for number in range(100, 1100)]
    copy = asyncio.create_task(client.copy_records_to_table("ledger", records=records))
    await hold.wait_hit_async()
    assert await observer.fetchval("SELECT count(*) FROM ledger") == 1100
    assert not copy.done()
    hold.release()
    assert await copy == "COPY 1000"
    assert len(await client.fetch("SELECT * FROM ledger")) == 1100
    await client.close()


@pytest.mark.parametrize(("where", "seen"), [("request", []), ("reply", [1])])
async def test_a_process_killed_while_its_commit_is_held_leaves_the_row_only_if_the_server_had_it(
    pg: PostgresProxy, database: str, observer: Connection, where: Any, seen: list[int]
) -> None:
    hold = pg.hold(commit_after("into ledger"), where)
    with subprocess.Popen([sys.executable, "-c", WORKER, through(pg, database)], stdout=subprocess.PIPE) as worker:
        await hold.wait_hit_async()
        worker.kill()
        output, _ = worker.communicate()
    assert (worker.returncode, output) == (-signal.SIGKILL, b"")
    assert not hold.release()
    assert await rows_at_rest(observer) == seen


async def test_the_commit_of_a_killed_process_can_still_arrive(
    pg: PostgresProxy, database: str, observer: Connection
) -> None:
    hold = pg.hold(commit())
    with subprocess.Popen([sys.executable, "-c", WORKER, through(pg, database)]) as worker:
        await hold.wait_hit_async()
        worker.kill()
    assert await rows(observer) == []
    assert hold.release(even_if_gone=True)
    assert await rows_at_rest(observer) == [1]


async def test_a_frozen_process_commits_when_it_is_woken(
    pg: PostgresProxy, database: str, observer: Connection
) -> None:
    hold = pg.hold(commit())
    with subprocess.Popen([sys.executable, "-c", WORKER, through(pg, database)], stdout=subprocess.PIPE) as worker:
        await hold.wait_hit_async()
        worker.send_signal(signal.SIGSTOP)
        assert hold.release()
        assert await rows_at_rest(observer) == [1]
        worker.send_signal(signal.SIGCONT)
        output, _ = await asyncio.to_thread(worker.communicate)
    assert (worker.returncode, output) == (0, b"committed\n")


async def test_a_session_the_server_ends_while_its_commit_is_held_commits_nothing(
    pg: PostgresProxy, database: str, observer: Connection
) -> None:
    client = await asyncpg.connect(through(pg, database))
    hold = pg.hold(commit())
    work = asyncio.create_task(insert(client, 1))
    await hold.wait_hit_async()
    await observer.execute("SELECT pg_terminate_backend($1, 5000)", client.get_server_pid())
    with pytest.raises(LOST):
        await work
    assert not hold.release()
    assert await rows(observer) == []


# Kafka


@pytest.fixture
async def topic(kafka: Any, topic_prefix: str) -> AsyncIterator[str]:
    name = f"{topic_prefix}deposits"
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(each, 1, 1) for each in (name, f"{name}.dlq")])
    for each in (name, f"{name}.dlq"):
        assert await values(kafka, each) == []  # waits for a leader, whose lack a producer would meet with a retry
    yield name
    await admin.delete_topics([name, f"{name}.dlq"])
    await admin.close()


@pytest.fixture
def broker(kafka: Any) -> Iterator[KafkaProxy]:
    host, _, port = kafka.bootstrap.rpartition(":")
    with KafkaProxy(host, int(port)) as proxy:
        yield proxy


@pytest.fixture
async def producer(broker: KafkaProxy, topic: str) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(
        bootstrap_servers=broker.address, client_id="worker", enable_idempotence=True, retry_backoff_ms=20
    )
    await producer.start()
    yield producer
    await producer.stop()


async def values(kafka: Any, topic: str) -> list[bytes]:
    """What is in the log now, read past the proxy."""
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap)
    await consumer.start()
    try:
        partition = TopicPartition(topic, 0)
        consumer.assign([partition])
        await consumer.seek_to_beginning(partition)
        end, found = (await consumer.end_offsets([partition]))[partition], []
        while await consumer.position(partition) < end:
            for records in (await consumer.getmany(timeout_ms=1000)).values():
                found += [record.value for record in records]
        return found
    finally:
        await consumer.stop()


@pytest.mark.parametrize(("where", "written"), [("request", []), ("reply", [b"1"])])
async def test_a_message_is_in_the_log_when_the_reply_to_produce_is_held_and_not_when_the_produce_is(
    broker: KafkaProxy, producer: AIOKafkaProducer, kafka: Any, topic: str, where: Any, written: list[bytes]
) -> None:
    hold = broker.hold(produce(topic), where)
    await producer.send_and_wait(f"{topic}.dlq", b"0")
    sending = asyncio.create_task(producer.send_and_wait(topic, b"1"))
    frame = await hold.wait_hit_async()
    assert (frame.kind, frame.name) == ("Produce", "worker")
    assert await values(kafka, topic) == written
    assert not sending.done()
    assert hold.release()
    await sending
    assert await values(kafka, topic) == [b"1"]
    assert await values(kafka, f"{topic}.dlq") == [b"0"]


@pytest.mark.parametrize("where", ["request", "reply"])
async def test_an_idempotent_producer_that_lost_its_connection_writes_one_copy(
    broker: KafkaProxy, producer: AIOKafkaProducer, kafka: Any, topic: str, where: Any
) -> None:
    await producer.send_and_wait(topic, b"1")
    hold = broker.hold(produce(topic), where)
    sending = asyncio.create_task(producer.send_and_wait(topic, b"2"))
    await hold.wait_hit_async()
    hold.drop()
    await sending
    assert hold.seen >= 2
    assert await values(kafka, topic) == [b"1", b"2"]


async def test_a_broker_that_refuses_for_a_while_is_found_again(
    broker: KafkaProxy, producer: AIOKafkaProducer, kafka: Any, topic: str
) -> None:
    await producer.send_and_wait(topic, b"1")
    broker.refuse(True)
    sending = asyncio.create_task(producer.send_and_wait(topic, b"2"))
    await asyncio.wait([sending], timeout=0.1)
    assert not sending.done()
    broker.refuse(False)
    await sending
    assert await values(kafka, topic) == [b"1", b"2"]


async def test_a_consumer_group_comes_through_the_proxy_and_its_commit_can_be_held(
    broker: KafkaProxy, producer: AIOKafkaProducer, kafka: Any, topic: str
) -> None:
    group = f"{topic}-group"
    await producer.send_and_wait(topic, b"1")
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=broker.address,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await consumer.start()
    await admin.start()
    assert (await consumer.getone()).value == b"1"
    for where, before in (("request", []), ("reply", [1])):
        hold = broker.hold(offset_commit(group), where)  # type: ignore[arg-type]
        committing = asyncio.create_task(consumer.commit())
        await hold.wait_hit_async()
        stored = await admin.list_consumer_group_offsets(group)
        assert [offset.offset for offset in stored.values()] == before
        assert not committing.done()
        assert hold.release()
        await committing
    assert {"FindCoordinator", "JoinGroup", "SyncGroup", "Fetch", "OffsetCommit"} <= set(broker.hits)
    await consumer.stop()
    await admin.close()


# HTTP


@pytest.fixture
async def sandbox() -> AsyncIterator[tuple[list[str], HttpProxy]]:
    """A server that remembers what it was asked, and a proxy before it."""
    asked: list[str] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(f"{request.method} {request.path_qs} {(await request.text())[:20]}".strip())
        if request.path == "/stream":
            response = web.StreamResponse()
            await response.prepare(request)
            for part in (b"one ", b"two"):
                await response.write(part)
            return response
        return web.Response(text="done", status=201)

    app = web.Application(client_max_size=10_000_000)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    with HttpProxy(*runner.addresses[0]) as proxy:
        yield asked, proxy
    await runner.cleanup()


async def fetch(session: aiohttp.ClientSession, method: str, url: str, **more: Any) -> tuple[int, str]:
    async with session.request(method, url, **more) as response:
        return response.status, await response.text()


@pytest.mark.parametrize(("where", "acted"), [("request", []), ("reply", ["POST /v1/wallets {}"])])
async def test_a_partner_has_acted_when_its_reply_is_held_and_not_when_the_request_is(
    sandbox: tuple[list[str], HttpProxy], where: Any, acted: list[str]
) -> None:
    asked, proxy = sandbox
    async with aiohttp.ClientSession() as session:
        hold = proxy.hold(http_request("POST", "/v1/wallets"), where)
        asking = asyncio.create_task(fetch(session, "POST", f"{proxy.url}/v1/wallets", data="{}"))
        frame = await hold.wait_hit_async()
        assert (frame.kind, frame.name) == ("POST", "/v1/wallets")
        assert asked == acted
        assert not asking.done()
        assert hold.release()
        assert await asking == (201, "done")
        assert asked == ["POST /v1/wallets {}"]


async def test_requests_and_replies_of_every_framing_pass_on_one_connection(
    sandbox: tuple[list[str], HttpProxy],
) -> None:
    asked, proxy = sandbox

    async def chunks() -> AsyncIterator[bytes]:
        yield b"a" * 100_000
        yield b"b" * 100_000

    async with aiohttp.ClientSession() as session:
        assert await fetch(session, "GET", f"{proxy.url}/stream") == (200, "one two")
        assert await fetch(session, "POST", f"{proxy.url}/x?y=1", data=chunks()) == (201, "done")
        assert await fetch(session, "PUT", f"{proxy.url}/x", data=io.BytesIO(b"c" * 5_000_000)) == (201, "done")
        assert await fetch(session, "HEAD", f"{proxy.url}/x") == (201, "")
        hold = proxy.hold(http_request("GET", "/stream"), "reply")
        streaming = asyncio.create_task(fetch(session, "GET", f"{proxy.url}/stream"))
        await hold.wait_hit_async()
        hold.release()
        assert await streaming == (200, "one two")
    assert asked == ["GET /stream", f"POST /x?y=1 {'a' * 20}", f"PUT /x {'c' * 20}", "HEAD /x", "GET /stream"]
    assert {frame.connection for frame in proxy.log} == {1}


async def test_a_client_that_gave_up_is_not_asked_for_and_a_dropped_reply_is_lost(
    sandbox: tuple[list[str], HttpProxy],
) -> None:
    asked, proxy = sandbox
    async with aiohttp.ClientSession() as session:
        hold = proxy.hold(http_request(path="/slow"))
        asking = asyncio.create_task(fetch(session, "POST", f"{proxy.url}/slow"))
        await hold.wait_hit_async()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(0)  # the turn of the loop in which the client closes its socket
        assert not hold.release()
        hold = proxy.hold(http_request(path="/lost", body_contains="key-1"), "reply")
        asking = asyncio.create_task(fetch(session, "POST", f"{proxy.url}/lost", data="key-1"))
        await hold.wait_hit_async()
        hold.drop()
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await asking
    assert asked == ["POST /lost key-1"]
