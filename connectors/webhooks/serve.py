"""The bridge with its Kafka publisher, from plain arguments: what `stablerail bridge` runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from connectors.webhooks.bridge import Limits, Mount, create_bridge
from connectors.webhooks.publisher import KafkaPublisher
from topics.trace import Spans


def kafka_bridge(
    mounts: Sequence[Mount],
    *,
    bootstrap: str,
    registry: CollectorRegistry,
    prefix: str = "",
    limits: Limits | None = None,
    publish_timeout_s: float = 4.0,
    probe_s: float = 2.0,
    spans: Spans | None = None,
    trace_ratio: float = 1.0,
) -> FastAPI:
    """An app whose lifespan starts and stops the publisher; what the sources need (a client's session) is the caller's.

    Serve it with a bound on connections: `uvicorn.Config(app, http=guarded(), ws="none", timeout_keep_alive=KEPT_S)`.
    """
    publisher = KafkaPublisher(bootstrap, prefix=prefix, timeout_s=publish_timeout_s, probe_s=probe_s)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await publisher.start()
        try:
            yield
        finally:
            await publisher.stop()

    return create_bridge(
        mounts, publisher, registry, limits=limits, lifespan=lifespan, spans=spans, trace_ratio=trace_ratio
    )
