"""A mend of asyncio for servers that run inside the tests' own processes: of proxies, uvicorn and aiohttp alike.

asyncio makes a connection's transport a turn of the loop after it was accepted. A server that is closed between the two refuses the
transport with an AssertionError that nobody sees, and the socket stays open until it is collected, as a ResourceWarning in whatever
test runs then (https://github.com/python/cpython/issues/109564, open). Here it is closed, as a connection of a closed server must be.
"""

from __future__ import annotations

import asyncio
from asyncio.selector_events import BaseSelectorEventLoop
from socket import socket
from typing import Any


def close_what_a_closed_server_accepted() -> None:
    """In every selector loop of this process."""
    inner = BaseSelectorEventLoop._accept_connection2  # type: ignore[attr-defined]

    async def accept(
        loop: BaseSelectorEventLoop,
        factory: Any,
        accepted: socket,
        extra: Any,
        sslcontext: Any = None,
        server: asyncio.Server | None = None,
        *more: Any,
        **named: Any,
    ) -> None:
        if server is not None and not server.sockets:
            accepted.close()
            return
        await inner(loop, factory, accepted, extra, sslcontext, server, *more, **named)

    BaseSelectorEventLoop._accept_connection2 = accept  # type: ignore[attr-defined]
