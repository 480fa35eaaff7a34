"""HTTP to a partner: one session, answers read within bounds, and what goes wrong in the words of connectors/errors.py."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple, Self

import aiohttp

from connectors.errors import Unavailable, Unknown

WAIT_S_MIN: Final = 1.0
"""A time that is past by our clock is no leave to ask without end."""


class Answer(NamedTuple):
    """Of any status. `raw` is the whole body, or as much as is over the limit (which then is no JSON)."""

    status: int
    raw: bytes
    headers: Mapping[str, str]

    @property
    def is_ok(self) -> bool:
        return 200 <= self.status < 300


class PartnerClient:
    """Use as an async context, or call start and close."""

    def __init__(self, base_url: str, timeout_s: float, reply_bytes_max: int) -> None:
        self._base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._reply_bytes_max = reply_bytes_max
        self._session: aiohttp.ClientSession | None = None

    def _authorization(self) -> str:
        """The header's value: a secret."""
        raise NotImplementedError

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            headers={"Authorization": self._authorization(), "Accept": "application/json"},
            timeout=aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=self._timeout_s / 2),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _ask(
        self, method: str, path: str, *, body: bytes | None = None, params: Mapping[str, str] | None = None
    ) -> Answer:
        """Raises Unavailable or Unknown where there is no answer. Errors of aiohttp stay inside: they can carry our headers."""
        if self._session is None:
            raise RuntimeError(f"{type(self).__name__} is not started")
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            async with self._session.request(
                method, f"{self._base_url}{path}", data=body, params=params, headers=headers, allow_redirects=False
            ) as reply:
                return Answer(reply.status, await self._read(reply), reply.headers)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as error:
            raise Unavailable(f"no connection: {type(error).__name__}", sent=False) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unknown(f"no reply: {type(error).__name__}") from None

    async def _read(self, reply: aiohttp.ClientResponse) -> bytes:
        parts = bytearray()
        async for chunk in reply.content.iter_chunked(65_536):
            parts += chunk
            if len(parts) > self._reply_bytes_max:
                break
        return bytes(parts)


def wait_s(retry_after: str | None) -> float | None:
    """What the header says: seconds, or a date; None where it says nothing that can be read."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return max(float(retry_after[:9]), WAIT_S_MIN)
    try:
        return max((parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds(), WAIT_S_MIN)
    except (ValueError, TypeError, OverflowError):  # TypeError: a date without a zone
        return None
