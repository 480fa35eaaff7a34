"""Our HTTP programs, served by uvicorn: the webhook bridge and the API."""

from __future__ import annotations

import asyncio
import gc
import re
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from functools import partial
from socket import socket

import asyncpg
import structlog
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr

from agents.crash import EXIT_BUG, exit_now
from agents.looking import until_up
from connectors.alpaca.client import AlpacaClient
from connectors.circle import mint_webhooks
from connectors.circle.client import CircleClient
from connectors.circle.mint_webhooks import MintWebhooks
from connectors.circle.sns import SnsVerifier, Trust
from connectors.circle.sns_http import SnsHttp
from connectors.circle.webhooks import CircleWebhooks
from connectors.kyc.onfido import OnfidoSource
from connectors.kyc.persona import PersonaSource
from connectors.kyc.sumsub import SumsubSource
from connectors.webhooks.bridge import CIRCLE_PATHS, ONFIDO_PATHS, PERSONA_PATHS, SUMSUB_PATHS, Mount
from connectors.webhooks.guard import KEPT_S, guarded
from connectors.webhooks.hmac_signed import HmacScheme, HmacSource
from connectors.webhooks.serve import kafka_bridge
from connectors.webhooks.source import WebhookSource
from ledger.errors import ACopy, DatabaseBehind, LegacyUnusable, RoleRefused
from ledger.shadow import mirrored
from stablerail import shadow
from stablerail.api.app import create_api
from stablerail.api.journal import Journal
from stablerail.config import EXIT_CONFIG, ConfigError, Settings
from stablerail.connections import opener
from stablerail.metrics import Metrics
from stablerail.telemetry import exported

_log = structlog.get_logger()


def bridge_app(settings: Settings, metrics: Metrics) -> FastAPI:
    """The bridge with every source that is configured."""
    assert settings.circle_api_key is not None
    assert settings.circle_entity_secret is not None
    circle = CircleClient(
        settings.circle_api_url, settings.circle_api_key, settings.circle_entity_secret, settings.call_timeout_s
    )
    tokens = dict.fromkeys(settings.circle_usdc_token_ids.values(), "USDC")
    webhooks = CircleWebhooks(
        circle.notification_public_key,
        settings.network,
        tokens,
        subscriptions=settings.circle_subscription_ids,
        lookups_per_min=settings.circle_webhook_key_lookups_per_min,
    )
    by_header: dict[str, WebhookSource] = {}
    sns = SnsHttp()
    if settings.circle_mint_topic_arns:
        verifier = SnsVerifier(_sns_trust(settings), sns.get)
        by_header[mint_webhooks.HEADER] = MintWebhooks(verifier, sns.get, settings.network)
    if settings.circle_webhook_secret is not None:
        scheme = _relay_scheme(settings, settings.circle_webhook_secret)
        by_header[scheme.signature_header.lower()] = HmacSource(webhooks, scheme)
    spans = exported(settings.otlp_traces_url, "stablerail-bridge")
    app = kafka_bridge(
        [Mount(webhooks, CIRCLE_PATHS, answers_head=True, by_header=by_header), *_kyc(settings)],
        bootstrap=settings.kafka_bootstrap,
        registry=metrics.registry,
        prefix=settings.topic_prefix,
        spans=spans,
        trace_ratio=settings.trace_ratio,
    )
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(served: FastAPI) -> AsyncIterator[None]:
        try:
            async with circle, sns, inner(served):
                yield
        finally:
            if spans is not None:
                await asyncio.to_thread(spans.close)

    app.router.lifespan_context = lifespan
    return app


def _kyc(settings: Settings) -> list[Mount]:
    """The vendors that are configured; Sumsub always is."""
    assert settings.sumsub_webhook_secret is not None
    sumsub = SumsubSource(settings.sumsub_webhook_secret, accept_sandbox_mode=settings.network == "testnet")
    mounts = [Mount(sumsub, SUMSUB_PATHS)]
    if settings.persona_webhook_secret is not None:
        persona = PersonaSource(settings.persona_webhook_secret, window_s=settings.persona_window_s)
        mounts.append(Mount(persona, PERSONA_PATHS))
    if settings.onfido_webhook_token is not None:
        mounts.append(Mount(OnfidoSource(settings.onfido_webhook_token), ONFIDO_PATHS))
    return mounts


def _sns_trust(settings: Settings) -> Trust:
    arns = frozenset(settings.circle_mint_topic_arns)
    if settings.circle_sns_url is None:
        return Trust(arns)
    return Trust(arns, re.compile(re.escape(settings.circle_sns_url)))


