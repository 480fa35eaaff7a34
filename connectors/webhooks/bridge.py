"""The bridge: a vendor's signed POST -> a topic. 2xx only after the broker has it.

413 body over the limit · 408 body too slow · 401/400 not signed by the vendor · 503 broker or key unavailable, send again
200 published, or understood and not ours to say, or not understood and kept in webhooks.dlq with its bytes
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from starlette.requests import ClientDisconnect

from connectors.webhooks import problems
from connectors.webhooks.guard import within
from connectors.webhooks.limits import LargeBodies, Refusals
from connectors.webhooks.problems import Problem
from connectors.webhooks.publisher import Publisher, Unavailable
from connectors.webhooks.source import (
    NOT_UNDERSTOOD,
    Act,
    Ignored,
    NotNow,
    NotUnderstood,
    Publish,
    Refused,
    Translation,
    WebhookSource,
)
from topics.catalog import INPUT_BYTES_MAX, WEBHOOKS_DLQ
from topics.envelope import headers_of, value_of
from topics.trace import Span, Spans, child, read_traceparent

log = structlog.get_logger()

CIRCLE_PATHS = (
    "/webhooks/circle",
    "/webhooks/circle/transfers",
    "/webhooks/circle/wallets",
    "/webhooks/circle/payments",
)
"""Circle posts every type to one endpoint; the last three are aliases that older configurations name."""
SUMSUB_PATHS = ("/webhooks/kyc/sumsub",)
PERSONA_PATHS = ("/webhooks/kyc/persona",)
ONFIDO_PATHS = ("/webhooks/kyc/onfido",)


@dataclass(frozen=True, slots=True)
class Mount:
    """A source and where it is reached."""

    source: WebhookSource
    paths: tuple[str, ...]
    answers_head: bool = False
    """Circle tries an endpoint with HEAD before it takes a subscription."""
    by_header: Mapping[str, WebhookSource] = field(default_factory=dict)
    """Schemes that share the paths: a request with this header (lower case) is for that source, which verifies and
    translates it; a scheme is never tried after another one has refused."""

    def source_of(self, headers: Mapping[str, str]) -> WebhookSource:
        return next((source for name, source in self.by_header.items() if name in headers), self.source)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may cost. Vendors wait 5 s for an answer."""

    body_bytes: int = INPUT_BYTES_MAX
    small_bytes: int = 65_536
    """A webhook has a few kilobytes. What is larger has to find room among the large ones."""
    large_bodies: int = 32
    """So many at the same time: memory must not grow with what strangers send, and small ones always have room."""
    read_s: float = 5.0
    verify_s: float = 3.0
    """A key may have to be fetched."""
    retry_after_s: int = 5
    """What a 503 asks the vendor to wait."""


