"""python -m connectors.alpaca.sandbox: the sandbox as a process of its own. Prints its address as one line of JSON."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Annotated

import typer

from connectors.alpaca.sandbox import TEST_KEY_ID, TEST_SECRET, AlpacaSandbox


def main(
    port: Annotated[int, typer.Option(help="0: a free one.")] = 0,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    key_id: Annotated[str, typer.Option(envvar="ALPACA_API_KEY", help="The one key.")] = TEST_KEY_ID,
    secret: Annotated[str, typer.Option(envvar="ALPACA_API_SECRET", help="Its secret.")] = TEST_SECRET,
) -> None:
    """Alpaca's wire format on loopback, until SIGTERM or Ctrl-C."""
    asyncio.run(_serve(AlpacaSandbox(key_id=key_id, secret=secret, host=host, port=port)))


async def _serve(sandbox: AlpacaSandbox) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with sandbox:
        print(json.dumps({"base_url": sandbox.base_url}), flush=True)
        await stop.wait()


if __name__ == "__main__":
    typer.run(main)
