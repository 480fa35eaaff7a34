"""The chains the sandbox knows and Circle's token on each. Token ids are the same in every run, so they can be configured."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import NAMESPACE_URL, uuid5

_SINCE: Final = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Blockchain:
    name: str
    family: str
    """`evm`, `solana`, `aptos`: which key pair serves it."""
    standard: str
    usdc_address: str
    native_decimals: int


_SEPOLIA_USDC = "0x1c7d4b196cb0c7b01d743fbc6116a902379c7238"
_AMOY_USDC = "0x41e94eb019c0762f9bfcf9fb1e58725bfb0e7582"
_FUJI_USDC = "0x5425890298aed601595a70ab815c96711a31bc65"
_DEVNET_USDC = "4zMMC9srt5Ri5X14GAgXhaHii3GnPAEERYPJgZJDncDU"
_APTOS_USDC = "0x69091fbab5f7d635ee7ac5098cf0c1efbe31d68fec0f2cd565e8d168daf52832"

BLOCKCHAINS: Final = {
    chain.name: chain
    for chain in (
        Blockchain("ETH-SEPOLIA", "evm", "ERC20", _SEPOLIA_USDC, 18),
        Blockchain("MATIC-AMOY", "evm", "ERC20", _AMOY_USDC, 18),
        Blockchain("AVAX-FUJI", "evm", "ERC20", _FUJI_USDC, 18),
        Blockchain("SOL-DEVNET", "solana", "Fungible", _DEVNET_USDC, 9),
        Blockchain("APTOS-TESTNET", "aptos", "FungibleAsset", _APTOS_USDC, 8),
    )
}


def usdc_token_id(blockchain: str) -> str:
    """Circle's id of (USDC, chain); here derived from the chain's name."""
    return str(uuid5(NAMESPACE_URL, f"circle-sandbox:{blockchain}:USDC"))


def native_token_id(blockchain: str) -> str:
    return str(uuid5(NAMESPACE_URL, f"circle-sandbox:{blockchain}:native"))


USDC_TOKENS: Final = {usdc_token_id(name): "USDC" for name in BLOCKCHAINS}
"""What a deployment against the sandbox configures for connectors.circle.webhooks."""


def token(token_id: str, addresses: dict[str, str]) -> dict[str, Any] | None:
    """Circle's token object. `addresses`: blockchain -> USDC contract, where it is not Circle's own."""
    dates = {"createDate": _SINCE, "updateDate": _SINCE}
    for name, chain in BLOCKCHAINS.items():
        common = {"id": token_id, "blockchain": name, **dates}
        if token_id == usdc_token_id(name):
            return common | {
                "name": "USDC",
                "symbol": "USDC",
                "standard": chain.standard,
                "decimals": 6,
                "isNative": False,
                "tokenAddress": addresses.get(name, chain.usdc_address),
            }
        if token_id == native_token_id(name):
            return common | {"name": name, "symbol": name, "decimals": chain.native_decimals, "isNative": True}
    return None
