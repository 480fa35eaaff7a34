"""At the end of every test with a ledger of its own: the invariants that PostgreSQL can tell, before the database goes.

Whoever makes a database ends it with `end_database`, which asks the views, all in one statement. Those of ages are left out: a test
may stop in the middle, and its clock need not be ours. A test that breaks rows on purpose says so with its reason:
`may_break(dsn, "rows are edited")`; a module whose databases are never filled by the flow has `ROWS_ARE_MADE_UP = "why"`.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg

from ledger.verify import VIEWS
from stablerail.dev.postgres import Server

SCHEMA: Final = "stablerail"
_ASKED: Final = tuple(invariant for invariant in VIEWS if not invariant.ages)
_broken_on_purpose: dict[str, str] = {}


def may_break(dsn: str, reason: str) -> None:
    """The database may end with broken invariants."""
    assert reason
    _broken_on_purpose[_name(dsn)] = reason


def end_database(server: Server, name: str) -> None:
    """Drops the database. AssertionError with the rows that break an invariant; a database without our newest schema has none."""
    try:
        if _broken_on_purpose.pop(name, None) is None:
            with ThreadPoolExecutor(1) as pool:
                broken = pool.submit(asyncio.run, _broken(server.dsn_of(name))).result()
            assert not broken, "\n".join(["the test left broken invariants:", *broken])
    finally:
        server.drop_database(name)


async def _broken(dsn: str) -> list[str]:
    try:
        connection: Any = await asyncpg.connect(dsn, server_settings={"search_path": SCHEMA, "jit": "off"})
    except (OSError, asyncpg.PostgresError):  # the test's own server is stopped, or the database gone
        return []
    try:
        rows = await connection.fetch(_statement())
    except asyncpg.UndefinedTableError:
        return []
    finally:
        await connection.close()
    return [f"{number} {view}: {row}" for number, view, row in rows]


def _statement() -> str:
    parts = (
        f"(SELECT {one.number}, '{one.view}', row_to_json(v)::text FROM {one.view} AS v LIMIT 5)" for one in _ASKED
    )
    return " UNION ALL ".join(parts)


def _name(dsn: str) -> str:
    return urlsplit(dsn).path.removeprefix("/")
