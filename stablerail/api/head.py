"""HEAD, which load balancers ask with: every GET answers it."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadAsGet:
    """ASGI middleware: HEAD is answered as GET is, without the content (RFC 9110, 9.3.2). What streams ends with its beginning."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        answered = False

        async def bare(message: Message) -> None:
            nonlocal answered
            if message["type"] != "http.response.body":
                await send(message)
            elif not answered:
                answered = True
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        # here, not in a copy: what the app finds out, such as the route, is told to those before us
        scope["method"] = "GET"
        try:
            await self.app(scope, receive, bare)
        finally:
            scope["method"] = "HEAD"
