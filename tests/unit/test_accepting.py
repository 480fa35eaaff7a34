"""What tests/support/accepting.py mends: whenever a server is closed, no connection that it accepted stays open."""

import asyncio
import gc

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
            async with asyncio.timeout(10):
                assert await reader.read() == b""
        except ConnectionError:
            pass
        finally:
            writer.close()
    finally:
        gc.enable()
