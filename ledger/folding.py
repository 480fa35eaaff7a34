"""The rows of blocks again, and the blocks of many records as few: what a rebuild does to be faster than the commits were.

| blocks of a table in the records | become |
| --- | --- |
| all inserted | one, their array literals set one behind the other: nothing is taken apart |
| others too | what is left of each key at the end: at most one row of one operation |

A row that only these records had, and deleted again, is not written at all. No value is read and written anew: an element
of a literal stays the text that the commit made of it. Rows of older programs, which lack the newest columns, are blocks of
their own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Final

import orjson

from ledger.rows import Block, Op, Row, Table

_NULL: Final = "NULL"
_QUOTED: Final = frozenset({"text", "json"})
_ELEMENT: Final = re.compile(r'"(?:[^"\\]|\\.)*"|NULL', re.DOTALL)
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)

Elements = tuple[str, ...]
"""A row, each value as it stands in an array literal."""


def _same(text: str) -> str:
    return text


def _unquoted(element: str) -> str:
    text = element[1:-1]
    return _ESCAPE.sub(r"\1", text) if "\\" in text else text


def _bytes(element: str) -> bytes:
    return b"" if element == '""' else bytes.fromhex(element)


_VALUES: Final[dict[str, Callable[[str], Any]]] = {
    "uuid": _same,
    "text": _unquoted,
    "int": int,
    "numeric": int,
    "bytes": _bytes,
    "time": datetime.fromisoformat,
    "json": lambda element: orjson.loads(_unquoted(element)),
}


def rows_of(block: Block) -> list[Row]:
    """The values that `rows.block` was given; of an UPDATE or a DELETE the columns that it writes. None in columns that are newer
    than the block's program. ValueError when a column is not what `rows` makes, or has another number of rows."""
    kinds = _kinds_of(block)
    columns = [
        [None if element == _NULL else _VALUES[kind](element) for element in elements]
        for kind, elements in zip(kinds, _columns(block, kinds), strict=True)
    ]
    newer = (None,) * (len(block.table.written(block.op)) - len(columns))
    return [(*row, *newer) for row in zip(*columns, strict=True)]


def count_of(block: Block) -> int:
    """How many rows it has."""
    kinds = _kinds_of(block)
    best = min(range(len(kinds)), key=lambda place: (block.columns[place][0] != "{", kinds[place] in _QUOTED))
    kind, column = kinds[best], block.columns[best]
    return len(_elements(kind, column)) if kind in _QUOTED else column.count(",") + 1


def fold(blocks: Iterable[Block]) -> tuple[list[Block], list[Block]]:
    """Blocks of one record after the other -> what is to be deleted first, and the rest: no key twice.

    ValueError where no order of rows could have been written so (a key inserted twice), and where what is left of a row has a
    column, but not one before it, that an older program did not know.
    """
    tables: defaultdict[Table, list[Block]] = defaultdict(list)
    for block in blocks:
        tables[block.table].append(block)
    deleted: list[Block] = []
    written: list[Block] = []
    for table, of_table in tables.items():
        if len(of_table) == 1:
            (deleted if of_table[0].op is Op.DELETE else written).append(of_table[0])
        elif all(block.op is Op.INSERT for block in of_table):
            by_width: defaultdict[int, list[Block]] = defaultdict(list)
            for block in of_table:
                by_width[len(block.columns)].append(block)
            written += map(_joined, by_width.values())
        else:
            for block in _last(table, of_table):
                (deleted if block.op is Op.DELETE else written).append(block)
    return deleted, written


def _joined(blocks: Sequence[Block]) -> Block:
    kinds = _kinds_of(blocks[0])
    counts: list[int] = []
    joined = []
    for place, kind in enumerate(kinds):
        columns = [block.columns[place] for block in blocks]
        first = columns[0]
        if first[0] != "{" and columns.count(first) == len(columns):
            joined.append(first)
            continue
        counts = counts or [count_of(block) for block in blocks]
        joined.append("{" + ",".join(map(_body, [kind] * len(columns), columns, counts)) + "}")
    return Block(blocks[0].table, Op.INSERT, joined)


