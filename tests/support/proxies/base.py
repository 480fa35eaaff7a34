"""What the proxies share: the listener, its thread, and holds.

Every coroutine here runs in the proxy's own loop. The public methods may be called from any thread, and from another
loop's coroutines too: they wait for that loop only for as long as a hand-over takes. The one that really waits,
`Hold.wait_hit`, has an async twin.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakSet

from tests.support.proxies.hold import Dropped, Frame, Hold, Match, Where

T = TypeVar("T")

HAND_OVER_TIMEOUT_S = 60.0
LOG_FRAMES_MAX = 100_000
READ_BYTES_MAX = 65_536


class Link:
    """One client's connection, numbered from 1 in the order they were accepted."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self.reader, self.writer = reader, writer
        self.writers = [writer]
        self.sequence = 0

    async def dial(self, upstream: tuple[str, int]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*upstream)
        self.writers[:] = [each for each in self.writers if not each.is_closing()] + [writer]
        return reader, writer


class Proxy(ABC):
    """Listens on a free loopback port from construction until `close`, or until its `with` block ends."""

    def __init__(self, upstream_host: str, upstream_port: int) -> None:
        self.upstream = (upstream_host, upstream_port)
        self.host = "127.0.0.1"
        self.hits: Counter[str] = Counter()
        self.log: deque[Frame] = deque(maxlen=LOG_FRAMES_MAX)
        self._holds: list[Hold] = []
        self._links: dict[asyncio.Task[None], Link] = {}
        self._writers: WeakSet[asyncio.StreamWriter] = WeakSet()
        self._accepted = 0
        self._failures: list[BaseException] = []
        self._server: asyncio.Server | None = None
        # Bound and never listening: keeps the port ours while `refuse` has closed the listener.
        self._reservation = self._bind(0)
        self.port: int = self._reservation.getsockname()[1]
        self.loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=type(self).__name__, daemon=True)
        self._thread.start()
        self.call(self._listen())

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop everything; raises what went wrong inside the proxy itself, so that no test passes on a broken one."""
        if self.loop.is_closed():
            return
        self.call(self._shut())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self._reservation.close()
        if self._failures:
            raise self._failures[0]

    def hold(self, match: Match, where: Where = "request", nth: int = 1, *, and_later: bool = False) -> Hold:
        async def arm() -> Hold:  # in the loop's thread, so that counting starts between two frames
            hold = Hold(self, match, where, nth, and_later)
            self._holds.append(hold)
            return hold

        return self.call(arm())

    def cut(self) -> None:
        """Close every connection, both sides, held frames included; new ones are welcome."""
        self.call(self._cut())

    def refuse(self, on: bool) -> None:
        """Be a server that is down: connections are cut, and new ones refused until `refuse(False)`."""
        self.call(self._refuse() if on else self._listen())

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(HAND_OVER_TIMEOUT_S)

    def note(self, frame: Frame) -> tuple[list[Hold], list[Hold]]:
        """Log a frame; the holds that stop it as a request, and those that stop its reply."""
        self.hits[frame.kind] += 1
        self.log.append(Frame(frame.connection, frame.sequence, frame.kind, frame.name, at_s=frame.at_s))
        due = [hold for hold in self._holds if hold.is_due(frame)]
        return [hold for hold in due if hold.where == "request"], [hold for hold in due if hold.where == "reply"]

    @abstractmethod
    async def serve(self, link: Link) -> None:
        """Carry one connection to its end."""

    def _bind(self, port: int) -> socket.socket:
        # The protocol is named, or asyncio does not set TCP_NODELAY on what is accepted: 40 ms for each reply in pieces.
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((self.host, port))
        return sock

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, sock=self._bind(self.port))

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut()

    async def _cut(self) -> None:
        tasks = list(self._links)
        for task in tasks:
            for writer in self._links[task].writers:
                writer.transport.abort()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _shut(self) -> None:
        await self._refuse()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:  # connections accepted just before
            await asyncio.wait(others)
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)  # one turn of the loop, in which the aborted transports close their sockets

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._accepted += 1
        link, task = Link(self._accepted, reader, writer), asyncio.current_task()
        assert task is not None
        self._links[task] = link
        try:
            if self._server is not None:  # else it was accepted just before `refuse`
                await self.serve(link)
        except EOFError:
            pass
        except (OSError, Dropped):
            for each in link.writers:
                each.transport.abort()
        except asyncio.CancelledError:
            pass  # by _cut, which has closed the sockets
        except Exception as error:
            self._failures.append(error)
        finally:
            for each in link.writers:
                self._writers.add(each)
                each.close()  # after what is still to be written
            del self._links[task]


async def until_either_ends(*pumps: Coroutine[Any, Any, None]) -> None:
    """Run both directions of a connection; when one has ended, in whatever way, so does the other."""
    tasks = [asyncio.create_task(pump) for pump in pumps]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
