"""The API as a process: who holds connections and says nothing keeps nobody out; a stream does not hold up its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import asyncpg

from connectors.webhooks.guard import CONNECTIONS_MAX
from ledger.migrate import upgrade
from ledger.rows import Op, block, write
from ledger.tables import WALLET_REQUESTS
from stablerail.dev.kafka import Kafka
from stablerail.dev.processes import Child, free_port, tail
from stablerail.keys import Scope, create_key
from tests.support.in_process import SCHEMA, until
from tests.support.patience import PATIENCE_S


def _started(database: str, kafka: Kafka, topic_prefix: str, log: Path, port: int) -> Child:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("STABLERAIL_")},
        "STABLERAIL_DATABASE_URL": database,
        "STABLERAIL_DATABASE_SCHEMA": SCHEMA,
        "STABLERAIL_KAFKA_BOOTSTRAP": kafka.bootstrap,
        "STABLERAIL_TOPIC_PREFIX": topic_prefix,
        "STABLERAIL_API_PORT": str(port),
    }
    return Child([sys.executable, "-m", "stablerail.cli", "api"], log=log, env=environment)


@asynccontextmanager
async def served(
    database: str, kafka: Kafka, topic_prefix: str, log: Path
) -> AsyncIterator[tuple[Child, int, aiohttp.ClientSession]]:
    """`stablerail api` that is ready, its port, and a client of it."""
    port = free_port()
    process = _started(database, kafka, topic_prefix, log, port)
    timeout = aiohttp.ClientTimeout(PATIENCE_S)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout) as http:

            async def ready() -> bool:
                assert process.returncode is None, tail(log)
                try:
                    async with http.get("/readyz") as answer:
                        return answer.status == 200
                except aiohttp.ClientConnectionError:
                    return False

            await until(ready, "the API is ready")
            yield process, port, http
    finally:
        process.stop()


async def _streamed_to(database: str) -> str:
    """A key, of whoever may see that ada's wallet on SOL is pending."""
    connection = await asyncpg.connect(database, server_settings={"search_path": SCHEMA})
    made = await create_key(connection, [Scope.READ], "the tests")
    request = block(WALLET_REQUESTS, Op.INSERT, [("ada", "SOL", "requested", datetime.now(UTC), None, None)])
    await write(connection, [request])
    await connection.close()
    return made.token.get_secret_value()


async def test_whoever_holds_connections_and_says_nothing_keeps_nobody_out(
    database: str, kafka: Kafka, topic_prefix: str, tmp_path: Path
) -> None:
    await upgrade(database, SCHEMA)
    async with (
        served(database, kafka, topic_prefix, tmp_path / "api.log") as (_, port, http),
        AsyncExitStack() as stack,
    ):
        for _ in range(CONNECTIONS_MAX + 100):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        for _ in range(20):
            async with http.get("/healthz", headers={"Connection": "close"}) as answer:
                assert answer.status == 200, await answer.text()
        slow = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost")
        slow.setblocking(False)
        said = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(slow, 65_536), PATIENCE_S)
        assert said.startswith(b"HTTP/1.1 408 "), said
        assert b'"headers_too_slow"' in said


async def test_head_is_answered_on_the_wire_and_the_connection_goes_on(
    database: str, kafka: Kafka, topic_prefix: str, tmp_path: Path
) -> None:
    await upgrade(database, SCHEMA)
    token = await _streamed_to(database)
    async with served(database, kafka, topic_prefix, tmp_path / "api.log") as (_, _port, http):
        headers = {"Authorization": f"Bearer {token}"}
        for path in ("/readyz", "/metrics", "/v1/wallets/status?user_id=ada", "/v1/onboarding/events?user_id=ada"):
            async with http.head(path, headers=headers) as answer:
                assert (answer.status, await answer.read()) == (200, b""), path
        async with http.get("/v1/wallets/status?user_id=ada", headers=headers) as answer:
            assert (await answer.json())["user_id"] == "ada"


async def test_a_stream_ends_when_the_api_is_told_to(
    database: str, kafka: Kafka, topic_prefix: str, tmp_path: Path
) -> None:
    await upgrade(database, SCHEMA)
    token = await _streamed_to(database)
    async with served(database, kafka, topic_prefix, tmp_path / "api.log") as (process, _, http):
        headers = {"Authorization": f"Bearer {token}"}
        async with http.get("/v1/onboarding/events", params={"user_id": "ada"}, headers=headers) as stream:
            assert (await stream.content.readline()).startswith(b"id: ")
            process.send_signal(signal.SIGTERM)
            # to its end: cut off, as one is that still runs when nothing is waited for any more, it raises
            assert b'"pending"' in await stream.content.read()
        assert await asyncio.to_thread(process.wait, PATIENCE_S) == 0


async def test_an_api_that_still_waits_for_its_database_ends_when_it_is_told_to(
    kafka: Kafka, topic_prefix: str, tmp_path: Path
) -> None:
    log = tmp_path / "api.log"
    process = _started("postgresql://u:p@127.0.0.1:1/d", kafka, topic_prefix, log, free_port())

    async def waits() -> bool:
        return "api.waits" in log.read_text()

    await until(waits, "waiting")
    assert await asyncio.to_thread(process.stop) == 0


async def test_whose_port_another_has_says_so_and_ends_as_one_to_be_started_again(
    database: str, kafka: Kafka, topic_prefix: str, tmp_path: Path
) -> None:
    await upgrade(database, SCHEMA)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        process = _started(database, kafka, topic_prefix, tmp_path / "api.log", other.getsockname()[1])
        assert await asyncio.to_thread(process.wait, PATIENCE_S) == 70
    assert "address already in use" in tail(tmp_path / "api.log")


async def test_whom_the_database_does_not_let_in_ends_as_one_to_be_started_again(
    database: str, kafka: Kafka, topic_prefix: str, tmp_path: Path
) -> None:
    nowhere = f"{database}_that_is_not_there"
    process = _started(nowhere, kafka, topic_prefix, tmp_path / "api.log", free_port())
    assert await asyncio.to_thread(process.wait, PATIENCE_S) == 70
    assert "api.crashed" in tail(tmp_path / "api.log", lines=1)
