"""Transactions that we sign: ERC-20 transfers in EIP-1559 form, as the bytes that go to a node. Pure.

unsigned_call ─▶ fields ─▶ digest, which a signer signs ─▶ signed

raw  = 0x02 ‖ rlp [ chain id, nonce, priority fee, max fee, gas limit, to, value, data, access list, y parity, r, s ]
hash = keccak(raw): known before anybody has seen the bytes, so it is stored with them first
"""

from __future__ import annotations

from typing import Final, NamedTuple

from sha3 import keccak_256

from chain.signer import Signature

TYPE: Final = b"\x02"
TRANSFER: Final = bytes.fromhex("a9059cbb")
"""transfer(address,uint256)"""
_NO_ACCESS: Final = b"\xc0"
"""An empty access list."""


class Signed(NamedTuple):
    raw: bytes
    tx_hash: str


def keccak(data: bytes) -> bytes:
    """Keccak-256 as Ethereum has it."""
    hashed: bytes = keccak_256(data).digest()
    return hashed


def transfer_data(to: str, amount: int) -> bytes:
    """The call `transfer(to, amount)`. `to`: 0x and 40 hex digits; `amount`: base units."""
    return TRANSFER + bytes.fromhex(to[2:]).rjust(32, b"\0") + amount.to_bytes(32, "big")


def unsigned_call(
    *, chain_id: int, nonce: int, priority_fee: int, max_fee: int, gas_limit: int, to: str, data: bytes, value: int = 0
) -> bytes:
    """The fields, encoded. Fees in wei per gas; `value`: wei that go along."""
    return (
        _number(chain_id)
        + _number(nonce)
        + _number(priority_fee)
        + _number(max_fee)
        + _number(gas_limit)
        + b"\x94"
        + bytes.fromhex(to[2:])
        + _number(value)
        + _bytes(data)
        + _NO_ACCESS
    )


def digest(fields: bytes) -> bytes:
    """What is signed of them: 32 bytes."""
    return keccak(TYPE + _list(fields))


def signed(fields: bytes, signature: Signature) -> Signed:
    r, s, y_parity = signature
    raw = TYPE + _list(fields + _number(y_parity) + _number(r) + _number(s))
    return Signed(raw, "0x" + keccak(raw).hex())


def _number(value: int) -> bytes:
    """RLP of an integer: big endian without leading zeros."""
    if value < 0x80:
        return b"\x80" if value == 0 else bytes((value,))
    size = (value.bit_length() + 7) // 8
    return bytes((0x80 + size,)) + value.to_bytes(size, "big")


def _bytes(value: bytes) -> bytes:
    """RLP of a byte string."""
    if len(value) == 1 and value[0] < 0x80:
        return value
    return _sized(0x80, value)


def _list(fields: bytes) -> bytes:
    """RLP of a list whose elements are encoded already."""
    return _sized(0xC0, fields)


def _sized(offset: int, value: bytes) -> bytes:
    length = len(value)
    if length <= 55:
        return bytes((offset + length,)) + value
    size = (length.bit_length() + 7) // 8
    return bytes((offset + 55 + size,)) + length.to_bytes(size, "big") + value
