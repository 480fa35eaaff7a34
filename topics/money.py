"""Amounts: decimal strings at the edges, integers in base units inside. Never float."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, ValidationInfo, WithJsonSchema

USDC_DECIMALS = 6
SCALE = 10**USDC_DECIMALS

# Above it an amount cannot be meant: 2**96 base units are 79 octillion; NUMERIC(38,0) holds the sum of a billion such.
AMOUNT_MAX = 2**96

_DECIMAL = re.compile(r"(0|[1-9][0-9]{0,29})(?:\.([0-9]{1,6}))?", re.ASCII)


def parse_amount(text: Any) -> int:
    """ "25.00" -> 25_000_000. At most six decimals, no sign, no exponent, at most 2**96 base units.

    An `int` is taken as base units already (models built in code). Raises ValueError saying what is expected.
    """
    if type(text) is int:
        amount = text
    else:
        match = _DECIMAL.fullmatch(text) if type(text) is str else None
        if match is None:
            raise ValueError('an amount is a decimal string with at most six decimals, such as "25.00"')
        whole, fraction = match.groups()
        amount = int(whole) * SCALE + (int(fraction.ljust(6, "0")) if fraction else 0)
    if not 0 <= amount <= AMOUNT_MAX:
        raise ValueError("an amount is from 0 to 2**96 base units")
    return amount


def format_amount(amount: int) -> str:
    """25_000_000 -> "25.000000"; negative amounts keep their sign."""
    sign, amount = ("-", -amount) if amount < 0 else ("", amount)
    return f"{sign}{amount // SCALE}.{amount % SCALE:06d}"


def _positive(amount: int) -> int:
    if amount <= 0:
        raise ValueError("the amount must be above zero")
    return amount


def _read_amount(value: Any, info: ValidationInfo) -> int:
    if info.mode == "json" and type(value) is int:
        # in a message 25 may mean 25 USDC or 25 base units: nobody may guess
        raise ValueError('an amount is a decimal string, such as "25.00", not a number')
    return _positive(parse_amount(value))


Amount = Annotated[
    int,
    BeforeValidator(_read_amount),
    PlainSerializer(format_amount, return_type=str, when_used="json"),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": f"^{_DECIMAL.pattern}$",
            "description": "A decimal string, above zero, with at most six decimals",
            "examples": ["25.00"],
        }
    ),
]
"""A positive amount in base units of a 6-decimal asset; a decimal string in JSON."""


def _read_total(value: Any, info: ValidationInfo) -> int:
    if info.mode == "json" and type(value) is int:
        raise ValueError('a total is a decimal string, such as "25.00", not a number')
    return parse_amount(value)


Total = Annotated[
    int,
    BeforeValidator(_read_total),
    PlainSerializer(format_amount, return_type=str, when_used="json"),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": f"^{_DECIMAL.pattern}$",
            "description": "A decimal string, zero or above, with at most six decimals",
            "examples": ["25.00"],
        }
    ),
]
"""A sum of amounts, which may be zero."""


def _read_balance(value: Any, info: ValidationInfo) -> int:
    if type(value) is int and info.mode != "json":
        return value
    text = value.removeprefix("-") if type(value) is str else value
    if type(text) is not str or len(value) - len(text) > 1:
        raise ValueError('a balance is a decimal string, such as "-25.00"')
    return parse_amount(text) * (-1 if value.startswith("-") else 1)


Balance = Annotated[
    int,
    BeforeValidator(_read_balance),
    PlainSerializer(format_amount, return_type=str, when_used="json"),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": f"^-?{_DECIMAL.pattern}$",
            "description": "A decimal string, on either side of zero, with at most six decimals",
            "examples": ["-25.00"],
        }
    ),
]
"""What an account of ours holds: on either side of zero."""
