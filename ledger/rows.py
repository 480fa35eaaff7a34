"""How rows are written: any number of tables by one statement of arrays, the same live and in a rebuild.

A `Block` is the rows of one table and one operation, each column one PostgreSQL array literal. What a commit writes is a
list of blocks; the commit record holds that list; a rebuild applies it again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from functools import cache, lru_cache
from operator import itemgetter
from typing import Any, Final, TypeAlias

import asyncpg
import orjson

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Row = tuple[Any, ...]

PASSING: Final[tuple[type[asyncpg.PostgresError], ...]] = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
)
"""What a statement fails by whatever it says: others were at the same rows, or it is the server's state. Whoever is told so runs the
same transaction again (commit.py)."""


class Op(StrEnum):
    INSERT = "i"
    """The row is new; a conflict is another writer's, and the whole commit runs again."""
    UPSERT = "u"
    """The row is locked by us, or new."""
    UPDATE = "c"
    """The row is there, locked by us: key and `Table.changing` columns. Half the price of an upsert."""
    DELETE = "d"
    """By key."""


@dataclass(frozen=True, eq=False)
class Table:
    """A journaled table, equal to itself only. `spec` is "column:type …" in the order of its rows; `key` names the primary key's columns.

    Records name columns by their place. So `spec` and `changing` only ever grow, at their ends, and what is out of use stays in both
    (and in the database)."""

    name: str
    key: tuple[str, ...]
    spec: str = field(repr=False)
    changing: tuple[str, ...] = ()
    """What an UPDATE writes; the other columns stay as they were inserted."""

    @property
    def columns(self) -> tuple[tuple[str, str], ...]:
        return _columns(self.spec)

    def written(self, op: Op, count: int | None = None) -> tuple[str, ...]:
        """The columns that a block of the operation has: of `count` columns the first ones, which a program of before the newest ones
        knew. ValueError: no program of before now had just these."""
        if op is Op.DELETE:
            names = self.key
        else:
            names = (*self.key, *self.changing) if op is Op.UPDATE else tuple(name for name, _ in self.columns)
        if count is None or count == len(names):
            return names
        if count > len(names) or not set(self.key) <= set(names[:count]):
            raise ValueError(f"{count} columns of {self.name}, which has {len(names)}")
        return names[:count]


@dataclass(frozen=True, slots=True)
class Block:
    table: Table
    op: Op
    columns: list[str]
    """Each column as one string: `{…}` a PostgreSQL array literal, `=…` one value for every row, `-` NULL for every row.
    One at least is an array: it says how many rows there are. In a record of an older program the table's newest may be missing:
    it left them as they were, or as PostgreSQL makes them in a new row."""
    rows: int = field(default=0, compare=False)
    """How many, where they are few and that is known: the statement reads them in another way. Else 0."""


FEW: Final = 8
"""Rows for which a text that they share is sooner read again for each than once by a query of its own."""


@cache
def _columns(spec: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, kind) for name, _, kind in (word.partition(":") for word in spec.split()))


def _plain(values: Sequence[Any]) -> str:
    """Values whose text holds nothing that an array literal treats specially: numbers, hex, ISO times."""
    if None in values:
        return "{" + ",".join(["NULL" if value is None else str(value) for value in values]) + "}"
    return "{" + ",".join(map(str, values)) + "}"


def _texts(values: Sequence[str | None]) -> str:
    """`_plain` of what is text already, at an eighth of the price."""
    try:
        return "{" + ",".join(values) + "}"  # type: ignore[arg-type]
    except TypeError:  # a None among them
        return _plain(values)


def _numbers(values: Sequence[Any]) -> str:
    """`_plain` of numbers, at a fifteenth of the price where all of them fit into 64 bits."""
    try:
        made = orjson.dumps(values)
    except TypeError:
        return _plain(values)
    if made.translate(None, b"0123456789,-[]"):  # a null, a text, a fraction
        return _plain(values)
    return "{" + made[1:-1].decode() + "}"


def _texts_or_empty(values: Sequence[str | None]) -> str:
    return _texts([value or '""' if value is not None else None for value in values] if "" in values else values)


def _quoted(values: Sequence[str | None]) -> str:
    if None in values:
        return "{" + ",".join(["NULL" if value is None else f'"{_escaped(value)}"' for value in values]) + "}"
    texts: Iterable[Any] = values
    joined = "".join(texts)
    if '"' in joined or "\\" in joined:
        texts = [_escaped(value) for value in texts]
    return '{"' + '","'.join(texts) + '"}'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _same(values: Sequence[Any]) -> Sequence[Any]:
    return values


def _hex(values: Sequence[bytes | None]) -> Sequence[str | None]:
    return [None if value is None else value.hex() for value in values]


def _iso(values: Sequence[datetime | None]) -> Sequence[str | None]:
    return [None if value is None else value.isoformat() for value in values]


def _json(values: Sequence[Any]) -> Sequence[str | None]:
    return [None if value is None else orjson.dumps(value).decode() for value in values]


