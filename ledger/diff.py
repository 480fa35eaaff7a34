"""Two databases, table by table: equal, or which rows are not.

| step | what | why |
| --- | --- | --- |
| digest | number of rows and two sums of hashes over them, in both databases at once | one pass, nothing sorted or sent: equal tables are most of them |
| walk | only where they differ: both tables' rows in the order of the key, side by side | every row that is not the same, whatever the table's size |

Each database is looked at as of one moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import asyncpg

from ledger.roles import quoted
from ledger.rows import Connection, Table
from ledger.tables import JOURNALED, OWNERS

ROWS_MAX: Final = 10
"""Rows that are shown of a table."""
_PREFETCH: Final = 2_000
AS_TEXT: Final = {
    "timezone": "UTC",
    "datestyle": "ISO",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "jit": "off",
}
"""How values are written: the same in both databases, whatever they are set to."""


@dataclass
class Difference:
    """What was found of one table."""

    table: str
    rows_a: int = 0
    rows_b: int = 0
    only_a: int = 0
    only_b: int = 0
    changed: int = 0
    shown: list[str] = field(default_factory=list)
    """`A …` and `B …` with the row as text, of a changed one both; the first few in the order of the key."""

    @property
    def equal(self) -> bool:
        return not (self.only_a or self.only_b or self.changed)


Progress = Callable[[str, int, int], None]
"""Is told the table, its number and how many there are."""


@asynccontextmanager
async def opened(dsn: str, schema: str) -> AsyncIterator[Connection]:
    """For `diff`. Raises asyncpg's errors, and ValueError for what is no URL."""
    settings = {"search_path": quoted(schema), "application_name": "stablerail diff", **AS_TEXT}
    connection: Connection = await asyncpg.connect(dsn, timeout=10, server_settings=settings)
    try:
        yield connection
    finally:
        await connection.close()


async def diff(
    a: Connection, b: Connection, *, rows_max: int = ROWS_MAX, progress: Progress | None = None
) -> list[Difference]:
    """Every journaled table, in the order of ledger/tables.py."""
    found = []
    async with (
        a.transaction(isolation="repeatable_read", readonly=True),
        b.transaction(isolation="repeatable_read", readonly=True),
    ):
        for number, table in enumerate(JOURNALED):
            if progress is not None:
                progress(table.name, number, len(JOURNALED))
            found.append(await _compare(a, b, table, rows_max))
    return found


async def tables_outside(connection: Connection) -> list[str]:
    """The tables of the schema that are not compared."""
    rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = current_schema() ORDER BY 1")
    return sorted({row[0] for row in rows} - {table.name for table in JOURNALED})


async def _compare(a: Connection, b: Connection, table: Table, rows_max: int) -> Difference:
    (rows_a, *digest_a), (rows_b, *digest_b) = await asyncio.gather(_digest(a, table), _digest(b, table))
    found = Difference(table.name, rows_a, rows_b)
    if (rows_a, digest_a) == (rows_b, digest_b):
        return found
    walk_a, walk_b = _walk(a, table), _walk(b, table)
    row_a, row_b = await anext(walk_a, None), await anext(walk_b, None)
    while row_a is not None or row_b is not None:
        if row_b is None or (row_a is not None and row_a[0] < row_b[0]):
            found.only_a += 1
            shown = [row_a]
        elif row_a is None or row_b[0] < row_a[0]:
            found.only_b += 1
            shown = [None, row_b]
        elif row_a[1] != row_b[1]:
            found.changed += 1
            shown = [row_a, row_b]
        else:
            shown = []
        if shown and found.only_a + found.only_b + found.changed <= rows_max:
            found.shown += [f"{side} {row[1]}" for side, row in zip("AB", shown, strict=False) if row is not None]
        took_a, took_b = _taken(row_a, row_b)
        row_a = await anext(walk_a, None) if took_a else row_a
        row_b = await anext(walk_b, None) if took_b else row_b
    return found


def _taken(row_a: tuple[Any, str] | None, row_b: tuple[Any, str] | None) -> tuple[bool, bool]:
    """Which side's row was looked at: the one of the lower key, or both."""
    if row_a is None or row_b is None:
        return row_a is not None, row_b is not None
    return row_a[0] <= row_b[0], row_b[0] <= row_a[0]


async def _digest(connection: Connection, table: Table) -> Any:
    text = _row(table)
    return tuple(
        await connection.fetchrow(
            f"SELECT count(*), coalesce(sum(hashtextextended({text}, 0)), 0)::text,"  # noqa: S608  (declared names only)
            f" coalesce(sum(hashtextextended({text}, 1)), 0)::text FROM {_rows(table)}"
        )
        or ()
    )


async def _walk(connection: Connection, table: Table) -> AsyncIterator[tuple[Any, str]]:
    """(key, row as text), in an order that is the same in every database: texts by their bytes."""
    kinds = dict(table.columns)
    keys = [f"t.{name}::text" if kinds[name] == "uuid" else f"t.{name}" for name in table.key]
    order = [f't.{name} COLLATE "C"' if kinds[name] == "text" else f"t.{name}" for name in table.key]
    query = f"SELECT {_row(table)}, {', '.join(keys)} FROM {_rows(table)} ORDER BY {', '.join(order)}"  # noqa: S608
    async for text, *key in connection.cursor(query, prefetch=_PREFETCH):
        yield tuple(key), text


def _rows(table: Table) -> str:
    """An owner row without a commit is as none: whoever finds that there is nothing to change may leave one."""
    return f"{table.name} t{' WHERE t.position > 0' if table is OWNERS else ''}"


def _row(table: Table) -> str:
    """By the declared columns: two databases may have got them in another order."""
    return f"ROW({', '.join(f't.{name}' for name, _ in table.columns)})::text"
