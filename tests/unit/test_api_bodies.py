"""A body that does not come is not waited for."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest

from stablerail.api import bodies
from stablerail.api.bodies import SmallBodies


async def answered(messages: list[dict[str, Any]], headers: list[tuple[bytes, bytes]] | None = None) -> tuple[int, Any]:
    """The status of the answer, and the body that the application got (None: it was not asked)."""
    got: Any = None
    sent: list[Any] = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        nonlocal got
        got = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    await SmallBodies(app)({"type": "http", "method": "POST", "headers": headers or []}, receive, send)
    return sent[0]["status"], got


def part(body: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


async def test_a_body_in_parts_comes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await answered([part(b"a", more=True), part(b"b", more=False)]) == (200, b"ab")
    monkeypatch.setattr(bodies, "BODY_S_MAX", 0.01)
    assert await answered([part(b"a", more=True)]) == (408, None)


async def test_a_body_that_came_while_the_process_stood_still_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_S_MAX", 0.05)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        loop = asyncio.get_running_loop()

        async def app(_scope: Any, receive: Any, send: Any) -> None:
            sent.append((await receive())["body"])

        async def receive() -> Any:
            return part(await loop.sock_recv(ours, 1), more=parts.pop())

        async def send(message: Any) -> None:
            sent.append(message)

        sent: list[Any] = []
        parts = [False, True]
        reading = asyncio.create_task(
            SmallBodies(app)({"type": "http", "method": "POST", "headers": []}, receive, send)
        )
        await asyncio.sleep(0)  # it waits for the first byte
        theirs.send(b"ab")
        time.sleep(0.1)
        await reading
    assert sent == [b"ab"]


async def test_a_body_that_is_too_large_is_not_read() -> None:
    assert await answered([], [(b"content-length", b"65537")]) == (413, None)
    assert await answered([], [(b"content-length", b"9" * 400)]) == (413, None)
    assert await answered([part(b"x" * 65_537, more=True)]) == (413, None)
