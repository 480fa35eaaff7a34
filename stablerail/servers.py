"""Our HTTP programs, served by uvicorn: the webhook bridge and the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import uvicorn
from fastapi import FastAPI

from connectors.circle.client import CircleClient
from connectors.circle.webhooks import CircleWebhooks
from connectors.kyc.sumsub import SumsubSource
from connectors.webhooks.bridge import CIRCLE_PATHS, SUMSUB_PATHS, Mount
from connectors.webhooks.serve import kafka_bridge
from stablerail.api.app import create_api
from stablerail.api.journal import Journal
from stablerail.config import Settings
from stablerail.metrics import Metrics
from stablerail.telemetry import exported

CONNECTIONS_MAX = 500
"""Each may hold a body of a megabyte."""


def bridge_app(settings: Settings, metrics: Metrics) -> FastAPI:
    """The bridge with Circle's and Sumsub's webhooks."""
    assert settings.circle_api_key is not None
    assert settings.circle_entity_secret is not None
    assert settings.sumsub_webhook_secret is not None
    circle = CircleClient(
        settings.circle_api_url, settings.circle_api_key, settings.circle_entity_secret, settings.call_timeout_s
    )
    tokens = dict.fromkeys(settings.circle_usdc_token_ids.values(), "USDC")
    webhooks = CircleWebhooks(
        circle.notification_public_key,
        settings.network,
        tokens,
        lookups_per_min=settings.circle_webhook_key_lookups_per_min,
    )
    sumsub = SumsubSource(settings.sumsub_webhook_secret, accept_sandbox_mode=settings.network == "testnet")
    spans = exported(settings.otlp_traces_url, "stablerail-bridge")
    app = kafka_bridge(
        [Mount(webhooks, CIRCLE_PATHS, answers_head=True), Mount(sumsub, SUMSUB_PATHS)],
        bootstrap=settings.kafka_bootstrap,
        registry=metrics.registry,
        prefix=settings.topic_prefix,
        spans=spans,
        trace_ratio=settings.trace_ratio,
    )
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(served: FastAPI) -> AsyncIterator[None]:
        await circle.start()
        try:
            async with inner(served):
                yield
        finally:
            await circle.close()
            if spans is not None:
                await asyncio.to_thread(spans.close)

    app.router.lifespan_context = lifespan
    return app


def run_bridge(settings: Settings) -> None:
    """Serves until SIGTERM."""
    _serve(bridge_app(settings, Metrics()), settings.bridge_host, settings.bridge_port, settings)


def api_app(settings: Settings, metrics: Metrics) -> FastAPI:
    """The API with a pool of its own, opened when it starts."""
    pool = asyncpg.create_pool(
        settings.secret("database_url"),
        min_size=1,
        max_size=settings.database_connections_max,
        command_timeout=10,
        server_settings={
            "application_name": "stablerail-api",
            "search_path": settings.database_schema,
            "jit": "off",  # our statements are short; compiling them costs more than running them
            "role": settings.database_role,
            # a frozen process keeps no locks
            "lock_timeout": f"{int(settings.database_lock_timeout_s * 1000)}ms",
            "idle_in_transaction_session_timeout": f"{int(settings.database_idle_timeout_s * 1000)}ms",
        },
    )
    journal = Journal.of(settings)
    app = create_api(settings, pool, metrics, journal)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(served: FastAPI) -> AsyncIterator[None]:
        async with pool, inner(served):
            await journal.start()
            try:
                yield
            finally:
                await journal.stop()

    app.router.lifespan_context = lifespan
    return app


def run_api(settings: Settings) -> None:
    """Serves until SIGTERM."""
    import uvloop

    async def main() -> None:
        app = api_app(settings, Metrics())
        await _server(app, settings.api_host, settings.api_port, settings).serve()

    uvloop.run(main())


def _serve(app: FastAPI, host: str, port: int, settings: Settings) -> None:
    _server(app, host, port, settings).run()


def _server(app: FastAPI, host: str, port: int, settings: Settings) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS_MAX,
            timeout_graceful_shutdown=int(settings.worker_shutdown_timeout_s),
        )
    )
