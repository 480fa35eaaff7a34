"""Runs the sandbox in this process, on a free port unless one is given."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import uvicorn

from connectors.circle.sandbox.app import Sandbox, create_app
from connectors.circle.sandbox.config import SandboxConfig


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to whoever embeds the server."""
        yield


class CircleSandbox:
    """Use as an async context, or call start and stop.

    In the same process `sandbox.state`, `.gate` and `.deliveries` say and set what /_control does over HTTP.
    """

    def __init__(self, config: SandboxConfig | None = None, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.config = config or SandboxConfig()
        self._host = host
        self._port = port
        self._parts: Sandbox | None = None
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def base_url(self) -> str:
        return f"http://{self._host}:{self._port}"

    @property
    def sandbox(self) -> Sandbox:
        """Its parts; only while it runs."""
        if self._parts is None:
            raise RuntimeError("CircleSandbox is not started")
        return self._parts

    async def start(self) -> None:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self._host, self._port))
        self._port = listener.getsockname()[1]
        self._parts = Sandbox(self.config)
        self._server = _Server(
            uvicorn.Config(
                create_app(self._parts),
                log_config=None,
                log_level="error",
                access_log=False,
                timeout_graceful_shutdown=1,
                ws="none",
            )
        )
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            if self._serving.done():
                listener.close()
                await self._serving
                raise RuntimeError("the sandbox did not start")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving
        self._server = self._serving = self._parts = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
