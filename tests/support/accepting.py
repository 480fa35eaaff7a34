"""A mend of asyncio for servers that run inside the tests' own processes: of proxies, uvicorn and aiohttp alike.

asyncio makes a connection's transport a turn of the loop after it was accepted. A server that is closed between the two refuses the
transport with an AssertionError that nobody sees, and a loop that ends between the two forgets the connection; in both the socket
stays open until it is collected, as a ResourceWarning in whatever test runs then
(https://github.com/python/cpython/issues/109564, open). Here it is closed, as a connection of a closed server must be.
"""

from __future__ import annotations

from asyncio.selector_events import BaseSelectorEventLoop
from collections.abc import Coroutine
from socket import socket
from typing import Any
from weakref import WeakKeyDictionary

_waiting: WeakKeyDictionary[BaseSelectorEventLoop, set[socket]] = WeakKeyDictionary()
"""What each loop has accepted and not made a transport of."""


def close_what_a_closed_server_accepted() -> None:
    """In every selector loop of this process."""
    accept, close = BaseSelectorEventLoop._accept_connection2, BaseSelectorEventLoop.close  # type: ignore[attr-defined]

    def accept_open(
        loop: BaseSelectorEventLoop, factory: Any, accepted: socket, *more: Any, **named: Any
    ) -> Coroutine[Any, Any, None]:
        waiting = _waiting.setdefault(loop, set())
        waiting.add(accepted)

        async def first_turn(extra: Any, sslcontext: Any = None, server: Any = None, *rest: Any) -> None:
            waiting.discard(accepted)
            if server is not None and not server.sockets:
                accepted.close()
                return
            await accept(loop, factory, accepted, extra, sslcontext, server, *rest)

        return first_turn(*more, **named)

    def close_all(loop: BaseSelectorEventLoop) -> None:
        close(loop)
        for one in _waiting.pop(loop, set()):  # its task was cancelled before it began, or never ran
            one.close()

    BaseSelectorEventLoop._accept_connection2 = accept_open  # type: ignore[attr-defined]
    BaseSelectorEventLoop.close = close_all  # type: ignore[method-assign]
