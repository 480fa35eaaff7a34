"""Around every request: a trace id for its log lines, one access line, its metrics, and `Cache-Control` for /v1."""

from __future__ import annotations

import time
from typing import Final

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ledger.audit_logs import CALLER, Caller
from stablerail.metrics import Metrics
from stablerail.telemetry import child_traceparent
from topics.envelope import trace_id

log = structlog.get_logger()

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
AGENT_LENGTH_MAX: Final = 200
_QUIET: Final = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked every few seconds by machines; counted, not logged."""


class Observed:
    """ASGI middleware. Plain ASGI, because the framework's own kind copies the body through a queue."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, name: str) -> None:
        self.app = app
        self.metrics = metrics
        self.name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500  # what the outermost layer answers when the application raises
        started = time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if scope["path"].startswith("/v1/"):
                    # Balances are a customer's, and old the moment they are read.
                    MutableHeaders(scope=message)["Cache-Control"] = "no-store"
            await send(message)

        traceparent = child_traceparent(Headers(scope=scope).get("traceparent"))
        scope.setdefault("state", {})["traceparent"] = traceparent  # for what the request causes
        CALLER.set(_caller(scope))  # of this request's task alone
        with structlog.contextvars.bound_contextvars(trace_id=trace_id(traceparent)):
            try:
                await self.app(scope, receive, watched)
            finally:
                self._record(scope, status, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = getattr(scope.get("route"), "path_format", None) or "unmatched"
        self.metrics.http_request(self.name, method, route, status, seconds)
        if route not in _QUIET:
            log.info("http_request", method=method, route=route, status=status, duration_ms=round(seconds * 1000, 1))


def _caller(scope: Scope) -> Caller:
    agent = "".join(filter(str.isprintable, Headers(scope=scope).get("user-agent", "")))[:AGENT_LENGTH_MAX]
    client = scope.get("client")
    return Caller(client[0] if client else None, agent or None)
