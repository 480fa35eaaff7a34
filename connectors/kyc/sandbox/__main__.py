"""`SUMSUB_WEBHOOK_SECRET=... python -m connectors.kyc.sandbox --target URL [--port 7102]`: the sandbox on loopback."""

from __future__ import annotations

import argparse
import asyncio
import os

import uvicorn
from pydantic import SecretStr

from connectors.kyc.sandbox.server import SumsubSandbox, create_control

SECRET_VARIABLE = "SUMSUB_WEBHOOK_SECRET"  # noqa: S105 - the variable's name, not its value


async def serve(target_url: str, secret: SecretStr, port: int, host: str) -> None:
    """Runs until the process is told to stop."""
    async with SumsubSandbox(target_url, secret) as sandbox:
        config = uvicorn.Config(create_control(sandbox), host=host, port=port, log_level="warning")
        await uvicorn.Server(config).serve()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m connectors.kyc.sandbox", description=__doc__)
    parser.add_argument("--target", required=True, help="where webhooks go: the bridge's /webhooks/kyc/sumsub")
    parser.add_argument("--port", type=int, default=7102, help="of POST /_control/review")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen")
    arguments = parser.parse_args()
    secret = os.environ.get(SECRET_VARIABLE)
    if not secret:
        parser.error(f"{SECRET_VARIABLE} is not set: the secret that the bridge checks webhooks with")
    asyncio.run(serve(arguments.target, SecretStr(secret), arguments.port, arguments.host))


if __name__ == "__main__":
    main()
