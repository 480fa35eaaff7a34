"""Whether a text is an address or a transaction hash of a chain, and its one canonical spelling."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from solders.pubkey import Pubkey
from solders.signature import Signature

from chain.errors import BadAddress, BadTxHash, UnknownChain
from topics.events import Chain

EVM_CHAINS = frozenset({Chain.ETH, Chain.MATIC, Chain.AVAX})
"""The chains whose addresses, logs and RPC are Ethereum's."""

_EVM_LOWER = re.compile(r"0x[0-9a-f]{40}", re.ASCII)
_EVM = re.compile(r"0x[0-9a-fA-F]{40}", re.ASCII)
_APTOS = re.compile(r"0x[0-9a-f]{64}", re.ASCII)
_HASH = re.compile(r"0x[0-9a-fA-F]{64}", re.ASCII)
_SOLANA = re.compile(r"[1-9A-HJ-NP-Za-km-z]{32,44}", re.ASCII)


def check_address(chain: str, text: str) -> str:
    """The canonical form of `text` on `chain`; lower case on EVM chains. Raises UnknownChain or BadAddress.

    Called for every deposit event: the canonical form of an EVM address costs one regular expression.
    """
    if not isinstance(text, str):
        raise BadAddress(f"an address is a text, not {type(text).__name__}")
    if chain in EVM_CHAINS:
        return text if _EVM_LOWER.fullmatch(text) else _evm(text)
    if chain == Chain.SOL:
        return _solana(text)
    if chain == Chain.APTOS:
        # AIP-40 strict: the long form only. A shortened or padded spelling would be a second name of one account.
        if _APTOS.fullmatch(text):
            return text
        raise BadAddress("an APTOS address is 0x and 64 lower-case hexadecimal digits")
    raise _unknown(chain)


def alike(places: Iterable[tuple[str, str]]) -> list[tuple[list[str], list[str]]]:
    """(chains whose addresses are the same, the addresses on any of them), of what is told as (chain, canonical address)."""
    found: dict[tuple[str, ...], set[str]] = {}
    for chain, address in places:
        chains = tuple(sorted(EVM_CHAINS)) if chain in EVM_CHAINS else (chain,)
        found.setdefault(chains, set()).add(address)
    return [(list(chains), sorted(addresses)) for chains, addresses in found.items()]


def check_tx_hash(chain: str, text: str) -> str:
    """The canonical form of a transaction's hash; lower case but on Solana. Raises UnknownChain or BadTxHash.

    The hash is part of a deposit's identity: two spellings of it would be two deposits.
    """
    if chain == Chain.SOL:
        try:
            if 64 <= len(text) <= 88 and str(Signature.from_string(text)) == text:
                return text
        except ValueError:
            pass
        raise BadTxHash("a SOL transaction is named by its signature, 64 bytes in base58")
    if chain not in EVM_CHAINS and chain != Chain.APTOS:
        raise _unknown(chain)
    if not _HASH.fullmatch(text):
        raise BadTxHash("a transaction hash is 0x and 64 hexadecimal digits")
    return text.lower()


def _unknown(chain: str) -> UnknownChain:
    return UnknownChain(f"{str(chain)[:50]!r} is not one of {', '.join(Chain)}")


@lru_cache(maxsize=65_536)
def _evm(text: str) -> str:
    if not _EVM.fullmatch(text):
        raise BadAddress("an EVM address is 0x and 40 hexadecimal digits")
    digits = text[2:]
    # One case only carries no checksum (EIP-55); mixed case is a checksum, and a wrong one is a mistyped address.
    if digits not in (digits.lower(), digits.upper()):
        from eth_utils.address import to_checksum_address  # brings all of eth_utils, and few processes meet such a text

        if text != to_checksum_address(text):
            raise BadAddress("the checksum (EIP-55) of the EVM address is wrong")
    return text.lower()


@lru_cache(maxsize=65_536)
def _solana(text: str) -> str:
    """Base58 of 32 bytes. Being on the curve is not required: a vault or a multisig is a program's address, off the
    curve, and holds USDC like any other. There is no checksum to check."""
    if _SOLANA.fullmatch(text):
        try:
            if str(Pubkey.from_string(text)) == text:
                return text
        except ValueError:
            pass
    raise BadAddress("a SOL address is 32 bytes in base58")
