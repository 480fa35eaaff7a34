"""What happens to a request before the sandbox looks at it: faults on demand, rate limits, and the count of calls."""

from __future__ import annotations

import random
import re
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_TEN_PER_S = frozenset({"POST /v1/w3s/developer/wallets"})
_WEATHERED = _TEN_PER_S | {"POST /v1/w3s/developer/transactions/transfer"}


@dataclass
class Fault:
    """What the next `times` calls to `path` (a shell pattern) meet."""

    path: str
    kind: Literal["status", "page", "hang", "lost_reply"]
    """`status` answers with it; `page` too, but in HTML, as what stands before Circle does; `hang` never answers; `lost_reply` breaks
    the connection in the answer."""
    method: str | None = None
    status: int = 500
    acts: bool = False
    """Whether the call is carried out first; a lost reply always is."""
    times: int = 1

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method in (None, method) and fnmatchcase(path, self.path)


@dataclass
class Weather:
    """What a call for wallets or for a transfer meets by chance, in shares of all. Drawn from a seed, so that a bad day can be had again."""

    unavailable: float = 0.0
    """500; half of them after the call was carried out."""
    lost_replies: float = 0.0
    limited: float = 0.0
    """429 with `Retry-After: 1`."""
    seed: int = 0

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)  # noqa: S311  (chance, not secrecy)

    def fault(self, endpoint: str) -> Fault | None:
        if endpoint not in _WEATHERED:
            return None
        drawn, acts = self._draw.random(), self._draw.random() < 0.5
        if drawn < self.unavailable:
            return Fault("*", "status", status=500, acts=acts)
        if drawn < self.unavailable + self.lost_replies:
            return Fault("*", "lost_reply")
        if drawn < self.unavailable + self.lost_replies + self.limited:
            return Fault("*", "status", status=429)
        return None


@dataclass
class Gate:
    """Shared by the middleware and the control calls."""

    rate_limits: bool
    faults: list[Fault] = field(default_factory=list)
    weather: Weather = field(default_factory=Weather)
    calls: Counter[str] = field(default_factory=Counter)
    """`POST /v1/w3s/developer/wallets` -> how often it was called, refused calls included."""
    _recent: defaultdict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))

    def take_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.matches(method, path):
                fault.times -= 1
                return fault
        self.faults = [fault for fault in self.faults if fault.times > 0]
        return None

    def admit(self, endpoint: str, now: float) -> bool:
        """Whether this call is within the endpoint's calls per second."""
        if not self.rate_limits:
            return True
        limit = 20 if endpoint.startswith("GET ") else 10 if endpoint in _TEN_PER_S else 5
        recent = self._recent[endpoint]
        while recent and now - recent[0] >= 1.0:
            recent.popleft()
        if len(recent) >= limit:
            return False
        recent.append(now)
        return True


class GateMiddleware:
    """ASGI: everything but /_control passes the gate."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/_control"):
            await self._app(scope, receive, send)
            return
        endpoint = f"{scope['method']} {_ID.sub('{id}', scope['path'])}"
        self._gate.calls[endpoint] += 1
        fault = self._gate.take_fault(scope["method"], scope["path"]) or self._gate.weather.fault(endpoint)
        if fault is not None:
            await self._fail(fault, scope, receive, send)
        elif not self._gate.admit(endpoint, time.monotonic()):
            await _answer(send, 429, "too many requests")
        else:
            await self._app(scope, receive, send)

    async def _fail(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None

        async def swallow(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message

        if fault.acts or fault.kind == "lost_reply":
            await self._app(scope, receive, swallow)
        if fault.kind == "status":
            await _answer(send, fault.status, "a fault on demand")
        elif fault.kind == "page":
            await _send(send, fault.status, b"text/html", b"<html><h1>a fault on demand</h1></html>")
        elif fault.kind == "hang":
            await _until_disconnected(receive)
        elif start is not None:
            await send(start)  # and no body: the server closes the connection, the client has a broken answer


async def _until_disconnected(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return


async def _answer(send: Send, status: int, message: str) -> None:
    await _send(send, status, b"application/json", orjson.dumps({"code": status, "message": message}))


async def _send(send: Send, status: int, kind: bytes, body: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    if status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