def _body(kind: str, column: str, count: int) -> str:
    """A column's elements without the braces, shared ones repeated."""
    if column[0] == "{":
        return column[1:-1]
    return ",".join([_element(kind, column)] * count)


def _last(table: Table, blocks: Sequence[Block]) -> Iterator[Block]:
    names = [name for name, _ in table.columns]
    keys = tuple(names.index(name) for name in table.key)
    changing = tuple(names.index(name) for name in table.written(Op.UPDATE))
    found: dict[Elements, tuple[Op, Elements]] = {}
    for block in blocks:
        op = block.op
        for row in zip(*_columns(block, _kinds_of(block)), strict=True):
            key = row[: len(keys)] if op in (Op.UPDATE, Op.DELETE) else tuple([row[place] for place in keys])
            before = found.get(key)
            if before is None:
                found[key] = (op, row)
            elif (after := _after(before, op, row, changing, len(names))) is None:
                del found[key]
            else:
                found[key] = after
    alike: defaultdict[tuple[Op, int], list[Elements]] = defaultdict(list)
    for op, row in found.values():
        alike[op, len(row)].append(row)
    for (op, _), rows in alike.items():
        yield Block(table, op, ["{" + ",".join(column) + "}" for column in zip(*rows, strict=True)])


def _after(
    before: tuple[Op, Elements], op: Op, row: Elements, changing: Sequence[int], width: int
) -> tuple[Op, Elements] | None:
    """What two operations on a key come to; None: nothing at all. A row that is shorter than another leaves the rest of it."""
    first, was = before
    match op:
        case Op.INSERT | Op.UPSERT if first is Op.DELETE:
            if len(row) < width:
                raise ValueError("the newest columns of a row that was deleted would come back")
            return Op.UPSERT, row
        case Op.INSERT:
            raise ValueError("a row is inserted twice")
        case Op.UPSERT if first is Op.UPDATE:
            if max(changing[: len(was)]) >= len(row):
                raise ValueError("a row was changed in columns that are newer than the program that wrote it whole")
            return Op.UPSERT, row
        case Op.UPSERT:
            return first, row + was[len(row) :]
        case Op.UPDATE if first is Op.UPDATE:
            return Op.UPDATE, row + was[len(row) :]
        case Op.UPDATE if first is Op.DELETE:
            raise ValueError("a row is changed that was deleted")
        case Op.UPDATE:
            changed = list(was)
            for place, element in zip(changing, row, strict=False):
                if place >= len(was):
                    raise ValueError("a row is changed in columns that are newer than the program that made it")
                changed[place] = element
            return first, tuple(changed)
        case Op.DELETE:
            return None if first is Op.INSERT else (Op.DELETE, row)


def _columns(block: Block, kinds: Sequence[str]) -> list[list[str]]:
    """Every column's elements, shared ones repeated."""
    found = [
        _elements(kind, column) if column[0] == "{" else column
        for kind, column in zip(kinds, block.columns, strict=True)
    ]
    count = next((len(column) for column in found if isinstance(column, list)), None)
    if count is None:
        raise ValueError(f"rows of {block.table.name} without a number")
    return [
        [_element(kind, column)] * count if isinstance(column, str) else column
        for kind, column in zip(kinds, found, strict=True)
    ]


def _elements(kind: str, literal: str) -> list[str]:
    body = literal[1:-1]
    if kind not in _QUOTED:
        return body.split(",")
    if "\\" in body or body[0] != '"' or body[-1] != '"' or f",{_NULL}," in body:
        return _ELEMENT.findall(body)
    return [f'"{text}"' for text in body[1:-1].split('","')]


def _element(kind: str, shared: str) -> str:
    """A column that all rows share, as one element of a literal."""
    if shared == "-":
        return _NULL
    text = shared[1:]
    if kind in _QUOTED:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return text or '""'


def _kinds_of(block: Block) -> tuple[str, ...]:
    return _kinds(block.table, block.op, len(block.columns))


@cache
def _kinds(table: Table, op: Op, count: int) -> tuple[str, ...]:
    kinds = dict(table.columns)
    return tuple(kinds[name] for name in table.written(op, count))
