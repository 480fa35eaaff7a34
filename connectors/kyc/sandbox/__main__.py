"""`SUMSUB_WEBHOOK_SECRET=... python -m connectors.kyc.sandbox --target URL [--vendor persona] [--port 7102]`: on loopback."""

from __future__ import annotations

import argparse
import asyncio
import os

import uvicorn
from pydantic import SecretStr

from connectors.kyc.sandbox import VENDORS, create_control


async def serve(vendor: str, target_url: str, secret: SecretStr, port: int, host: str) -> None:
    """Runs until the process is told to stop."""
    async with VENDORS[vendor](target_url, secret) as sandbox:
        config = uvicorn.Config(create_control(sandbox), host=host, port=port, log_level="warning")
        await uvicorn.Server(config).serve()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m connectors.kyc.sandbox", description=__doc__)
    parser.add_argument("--target", required=True, help="where webhooks go: the bridge's /webhooks/kyc/<vendor>")
    parser.add_argument("--vendor", choices=sorted(VENDORS), default="sumsub")
    parser.add_argument("--port", type=int, default=7102, help="of POST /_control/review")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen")
    arguments = parser.parse_args()
    variable = f"{arguments.vendor.upper()}_WEBHOOK_SECRET"
    secret = os.environ.get(variable)
    if not secret:
        parser.error(f"{variable} is not set: the secret that the bridge checks webhooks with")
    asyncio.run(serve(arguments.vendor, arguments.target, SecretStr(secret), arguments.port, arguments.host))


if __name__ == "__main__":
    main()
