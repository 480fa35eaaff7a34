"""What the API says of itself, its cursors, and what it answers without a database."""

from __future__ import annotations

import contextlib
import re
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from stablerail.api import create_api
from stablerail.api.models import Problem
from stablerail.api.reads import Cursor
from stablerail.config import load_settings
from stablerail.keys import authenticate

PROBLEM = "application/problem+json"


@pytest.fixture
async def api() -> FastAPI:
    """With a pool that was never opened: each acquisition fails at once."""
    return create_api(load_settings(env_file=None), asyncpg.create_pool("postgresql://127.0.0.1:1/none"))


@pytest.fixture
async def client(api: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(api, raise_app_exceptions=False), base_url="http://api")


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(path, operation) for path, methods in document["paths"].items() for operation in methods.values()]


async def test_every_endpoint_is_described_and_every_customer_endpoint_needs_a_key(api: FastAPI) -> None:
    document = api.openapi()
    assert {path for path, _ in operations(document)} == {
        "/v1/users/{user_id}/balances",
        "/v1/users/{user_id}/wallets",
        "/v1/users/{user_id}/deposits",
        "/v1/deposits",
        "/v1/deposits/{deposit_id}",
        "/v1/wallets",
        "/v1/accounts/{account}/balance",
        "/v1/accounts/{account}/statement",
        "/v1/ledger/transactions/{transaction_id}",
        "/v1/ledger/transactions",
        "/v1/ledger/trial-balance",
        "/v1/onboarding/status",
        "/v1/onboarding/events",
        "/v1/wallets/status",
        "/v1/wallets/addresses",
        "/v1/admin/workers/status",
        "/v1/admin/workers/metrics",
        "/v1/admin/workers/health",
        "/v1/admin/workers/restart",
        "/v1/admin/workers/trigger",
        "/v1/withdrawals",
        "/v1/withdrawals/{withdrawal_id}",
        "/v1/withdrawals/{withdrawal_id}/cancel",
        "/v1/admin/limits",
        "/v1/admin/dlq",
        "/v1/admin/dlq/redrive",
        "/v1/admin/dlq/{letter_id}",
        "/v1/admin/dlq/{letter_id}/redrive",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    for path, operation in operations(document):
        assert operation["summary"], path
        assert operation["tags"], path
        if path.startswith("/v1/"):
            assert operation["description"], path
            assert operation["security"] == [{"APIKey": []}], path
            assert {"401", "403", "422", "503"} <= set(operation["responses"]), path
            assert {"200", "202"} & set(operation["responses"]), path
            unread = {"408", "413", "415"}
            assert unread & set(operation["responses"]) == (unread if "requestBody" in operation else set()), path
            assert "400" in operation["responses"] or "requestBody" not in operation, path
            asked = path.startswith(("/v1/onboarding/", "/v1/wallets/"))
            named = "{" in path or asked or (path.startswith("/v1/admin/workers/") and "requestBody" in operation)
            assert ("404" in operation["responses"]) == named, path


async def test_every_error_in_the_document_is_a_problem_with_a_true_example(api: FastAPI) -> None:
    document = api.openapi()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path, operation in operations(document):
        for status, response in operation["responses"].items():
            if status >= "300":
                content = response["content"]
                assert list(content) == [PROBLEM], (path, status)
                example = Problem.model_validate(content[PROBLEM]["example"])
                assert str(example.status) == status


async def test_every_code_of_a_503_is_in_the_document(api: FastAPI) -> None:
    """An answer that a caller has not heard of is one that is not asked again."""
    own = {
        "/readyz": {"not_ready"},
        "/v1/admin/workers/health": {"workers_unhealthy"},
        "/v1/users/{user_id}/balances": {"legacy_away"},
    }
    for path, methods in api.openapi()["paths"].items():
        for method, operation in methods.items():
            codes = {"busy"} | own.get(path, set())
            codes |= {"database_behind", "a_copy"} if path.startswith("/v1/") or path == "/readyz" else set()
            codes |= {"database_unavailable"} if path.startswith("/v1/") else set()
            codes |= {"journal_unavailable"} if method != "get" else set()
            told = re.findall(r"`(\w+)`", operation["responses"]["503"]["description"])
            assert set(told) == codes, (method, path)
            assert len(told) == len(codes), (method, path)


async def test_every_reference_in_the_document_leads_somewhere(api: FastAPI) -> None:
    document = api.openapi()
    schemas = set(document["components"]["schemas"])

    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [found for value in node.values() for found in references(value)]
        return [found for value in node for found in references(value)] if isinstance(node, list) else []

    assert {reference.rpartition("/")[2] for reference in references(document)} <= schemas


async def test_the_documentation_page_is_served(client: httpx.AsyncClient) -> None:
    assert (await client.get("/docs")).status_code == 200
    assert (await client.get("/openapi.json")).json()["info"]["title"] == "Stablerail"


async def test_without_a_database_it_lives_is_not_ready_and_says_so(client: httpx.AsyncClient) -> None:
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    ready = await client.get("/readyz")
    assert (ready.status_code, ready.json()["code"]) == (503, "not_ready")
    read = await client.get("/v1/users/u/balances", headers={"Authorization": "Bearer x"})
    assert (read.status_code, read.json()["code"]) == (503, "database_unavailable")
    assert read.headers["content-type"] == PROBLEM
    assert read.headers["retry-after"]


async def test_a_server_that_refuses_connections_is_a_problem_to_try_again() -> None:
    async with asyncpg.create_pool("postgresql://127.0.0.1:1/none", min_size=0) as pool:
        transport = httpx.ASGITransport(create_api(load_settings(env_file=None), pool))
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            header = {"Authorization": "Bearer sr_" + "0" * 16 + "_" + "0" * 64}
            answer = await client.get("/v1/users/u/balances", headers=header)
    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")


async def test_head_is_answered_as_get_without_the_content(api: FastAPI, client: httpx.AsyncClient) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/docs", "/v1/users/u/balances", "/nothing"):
        read, head = await client.get(path), await client.head(path)
        assert (head.status_code, head.content) == (read.status_code, b""), path
        assert head.headers.keys() == read.headers.keys(), path
    assert (await client.head("/v1/admin/workers/restart")).headers["allow"] == "POST"
    labels = {"app": "api", "method": "HEAD", "route": "/v1/users/{user_id}/balances", "status": "503"}
    assert api.state.metrics.registry.get_sample_value("stablerail_http_requests_total", labels) == 1


async def test_a_bug_is_answered_with_a_problem_that_says_nothing_of_its_cause(api: FastAPI) -> None:
    @api.get("/bug")
    async def bug() -> None:
        raise RuntimeError("s3cr3t")

    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        answer = await client.get("/bug")
    assert (answer.status_code, answer.headers["content-type"]) == (500, PROBLEM)
    assert answer.json()["code"] == "internal_error"
    assert "s3cr3t" not in answer.text


async def test_unknown_paths_and_methods_are_problems_and_make_no_new_series(
    api: FastAPI, client: httpx.AsyncClient
) -> None:
    for path in ("/nothing/1", "/nothing/2"):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert (await client.post("/healthz")).json()["code"] == "method_not_allowed"
    assert (await client.post("/healthz")).headers["allow"] == "GET, HEAD"
    assert (await client.request("BREW", "/nothing")).status_code == 404
    labels = {"app": "api", "method": "GET", "route": "unmatched", "status": "404"}
    registry = api.state.metrics.registry
    assert registry.get_sample_value("stablerail_http_requests_total", labels) == 2
    assert registry.get_sample_value("stablerail_http_requests_total", {**labels, "method": "other"}) == 1


@given(
    st.none() | st.datetimes(timezones=st.just(UTC)),
    st.uuids(),
)
def test_a_cursor_survives_its_text(at: datetime | None, deposit_id: UUID) -> None:
    assert Cursor.parse(Cursor(at, deposit_id).text()) == Cursor(at, deposit_id)


@given(st.text(max_size=100) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
def test_no_text_makes_a_cursor_fail_otherwise_than_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(Cursor.parse(text), Cursor)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer sr_0123456789abcdef_",
        "Basic sr_0123456789abcdef_" + "a" * 64,
        "Bearer sr_0123456789abcdeg_" + "a" * 64,
        "Bearer sr_0123456789abcdef_" + "a" * 65,
        "Bearer sr_0123456789abcdef_" + "a" * 64 + "\n",
        "Bearer sr_0123456789abcdef_" + "\0" * 64,
    ],
)
async def test_a_malformed_key_is_refused_before_the_database_is_asked(header: str | None) -> None:
    assert await authenticate(None, header) is None  # type: ignore[arg-type]


async def test_the_documentation_page_loads_nothing_from_other_hosts(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")
    loaded = re.findall(r'(?:href|src)="([^"]+)"', page.text)
    assert len(loaded) >= 2
    for address in loaded:
        assert address.startswith("/")
        assert (await client.get(address)).status_code == 200
