"""Holds, cuts and refusals, on a protocol of one line per request and one per reply."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from tests.support.proxies import Frame, Hold, Proxy
from tests.support.proxies.base import Link


class LineProxy(Proxy):
    async def serve(self, link: Link) -> None:
        reader, writer = await link.dial(self.upstream)
        while line := await link.reader.readline():
            link.sequence += 1
            frame = Frame(link.number, link.sequence, "line", line.decode().strip(), line)
            requests, replies = self.note(frame)
            async with Hold.passing(requests, frame, link.writer):
                writer.write(line)
            reply = await reader.readline()
            async with Hold.passing(replies, frame, link.writer):
                link.writer.write(reply)


class Client:
    """A line client through the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, proxy: Proxy) -> "Client":
        return cls(*await asyncio.open_connection(proxy.host, proxy.port))

    async def ask(self, line: str) -> str:
        self.writer.write(f"{line}\n".encode())
        return (await self.reader.readline()).decode().strip()

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


class Echo:
    """The upstream: answers each line with itself in capitals and remembers it."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.something = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while line := await reader.readline():
                self.heard.append(line.decode().strip())
                self.something.set()
                writer.write(line.upper())
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@pytest.fixture
async def echo() -> AsyncIterator[tuple[Echo, LineProxy]]:
    upstream = Echo()
    server = await asyncio.start_server(upstream, "127.0.0.1", 0)
    with LineProxy(*server.sockets[0].getsockname()) as proxy:
        yield upstream, proxy
    server.close()
    while others := asyncio.all_tasks() - {asyncio.current_task()}:  # also of connections accepted just before
        await asyncio.wait(others)
    await server.wait_closed()


def is_b(frame: Frame) -> bool:
    return frame.name == "b"


async def test_the_nth_match_is_held_over_all_connections_and_only_that(echo: tuple[Echo, LineProxy]) -> None:
    upstream, proxy = echo
    one, two = await Client.connect(proxy), await Client.connect(proxy)
    hold = proxy.hold(is_b, nth=2)
    assert [await one.ask("a"), await one.ask("b"), await two.ask("a")] == ["A", "B", "A"]
    held = asyncio.create_task(two.ask("b"))
    frame = await hold.wait_hit_async()
    assert (frame.sequence, frame.kind, frame.name, frame.raw) == (2, "line", "b", b"b\n")
    assert await one.ask("b") == "B"
    assert upstream.heard == ["a", "b", "a", "b"]
    assert hold.release()
    assert await held == "B"
    assert (hold.seen, proxy.hits["line"]) == (3, 5)
    assert [entry.name for entry in proxy.log] == ["a", "b", "a", "b", "b"]
    await one.close()
    await two.close()


async def test_a_held_reply_has_been_given_by_the_server(echo: tuple[Echo, LineProxy]) -> None:
    upstream, proxy = echo
    client = await Client.connect(proxy)
    hold = proxy.hold(is_b, "reply")
    held = asyncio.create_task(client.ask("b"))
    await hold.wait_hit_async()
    assert upstream.heard == ["b"]
    assert not held.done()
    assert hold.release()
    assert await held == "B"
    await client.close()


@pytest.mark.parametrize("where", ["request", "reply"])
async def test_a_dropped_frame_ends_its_connection(echo: tuple[Echo, LineProxy], where: str) -> None:
    upstream, proxy = echo
    client = await Client.connect(proxy)
    hold = proxy.hold(is_b, where)  # type: ignore[arg-type]
    held = asyncio.create_task(client.ask("b"))
    await hold.wait_hit_async()
    hold.drop()
    assert await held == ""
    assert upstream.heard == (["b"] if where == "reply" else [])
    await client.close()


async def test_a_request_whose_client_is_gone_is_not_sent_on_unless_asked(echo: tuple[Echo, LineProxy]) -> None:
    upstream, proxy = echo
    hold, late = proxy.hold(is_b), proxy.hold(lambda frame: frame.name == "late")
    for each, line in ((hold, "b\nunread\n"), (late, "late\n")):
        client = await Client.connect(proxy)
        client.writer.write(line.encode())
        await each.wait_hit_async()
        await client.close()
    assert not hold.release()
    assert late.release(even_if_gone=True)
    await upstream.something.wait()
    assert upstream.heard == ["late"]


async def test_a_hold_taken_back_stops_nothing(echo: tuple[Echo, LineProxy]) -> None:
    _, proxy = echo
    hold = proxy.hold(is_b)
    assert not hold.release()
    client = await Client.connect(proxy)
    assert await client.ask("b") == "B"
    assert (hold.seen, hold.is_hit) == (1, False)
    await client.close()


async def test_a_hold_that_is_not_hit_says_what_passed_instead(echo: tuple[Echo, LineProxy]) -> None:
    _, proxy = echo
    hold = proxy.hold(is_b)
    client = await Client.connect(proxy)
    await client.ask("a")
    for wait in (hold.wait_hit_async(0.01), asyncio.to_thread(hold.wait_hit, 0.01)):
        with pytest.raises(TimeoutError, match=r"no request held after 0\.01 s: 0 matched, .*line a"):
            await wait
    held = asyncio.create_task(client.ask("b"))
    assert (await hold.wait_hit_async()).name == "b"
    hold.release()
    assert await held == "B"
    await client.close()


async def test_a_cut_ends_connections_and_holds_but_new_ones_are_welcome(echo: tuple[Echo, LineProxy]) -> None:
    upstream, proxy = echo
    client = await Client.connect(proxy)
    hold = proxy.hold(is_b)
    held = asyncio.create_task(client.ask("b"))
    await hold.wait_hit_async()
    proxy.cut()
    assert await held == ""
    assert not hold.release()
    await client.close()
    again = await Client.connect(proxy)
    assert await again.ask("b") == "B"
    assert upstream.heard == ["b"]
    await again.close()


async def test_a_refusing_proxy_is_a_server_that_is_down_and_comes_back_on_its_port(
    echo: tuple[Echo, LineProxy],
) -> None:
    _, proxy = echo
    client = await Client.connect(proxy)
    assert await client.ask("a") == "A"
    for _ in range(2):
        proxy.refuse(True)
        assert await client.reader.read() == b""
        with pytest.raises(ConnectionRefusedError):
            await Client.connect(proxy)
        proxy.refuse(False)
        await client.close()
        client = await Client.connect(proxy)
        assert await client.ask("a") == "A"
    await client.close()


async def test_an_upstream_that_is_down_ends_the_clients_connection(echo: tuple[Echo, LineProxy]) -> None:
    _, down = echo
    with LineProxy(down.host, down.port) as proxy:
        down.refuse(True)
        client = await Client.connect(proxy)
        with pytest.raises((ConnectionResetError, AssertionError)):
            assert await client.reader.read()
        await client.close()


async def test_a_fault_of_the_proxy_itself_is_raised_when_it_closes(echo: tuple[Echo, LineProxy]) -> None:
    _, upstream = echo
    proxy = LineProxy(upstream.host, upstream.port)
    proxy.hold(lambda frame: bool(1 // 0))
    client = await Client.connect(proxy)
    assert await client.ask("a") == ""
    await client.close()
    with pytest.raises(ZeroDivisionError):
        proxy.close()


def test_an_impossible_hold_is_refused() -> None:
    with LineProxy("127.0.0.1", 9) as proxy, pytest.raises(ValueError, match="want request or reply"):
        proxy.hold(is_b, "answer")  # type: ignore[arg-type]
