"""Rows of blocks again, and many blocks as few, whatever is in the rows."""

from __future__ import annotations

import string
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.folding import count_of, fold, rows_of
from ledger.rows import Block, Op, Row, Table, block, columns

THINGS = Table(
    "things",
    ("stage", "n"),
    "stage:text n:int id:uuid value:bytes about:json at:time amount:numeric note:text",
    changing=("amount", "note"),
)
NOTES = ("", "NULL", "null", 'say "NULL",', "a,b", "{x}", "\\", '\\"', '","', "=", "-", "line\nline", "µ€", None)
AT = datetime(2026, 7, 1, 12, 0, 0, 123456, tzinfo=UTC)

note = st.sampled_from(NOTES) | st.none() | st.text(string.printable, max_size=6)
key = st.tuples(st.sampled_from(["s", 'odd",\\', "NULL", ""]), st.integers(0, 2))
rest = st.tuples(
    st.sampled_from(["0" * 32, "f" * 32, None]),
    st.sampled_from([b"", b"\x00\xff", None]),
    st.sampled_from([{}, {"a": [1, None, 'x",\\']}, [], None, "text"]),
    st.sampled_from([AT, AT.replace(microsecond=0), None]),
    st.sampled_from([0, -5, 10**37, None]),
    note,
)


def row(key: tuple[str, int], rest: Row) -> Row:
    return (*key, *rest)


@given(st.dictionaries(key, rest, min_size=1, max_size=5))
def test_a_block_gives_back_the_rows_it_was_made_of(found: dict[Any, Row]) -> None:
    rows = [row(*item) for item in found.items()]
    made = block(THINGS, Op.INSERT, rows)
    assert rows_of(made) == rows
    assert count_of(made) == len(rows)


def test_a_value_that_all_rows_share_is_each_ones() -> None:
    made = columns(THINGS, Op.INSERT, "s", [1, 2], None, b"", {"a": 1}, AT, 3, 'x",')
    assert rows_of(made) == [("s", n, None, b"", {"a": 1}, AT, 3, 'x",') for n in (1, 2)]
    assert count_of(made) == 2


def test_columns_that_are_newer_than_a_rows_program_hold_nothing() -> None:
    whole = columns(THINGS, Op.INSERT, "s", [1, 2], None, b"", {"a": 1}, AT, 3, "note")
    older = Block(THINGS, Op.INSERT, whole.columns[:-2])
    assert rows_of(older) == [("s", n, None, b"", {"a": 1}, AT, None, None) for n in (1, 2)]


@pytest.mark.parametrize("op", [Op.UPSERT, Op.UPDATE, Op.DELETE])
def test_columns_that_no_program_of_before_had_are_refused(op: Op) -> None:
    names = THINGS.written(op)
    for count in (1, len(names) + 1):
        with pytest.raises(ValueError, match=f"{count} columns of things"):
            rows_of(Block(THINGS, op, ["{1}"] * count))


Step = tuple[Op, tuple[str, int], Row]


class World:
    """The table, as PostgreSQL would have it."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], Row] = {}

    def may(self, step: Step) -> bool:
        op, key, _ = step
        return op is Op.UPSERT or op is Op.DELETE or (op is Op.UPDATE) == (key in self.rows)

    def write(self, blocks: list[Block]) -> None:
        for each in blocks:
            for values in rows_of(each):
                key, wrote = values[:2], len(each.columns)
                before = self.rows.get(key, (None,) * 8)
                match each.op:
                    case Op.INSERT:
                        assert key not in self.rows, "a unique violation"
                        self.rows[key] = values
                    case Op.UPSERT:
                        self.rows[key] = (*values[:wrote], *before[wrote:])
                    case Op.UPDATE:
                        self.rows[key] = (*before[:6], *values[2:wrote], *before[4 + wrote :])
                    case Op.DELETE:
                        self.rows.pop(key, None)


def block_of(step: Step, newest: int = 0) -> Block:
    """`newest`: so many columns were not there yet when the step's program was made."""
    op, key, rest = step
    match op:
        case Op.UPDATE:
            made = block(THINGS, op, [(*key, *rest[-2:])])
        case Op.DELETE:
            return block(THINGS, op, [key])
        case _:
            made = block(THINGS, op, [row(key, rest)])
    return Block(THINGS, op, made.columns[: len(made.columns) - newest])