class Metrics:
    """Label values come from the code only: vendors, outcomes and codes, never from a request."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.webhooks = Counter(
            "stablerail_webhooks",
            "Webhook requests by how they ended",
            ["vendor", "outcome", "code"],
            registry=registry,
        )
        self.seconds = Histogram(
            "stablerail_webhook_seconds",
            "From the first byte of a webhook to its answer",
            ["vendor"],
            registry=registry,
        )


@dataclass(frozen=True, slots=True)
class _Context:
    publisher: Publisher
    bodies: LargeBodies
    refusals: Refusals
    metrics: Metrics
    limits: Limits
    now: Callable[[], datetime]
    spans: Spans | None
    trace_ratio: float


def _utc_now() -> datetime:
    return datetime.now(UTC)


def create_bridge(
    mounts: Sequence[Mount],
    publisher: Publisher,
    registry: CollectorRegistry,
    *,
    limits: Limits | None = None,
    now: Callable[[], datetime] = _utc_now,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    spans: Spans | None = None,
    trace_ratio: float = 1.0,
) -> FastAPI:
    """The app. The publisher is started and stopped by the caller (see `serve`). `spans`: told of each webhook of a sampled
    trace; `trace_ratio` of those whose sender has none begin one that is."""
    app = FastAPI(
        title="Stablerail bridge",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    problems.install(app)
    limits = limits or Limits()
    bodies = LargeBodies(limits.large_bodies, limits.retry_after_s)
    context = _Context(publisher, bodies, Refusals(), Metrics(registry), limits, now, spans, trace_ratio)
    for mount in mounts:
        for source in (mount.source, *mount.by_header.values()):
            # a series that begins at its first rise has, to Prometheus, not risen
            context.metrics.webhooks.labels(source.vendor, "unavailable", "broker_unavailable")
            for code in NOT_UNDERSTOOD:
                context.metrics.webhooks.labels(source.vendor, "not_understood", code)
        endpoint = _endpoint(mount, context)
        for path in mount.paths:
            app.add_api_route(path, endpoint, methods=["POST"])
            if mount.answers_head:
                app.add_api_route(path, _ok, methods=["HEAD"])

    # HEAD is what some load balancers ask with
    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.api_route("/readyz", methods=["GET", "HEAD"])
    async def readyz() -> dict[str, str]:
        if not publisher.connected:
            raise Problem(503, "broker_unavailable", "Not connected to Kafka.")
        return {"status": "ready"}

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _ok() -> Response:
    return Response(status_code=200)


def _endpoint(mount: Mount, context: _Context) -> Callable[[Request], Awaitable[Response]]:
    async def receive(request: Request) -> Response:
        started_ns = time.time_ns()
        source = mount.source_of(request.headers)
        parent = read_traceparent(request.headers.get("traceparent"))
        traceparent = trace_of(parent, context.trace_ratio, new_span=context.spans is not None)

        def over(outcome: str, code: str) -> None:
            if context.spans is not None:
                about = {"url.path": request.url.path, "webhook.outcome": outcome, "webhook.code": code}
                name = f"webhook {source.vendor}"
                context.spans(Span(name, "server", traceparent, parent, started_ns, time.time_ns(), about))

        with context.metrics.seconds.labels(source.vendor).time():
            try:
                with context.bodies.room() as take_room:
                    outcomes = await _receive(request, source, context, traceparent, take_room)
            except Problem as problem:
                outcome = "unavailable" if problem.status == 503 else "refused"
                over(outcome, problem.code)
                context.metrics.webhooks.labels(source.vendor, outcome, problem.code).inc()
                context.refusals.tell(source.vendor, problem)
                raise
            over(*(outcomes[0] if outcomes else ("ignored", "")))
            for outcome, code in outcomes:
                context.metrics.webhooks.labels(source.vendor, outcome, code).inc()
            return Response(status_code=200)

    return receive


async def _receive(
    request: Request, source: WebhookSource, context: _Context, traceparent: str, take_room: Callable[[], None]
) -> list[tuple[str, str]]:
    """(outcome, code) of each thing the webhook said, all of them with the broker. Raises Problem."""
    limits = context.limits
    body = await _read(request, limits, take_room)
    try:
        async with asyncio.timeout(limits.verify_s):
            await source.verify(request.headers, body)
    except Refused as refused:
        headers = _retry_after(limits) if refused.status == 503 else None
        raise Problem(refused.status, refused.code, refused.reason, headers=headers) from None
    except TimeoutError:
        raise Problem(
            503, "key_unavailable", "The signature could not be checked in time.", headers=_retry_after(limits)
        ) from None
    path = request.url.path
    try:
        return [await _say(said, body, path, source.vendor, traceparent, context) for said in _translate(source, body)]
    except NotNow as error:
        log.warning("webhook_not_done", vendor=source.vendor, reason=str(error), traceparent=traceparent)
        raise Problem(
            503, "not_done", "It could not be done now; send it again.", headers=_retry_after(limits)
        ) from None
    except Unavailable as error:
        # What was published before the failure is published again with the same id when the vendor repeats.
        log.warning("webhook_not_published", vendor=source.vendor, reason=str(error), traceparent=traceparent)
        raise Problem(
            503, "broker_unavailable", "It could not be stored now; send it again.", headers=_retry_after(limits)
        ) from None


def _translate(source: WebhookSource, body: bytes) -> tuple[Translation, ...]:
    try:
        return source.translate(body)
    except Exception as error:
        # Translators are total. Should one not be, the vendor's bytes are kept rather than refused until it gives up.
        log.exception("webhook_translator_bug", vendor=source.vendor)
        return (NotUnderstood("bug", f"the translator raised {type(error).__name__}"),)


async def _say(
    said: Translation, body: bytes, path: str, vendor: str, traceparent: str, context: _Context
) -> tuple[str, str]:
    received = context.now()
    match said:
        case Publish(topic, key, event, event_id, source):
            headers = headers_of(
                event.ce_type(), event_id=event_id, source=source, time=received, traceparent=traceparent
            )
            await context.publisher.publish(topic, key, value_of(event), headers)
            # at debug: the metric counts it, the message itself has id and trace, and the line cost as much as the signature
            log.debug("webhook_published", vendor=vendor, topic=topic.name, id=event_id, traceparent=traceparent)
            return "published", event.type
        case Act(code, act):
            await act()
            log.info("webhook_done", vendor=vendor, code=code, traceparent=traceparent)
            return "done", code
        case Ignored(code, reason):
            log.info("webhook_ignored", vendor=vendor, code=code, reason=reason, traceparent=traceparent)
            return "ignored", code
        case NotUnderstood(code, reason):
            fields = {"vendor": vendor, "path": path, "code": code, "reason": reason, "traceparent": traceparent}
            headers = [(name, value.encode()) for name, value in fields.items()]
            headers.append(("received_at", received.isoformat().encode()))
            await context.publisher.publish(WEBHOOKS_DLQ, vendor.encode(), body, headers)
            log.warning("webhook_not_understood", vendor=vendor, code=code, reason=reason, traceparent=traceparent)
            return "not_understood", code


async def _read(request: Request, limits: Limits, take_room: Callable[[], None]) -> bytes:
    """The raw body. Nothing beyond the limit is read, so the connection is closed after the answer."""
    declared = request.headers.get("content-length", "")
    too_large = Problem(
        413, "body_too_large", f"A body has at most {limits.body_bytes} bytes.", headers={"Connection": "close"}
    )
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limits.body_bytes):
        raise too_large
    if declared.isdecimal() and int(declared) > limits.small_bytes:
        take_room()
    body = bytearray()
    try:
        async with within(limits.read_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise too_large
                if len(body) > limits.small_bytes:
                    take_room()
    except TimeoutError:
        raise Problem(
            408, "body_too_slow", f"A body must arrive within {limits.read_s:g} s.", headers={"Connection": "close"}
        ) from None
    except ClientDisconnect:
        raise Problem(400, "body_incomplete", "The connection ended before the body did.") from None
    return bytes(body)


def _retry_after(limits: Limits) -> dict[str, str]:
    return {"Retry-After": str(limits.retry_after_s)}


def trace_of(received: str | None, ratio: float = 1.0, *, new_span: bool = False) -> str:
    """The caller's W3C `traceparent` when it is one, else a new one, sampled at the ratio. `new_span`: a span of ours in it."""
    if (parent := read_traceparent(received)) is not None:
        return child(parent, secrets.token_hex(8)) if new_span else parent
    sampled = secrets.randbelow(1_000_000) < ratio * 1_000_000
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-{sampled:02x}"
