"""The fuse: two rules against the same answer for everybody, judged before the commit."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.fuse import WINDOW, Fuse, FuseBlown


def test_one_refusal_too_many_in_a_row_blows_it_and_is_not_recorded() -> None:
    fuse = Fuse(1.0, 3)
    fuse.check([True, True, True])
    fuse.record([True, True, True])
    for _ in range(2):  # a restart of the batch is judged alike
        with pytest.raises(FuseBlown, match="4 refusals in a row; at most 3"):
            fuse.check([True])
    fuse.check([False, True, True, True])


def test_a_good_event_ends_a_run() -> None:
    fuse = Fuse(1.0, 2)
    for _ in range(5):
        fuse.check([True, True, False])
        fuse.record([True, True, False])


def test_a_run_within_a_batch_counts_wherever_it_stands() -> None:
    with pytest.raises(FuseBlown):
        Fuse(1.0, 2).check([False, True, True, True, False, False])


def test_the_share_is_judged_over_a_full_window_only() -> None:
    fuse = Fuse(0.5, WINDOW)
    mixed = [True, False] * (WINDOW // 2 - 1)
    fuse.check([True, *mixed])
    fuse.record(mixed)
    fuse.check([True])  # 500 of 999
    with pytest.raises(FuseBlown, match="501 of the last 1000 events refused; at most 50%"):
        fuse.check([True, True])


def test_what_is_older_than_the_window_is_forgotten() -> None:
    fuse = Fuse(0.5, WINDOW)
    fuse.record([True] * (WINDOW // 2))
    fuse.record([False] * WINDOW)
    fuse.check([True] * (WINDOW // 2))


def test_a_small_window_is_judged_sooner() -> None:
    fuse = Fuse(0.5, 100, window=10)
    fuse.record([False, True] * 5)
    with pytest.raises(FuseBlown, match="6 of the last 10"):
        fuse.check([True, True])


@given(st.lists(st.lists(st.booleans(), max_size=12), max_size=12), st.integers(1, 6))
def test_it_blows_exactly_when_a_run_is_too_long(batches: list[list[bool]], run_max: int) -> None:
    fuse = Fuse(1.0, run_max)
    seen: list[bool] = []
    for batch in batches:
        longest = max((len(list(g)) for refused, g in groupby([*seen, *batch]) if refused), default=0)
        if longest > run_max:
            with pytest.raises(FuseBlown):
                fuse.check(batch)
            return
        fuse.check(batch)
        fuse.record(batch)
        seen += batch
