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


@asynccontextmanager
async def served(
    database: str, kafka: Kafka, topic_prefix: str, log: Path
) -> AsyncIterator[tuple[Child, int, aiohttp.ClientSession]]:
    """`stablerail api` that is ready, its port, and a client of it."""
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("STABLERAIL_")},
        "STABLERAIL_DATABASE_URL": database,
        "STABLERAIL_DATABASE_SCHEMA": SCHEMA,
        "STABLERAIL_KAFKA_BOOTSTRAP": kafka.bootstrap,
        "STABLERAIL_TOPIC_PREFIX": topic_prefix,
        "STABLERAIL_API_PORT": str(port),
    }
    process = Child([sys.executable, "-m", "stablerail.cli", "api"], log=log, env=environment)
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


async def test_a_stream_ends_when_the_api_is_told_to(
    database: str, kafka: Kafka, topic_prefix: str, tmp_path: Path
) -> None:
    await upgrade(database, SCHEMA)
    connection = await asyncpg.connect(database, server_settings={"search_path": SCHEMA})
    token = (await create_key(connection, [Scope.READ], "the tests")).token.get_secret_value()
    request = block(WALLET_REQUESTS, Op.INSERT, [("ada", "SOL", "requested", datetime.now(UTC), None, None)])
    await write(connection, [request])
    await connection.close()
    async with served(database, kafka, topic_prefix, tmp_path / "api.log") as (process, _, http):
        headers = {"Authorization": f"Bearer {token}"}
        async with http.get("/v1/onboarding/events", params={"user_id": "ada"}, headers=headers) as stream:
            assert (await stream.content.readline()).startswith(b"id: ")
            process.send_signal(signal.SIGTERM)
            # to its end: cut off, as one is that still runs when nothing is waited for any more, it raises
            assert b'"pending"' in await stream.content.read()