@given(st.lists(st.tuples(st.sampled_from(Op), key, rest), max_size=15), st.integers(0, 5))
def test_folded_blocks_do_what_they_did_one_after_the_other(steps: list[Step], before: int) -> None:
    plain, folded = World(), World()
    done: list[Block] = []
    for number, step in enumerate(steps):
        if plain.may(step):
            made = block_of(step)
            plain.write([made])
            if number < before:
                folded.write([made])  # the table is not empty when the fold comes
            else:
                done.append(made)
    deleted, written = fold(done)
    keys = [values[:2] for each in (*deleted, *written) for values in rows_of(each)]
    assert len(keys) == len(set(keys)), "each key once"
    folded.write(deleted)
    folded.write(written)
    assert folded.rows == plain.rows


@given(st.lists(st.tuples(st.tuples(st.sampled_from(Op), key, rest), st.booleans()), max_size=15), st.integers(0, 5))
def test_what_programs_of_two_versions_did_is_folded_so_or_not_at_all(
    steps: list[tuple[Step, bool]], before: int
) -> None:
    plain, folded = World(), World()
    done: list[Block] = []
    for number, (step, is_older) in enumerate(steps):
        if plain.may(step):
            made = block_of(step, newest=int(is_older))
            plain.write([made])
            if number < before:
                folded.write([made])
            else:
                done.append(made)
    try:
        deleted, written = fold(done)
    except ValueError:
        return  # they are written one after the other
    folded.write(deleted)
    folded.write(written)
    assert folded.rows == plain.rows


A, VALUES = ("a", 1), (None, b"1", {}, AT, 5, "note")


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        ([(Op.INSERT, 0), (Op.UPSERT, 1)], [(Op.INSERT, 8)]),
        ([(Op.UPSERT, 0), (Op.UPSERT, 1)], [(Op.UPSERT, 8)]),
        ([(Op.UPSERT, 1), (Op.UPSERT, 0)], [(Op.UPSERT, 8)]),
        ([(Op.UPSERT, 1), (Op.UPSERT, 1)], [(Op.UPSERT, 7)]),
        ([(Op.UPDATE, 0), (Op.UPDATE, 1)], [(Op.UPDATE, 4)]),
        ([(Op.UPDATE, 1), (Op.UPSERT, 1)], [(Op.UPSERT, 7)]),
        ([(Op.UPSERT, 1), (Op.UPDATE, 1)], [(Op.UPSERT, 7)]),
        ([(Op.UPSERT, 0), (Op.UPDATE, 1)], [(Op.UPSERT, 8)]),
        ([(Op.UPSERT, 1), (Op.DELETE, 0)], [(Op.DELETE, 2)]),
        ([(Op.UPSERT, 1), (Op.UPDATE, 0)], None),
        ([(Op.UPDATE, 0), (Op.UPSERT, 1)], None),
        ([(Op.DELETE, 0), (Op.INSERT, 1)], None),
        ([(Op.DELETE, 0), (Op.UPSERT, 1)], None),
    ],
)
def test_an_older_programs_row_leaves_the_newest_columns_of_the_one_before(
    steps: list[tuple[Op, int]], left: list[tuple[Op, int]] | None
) -> None:
    done = [block_of((op, A, VALUES), newest) for op, newest in steps]
    if left is None:
        with pytest.raises(ValueError, match="newe"):
            fold(done)
    else:
        deleted, written = fold(done)
        assert [(each.op, len(each.columns)) for each in (*deleted, *written)] == left


def test_rows_that_programs_of_two_versions_added_stay_apart() -> None:
    steps = [(Op.INSERT, ("a", n), VALUES) for n in range(4)]
    deleted, written = fold([block_of(step, newest=step[1][1] % 2) for step in steps])
    assert deleted == []
    assert [(len(each.columns), count_of(each)) for each in written] == [(8, 2), (7, 2)]


def test_rows_that_were_only_added_are_set_one_behind_the_other() -> None:
    first = columns(THINGS, Op.INSERT, "a", [1, 2], None, b"x", {}, AT, 3, "n")
    second = columns(THINGS, Op.INSERT, "b", [1], None, b"", {}, AT, [4], None)
    deleted, [joined] = fold([first, second])
    assert deleted == []
    assert rows_of(joined) == [*rows_of(first), *rows_of(second)]
    assert joined.columns[2] == "-", "what all share is sent once"


def test_a_row_that_is_added_twice_is_refused() -> None:
    one = block(THINGS, Op.INSERT, [row(("a", 1), (None, None, None, None, None, None))])
    gone = block(THINGS, Op.DELETE, [("b", 1)])
    with pytest.raises(ValueError, match="inserted twice"):
        fold([one, gone, one])


def test_a_row_that_is_changed_after_its_end_is_refused() -> None:
    with pytest.raises(ValueError, match="was deleted"):
        fold([block(THINGS, Op.DELETE, [("a", 1)]), block(THINGS, Op.UPDATE, [("a", 1, 2, "x")])])
