"""Alpaca's Broker API on loopback: `async with AlpacaSandbox() as alpaca: alpaca.state.hold(account, "AAPL", "3", "150")`.

| what | as Alpaca does it |
| --- | --- |
| keys | HTTP Basic; without, or with wrong ones, 401 |
| `GET /v1/trading/accounts/{id}/positions[/{symbol or asset id}]` | decimal strings; 404 where the account or the position is not known |
| `GET /v1/trading/accounts/{id}/account` | cash and values, decimal strings |
| rate | `X-RateLimit-*` on every answer; 429 over the limit |
| `/_control/…` | accounts, positions, and what the next calls meet |

Alpaca's own SDK reads it (tests/integration/test_alpaca.py). `python -m connectors.alpaca.sandbox` is a process of its own.
"""

from connectors.alpaca.sandbox.server import TEST_KEY_ID, TEST_SECRET, AlpacaSandbox

__all__ = ["TEST_KEY_ID", "TEST_SECRET", "AlpacaSandbox"]
