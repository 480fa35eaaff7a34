"""python -m connectors.circle.sandbox: the sandbox as a process of its own. Prints its address as one line of JSON."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Annotated

import typer

from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET


def main(
    port: Annotated[int, typer.Option(help="0: a free one.")] = 0,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    api_key: Annotated[str, typer.Option(envvar="CIRCLE_API_KEY", help="The one bearer key.")] = TEST_API_KEY,
    entity_secret: Annotated[
        str, typer.Option(envvar="CIRCLE_ENTITY_SECRET", help="64 hex characters; empty: to be registered.")
    ] = TEST_ENTITY_SECRET,
    rpc_url: Annotated[str | None, typer.Option(help="JSON-RPC of the EVM chain to watch.")] = None,
    usdc: Annotated[str | None, typer.Option(help="Address of USDC on it.")] = None,
    blockchain: Annotated[str, typer.Option(help="Which of Circle's chains it plays.")] = "MATIC-AMOY",
    confirmations: Annotated[int, typer.Option(help="Blocks until COMPLETE.")] = 3,
    endpoint: Annotated[str | None, typer.Option(help="Subscribed to all notifications from the start.")] = None,
    poll_s: Annotated[float, typer.Option(help="Seconds between two looks at the chain.")] = 0.2,
    retry_delays_s: Annotated[
        str, typer.Option(help="Delivery retries: seconds, comma separated.")
    ] = "1,10,30,60,900,3600",
    rate_limits: Annotated[bool, typer.Option(help="Circle's calls per second.")] = True,
    keys_beforehand: Annotated[int, typer.Option(help="Key pairs drawn before the first call.")] = 0,
    control: Annotated[bool, typer.Option(help="Serve /_control.")] = False,
) -> None:
    """Circle's W3S wire format on loopback, until SIGTERM or Ctrl-C."""
    config = SandboxConfig(
        api_key=api_key,
        entity_secret=entity_secret or None,
        rate_limits=rate_limits,
        keys_beforehand=keys_beforehand,
        control=control,
        rpc_url=rpc_url,
        usdc_address=usdc,
        evm_blockchain=blockchain,
        confirmations=confirmations,
        endpoint=endpoint,
        poll_s=poll_s,
        retry_delays_s=tuple(float(delay) for delay in retry_delays_s.split(",") if delay),
    )
    asyncio.run(_serve(CircleSandbox(config, host=host, port=port)))


async def _serve(sandbox: CircleSandbox) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with sandbox:
        print(json.dumps({"base_url": sandbox.base_url}), flush=True)
        await stop.wait()


if __name__ == "__main__":
    typer.run(main)
