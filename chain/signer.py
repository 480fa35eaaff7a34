"""Who signs for a lane, and the key that is in this process. Keys are loaded in chain/keys.py, and nowhere else.

The key stays inside libsecp256k1's object: no attribute, repr, pickle, copy or exception of a signer shows it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple, NoReturn, Protocol

from coincurve import PrivateKey
from sha3 import keccak_256

SLICE: Final = 20
"""Signatures at once."""


class Signature(NamedTuple):
    r: int
    s: int
    """In the lower half of the curve's order (EIP-2): a node takes no other."""
    y_parity: int


class Signer(Protocol):
    @property
    def address(self) -> str:
        """0x and 40 hex digits in lower case."""
        ...

    @property
    def at_once_max(self) -> int:
        """Signatures it makes well within the time that a lane may stay locked."""
        ...

    async def signatures(self, digests: Sequence[bytes]) -> Sequence[Signature]:
        """Of 32 bytes each, in their order; all or, raising SignerError, none. Asked again it may give others for the same digest
        (a key store draws them): what is stored is sent, and is never signed again."""
        ...


class KeySigner:
    """A key in this process's memory. Deterministic (RFC 6979)."""

    __slots__ = ("_sign", "address")
    at_once_max: Final = 2_000

    def __init__(self, key: bytes) -> None:
        private = PrivateKey(key)
        point = private.public_key.format(compressed=False)[1:]
        self.address: Final = address_of(point)
        self._sign: Final = private.sign_recoverable

    def sign(self, digest: bytes) -> Signature:
        signed = self._sign(digest, hasher=None)
        return Signature(int.from_bytes(signed[:32], "big"), int.from_bytes(signed[32:64], "big"), signed[64])

    async def signatures(self, digests: Sequence[bytes]) -> Sequence[Signature]:
        """Forty microseconds each. Between slices the loop serves others: a node that has answered gets its next request."""
        made: list[Signature] = []
        for start in range(0, len(digests), SLICE):
            made += map(self.sign, digests[start : start + SLICE])
            await asyncio.sleep(0)
        return made

    def __repr__(self) -> str:
        return f"KeySigner({self.address})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a signer does not leave its process")


def address_of(point: bytes) -> str:
    """Of a public key's 64 bytes."""
    hashed: bytes = keccak_256(point).digest()
    return "0x" + hashed[-20:].hex()
