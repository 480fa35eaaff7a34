"""Runs the sandbox in this process, on a free port unless one is given."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Final, Self

import uvicorn

from connectors.alpaca.sandbox.app import create_app
from connectors.alpaca.sandbox.state import State

TEST_KEY_ID: Final = "CKSANDBOX0000000"
TEST_SECRET: Final = "sandbox-secret-that-protects-nothing"  # noqa: S105


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to whoever embeds the server."""
        yield


class AlpacaSandbox:
    """Use as an async context. `state` says and sets what /_control does over HTTP."""

    def __init__(
        self,
        *,
        key_id: str = TEST_KEY_ID,
        secret: str = TEST_SECRET,
        host: str = "127.0.0.1",
        port: int = 0,
        calls_per_min: int = 1_000,
    ) -> None:
        self.state = State()
        self._app = create_app(self.state, key_id, secret, calls_per_min)
        self._host, self._port = host, port
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def base_url(self) -> str:
        return f"http://{self._host}:{self._port}"

    async def __aenter__(self) -> Self:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self._host, self._port))
        self._port = listener.getsockname()[1]
        self._server = _Server(
            uvicorn.Config(
                self._app, log_config=None, log_level="error", access_log=False, timeout_graceful_shutdown=1, ws="none"
            )
        )
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            if self._serving.done():
                listener.close()
                await self._serving
                raise RuntimeError("the sandbox did not start")
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving
        self._server = self._serving = None
