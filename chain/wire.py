"""JSON-RPC values of Ethereum nodes, checked. ValueError says what was expected; nothing else is raised."""

from __future__ import annotations

import re
from typing import Any

_QUANTITY = re.compile(r"0x[0-9a-fA-F]{1,16}", re.ASCII)
_AMOUNT = re.compile(r"0x[0-9a-fA-F]{1,64}", re.ASCII)
_HASH = re.compile(r"0x[0-9a-fA-F]{64}", re.ASCII)
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}", re.ASCII)

QUANTITY_MAX = 2**63 - 1
"""Block numbers, times and chain ids go into BIGINT columns."""


def quantity(value: Any) -> int:
    """ "0x1b4" -> 436"""
    if type(value) is str and _QUANTITY.fullmatch(value):
        number = int(value, 16)
        if number <= QUANTITY_MAX:
            return number
    raise ValueError(f"not a quantity: {value!r:.80}")


def hash32(value: Any) -> str:
    """A hash or any other word of 32 bytes, in lower case."""
    if type(value) is str and _HASH.fullmatch(value):
        return value.lower()
    raise ValueError(f"not 32 bytes: {value!r:.80}")


def address20(value: Any) -> str:
    """An address, in lower case. Nodes answer without checksums."""
    if type(value) is str and _ADDRESS.fullmatch(value):
        return value.lower()
    raise ValueError(f"not an address: {value!r:.80}")


def uint256(value: Any) -> int:
    """A word of 32 bytes as a number."""
    return int(hash32(value), 16)


def mapping(value: Any) -> dict[str, Any]:
    """A JSON object."""
    if type(value) is dict:
        return value
    raise ValueError(f"not an object: {value!r:.80}")


def items(value: Any) -> list[Any]:
    """A JSON array."""
    if type(value) is list:
        return value
    raise ValueError(f"not an array: {value!r:.80}")


def amount(value: Any) -> int:
    """A quantity of up to 256 bits: wei, token units."""
    if type(value) is str and _AMOUNT.fullmatch(value):
        return int(value, 16)
    raise ValueError(f"not an amount: {value!r:.80}")
