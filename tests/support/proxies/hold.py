"""Holds: stop a frame, tell the test, wait for its verdict."""

from __future__ import annotations

import asyncio
import concurrent.futures
import select
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tests.support.proxies.base import Proxy

PATIENCE_S = 100.0
"""What is held may come from a process that has yet to start, on a machine that others load."""
Where = Literal["request", "reply"]
Verdict = Literal["go", "go even if gone", "drop"]


@dataclass(frozen=True)
class Frame:
    """One request a client sent: what predicates look at, `Hold.wait_hit` returns and `Proxy.log` keeps.

    kind    PostgreSQL: the statement's first word, in capitals; Kafka: the API's name; HTTP: the method
    name    PostgreSQL: the SQL, white space collapsed; Kafka: the client id; HTTP: the target with its query
    raw     the bytes on the wire (empty in the log)
    before  PostgreSQL: the statements of the same transaction that came earlier
    """

    connection: int
    sequence: int
    kind: str
    name: str
    raw: bytes = field(default=b"", repr=False)
    before: tuple[str, ...] = field(default=(), repr=False)
    at_s: float = field(default_factory=time.monotonic, repr=False)


Match = Callable[[Frame], bool]


class Dropped(Exception):
    """The frame goes no further and its connection ends."""


class Hold:
    """Stops the nth frame that matches, counted over all connections since the hold was made; the others pass. With
    `and_later` those after it are stopped too, until the verdict.

    `seen` counts the frames that matched so far, whether stopped or not.
    """

    def __init__(self, proxy: Proxy, match: Match, where: Where, nth: int, and_later: bool) -> None:
        if nth < 1 or where not in ("request", "reply"):
            raise ValueError(f"hold {where!r} of match number {nth}: want request or reply, and a number from 1")
        self.where = where
        self.seen = 0
        self._proxy, self._match, self._nth, self._and_later = proxy, match, nth, and_later
        self._hit: concurrent.futures.Future[Frame] = concurrent.futures.Future()
        self._hit.set_running_or_notify_cancel()  # a waiter that gives up must not cancel it for the others
        self._verdict: asyncio.Future[Verdict] = proxy.loop.create_future()
        self._over: asyncio.Future[bool] = proxy.loop.create_future()

    @property
    def is_hit(self) -> bool:
        return self._hit.done()

    def wait_hit(self, timeout_s: float = PATIENCE_S) -> Frame:
        """The frame that is being held. Of a reply: the whole of it has arrived from the server."""
        try:
            return self._hit.result(timeout_s)
        except TimeoutError:
            raise self._missed(timeout_s) from None

    async def wait_hit_async(self, timeout_s: float = PATIENCE_S) -> Frame:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._hit), timeout_s)
        except TimeoutError:
            raise self._missed(timeout_s) from None

    def release(self, *, even_if_gone: bool = False) -> bool:
        """Let the frame go; true when its bytes were written on. A hold that was not hit yet is taken back.

        When the client's side is closed by then (killed: wait for the process before you release), the bytes are
        dropped and the connection ends, as if they had never left the client. `even_if_gone` sends a held request on
        nevertheless: the packet of a dead client that was still on its way.
        """
        return self._proxy.call(self._settle("go even if gone" if even_if_gone else "go"))

    def drop(self) -> None:
        """Close both sides without writing the frame on."""
        self._proxy.call(self._settle("drop"))

    async def _settle(self, verdict: Verdict) -> bool:
        if not self._verdict.done():
            self._verdict.set_result(verdict if self.is_hit else "go")
        if not self.is_hit:
            self.finish(False)
        return await self._over

    def is_due(self, frame: Frame) -> bool:
        if not self._match(frame):
            return False
        self.seen += 1
        return self.seen == self._nth or (self._and_later and self.seen > self._nth)

    async def pause(self, frame: Frame, client: asyncio.StreamWriter) -> None:
        """Report the hit and wait for the verdict; raises Dropped."""
        if self._verdict.done():
            return
        if not self.is_hit:
            self._hit.set_result(frame)
        verdict = await self._verdict
        if verdict == "drop" or (verdict == "go" and is_gone(client)):
            raise Dropped

    def finish(self, written: bool) -> None:
        if not self._over.done():
            self._over.set_result(written)

    def _missed(self, timeout_s: float) -> TimeoutError:
        last = ", ".join(f"{frame.connection}: {frame.kind} {frame.name}"[:80] for frame in list(self._proxy.log)[-10:])
        return TimeoutError(
            f"no {self.where} held after {timeout_s} s: {self.seen} matched, number {self._nth} is wanted; last: {last}"
        )

    @staticmethod
    @asynccontextmanager
    async def passing(holds: Sequence[Hold], frame: Frame, client: asyncio.StreamWriter) -> AsyncIterator[None]:
        """Around the writing of a frame: waits for each hold first, and tells it afterwards how that ended."""
        written = False
        try:
            for hold in holds:
                await hold.pause(frame, client)
            yield
            written = True
        finally:
            for hold in holds:
                hold.finish(written)


def is_gone(writer: asyncio.StreamWriter) -> bool:
    """Whether the peer has closed its side. Asked of the kernel, as what it sent before may hide the end from a read."""
    sock: socket.socket = writer.get_extra_info("socket")
    if writer.is_closing() or sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock.fileno(), getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR)
    return bool(poll.poll(0))
