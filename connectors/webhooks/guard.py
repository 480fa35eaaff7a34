"""Connections of the bridge and of the API, bounded: uvicorn's HTTP/1.1 protocol with a time for each request and a place in a row for each wait.

Who has sent a whole request is answered. Who has not yet, waits: for headers HEAD_S at most (the body's time is the app's). So does
who does not read the answer, for as long as there is room. When there are more than CONNECTIONS_MAX connections, those who have
waited longest go, after GRACE_S: an attacker who opens connections and says or reads little pushes out his own, and a vendor sends a
request at once. There are never more than CONNECTIONS_HARD_MAX; a new one is refused when all of them are being answered. All answers
given here are problems (RFC 9457) as the app's are. A connection that was answered before and has begun no other request ends without
one: its client may send a request just then, and would take it for the answer.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, Final

import h11
import orjson
from uvicorn.protocols.http.h11_impl import H11Protocol

from connectors.webhooks.problems import MEDIA_TYPE

CONNECTIONS_MAX: Final = 500
CONNECTIONS_HARD_MAX: Final = 2_000
"""A thousand that come in one turn of the loop must not push out the vendor who came with them, and whose request is not read
yet. One that has sent nothing takes some 20 kB."""
GRACE_S: Final = 1.0
HEAD_S: Final = 5.0
READ_FIRST_S: Final = 0.01
"""Between a time that is up and the consequence: a process that stood still first reads what came meanwhile."""
KEPT_S: Final = 60
"""`timeout_keep_alive` of the server: above HEAD_S, so that it is the time here that counts."""


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """As `asyncio.timeout`, for what others send. Who finds the time up late stood still itself: what came meanwhile is read first,
    for as long again."""
    loop = asyncio.get_running_loop()
    due = loop.time() + seconds
    async with asyncio.timeout(None) as limit:

        def time_is_up() -> None:
            now = loop.time()
            limit.reschedule(now + max(READ_FIRST_S, now - due))

        timer = loop.call_at(due, time_is_up)
        try:
            yield
        finally:
            timer.cancel()


_quiet = logging.getLogger("connectors.webhooks.guard")
_quiet.setLevel(logging.ERROR)  # uvicorn has a line for every request that is none: an attacker would write our log


class Waiting(dict["GuardedProtocol", float]):
    """Connections of one server without a whole request, or whose client does not read, longest first, and since when."""


def guarded(connections_max: int = CONNECTIONS_MAX, head_s: float = HEAD_S) -> type[GuardedProtocol]:
    """A protocol class for one server: `uvicorn.Config(app, http=guarded(), ws="none", timeout_keep_alive=KEPT_S)`."""

    class Protocol(GuardedProtocol):
        waiting = Waiting()

    # each connection is a file, and the process has others
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    Protocol.hard_max = max(connections_max, min(CONNECTIONS_HARD_MAX, files // 2))
    Protocol.connections_max = connections_max
    Protocol.head_s = head_s
    return Protocol


class GuardedProtocol(H11Protocol):
    waiting: Waiting
    connections_max: int
    hard_max: int
    head_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _quiet
        self._head_timer: asyncio.TimerHandle | None = None
        self._answered = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._make_room()
        if len(self.connections) > self.hard_max:
            self._refuse(503, "busy", "Too many requests are being answered; send it again.", ("Retry-After", "5"))
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._settled()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return  # refused already
        super().data_received(data)
        self._note()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.waiting.setdefault(self, self.loop.time())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._note()

    def on_response_complete(self) -> None:
        self._answered = True
        if self.transport.is_closing():
            self._close()
        else:
            self._wait()
        super().on_response_complete()
        self._note()  # the next request may have been there already

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "bad_request", msg)

    def _make_room(self) -> None:
        now = self.loop.time()
        while len(self.connections) > self.connections_max and self.waiting:
            oldest, since = next(iter(self.waiting.items()))
            if now - since < GRACE_S and len(self.connections) <= self.hard_max:
                return
            oldest._drop()

    def _note(self) -> None:
        """Looks how far the request is."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return
        self._stop_timer()
        if not cycle.more_body and not self.flow.write_paused:
            self.waiting.pop(self, None)

    def _wait(self) -> None:
        """For the next request, with a new time, last in the row."""
        self._settled()
        self.waiting[self] = self.loop.time()
        self._head_timer = self.loop.call_later(self.head_s, self._time_is_up)

    def _time_is_up(self) -> None:
        self._head_timer = self.loop.call_later(READ_FIRST_S, self._too_slow)

    def _too_slow(self) -> None:
        if self.transport.is_closing():
            return
        begun, _ = self.conn.trailing_data
        if self._answered and not begun:
            self._close()
            return
        self._refuse(408, "headers_too_slow", f"A request's headers must arrive within {self.head_s:g} s.")

    def _settled(self) -> None:
        self._stop_timer()
        self.waiting.pop(self, None)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        """It ends when the client has read everything: at once, or else it makes room as others do."""
        self._settled()
        self.transport.close()
        self._head_timer = self.loop.call_later(READ_FIRST_S, self._linger)

    def _linger(self) -> None:
        self.waiting[self] = self.loop.time()

    def _drop(self) -> None:
        self._settled()
        self.connections.discard(self)  # it counts no more, though its end comes with the next turn of the loop
        self.transport.abort()

    def _refuse(self, status: int, code: str, detail: str, *headers: tuple[str, str]) -> None:
        """Answers with a problem, where an answer is still possible, and closes."""
        phrase = HTTPStatus(status).phrase
        body = orjson.dumps({"type": "about:blank", "title": phrase, "status": status, "code": code, "detail": detail})
        given = [("Content-Type", MEDIA_TYPE), ("Content-Length", str(len(body))), ("Connection", "close"), *headers]
        try:
            events = [
                h11.Response(status_code=status, headers=given, reason=phrase),
                h11.Data(body),
                h11.EndOfMessage(),
            ]
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        except h11.LocalProtocolError:
            pass  # an answer has begun
        self._close()