@dataclass(frozen=True, slots=True)
class _Kind:
    texts: Callable[[Sequence[Any]], Sequence[Any]]
    """Values to what the literal is made of."""
    literal: Callable[[Sequence[Any]], str]
    type: str
    """As which PostgreSQL reads the literal's elements."""
    read: str = "{}"
    """How the statement makes the column's value of it."""


# A literal is one string to encode; asyncpg's own arrays inspect every element twice and cost more than the rest of a
# commit. A value that all rows share is read once.
_KINDS: Final[dict[str, _Kind]] = {
    "uuid": _Kind(_same, _texts, "uuid"),
    "text": _Kind(_same, _quoted, "text"),
    "int": _Kind(_same, _numbers, "int8"),
    "numeric": _Kind(_same, _numbers, "numeric"),
    "bytes": _Kind(_hex, _texts_or_empty, "text", "decode({}, 'hex')"),
    "time": _Kind(_iso, _texts, "timestamptz"),
    "json": _Kind(_json, _quoted, "jsonb"),
}


def block(table: Table, op: Op, rows: Sequence[Row]) -> Block:
    """Rows, of the columns that the operation writes, as a block. Values: int, str, bytes, aware datetime, JSON-able, None;
    uuids as 32 hex digits."""
    kinds = _kinds(table, op)
    if len(rows) == 1:
        first, *rest = rows[0]
        made = [_column(kinds[0], (first,), shared=False)]
        made += [_shared(kind, value) for kind, value in zip(kinds[1:], rest, strict=True)]
        return Block(table, op, made, 1)
    pairs = enumerate(zip(kinds, zip(*rows, strict=True), strict=True))
    made = [_column(kind, values, shared=index > 0) for index, (kind, values) in pairs]
    return Block(table, op, made, len(rows) if len(rows) <= FEW else 0)


@cache
def _kinds(table: Table, op: Op) -> tuple[_Kind, ...]:
    kinds = dict(table.columns)
    return tuple(_KINDS[kinds[name]] for name in table.written(op))


def columns(table: Table, op: Op, *values: Any) -> Block:
    """As `block`, of columns: a list of values, or one value that all rows share."""
    made: list[str] = []
    counted = False
    for kind, value in zip(_kinds(table, op), values, strict=True):
        if isinstance(value, list):
            made.append(_column(kind, value, shared=counted))
            counted = True
        else:
            made.append(_shared(kind, value))
    return Block(table, op, made)


def shared(made: Block, **values: Any) -> Block:
    """The block with other values in columns that all its rows have alike."""
    kinds = zip(made.table.written(made.op), _kinds(made.table, made.op), made.columns, strict=True)
    return replace(
        made, columns=[_shared(kind, values[name]) if name in values else column for name, kind, column in kinds]
    )


def _column(kind: _Kind, values: Sequence[Any], *, shared: bool) -> str:
    first = values[0]
    if shared and values[-1] == first and values.count(first) == len(values):
        return _shared(kind, first)
    return kind.literal(kind.texts(values))


def _shared(kind: _Kind, value: Any) -> str:
    return "-" if value is None else f"={kind.texts((value,))[0]}"


def uuids(values: Iterable[str]) -> str:
    """A parameter for `$n::text::uuid[]`."""
    return "{" + ",".join(values) + "}"


def numbers(values: Iterable[int]) -> str:
    """A parameter for `$n::text::int[]`."""
    return _numbers([*values])


def texts(values: Sequence[str]) -> str:
    """A parameter for `$n::text::text[]`."""
    return _quoted(values)


async def write(connection: Connection, blocks: Iterable[Block]) -> None:
    """Writes all blocks by one statement. No table may have the same key twice in them."""
    if made := list(blocks):
        await connection.execute(_statement(_shape(made), "", 0), *_values(made))


async def write_then(
    connection: Connection, blocks: Sequence[Block], query: str, *args: Any, provided: str | None = None
) -> Any:
    """As `write`, and `query` in the same statement; returns its first value. Its `{written}` becomes a condition that holds
    when every row is written. At least one block. `provided`: a query of one boolean, of the same arguments, asked before
    anything is written; where it says no nothing is, and the first value is None."""
    statement = _statement(_shape(blocks), query, len(args), provided)
    return await connection.fetchval(statement, *args, *_values(blocks))


def _shape(blocks: Sequence[Block]) -> tuple[tuple[Table, Op, str], ...]:
    return tuple((b.table, b.op, _size(b) + "".join([column[0] for column in b.columns])) for b in blocks)


def _size(one: Block) -> str:
    return "1" if one.rows == 1 else "+" if one.rows else "*"


def _values(blocks: Sequence[Block]) -> list[str]:
    return [column if column[0] == "{" else column[1:] for b in blocks for column in b.columns if column != "-"]


