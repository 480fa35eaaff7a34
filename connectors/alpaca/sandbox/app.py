"""The sandbox as an ASGI app: who may call, Alpaca's error bodies and headers, what it answers, and /_control."""

from __future__ import annotations

import asyncio
import base64
import hmac
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from connectors.alpaca.sandbox.state import Account, State

RATE_WINDOW_S: Final = 60.0


class AlpacaError(Exception):
    """`code`: the HTTP status and five digits more."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.body = status, {"code": code, "message": message}


class Wish(BaseModel):
    """A position that the control sets."""

    model_config = ConfigDict(extra="forbid")
    symbol: str
    qty: str
    entry: str
    price: str | None = None


def create_app(state: State, key_id: str, secret: str, calls_per_min: int = 1_000) -> FastAPI:
    expected = base64.b64encode(f"{key_id}:{secret}".encode())

    async def basic(authorization: Annotated[str, Header()] = "") -> None:
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "basic" or not hmac.compare_digest(given.encode(), expected):
            raise AlpacaError(401, 40110000, "request is not authorized")

    app = FastAPI(title="Alpaca Broker API sandbox")
    app.middleware("http")(_gate(state, calls_per_min))
    app.include_router(_trading(state), dependencies=[Depends(basic)])
    app.include_router(_control(state))

    @app.exception_handler(AlpacaError)
    async def refused(_: Request, error: AlpacaError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    return app


Next = Callable[[Request], Awaitable[Response]]


def _gate(state: State, calls_per_min: int) -> Callable[[Request, Next], Awaitable[Response]]:
    calls: deque[float] = deque()

    async def gate(request: Request, go_on: Next) -> Response:
        if request.url.path.startswith("/_control"):
            return await go_on(request)
        if state.faults:
            status = state.faults.pop(0)
            if status == 0:
                await asyncio.Event().wait()
            return Response("upstream error", status)  # plain text, as proxies answer
        now = time.monotonic()
        while calls and calls[0] <= now - RATE_WINDOW_S:
            calls.popleft()
        left = calls_per_min - len(calls)
        if left > 0:
            calls.append(now)
            answer = await go_on(request)
        else:
            answer = JSONResponse({"code": 42910000, "message": "rate limit exceeded"}, 429)
        answer.headers["X-RateLimit-Limit"] = str(calls_per_min)
        answer.headers["X-RateLimit-Remaining"] = str(max(left - 1, 0))
        answer.headers["X-RateLimit-Reset"] = str(int(time.time() + RATE_WINDOW_S))
        return answer

    return gate


def _trading(state: State) -> APIRouter:
    router = APIRouter(prefix="/v1/trading/accounts/{account_id}")

    def known(account_id: str) -> Account:
        if account_id not in state.accounts:
            raise AlpacaError(404, 40410000, f"account {account_id} not found")
        return state.accounts[account_id]

    @router.get("/positions")
    async def positions(account_id: str) -> list[dict[str, Any]]:
        return [holding.body() for _, holding in sorted(known(account_id).holdings.items())]

    @router.get("/positions/{symbol_or_asset_id}")
    async def position(account_id: str, symbol_or_asset_id: str) -> dict[str, Any]:
        for holding in known(account_id).holdings.values():
            if symbol_or_asset_id in (holding.symbol, holding.asset_id):
                return holding.body()
        raise AlpacaError(404, 40410000, "position does not exist")

    @router.get("/account")
    async def account(account_id: str) -> dict[str, Any]:
        return known(account_id).body()

    return router


def _control(state: State) -> APIRouter:
    router = APIRouter(prefix="/_control")

    @router.put("/accounts/{account_id}/positions")
    async def set_positions(account_id: str, wishes: list[Wish]) -> dict[str, int]:
        state.open_account(account_id).holdings.clear()
        for wish in wishes:
            state.hold(account_id, wish.symbol, wish.qty, wish.entry, wish.price)
        return {"positions": len(wishes)}

    @router.put("/faults")
    async def set_faults(statuses: list[int]) -> dict[str, int]:
        state.faults[:] = statuses
        return {"faults": len(statuses)}

    return router
