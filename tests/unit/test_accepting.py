"""What tests/support/accepting.py mends: whenever a server is closed or its loop ends, no connection that it accepted stays open."""

import asyncio
import gc
import socket
from contextlib import suppress

import pytest


@pytest.mark.parametrize("turns", range(6))
async def test_a_connection_accepted_as_its_server_closes_is_closed(turns: int) -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    client = asyncio.open_connection(*server.sockets[0].getsockname())
    gc.disable()  # which would close it in the end
    try:
        connecting = asyncio.create_task(client)
        for _ in range(turns):
            await asyncio.sleep(0)
        server.close()
        try:
            reader, writer = await connecting
        except ConnectionError:
            return  # closed before it was heard of
        try:
            async with asyncio.timeout(100):
                assert await reader.read() == b""
        except ConnectionError:
            pass
        finally:
            writer.close()
    finally:
        gc.enable()


@pytest.mark.parametrize("turns", range(6))
def test_a_connection_accepted_as_its_loop_ends_is_closed(turns: int) -> None:
    loop = asyncio.SelectorEventLoop()
    server = loop.run_until_complete(asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0))
    with socket.create_connection(server.sockets[0].getsockname(), timeout=100) as client:
        for _ in range(turns):
            loop.call_soon(loop.stop)
            loop.run_forever()
        gc.disable()  # which would close it in the end
        try:
            server.close()
            if cancelled := asyncio.all_tasks(loop):
                for task in cancelled:
                    task.cancel()
                loop.run_until_complete(asyncio.wait(cancelled))
            loop.close()
            with suppress(ConnectionError):
                assert client.recv(1) == b""
        finally:
            gc.enable()