@lru_cache(maxsize=1_000)
def _statement(shape: tuple[tuple[Table, Op, str], ...], query: str, before: int, provided: str | None = None) -> str:
    parts, number, where = [], before + 1, ""
    if provided is not None:
        parts.append(f"provided(yes) AS MATERIALIZED ({provided})")
        where = " WHERE (SELECT yes FROM provided)"
    for index, (table, op, sized) in enumerate(shape):
        size, forms = sized[0], sized[1:]
        kinds = dict(table.columns)
        made = {}
        for name, form in zip(table.written(op, len(forms)), forms, strict=True):
            kind = _KINDS[kinds[name]]
            if form == "{":
                array = f"${number}::text::{kind.type}[]"
                made[name] = kind.read.format(f"({array})[1]" if size == "1" else f"unnest({array})")
            elif form == "=":
                value = kind.read.format(f"${number}::text::{kind.type}")
                # a query of its own for many: without it PostgreSQL reads the text again for every row
                made[name] = f"(SELECT {value})" if size == "*" else value
            else:
                made[name] = kind.read.format(f"NULL::{kind.type}")
            number += form != "-"
        parts.append(f"w{index} AS ({_one(table, op, made, where)}{' RETURNING 1' if query else ''})")
    # a query that does not look at them would run before them
    counted = " + ".join(f"(SELECT count(*) FROM w{index})" for index in range(len(shape)))  # noqa: S608
    written = f"{counted} >= 0{where.replace(' WHERE', ' AND')}"
    return f"WITH {', '.join(parts)} {query.replace('{written}', written) or 'SELECT 1'}"


def _one(table: Table, op: Op, made: dict[str, str], where: str) -> str:
    """`made`: each written column's values, the arrays unnested side by side in the SELECT: in the FROM each would be stored before
    its first row is taken."""
    match = " AND ".join(f"t.{name} = x.{name}" for name in table.key)
    source = f"(SELECT {', '.join(f'{value} AS {name}' for name, value in made.items())}{where}) AS x"
    if op is Op.DELETE:
        return f"DELETE FROM {table.name} t USING {source} WHERE {match}"  # noqa: S608  (declared names only)
    if op is Op.UPDATE:
        changes = ", ".join(f"{name} = x.{name}" for name in made if name not in table.key)
        return f"UPDATE {table.name} t SET {changes} FROM {source} WHERE {match}"  # noqa: S608
    insert = f"INSERT INTO {table.name} ({', '.join(made)}) SELECT {', '.join(made.values())}{where}"
    if op is Op.INSERT:
        return insert
    rest = [name for name in made if name not in table.key]
    changes = ", ".join(f"{name} = excluded.{name}" for name in rest)
    action = f"DO UPDATE SET {changes}" if rest else "DO NOTHING"
    return f"{insert} ON CONFLICT ({', '.join(table.key)}) {action}"


class Changes:
    """What one commit wants to write, gathered by table and operation. A later write of the same key replaces an
    earlier one (a fold), so that each key stands once in the statement."""

    def __init__(self) -> None:
        self._inserts: defaultdict[Table, dict[Any, Row]] = defaultdict(dict)
        self._upserts: defaultdict[Table, dict[Any, Row]] = defaultdict(dict)
        self._updates: defaultdict[Table, dict[Any, Row]] = defaultdict(dict)
        self._deletes: defaultdict[Table, dict[Any, Row]] = defaultdict(dict)

    def insert(self, table: Table, row: Row) -> None:
        self._inserts[table][_key_of(table)(row)] = row

    def upsert(self, table: Table, row: Row) -> None:
        key = _key_of(table)(row)
        fresh = self._inserts.get(table)
        if fresh is not None and key in fresh:
            fresh[key] = row  # made in this very commit: it stays an insert, so that another writer's is noticed
        else:
            self._updates[table].pop(key, None)
            self._upserts[table][key] = row

    def update(self, table: Table, row: Row) -> None:
        """A row that is there, locked by us, whole; only the table's `changing` columns are written."""
        key = _key_of(table)(row)
        for rows in (self._inserts[table], self._upserts[table]):
            if key in rows:
                rows[key] = row
                return
        self._updates[table][key] = row

    def delete(self, table: Table, key: Row) -> None:
        """`key`: the primary key's values, in its order."""
        for rows in (self._inserts, self._upserts, self._updates):
            rows[table].pop(key if len(key) > 1 else key[0], None)
        self._deletes[table][key] = key

    def blocks(self) -> Iterator[Block]:
        """Made as they are taken."""
        for op, tables in ((Op.INSERT, self._inserts), (Op.UPSERT, self._upserts), (Op.DELETE, self._deletes)):
            for table, rows in tables.items():
                if rows:
                    yield block(table, op, list(rows.values()))
        for table, rows in self._updates.items():
            if rows:
                yield block(table, Op.UPDATE, list(map(_changing_of(table), rows.values())))


@cache
def _changing_of(table: Table) -> Callable[[Row], Row]:
    """The columns that an UPDATE writes."""
    names = [name for name, _ in table.columns]
    return itemgetter(*(names.index(name) for name in table.written(Op.UPDATE)))


@cache
def _key_of(table: Table) -> Callable[[Row], Any]:
    names = [name for name, _ in table.columns]
    return itemgetter(*(names.index(name) for name in table.key))
