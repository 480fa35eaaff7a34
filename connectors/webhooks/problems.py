"""RFC 9457 problem answers: one look for the bridge and the API.

    {"type": "about:blank", "title": "Unauthorized", "status": 401, "code": "bad_signature", "detail": "..."}

`code` is stable and meant for programs; `detail` is for people. A 500 says nothing of its cause.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

MEDIA_TYPE: Final = "application/problem+json"


class Problem(Exception):
    """Raised by a handler to answer with a problem."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = headers
        self.members = members or {}
        """Further members of the answer, such as the list of wrong fields."""

    def response(self) -> JSONResponse:
        body = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            **self.members,
        }
        return JSONResponse(body, self.status, headers=self.headers, media_type=MEDIA_TYPE)


_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 500: "internal_error"}
_DETAILS = {
    404: "There is nothing at this path.",
    405: "This path does not take this method; see the Allow header.",
}


def install(app: FastAPI) -> None:
    """Every error of `app` becomes a problem: Problem, the framework's own 404 and 405, and the unexpected."""
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, _on_unexpected)


async def _on_problem(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)
    return error.response()


async def on_http_exception(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, f"http_{error.status_code}")
    detail = _DETAILS.get(error.status_code, str(error.detail))
    return Problem(error.status_code, code, detail, headers=error.headers).response()


async def _on_unexpected(_request: Request, _error: Exception) -> JSONResponse:
    # Starlette raises it again after this answer, so the server's log has the traceback.
    return Problem(500, "internal_error", "Something went wrong on our side.").response()
