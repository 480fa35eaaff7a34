"""Array literals: what is written fast is what is written plainly, since hashes cover it."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.rows import _numbers, _plain, _texts, _texts_or_empty

AT_THE_EDGES = [0, -1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**38 - 1, -(10**38) + 1]
HEX = st.text("0123456789abcdef", min_size=32, max_size=32)


@given(st.lists(st.one_of(st.integers(), st.sampled_from(AT_THE_EDGES), st.none()), min_size=1))
def test_numbers_and_nothing(values: list[int | None]) -> None:
    assert _numbers(values) == _numbers(tuple(values)) == _plain(values)


@pytest.mark.parametrize("values", [[True], [Decimal(3), Decimal(10**30)], ["5", 1], [1.5], [1e300], [Decimal("0.10")]])
def test_what_is_no_integer_is_written_plainly(values: Sequence[Any]) -> None:
    assert _numbers(values) == _plain(values)


@given(st.lists(st.one_of(HEX, st.none()), min_size=1))
def test_texts_and_nothing(values: list[str | None]) -> None:
    assert _texts(values) == _texts(tuple(values)) == _plain(values)


def test_an_empty_text_is_quoted() -> None:
    assert _texts_or_empty(["ff", "", None]) == '{ff,"",NULL}'
