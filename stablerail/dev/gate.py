"""A door before a chain's node: while it is shut, what would send a transaction waits there, and the node hears nothing of it."""

from __future__ import annotations

import asyncio

import aiohttp
from aiohttp import web

from stablerail.dev.processes import free_port

SENDS = b"eth_sendRawTransaction"


class Gate:
    """A JSON-RPC endpoint that passes everything on to another. Open at first."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._port = free_port()
        self._open = asyncio.Event()
        self._open.set()
        self._runner: web.AppRunner | None = None
        self.held = asyncio.Event()
        """Something waits before the shut door."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def shut(self) -> None:
        self._open.clear()

    def open(self) -> None:
        """What waited is turned away: whoever sent it does not know whether it arrived."""
        self._open.set()

    async def start(self) -> None:
        app = web.Application(client_max_size=64_000_000)
        app.router.add_post("/", self._pass)
        self._client = aiohttp.ClientSession()
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            self._open.set()
            await self._runner.cleanup()
            await self._client.close()
            self._runner = None

    async def _pass(self, request: web.Request) -> web.Response:
        body = await request.read()
        if SENDS in body and not self._open.is_set():
            self.held.set()
            await self._open.wait()
            return web.Response(status=503)
        headers = {"content-type": "application/json"}
        async with self._client.post(self._upstream, data=body, headers=headers) as answer:
            return web.Response(status=answer.status, body=await answer.read(), content_type="application/json")
