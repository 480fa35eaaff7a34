"""An HTTP/1.1 proxy: requests by method and path, one upstream connection for each.

A request is read whole before it goes on. A reply streams through as it comes, or, when it is held, is read whole
first. Not for clients that pipeline, upgrade, or wait for `100 Continue`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11

from tests.support.proxies.base import READ_BYTES_MAX, Link, Proxy
from tests.support.proxies.hold import Dropped, Frame, Hold, Match


def http_request(method: str | None = None, path: str = "/", body_contains: str = "") -> Match:
    """Requests of a method whose target begins with the path and whose body contains the text."""
    wanted = body_contains.encode()

    def match(frame: Frame) -> bool:
        _, _, body = frame.raw.partition(b"\r\n\r\n")
        return method in (None, frame.kind) and frame.name.startswith(path) and wanted in body

    return match


class HttpProxy(Proxy):
    @property
    def url(self) -> str:
        return f"http://{self.address}"

    async def serve(self, link: Link) -> None:
        try:
            while await self._exchange(link):
                pass
        except h11.RemoteProtocolError as error:  # either side stopped in the middle of a message
            raise Dropped from error

    async def _exchange(self, link: Link) -> bool:
        """One request and its reply; whether the connection stays open for the next."""
        client = h11.Connection(h11.SERVER)
        raw = b""
        events: list[Any] = []
        while not events or not isinstance(events[-1], h11.EndOfMessage):
            data = await link.reader.read(READ_BYTES_MAX)
            if not data:
                return False
            client.receive_data(data)
            raw += data
            events += take(client)
        request = events[0]
        link.sequence += 1
        frame = Frame(link.number, link.sequence, request.method.decode(), request.target.decode(), raw)
        requests, replies = self.note(frame)
        async with Hold.passing(requests, frame, link.writer):
            upstream, writer = await link.dial(self.upstream)
            writer.write(raw)
        server = h11.Connection(h11.CLIENT)
        for event in events:
            server.send(event)  # so that it knows what the reply answers
        try:
            await self._reply(link, upstream, server, frame, replies)
        finally:
            writer.close()
        return server.their_state is h11.DONE

    async def _reply(
        self, link: Link, upstream: asyncio.StreamReader, server: h11.Connection, frame: Frame, holds: list[Hold]
    ) -> None:
        kept = b""
        events: list[Any] = []
        while not events or not isinstance(events[-1], h11.EndOfMessage):
            data = await upstream.read(READ_BYTES_MAX)
            server.receive_data(data)
            events += take(server)
            if holds:
                kept += data
            else:
                link.writer.write(data)
                await link.writer.drain()
        async with Hold.passing(holds, frame, link.writer):
            link.writer.write(kept)


def take(connection: h11.Connection) -> list[Any]:
    """The events that the bytes received so far make up."""
    events: list[Any] = []
    while not events or not isinstance(events[-1], h11.EndOfMessage):
        event = connection.next_event()
        if event in (h11.NEED_DATA, h11.PAUSED):
            break
        events.append(event)
    return events
