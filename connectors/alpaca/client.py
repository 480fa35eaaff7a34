"""Alpaca's Broker API as far as we use it: what a customer holds there. docs.alpaca.markets, Broker API.

A call returns its result or raises one of connectors.errors. Nothing is retried here. Numbers stay the decimal strings they are.
"""

from __future__ import annotations

import base64
import time
from typing import Any, Final, Self
from urllib.parse import quote

import aiohttp
import orjson
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from connectors.errors import ConnectorError, RateLimited, Refused, Unavailable, Unknown

REPLY_BYTES_MAX: Final = 4_000_000
"""A thousand positions are 600 kB."""


class Position(BaseModel):
    """What an account holds of one security, as Alpaca says it; unknown fields are ignored, unknown kinds kept."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    asset_id: str
    symbol: str
    asset_class: str
    """`us_equity`, `crypto`, …"""
    side: str
    """`long` or `short`"""
    qty: str
    avg_entry_price: str
    cost_basis: str
    market_value: str | None = None
    """Null while no price is known, as the others."""
    current_price: str | None = None
    unrealized_pl: str | None = None


class AlpacaClient:
    """One key of a correspondent. Use as an async context, or call start and close."""

    def __init__(self, base_url: str, key_id: str, secret: SecretStr, timeout_s: float = 10.0) -> None:
        self._base_url = base_url.rstrip("/")
        self._key_id = key_id
        self._secret = secret
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        key = base64.b64encode(f"{self._key_id}:{self._secret.get_secret_value()}".encode()).decode()
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Basic {key}", "Accept": "application/json"},
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

    async def positions(self, account_id: str) -> list[Position]:
        """All open positions of a customer's account. Raises Refused (404) when Alpaca knows no such account."""
        listed = await self._get(f"/v1/trading/accounts/{quote(account_id, safe='')}/positions")
        if not isinstance(listed, list):
            raise Unknown("Alpaca's reply holds no positions")
        try:
            return [Position.model_validate(each) for each in listed]
        except ValidationError as error:
            raise Unknown(f"a position in Alpaca's reply is unreadable: {error.error_count()} fields") from None

    async def _get(self, path: str) -> Any:
        """The JSON of a 2xx answer, or a ConnectorError. Errors of aiohttp stay inside: they can carry our headers."""
        if self._session is None:
            raise RuntimeError("AlpacaClient is not started")
        try:
            async with self._session.get(f"{self._base_url}{path}", allow_redirects=False) as reply:
                raw = await _read(reply)
                status, reset = reply.status, reply.headers.get("X-RateLimit-Reset")
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as error:
            raise Unavailable(f"no connection: {type(error).__name__}", sent=False) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unknown(f"no reply: {type(error).__name__}") from None
        if not 200 <= status < 300:
            raise _failure(status, raw, reset)
        try:
            return orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise Unknown(f"an unreadable reply with status {status}") from None


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    """The whole body, or as much as is over the limit (which then is no JSON)."""
    parts = bytearray()
    async for chunk in reply.content.iter_chunked(65_536):
        parts += chunk
        if len(parts) > REPLY_BYTES_MAX:
            break
    return bytes(parts)


def _failure(status: int, raw: bytes, reset: str | None) -> ConnectorError:
    """Bodies are `{"code": 40410000, "message": "…"}`, plain text, or empty."""
    try:
        answer = orjson.loads(raw)
    except orjson.JSONDecodeError:
        answer = None
    fields = answer if isinstance(answer, dict) else {}
    partner_code = str(fields["code"])[:40] if "code" in fields else None
    message = str(fields.get("message", ""))[:300]
    if status == 429:
        known = reset is not None and reset.isascii() and reset.isdigit()
        return RateLimited(max(float(reset[:12]) + 1 - time.time(), 0.0) if known and reset else None)
    if status >= 500 or status == 408:
        return Unavailable(f"{status} (code {partner_code}): {message}", sent=True)
    return Refused(status, partner_code, message)
