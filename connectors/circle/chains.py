"""Our chains and Circle's names for them. One Circle name is one chain on one network, and never another network's."""

from __future__ import annotations

from typing import Final, Literal

from topics.events import Chain

Network = Literal["testnet", "mainnet"]

_NAMES: Final[dict[Network, dict[Chain, str]]] = {
    "testnet": {
        Chain.ETH: "ETH-SEPOLIA",
        Chain.SOL: "SOL-DEVNET",
        Chain.APTOS: "APTOS-TESTNET",
        Chain.MATIC: "MATIC-AMOY",
        Chain.AVAX: "AVAX-FUJI",
    },
    "mainnet": {chain: chain.value for chain in Chain},
}
_CHAINS: Final = {network: {name: chain for chain, name in names.items()} for network, names in _NAMES.items()}

EVM_CHAINS: Final = frozenset({Chain.ETH, Chain.MATIC, Chain.AVAX})
"""Chains whose addresses and hashes are hexadecimal, so that their case says nothing."""


def to_circle(chain: Chain, network: Network) -> str:
    """Chain.ETH on testnet -> "ETH-SEPOLIA"."""
    return _NAMES[network][chain]


def from_circle(blockchain: str, network: Network) -> Chain | None:
    """ "ETH-SEPOLIA" on testnet -> Chain.ETH; None for a chain of another network or one we do not have."""
    return _CHAINS[network].get(blockchain)


_MINT: Final = {"ETH": Chain.ETH, "POLY": Chain.MATIC, "SOL": Chain.SOL, "AVAX": Chain.AVAX}


def from_mint(chain: str) -> Chain | None:
    """ "POLY" -> Chain.MATIC; Mint's names are the same on both networks: its API key and its topic are one network's."""
    return _MINT.get(chain)
