"""Settings of the sandbox."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

TEST_API_KEY: Final = "TEST_API_KEY:sandbox:sandbox"
TEST_ENTITY_SECRET: Final = "5a" * 32  # the sandbox's own default; guards nothing

RETRY_DELAYS_S: Final = (1.0, 10.0, 30.0, 60.0, 900.0, 3600.0)
"""The schedule Circle publishes for another product's test environment; that of Wallets is not published."""

SNS_RETRY_DELAYS_S: Final = (20.0, 20.0, 20.0)
"""Amazon's default for HTTP."""


@dataclass(frozen=True)
class SandboxConfig:
    api_key: str = field(default=TEST_API_KEY, repr=False)
    entity_secret: str | None = field(default=TEST_ENTITY_SECRET, repr=False)
    """64 hex characters; None: not registered yet."""
    rsa_bits: int = 4096
    """Circle's size: the ciphertext then has 684 characters."""
    rate_limits: bool = True
    """5 POST, 10 wallet creations, 20 GET per second and endpoint."""
    keys_beforehand: int = 0
    """So many key pairs of each kind are drawn before the first call: making wallets then costs nothing but the call."""
    control: bool = True
    """Serve /_control."""

    rpc_url: str | None = None
    """JSON-RPC of an EVM chain to watch; None: no chain is watched."""
    usdc_address: str | None = None
    evm_blockchain: str = "MATIC-AMOY"
    """Which of Circle's chains the watched chain plays."""
    poll_s: float = 0.2
    confirmations: int = 3
    """Blocks, its own included, after which an inbound transaction is COMPLETE."""

    retry_delays_s: tuple[float, ...] = RETRY_DELAYS_S
    sns_retry_delays_s: tuple[float, ...] = SNS_RETRY_DELAYS_S
    delivery_timeout_s: float = 5.0
    duplicate: int = 0
    """The next n notifications are delivered twice."""
    endpoint: str | None = None
    """Where all notifications go from the start, without a subscription being asked for."""
    head_check: bool = True
    """Ask a new subscription's endpoint with HEAD, as Circle does."""
