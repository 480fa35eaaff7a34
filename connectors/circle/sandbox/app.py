"""The sandbox as an ASGI app: who may call, Circle's error bodies, and the background work for as long as it is served."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated

from fastapi import Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from connectors.circle.sandbox import control, mint, transfers, wallets, webhooks
from connectors.circle.sandbox.chainwatch import ChainWatch
from connectors.circle.sandbox.config import SandboxConfig
from connectors.circle.sandbox.deliveries import Deliveries
from connectors.circle.sandbox.gate import Gate, GateMiddleware
from connectors.circle.sandbox.keys import entity_key
from connectors.circle.sandbox.rpc import Rpc, RpcError
from connectors.circle.sandbox.state import CircleError, State, Subscription


class Sandbox:
    """The parts of one sandbox. Make it, and its app, inside a running event loop."""

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self.state = State(config)
        self.gate = Gate(rate_limits=config.rate_limits)
        self.deliveries = Deliveries(config, self.state)
        self.mint = mint.MintSandbox(config.sns_retry_delays_s)
        self.rpc: Rpc | None = None
        if config.rpc_url is not None:
            if config.usdc_address is None:
                raise ValueError("rpc_url needs usdc_address: which contract to watch")
            self.rpc = Rpc(config.rpc_url, config.usdc_address)
        self.transfers = transfers.Transfers(config, self.state, self.rpc, self.deliveries.announce)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        await asyncio.to_thread(entity_key, self.config.rsa_bits)
        if self.config.endpoint is not None:
            subscribed = Subscription(endpoint=self.config.endpoint)
            self.state.subscriptions[subscribed.id] = subscribed
        await self.deliveries.start()
        watching = None
        if self.rpc is not None:
            watch = ChainWatch(self.config, self.rpc, self.state, self.deliveries.announce)
            # The first poll sets the block after which transfers count: before anybody can make a wallet.
            with suppress(RpcError):
                await watch.poll()
            watching = asyncio.create_task(watch.run())
        try:
            yield
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
            await self.transfers.close()
            await self.deliveries.close()
            await self.mint.close()
            if self.rpc is not None:
                await self.rpc.close()


def create_app(sandbox: Sandbox) -> FastAPI:
    """The app of this sandbox; its lifespan runs the watcher and the deliveries."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with sandbox.running():
            yield

    async def bearer(authorization: Annotated[str | None, Header()] = None) -> None:
        scheme, _, key = (authorization or "").partition(" ")
        if scheme != "Bearer" or not key:
            raise CircleError(401, 1, "malformed authorization")
        if not hmac.compare_digest(key.encode(), sandbox.config.api_key.encode()):
            raise CircleError(401, 401, "invalid credentials")

    app = FastAPI(title="Circle W3S sandbox", lifespan=lifespan)
    app.add_middleware(GateMiddleware, gate=sandbox.gate)
    app.include_router(wallets.routes(sandbox.state, sandbox.rpc), dependencies=[Depends(bearer)])
    app.include_router(transfers.routes(sandbox.transfers, sandbox.state), dependencies=[Depends(bearer)])
    app.include_router(webhooks.routes(sandbox.state, sandbox.deliveries), dependencies=[Depends(bearer)])
    app.include_router(mint.api(sandbox.mint), dependencies=[Depends(bearer)])
    app.include_router(mint.amazon(sandbox.mint))
    if sandbox.config.control:
        app.include_router(mint.control(sandbox.mint))
        app.include_router(control.routes(sandbox.state, sandbox.gate, sandbox.deliveries))
    _errors(app)
    return app


def _errors(app: FastAPI) -> None:
    @app.exception_handler(CircleError)
    async def circle_error(_: Request, error: CircleError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(RequestValidationError)
    async def bad_request(_: Request, error: RequestValidationError) -> JSONResponse:
        details = [
            {
                "error": "required" if problem["type"] == "missing" else "invalid_value",
                "message": problem["msg"],
                "location": ".".join(str(part) for part in problem["loc"][1:]),
                "constraints": {},
            }
            for problem in error.errors()
        ]
        return JSONResponse({"code": 2, "message": "API parameter invalid", "errors": details}, 400)

    @app.exception_handler(HTTPException)
    async def no_such_path(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"code": error.status_code, "message": str(error.detail)}, error.status_code)

    @app.exception_handler(RpcError)
    async def chain_unreachable(_: Request, error: RpcError) -> JSONResponse:
        return JSONResponse({"code": -1, "message": "Something went wrong"}, 500)
