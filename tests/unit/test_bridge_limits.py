"""What strangers may cost: connections, memory, lines in the log."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
import structlog
import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send

from connectors.webhooks import guard
from connectors.webhooks.guard import GuardedProtocol, guarded
from connectors.webhooks.limits import LINE_S, LargeBodies, Refusals
from connectors.webhooks.problems import Problem
from tests.support.ledger_rig import until

GET = b"GET / HTTP/1.1\r\nHost: b\r\n\r\n"
NEVER_S = 100_000.0
"""For a limit that is not what the test is about: a machine that stands still must not reach it."""


def test_large_bodies_have_so_many_places_and_give_them_back() -> None:
    bodies = LargeBodies(2, retry_after_s=5)
    with bodies.room() as first, bodies.room() as second, bodies.room() as third:
        first()
        first()
        second()
        with pytest.raises(Problem) as refused:
            third()
        assert (refused.value.status, refused.value.code) == (503, "busy")
    assert bodies.held == 0
    with suppress(RuntimeError), bodies.room() as fourth:
        fourth()
        raise RuntimeError
    assert bodies.held == 0, "whatever becomes of the request"


def test_a_flood_of_refusals_is_a_line_a_second_for_each_kind() -> None:
    now = 100.0
    refusals = Refusals(clock=lambda: now)
    bad, slow = Problem(401, "bad_signature", "x"), Problem(408, "body_too_slow", "x")
    with structlog.testing.capture_logs() as lines:
        for _ in range(1_000):
            refusals.tell("circle", bad)
        refusals.tell("circle", slow)
        refusals.tell("sumsub", bad)
        now += LINE_S
        refusals.tell("circle", bad)
    assert [(line["vendor"], line["code"], line["silent_before"]) for line in lines] == [
        ("circle", "bad_signature", 0), ("circle", "body_too_slow", 0), ("sumsub", "bad_signature", 0),
        ("circle", "bad_signature", 999),
    ]  # fmt: skip


class Served:
    """An app that answers when it is told to."""

    def __init__(self, protocol: type[GuardedProtocol]) -> None:
        self.answering = asyncio.Event()
        self.requests = 0
        self.body = [b""]
        self.protocol = protocol
        self.socket = socket.create_server(("127.0.0.1", 0))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests += 1
        await self.answering.wait()
        await send({"type": "http.response.start", "status": 204 if self.body == [b""] else 200, "headers": []})
        for left, part in zip(range(len(self.body))[::-1], self.body, strict=True):
            await send({"type": "http.response.body", "body": part, "more_body": left > 0})

    async def connect(self, stack: AsyncExitStack) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*self.socket.getsockname())
        stack.callback(writer.close)
        return reader, writer


@asynccontextmanager
async def served(protocol: type[GuardedProtocol]) -> AsyncIterator[Served]:
    app = Served(protocol)
    config = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", log_level="critical", timeout_keep_alive=guard.KEPT_S
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([app.socket]))
    try:
        await until(lambda: server.started or serving.done(), "the start")
        yield app
    finally:
        app.answering.set()
        server.should_exit = True
        await serving


async def test_a_new_connection_is_refused_only_when_every_other_is_being_answered() -> None:
    protocol = guarded(2, head_s=NEVER_S)
    protocol.hard_max = 2
    async with served(protocol) as app, AsyncExitStack() as stack:
        busy = [await app.connect(stack) for _ in range(2)]
        for _, writer in busy:
            writer.write(GET)
        await until(lambda: app.requests == 2)
        reader, _ = await app.connect(stack)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"application/problem+json" in head
        assert b"Retry-After: 5" in head
        assert json.loads(body)["code"] == "busy"
        app.answering.set()
        for reader, _ in busy:
            assert (await reader.readline()).startswith(b"HTTP/1.1 204 ")


async def test_who_has_said_least_for_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "GRACE_S", 0.0)
    async with served(guarded(2, head_s=NEVER_S)) as app, AsyncExitStack() as stack:
        oldest, _ = await app.connect(stack)
        second, writer = await app.connect(stack)
        writer.write(GET)
        await until(lambda: app.requests == 1)
        _, third = await app.connect(stack)
        with suppress(ConnectionResetError):
            assert await oldest.read() == b"", "it is gone, without an answer"
        app.answering.set()
        assert (await second.readline()).startswith(b"HTTP/1.1 204 ")
        third.write(GET)
        await until(lambda: app.requests == 2)


@pytest.mark.parametrize(
    ("said", "parts", "head_s", "closing"),
    [
        pytest.param(GET, 2, NEVER_S, False, id="in the midst of it"),
        pytest.param(GET[:-2] + b"Connection: close\r\n\r\n", 1, NEVER_S, True, id="at the end of the connection"),
        pytest.param(GET, 1, 0.0, True, id="when its time for another request is over"),
        pytest.param(GET + b"no HTTP\r\n\r\n", 1, NEVER_S, True, id="before a refusal"),
    ],
)
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_who_does_not_read_the_answer_makes_room(
    said: bytes, parts: int, head_s: float, closing: bool, run: Callable[[Coroutine[Any, Any, None]], None]
) -> None:
    async def main() -> None:
        protocol = guarded(2, head_s=NEVER_S)
        protocol.hard_max = 2
        async with served(protocol) as app, AsyncExitStack() as stack:
            app.body = [b"x" * 32 * 1024 * 1024] * parts  # more than the system keeps for who does not read
            for _ in range(2):
                (stack.enter_context(socket.create_connection(app.socket.getsockname()))).sendall(said)
            await until(lambda: app.requests == 2)
            protocol.head_s = head_s
            app.answering.set()
            await until(lambda: [one.transport.is_closing() for one in protocol.waiting] == [closing] * 2)
            app.body = [b""]
            reader, writer = await app.connect(stack)
            writer.write(GET)
            assert (await reader.readline()).startswith(b"HTTP/1.1 204 ")

    run(main())


async def test_within_its_grace_nobody_makes_room_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "GRACE_S", NEVER_S)
    async with served(guarded(1, head_s=NEVER_S)) as app, AsyncExitStack() as stack:
        app.answering.set()
        several = [await app.connect(stack) for _ in range(20)]
        for _, writer in several:
            writer.write(GET)
        for reader, _ in several:
            assert (await reader.readline()).startswith(b"HTTP/1.1 204 ")


async def test_a_kept_connection_that_says_nothing_more_ends_without_a_word() -> None:
    """A client that sends its next request just then would take a word for the answer."""
    protocol = guarded(10, head_s=NEVER_S)
    async with served(protocol) as app, AsyncExitStack() as stack:
        reader, writer = await app.connect(stack)
        writer.write(GET)
        await until(lambda: app.requests == 1)
        protocol.head_s = 0.0
        app.answering.set()
        assert (await reader.read()).count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("kept", [False, True])
def test_a_process_that_stood_still_answers_what_was_sent_to_it_meanwhile(
    kept: bool, run: Callable[[Coroutine[Any, Any, None]], None]
) -> None:
    async def main() -> None:
        protocol = guarded(10, head_s=NEVER_S)
        async with served(protocol) as app:
            app.answering.set()
            with socket.create_connection(app.socket.getsockname()) as client:
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                if kept:
                    await loop.sock_sendall(client, GET)
                    assert (await loop.sock_recv(client, 65_536)).startswith(b"HTTP/1.1 204 ")
                else:
                    await until(lambda: bool(protocol.waiting))
                bell, ringer = socket.socketpair()
                with bell, ringer:
                    # while it reads: uvloop then looks first whose time is up
                    loop.add_reader(bell, stand_still, protocol, bell, client)
                    ringer.send(b"!")
                    answer = await loop.sock_recv(client, 65_536)
                assert answer.startswith(b"HTTP/1.1 204 ")

    def stand_still(protocol: type[GuardedProtocol], bell: socket.socket, client: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(bell)
        protocol.head_s = 0.05
        (waiting,) = protocol.waiting
        waiting._wait()  # anew, with the new time
        client.sendall(GET)
        time.sleep(0.1)

    run(main())


async def test_a_kept_connection_that_says_too_little_is_ended_with_a_word() -> None:
    protocol = guarded(10, head_s=NEVER_S)
    async with served(protocol) as app, AsyncExitStack() as stack:
        reader, writer = await app.connect(stack)
        writer.write(GET + GET + GET[:-5])
        await until(lambda: app.requests == 1)
        protocol.head_s = 0.2  # only now, when all bytes are there: they come on no slow machine too late
        app.answering.set()
        answers = await reader.read()
        assert answers.count(b"HTTP/1.1 204 ") == 2
        assert answers.count(b"HTTP/1.1 408 ") == 1
        assert b"headers_too_slow" in answers
