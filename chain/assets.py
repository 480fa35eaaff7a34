"""Which assets exist on which chain, and where. The native coin is no asset of ours: nobody is credited for gas."""

from __future__ import annotations

from enum import StrEnum

from chain.addresses import EVM_CHAINS
from topics.events import Chain


class Network(StrEnum):
    """One per deployment; chains of different networks are never mixed."""

    MAINNET = "mainnet"
    TESTNET = "testnet"
    """ETH is Sepolia, MATIC is Amoy, AVAX is Fuji, SOL is Devnet, APTOS is Testnet."""


USDC = "USDC"

_SUPPORTED = frozenset((chain.value, USDC) for chain in Chain)

# Native USDC as Circle publishes it. A place that is not here must be configured: a guessed contract credits for nothing.
# MATIC and AVAX are native USDC, not the bridged USDC.e.
_USDC = {
    (Network.MAINNET, Chain.ETH): "0xA0b86991c6218b36c1d19D4a2e9Eb0cE3606eB48",
    (Network.MAINNET, Chain.MATIC): "0x3c499c542cEF5E3811e1192ce70d8cC03d5c3359",
    (Network.MAINNET, Chain.AVAX): "0xB97EF9Ef8734C71904D8002F8b6Bc66Dd9c48a6E",
    (Network.MAINNET, Chain.SOL): "EPjFWdd5AufqSSqeM2qN1xzybapC8G4wEGGkZwyTDt1v",
    (Network.TESTNET, Chain.ETH): "0x1c7D4B196Cb0C7B01d743Fbc6116a902379C7238",
    (Network.TESTNET, Chain.AVAX): "0x5425890298aed601595a70AB815c96711a31Bc65",
}


def is_supported(chain: str, symbol: str) -> bool:
    """Whether a deposit of `symbol` on `chain` may be credited. False for native coins and unknown chains."""
    return (chain, symbol) in _SUPPORTED


def usdc(network: Network, chain: Chain) -> str | None:
    """USDC's canonical contract (EVM) or mint (Solana); None where it must be configured."""
    address = _USDC.get((network, chain))
    # The checksums above are a test's to check: at the start of each process they would cost the import of eth_utils.
    return address.lower() if address is not None and chain in EVM_CHAINS else address
