"""Problem answers of the API, which are the bridge's."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from stablerail.problems import Problem, install


class Order(BaseModel):
    amount: int
    asset: str


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    install(app)

    @app.post("/orders")
    async def order(order: Order) -> None:
        raise Problem(409, "already_ordered", "That order exists.", members={"order": 7})

    @app.delete("/orders")
    async def clear() -> None: ...

    @app.get("/bug")
    async def bug() -> None:
        raise RuntimeError("password=hunter2")

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        yield client


async def test_wrong_fields_are_named_and_their_values_are_not_repeated(http: httpx.AsyncClient) -> None:
    answer = await http.post("/orders", json={"amount": "hunter2"})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    problem = answer.json()
    assert problem["code"] == "invalid_request"
    assert [error["field"] for error in problem["errors"]] == ["body.amount", "body.asset"]
    assert "hunter2" not in answer.text


@pytest.mark.parametrize("body", [b"{", b'"\xff"', b"[" * 60_000, b"9" * 5_000])
async def test_a_body_that_is_not_json_is_a_bad_request(http: httpx.AsyncClient, body: bytes) -> None:
    answer = await http.post("/orders", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")


@pytest.mark.parametrize("headers", [{}, {"content-type": "application/x-www-form-urlencoded"}])
async def test_a_body_that_is_not_said_to_be_json_is_refused_by_its_type(
    http: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    answer = await http.post("/orders", content=b'{"amount": 1, "asset": "USDC"}', headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert "application/json" in answer.json()["detail"]


async def test_a_method_that_a_path_does_not_take_is_told_all_that_it_takes(http: httpx.AsyncClient) -> None:
    answer = await http.put("/orders")
    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST, DELETE"
    assert "GET" in (await http.put("/docs")).headers["allow"]


async def test_a_problem_carries_its_own_members(http: httpx.AsyncClient) -> None:
    answer = await http.post("/orders", json={"amount": 1, "asset": "USDC"})
    assert answer.json() == {
        "type": "about:blank",
        "title": "Conflict",
        "status": 409,
        "code": "already_ordered",
        "detail": "That order exists.",
        "order": 7,
    }


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/orders", 405, "method_not_allowed"),
        ("GET", "/bug", 500, "internal_error"),
    ],
)
async def test_the_frameworks_own_errors_are_problems(
    http: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    answer = await http.request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert "hunter2" not in answer.text
