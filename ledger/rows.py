"""How rows are written: any number of tables by one statement of arrays, the same live and in a rebuild.

A `Block` is the rows of one table and one operation, by column, in the form PostgreSQL's `unnest` takes and msgpack
keeps. What a commit writes is a list of blocks; the commit record holds that list; a rebuild applies it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cache
from typing import Any, Final, TypeAlias

import asyncpg
import orjson

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Row = tuple[Any, ...]
Columns = list[list[Any]]


class Op(StrEnum):
    INSERT = "i"
    """The row is new; a conflict is another writer's, and the whole commit runs again."""
    UPSERT = "u"
    """The row is locked by us, or new."""
    DELETE = "d"
    """By key."""


@dataclass(frozen=True)
class Table:
    """A journaled table. `spec` is "column:type …" in the order of its rows; `key` names the primary key's columns."""

    name: str
    key: tuple[str, ...]
    spec: str = field(repr=False)

    @property
    def columns(self) -> tuple[tuple[str, str], ...]:
        return _columns(self.spec)


@dataclass(frozen=True, slots=True)
class Block:
    table: Table
    op: Op
    columns: Columns


@cache
def _columns(spec: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, kind) for name, _, kind in (word.partition(":") for word in spec.split()))


def _same(values: list[Any]) -> list[Any]:
    return values


def _decimal(values: list[Any]) -> list[Any]:
    return [None if value is None else str(value) for value in values]


def _time(values: list[Any]) -> list[Any]:
    seen: dict[datetime | None, str | None] = {None: None}  # a batch has one or two distinct times
    return [seen[v] if v in seen else seen.setdefault(v, v.isoformat()) for v in values]


def _json(values: list[Any]) -> list[Any]:
    return [None if value is None else orjson.dumps(value).decode() for value in values]


# kind -> (to the form kept and sent, the parameter's array type, cast in the statement)
_KINDS: Final[dict[str, tuple[Callable[[list[Any]], list[Any]], str, str]]] = {
    "uuid": (_same, "uuid[]", ""),
    "text": (_same, "text[]", ""),
    "int": (_same, "int8[]", ""),
    "bool": (_same, "bool[]", ""),
    "bytes": (_same, "bytea[]", ""),
    # as text: asyncpg would build a Decimal and a datetime for each value
    "numeric": (_decimal, "text[]", "::numeric"),
    "time": (_time, "text[]", "::timestamptz"),
    "json": (_json, "text[]", "::jsonb"),
}


def block(table: Table, op: Op, rows: Sequence[Row]) -> Block:
    """Rows (for DELETE: keys) of one table as a block. Values: int, str, bytes, bool, aware datetime, JSON-able, None."""
    kinds = dict(table.columns)
    names = table.key if op is Op.DELETE else tuple(kinds)
    columns = [list(column) for column in zip(*rows, strict=True)]
    return Block(table, op, [_KINDS[kinds[name]][0](values) for name, values in zip(names, columns, strict=True)])


async def write(connection: Connection, blocks: Sequence[Block]) -> None:
    """Writes all blocks by one statement. No table may have the same key twice in them."""
    if blocks:
        sql = _statement(tuple((b.table, b.op) for b in blocks))
        await connection.execute(sql, *(values for b in blocks for values in b.columns))


@cache
def _statement(shape: tuple[tuple[Table, Op], ...]) -> str:
    parts, number = [], 1
    for index, (table, op) in enumerate(shape):
        kinds = dict(table.columns)
        names = table.key if op is Op.DELETE else tuple(kinds)
        arrays = ", ".join(f"${number + i}::{_KINDS[kinds[name]][1]}" for i, name in enumerate(names))
        number += len(names)
        source = f"unnest({arrays}) AS x({', '.join(names)})"
        parts.append(f"w{index} AS ({_one(table, op, names, kinds, source)})")
    return f"WITH {', '.join(parts)} SELECT 1"


def _one(table: Table, op: Op, names: Iterable[str], kinds: dict[str, str], source: str) -> str:
    values = ", ".join(f"x.{name}{_KINDS[kinds[name]][2]}" for name in names)
    if op is Op.DELETE:
        match = " AND ".join(f"t.{name} = x.{name}{_KINDS[kinds[name]][2]}" for name in table.key)
        return f"DELETE FROM {table.name} t USING {source} WHERE {match}"  # noqa: S608  (declared names only)
    insert = f"INSERT INTO {table.name} ({', '.join(names)}) SELECT {values} FROM {source}"  # noqa: S608
    if op is Op.INSERT:
        return insert
    rest = [name for name in names if name not in table.key]
    changes = ", ".join(f"{name} = excluded.{name}" for name in rest)
    action = f"DO UPDATE SET {changes}" if rest else "DO NOTHING"
    return f"{insert} ON CONFLICT ({', '.join(table.key)}) {action}"


class Changes:
    """What one commit wants to write, gathered by table and operation. A later write of the same key replaces an
    earlier one (a fold), so that each key stands once in the statement."""

    def __init__(self) -> None:
        self._rows: dict[tuple[Table, Op], dict[Row, Row]] = {}

    def insert(self, table: Table, row: Row) -> None:
        self._rows.setdefault((table, Op.INSERT), {})[self._key(table, row)] = row

    def upsert(self, table: Table, row: Row) -> None:
        key = self._key(table, row)
        fresh = self._rows.get((table, Op.INSERT))
        if fresh is not None and key in fresh:
            fresh[key] = row  # made in this very commit: it stays an insert, so that another writer's is noticed
        else:
            self._rows.setdefault((table, Op.UPSERT), {})[key] = row

    def delete(self, table: Table, key: Row) -> None:
        for op in (Op.INSERT, Op.UPSERT):
            self._rows.get((table, op), {}).pop(key, None)
        self._rows.setdefault((table, Op.DELETE), {})[key] = key

    def blocks(self) -> list[Block]:
        return [block(table, op, list(rows.values())) for (table, op), rows in self._rows.items() if rows]

    @staticmethod
    def _key(table: Table, row: Row) -> Row:
        return tuple(row[i] for i in _key_positions(table))


@cache
def _key_positions(table: Table) -> tuple[int, ...]:
    names = [name for name, _ in table.columns]
    return tuple(names.index(name) for name in table.key)