def _relay_scheme(settings: Settings, secret: SecretStr) -> HmacScheme:
    timed = settings.circle_webhook_time_header != "none"
    return HmacScheme(
        secret,
        settings.circle_webhook_header,
        settings.circle_webhook_time_header if timed else None,
        settings.circle_webhook_encoding,
    )


def run_bridge(settings: Settings) -> None:
    """Serves until SIGTERM."""
    # a request's objects die with it; looking at the living every 700 costs a fifth of the time
    gc.set_threshold(100_000, 50, 100)
    app = bridge_app(settings, Metrics())
    _server(app, settings.bridge_host, settings.bridge_port, settings).run()


def api_app(settings: Settings, metrics: Metrics) -> FastAPI:
    """The API with a pool of its own, opened when it starts."""
    mirror = shadow.mirror_for(settings, metrics)
    journal = Journal.of(settings)
    pool = asyncpg.create_pool(
        settings.secret("database_url"),
        min_size=1,
        max_size=settings.database_connections_max,
        command_timeout=10,
        connection_class=mirrored(mirror),
        init=journal.met,
        setup=journal.lent,
        server_settings={
            "application_name": "stablerail-api",
            "search_path": settings.database_schema,
            # whatever the database's own is: who waited for a lock must see what was done meanwhile
            "default_transaction_isolation": "read committed",
            "jit": "off",  # our statements are short; compiling them costs more than running them
            "role": settings.database_role,
            # a frozen process keeps no locks
            "lock_timeout": f"{int(settings.database_lock_timeout_s * 1000)}ms",
            "idle_in_transaction_session_timeout": f"{int(settings.database_idle_timeout_s * 1000)}ms",
        },
    )
    broker = alpaca_client(settings)
    app = create_api(settings, pool, metrics, journal, broker)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(served: FastAPI) -> AsyncIterator[None]:
        async with broker or nullcontext(), pool, inner(served):
            try:
                await journal.start()
                yield
            finally:
                await journal.stop()
                if mirror is not None:
                    await mirror.close()

    app.router.lifespan_context = lifespan
    return app


def alpaca_client(settings: Settings) -> AlpacaClient | None:
    """None without credentials."""
    if settings.alpaca_api_key is None or settings.alpaca_api_secret is None:
        return None
    return AlpacaClient(
        settings.alpaca_api_url,
        settings.alpaca_api_key.get_secret_value(),
        settings.alpaca_api_secret,
        settings.alpaca_timeout_s,
    )


async def reach(settings: Settings) -> None:
    """PostgreSQL, as the API's role, and the legacy table where there is one. Raises RoleRefused, LegacyUnusable."""
    connection = await opener(settings, None)()
    try:
        await shadow.start(settings, connection)
    finally:
        await connection.close()


def run_api(settings: Settings) -> None:
    """Serves until SIGTERM."""
    import uvloop

    # until uvicorn listens nothing is in hand; the first process of a container ends by no signal that it does not handle
    before = signal.signal(signal.SIGTERM, lambda *_: exit_now(0))

    async def main() -> None:
        await until_up(partial(reach, settings), "api.waits")
        app = api_app(settings, Metrics())
        server = _server(app, settings.api_host, settings.api_port, settings)
        app.state.stopping = lambda: server.should_exit
        journal: Journal = app.state.journal
        journal.on_unfit = partial(setattr, server, "should_exit", True)
        await server.serve()
        if journal.unfit is not None:
            raise journal.unfit

    try:
        uvloop.run(main())
    # nothing was done, or nothing of it was told
    except (ACopy, ConfigError, DatabaseBehind, LegacyUnusable, RoleRefused) as error:
        _log.critical("api.stops", code=error.code, reason=str(error))
        raise SystemExit(EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_BUG) from None
    except Exception:  # a database that does not let us in
        _log.critical("api.crashed", exc_info=True)
        raise SystemExit(EXIT_BUG) from None
    finally:
        signal.signal(signal.SIGTERM, before)


class _Server(uvicorn.Server):
    """uvicorn's, with our exit codes: it dies of the SIGTERM that it obeyed, and ends with 3 when it cannot start."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals = [number for number in self._captured_signals if number != signal.SIGTERM]

    async def serve(self, sockets: list[socket] | None = None) -> None:
        try:
            await super().serve(sockets)
        except SystemExit:  # its port is another's; uvicorn has logged it
            raise SystemExit(EXIT_BUG) from None


def _server(app: FastAPI, host: str, port: int, settings: Settings) -> _Server:
    """Not with `limit_concurrency`: whoever holds so many connections, and says nothing, keeps everybody out."""
    return _Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            http=guarded(),
            ws="none",
            timeout_keep_alive=KEPT_S,
            timeout_graceful_shutdown=int(settings.worker_shutdown_timeout_s),
        )
    )
