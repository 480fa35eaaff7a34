"""The API as a process: who holds connections and says nothing keeps nobody out."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp

from connectors.webhooks.guard import CONNECTIONS_MAX
from ledger.migrate import upgrade
from stablerail.dev.kafka import Kafka
from stablerail.dev.processes import Child, free_port, tail
from tests.support.in_process import SCHEMA, until
from tests.support.patience import PATIENCE_S


async def test_whoever_holds_connections_and_says_nothing_keeps_nobody_out(
    database: str, kafka: Kafka, topic_prefix: str, tmp_path: Path
) -> None:
    await upgrade(database, SCHEMA)
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("STABLERAIL_")},
        "STABLERAIL_DATABASE_URL": database,
        "STABLERAIL_DATABASE_SCHEMA": SCHEMA,
        "STABLERAIL_KAFKA_BOOTSTRAP": kafka.bootstrap,
        "STABLERAIL_TOPIC_PREFIX": topic_prefix,
        "STABLERAIL_API_PORT": str(port),
    }
    log = tmp_path / "api.log"
    process = Child([sys.executable, "-m", "stablerail.cli", "api"], log=log, env=environment)
    timeout = aiohttp.ClientTimeout(PATIENCE_S)
    try:
        async with (
            aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout) as http,
            AsyncExitStack() as stack,
        ):

            async def ready() -> bool:
                assert process.returncode is None, tail(log)
                try:
                    async with http.get("/readyz") as answer:
                        return answer.status == 200
                except aiohttp.ClientConnectionError:
                    return False

            await until(ready, "the API is ready")
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
    finally:
        process.stop()
