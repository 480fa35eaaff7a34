"""The API's problem answers (RFC 9457): the bridge's, and what a request's validation has to say."""

from __future__ import annotations

from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from connectors.webhooks import problems
from connectors.webhooks.problems import MEDIA_TYPE, Problem

__all__ = ["MEDIA_TYPE", "Problem", "install"]

_UNREADABLE: Final = "The body cannot be read as JSON."


def install(app: FastAPI) -> None:
    """Every error of `app` becomes a problem. A handler raises Problem(status, code, detail)."""
    problems.install(app)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """As the bridge's. A 400 is a body that the framework cannot read: no UTF-8, nested too deep, a number too long."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400:
        return Problem(400, "invalid_request", _UNREADABLE).response()
    if error.status_code == 405:
        # each route knows its own method alone; the document has all of a path
        path = getattr(request.scope.get("route"), "path_format", None)
        methods = request.app.openapi()["paths"].get(path)
        if methods is not None:
            error.headers = {"Allow": ", ".join([*methods, *["head"] * ("get" in methods)]).upper()}
    return await problems.on_http_exception(request, error)


async def _on_invalid_request(_request: Request, error: Exception) -> JSONResponse:
    """400 when the body is not JSON, 415 when it is not said to be, else 422; `errors` names each field. Values sent are not
    repeated."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    if any(isinstance(e.get("input"), bytes) for e in errors):
        return Problem(415, "unsupported_media_type", "Send the body as application/json.").response()
    fields = [{"field": ".".join(map(str, e["loc"])), "message": e["msg"]} for e in errors]
    unreadable = any(e["type"] == "json_invalid" for e in errors)
    problem = Problem(
        400 if unreadable else 422,
        "invalid_request",
        _UNREADABLE if unreadable else "Some fields are missing or wrong; see errors.",
        members={"errors": fields},
    )
    return problem.response()
