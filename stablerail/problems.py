"""The API's problem answers (RFC 9457): the bridge's, and what a request's validation has to say."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from connectors.webhooks import problems
from connectors.webhooks.problems import MEDIA_TYPE, Problem

__all__ = ["MEDIA_TYPE", "Problem", "install"]


def install(app: FastAPI) -> None:
    """Every error of `app` becomes a problem. A handler raises Problem(status, code, detail)."""
    problems.install(app)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)


async def _on_invalid_request(_request: Request, error: Exception) -> JSONResponse:
    """400 when the body is not JSON, else 422; `errors` names each field. Values sent are not repeated."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    fields = [{"field": ".".join(map(str, e["loc"])), "message": e["msg"]} for e in errors]
    unreadable = any(e["type"] == "json_invalid" for e in errors)
    problem = Problem(
        400 if unreadable else 422,
        "invalid_request",
        "The body is not JSON." if unreadable else "Some fields are missing or wrong; see errors.",
        members={"errors": fields},
    )
    return problem.response()
