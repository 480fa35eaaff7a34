"""The API's factory. Health and metrics need no key: bind them where only your own machines reach them."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import asyncpg
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline

from agents.recovery.errors import LetterRefused
from agents.withdrawals.errors import RequestRefused
from ledger.commit import TRANSIENT
from ledger.errors import BalancesDisagree, LegacyAway, ReadRefused
from stablerail import problems
from stablerail.api import dlq_routes, ledger_routes, models, onboarding_routes, withdrawal_routes, worker_routes
from stablerail.api.bodies import BODY_BYTES_MAX, BODY_S_MAX, SmallBodies
from stablerail.api.compared import on_away, on_disagree
from stablerail.api.detail import Broker
from stablerail.api.head import HeadAsGet
from stablerail.api.journal import Journal
from stablerail.api.observe import Observed
from stablerail.api.reads import Pool
from stablerail.api.routes import problem, router
from stablerail.config import Settings
from stablerail.limits import known_limits
from stablerail.metrics import Metrics
from stablerail.problems import Problem

log = structlog.get_logger()

READY_TIMEOUT_S: Final = 2.0
RETRY_AFTER_S: Final = 2
_AWAY: Final[tuple[type[Exception], ...]] = (*TRANSIENT, asyncpg.ReadOnlySQLTransactionError)
"""The server is away or takes no writes, or others hold what the request needs for longer than it may wait: asked again it may be
done."""
_NOT_READY: Final[tuple[type[Exception], ...]] = (*TRANSIENT, asyncpg.PostgresError)

_DESCRIPTION = """
What a customer has, where they can deposit, how each deposit came about, withdrawals, and the ledger that says so.

* **Amounts** are decimal strings with six decimals. Never parse them as floats.
* **Errors** are `application/problem+json` (RFC 9457); branch on `code`, which is stable.
* **Keys**: `Authorization: Bearer sr_<id>_<secret>`, made by `stablerail keys create --scope read --scope withdraw`.
* **Asking twice** for a withdrawal with one `Idempotency-Key` asks once: after a lost answer or a 503, ask again.
"""

_OF_BODIES: Final = {
    **problem(400, "invalid_request", "The body cannot be read as JSON.", "Bad Request"),
    **problem(408, "body_too_slow", f"A body must arrive within {BODY_S_MAX:g} s.", "Request Timeout"),
    **problem(413, "body_too_large", f"A body has at most {BODY_BYTES_MAX} bytes.", "Content Too Large"),
    **problem(415, "unsupported_media_type", "Send the body as application/json.", "Unsupported Media Type"),
}
_BUSY: Final = problem(503, "busy", "Too many requests are being answered; send it again.", "Service Unavailable")


def create_api(
    settings: Settings,
    pool: Pool,
    metrics: Metrics | None = None,
    journal: Journal | None = None,
    broker: Broker | None = None,
) -> FastAPI:
    """The app. Whoever calls it opens and closes the pool, whose connections have our schema as their search_path, and
    starts and stops the journal and the broker's client."""
    metrics = metrics or Metrics()
    app = FastAPIOffline(
        title="Stablerail",
        version="1",
        summary="Customers' stablecoin balances, wallets, deposits and withdrawals",
        description=_DESCRIPTION,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
        separate_input_output_schemas=False,
        openapi_tags=[
            {"name": "customers", "description": f"Balances and wallets ({settings.network})."},
            {"name": "deposits", "description": "Transfers to customers' wallets."},
            {"name": "withdrawals", "description": "Money on its way out; asked for with the scope `withdraw`."},
            {"name": "administration", "description": "Limits; scope `admin`."},
            {"name": "ledger", "description": "Accounts, statements, transactions; the company's own too."},
            {"name": "workers", "description": "The workers, for operators."},
            {"name": "dead letters", "description": "Events that were refused; scope `admin`."},
            {"name": "operation", "description": "For orchestrators and Prometheus; no key."},
        ],
    )
    app.state.pool = pool
    app.state.metrics = metrics
    app.state.journal = journal or Journal.of(settings)
    app.state.broker = broker
    app.state.known_limits = known_limits(settings)
    app.state.stopping = lambda: False
    problems.install(app)
    for error in _AWAY:
        app.add_exception_handler(error, _on_database_gone)
    app.add_middleware(HeadAsGet)
    app.add_middleware(SmallBodies)
    app.add_middleware(Observed, metrics=metrics, name="api")
    app.include_router(router)
    app.include_router(ledger_routes.router)
    app.include_router(onboarding_routes.router)
    app.include_router(worker_routes.router)
    app.include_router(dlq_routes.router)
    for withdrawals in (withdrawal_routes.asking, withdrawal_routes.reading, withdrawal_routes.administering):
        app.include_router(withdrawals)
    app.add_exception_handler(BalancesDisagree, on_disagree)
    app.add_exception_handler(LegacyAway, on_away)
    app.add_exception_handler(ReadRefused, ledger_routes.on_read_refused)
    app.add_exception_handler(LetterRefused, dlq_routes.on_letter_refused)
    app.add_exception_handler(RequestRefused, withdrawal_routes.on_request_refused)
    _add_operation(app, pool, metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


def _add_operation(app: FastAPI, pool: Pool, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["operation"], summary="The process runs", responses=_BUSY)
    async def healthz() -> models.Health:
        return models.Health(status="ok")

    not_ready = problem(503, "not_ready", "The database does not answer.", "Service Unavailable")

    @app.get("/readyz", tags=["operation"], summary="The process can serve", responses=not_ready)
    async def readyz() -> models.Health:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S), pool.acquire() as connection:
                await connection.execute("SELECT FROM api_keys LIMIT 1")
        except _NOT_READY as error:
            log.warning("not_ready", error=type(error).__name__)
            raise Problem(503, "not_ready", "The database does not answer, or is not migrated.") from None
        return models.Health(status="ready")

    @app.get("/metrics", tags=["operation"], summary="Prometheus metrics", response_class=Response, responses=_BUSY)
    async def read_metrics() -> Response:
        return Response(metrics.render(), media_type=metrics.content_type)


async def _on_database_gone(_request: Request, error: Exception) -> JSONResponse:
    log.warning("database_unavailable", error=type(error).__name__)
    gone = Problem(
        503,
        "database_unavailable",
        "The database does not answer; try again.",
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )
    return gone.response()


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the problem answers' schema, which no endpoint returns and so is not found by itself, what a
    body is refused by before an endpoint is asked, and every code of a 503."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                responses = operation["responses"]
                if "requestBody" in operation:
                    responses.update({str(status): each for status, each in _OF_BODIES.items()})
                told = responses["503"]["description"]
                for code in (f"`{code}`" for code in _unavailable(path, method)):
                    told += f", {code}" * (code not in told)
                responses["503"]["description"] = told
        schemas = document["components"]["schemas"]
        schemas["Problem"] = models.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        app.openapi_schema = document
    return app.openapi_schema


def _unavailable(path: str, method: str) -> list[str]:
    """What 503 may say of any operation like this one."""
    codes = []
    if path.startswith("/v1/"):
        codes.append("database_unavailable")
    if path not in ("/healthz", "/metrics"):  # it has a connection
        codes += ["database_behind", "a_copy"]
    if method != "get":  # it commits
        codes.append("journal_unavailable")
    return [*codes, "busy"]
