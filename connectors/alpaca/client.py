"""Alpaca's Broker API as far as we use it: what a customer holds there. docs.alpaca.markets, Broker API.

A call returns its result or raises one of connectors.errors. Nothing is retried here. Numbers stay the decimal strings they are.
"""

from __future__ import annotations

import base64
import time
from typing import Any, Final
from urllib.parse import quote

import orjson
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from connectors.errors import ConnectorError, RateLimited, Refused, Unavailable, Unknown
from connectors.partner import PartnerClient

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


class AlpacaClient(PartnerClient):
    """One key of a correspondent. Use as an async context, or call start and close."""

    def __init__(self, base_url: str, key_id: str, secret: SecretStr, timeout_s: float = 10.0) -> None:
        super().__init__(base_url, timeout_s, REPLY_BYTES_MAX)
        self._key_id = key_id
        self._secret = secret

    def _authorization(self) -> str:
        return "Basic " + base64.b64encode(f"{self._key_id}:{self._secret.get_secret_value()}".encode()).decode()

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
        """The JSON of a 2xx answer, or a ConnectorError."""
        answer = await self._ask("GET", path)
        if not answer.is_ok:
            raise _failure(answer.status, answer.raw, answer.headers.get("X-RateLimit-Reset"))
        try:
            return orjson.loads(answer.raw)
        except orjson.JSONDecodeError:
            raise Unknown(f"an unreadable reply with status {answer.status}") from None


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
