"""A request's body is small, and here before anything is done with it: whoever sends it has not shown a key yet."""

from __future__ import annotations

from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from connectors.webhooks.guard import within
from stablerail.problems import Problem

BODY_BYTES_MAX: Final = 64 * 1024
BODY_S_MAX: Final = 10.0


class SmallBodies:
    """ASGI middleware: reads the whole body within the limits, and hands it on as one message."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        try:
            body = await _read(Headers(scope=scope), receive)
        except Problem as problem:
            await problem.response()(scope, receive, send)
            return
        handed = False

        async def whole() -> Message:
            nonlocal handed
            if handed:
                return await receive()  # the end of the connection
            handed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, whole, send)


async def _read(headers: Headers, receive: Receive) -> bytes:
    """Nothing beyond the limit is read, so the connection is closed after the answer."""
    closes = {"Connection": "close"}
    too_large = Problem(413, "body_too_large", f"A body has at most {BODY_BYTES_MAX} bytes.", headers=closes)
    declared = headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > BODY_BYTES_MAX):
        raise too_large
    body = bytearray()
    try:
        async with within(BODY_S_MAX):
            while True:
                message = await receive()
                body += message.get("body", b"")
                if len(body) > BODY_BYTES_MAX:
                    raise too_large
                if not message.get("more_body", False):  # also when the caller is gone
                    return bytes(body)
    except TimeoutError:
        raise Problem(408, "body_too_slow", f"A body must arrive within {BODY_S_MAX:g} s.", headers=closes) from None
