"""An endpoint that passes calls on to a real node and alters what it is told to."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from typing import Any

from aiohttp import ClientSession, web

Lie = Callable[[list[Any], Any], Any]
"""(params, the honest result) -> the result to answer, or an awaitable of it. May raise Refusal."""


class Refusal(Exception):
    """Answer a JSON-RPC error instead."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class LyingEndpoint:
    """`lies` by method; `whole`, when set, is the answer to everything; `hangs` answers nothing at all; what only asks for
    methods that it `swallows` does not reach the node."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.lies: dict[str, Lie] = {}
        self.whole: tuple[int, bytes] | None = None
        self.headers: dict[str, str] = {}
        """Of `whole`."""
        self.hangs = False
        self.swallows: set[str] = set()
        self.shuffles = False
        self.calls: list[tuple[str, list[Any]]] = []
        self.connections: set[Any] = set()
        self.url = ""

    async def __aenter__(self) -> LyingEndpoint:
        app = web.Application(client_max_size=10_000_000)
        app.router.add_post("/{key:.*}", self._answer)
        self._released = asyncio.Event()
        self._client = ClientSession()
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    def release(self) -> None:
        """It hangs no longer: what waits is answered."""
        self.hangs = False
        self._released.set()
        self._released = asyncio.Event()

    async def __aexit__(self, *_: object) -> None:
        self._released.set()
        await self._runner.cleanup()
        await self._client.close()

    async def _answer(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        self.connections.add(request.transport.get_extra_info("peername"))
        body = await request.json()
        if self.hangs:
            await self._released.wait()
        if self.whole is not None:
            status, raw = self.whole
            return web.Response(status=status, body=raw, content_type="application/json", headers=self.headers)
        asked = body if isinstance(body, list) else [body]
        if {one["method"] for one in asked} <= self.swallows:
            honest: Any = [{"id": one["id"]} for one in asked]
            honest = honest if isinstance(body, list) else honest[0]
        else:
            async with self._client.post(self.upstream, json=body) as response:
                honest = await response.json()
        if isinstance(body, dict):
            return self._json(await self._altered(body, honest))
        by_id = {one["id"]: one for one in honest}
        answers = [await self._altered(one, by_id[one["id"]]) for one in body]
        return self._json(answers[::-1] if self.shuffles else answers)

    async def _altered(self, request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        self.calls.append((request["method"], request["params"]))
        lie = self.lies.get(request["method"])
        if lie is None:
            return answer
        try:
            result = lie(request["params"], answer.get("result"))
            result = await result if inspect.isawaitable(result) else result
            return {"jsonrpc": "2.0", "id": request["id"], "result": result}
        except Refusal as refusal:
            error = {"code": refusal.code, "message": refusal.message}
            return {"jsonrpc": "2.0", "id": request["id"], "error": error}

    @staticmethod
    def _json(answer: Any) -> web.Response:
        return web.Response(body=json.dumps(answer).encode(), content_type="application/json")
