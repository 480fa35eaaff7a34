"""GET of what Amazon SNS serves: certificates and confirmations. Small, quick, and never anywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Final, Self

import aiohttp

from connectors.errors import Refused, Unavailable

REPLY_BYTES_MAX: Final = 64_000
"""A certificate has 2 kB."""
TIMEOUT_S: Final = 2.5
"""Vendors wait 5 s for our answer."""


class SnsHttp:
    """Use as an async context, or call start and close. The caller has checked the address."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=4))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def get(self, url: str) -> bytes:
        """The body of a 2xx answer. Raises Refused for another one below 500, Unavailable otherwise; follows nothing."""
        if self._session is None:
            raise RuntimeError("SnsHttp is not started")
        try:
            async with self._session.get(url, allow_redirects=False) as reply:
                raw = bytearray()
                async for chunk in reply.content.iter_chunked(16_384):
                    raw += chunk
                    if len(raw) > REPLY_BYTES_MAX:
                        raise Refused(reply.status, None, f"more than {REPLY_BYTES_MAX} bytes")
                status = reply.status
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Unavailable(f"no reply: {type(error).__name__}", sent=True) from None
        if status >= 500 or status == 429:
            raise Unavailable(f"status {status}", sent=True)
        if not 200 <= status < 300:
            raise Refused(status, None, "not served")
        return bytes(raw)
