"""Alembic migrations, run from code: `stablerail migrate`, tests and the demo use the same function.

A roll-out without downtime: `pre` while the old version works, then the new version everywhere, then `post`. Each change
is at most two revisions, NNNN_pre and NNNN_post, on two branches of Alembic: a pre follows the pre before it, a post the post
before it, and each post depends on its pre. No file waits for a lock longer than LOCK_WAIT_MS, because every writer would
wait behind it: it gives up and tries again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from importlib.resources import files
from typing import Final, Literal

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from ledger.errors import SchemaOutdated
from ledger.roles import ROLE, grant, make_role, quoted
from ledger.rows import Connection as AsyncConnection

Part = Literal["all", "pre", "post"]

LOCK_WAIT_MS: Final = 1_000
TRIES_MAX: Final = 30
"""At most so often a revision that did not get its lock is tried; the last one's error is raised."""
_TARGETS: Final = {"all": "heads", "pre": "pre@head", "post": "post@head"}


async def upgrade(database_url: str, schema: str, part: Part = "all", role: str = ROLE) -> None:
    """Makes the schema and the application's role when missing and brings the schema to the newest revision (`pre`: what may
    be done before a roll-out). Safe to run from many processes at once, and while workers write. Raises RoleRefused, and
    SchemaOutdated, having done nothing, where a newer program has been: it knows best who may do what to its tables."""
    connection = await asyncpg.connect(database_url, server_settings={"search_path": quoted(schema)})
    try:
        # one at a time: two first starts would both create the tables
        await connection.execute("SELECT pg_advisory_lock(hashtext($1))", f"migrate {schema}")
        if not await connection.fetchval("SELECT to_regnamespace($1) IS NOT NULL", quoted(schema)):
            await connection.execute(f"CREATE SCHEMA {quoted(schema)}")  # who owns one need not be allowed to make one
        if unknown := await _done(connection) - {each.revision for each in _scripts().walk_revisions()}:
            raise SchemaOutdated(
                f"the schema is newer than this program, which does not know {', '.join(sorted(unknown))}; use the newer one"
            )
        await make_role(connection, role)
        await run_to(database_url, schema, _TARGETS[part])
        await grant(connection, schema, role)
    finally:
        await connection.close()


async def run_to(database_url: str, schema: str, revision: str) -> None:
    """Upgrades to an Alembic revision, each in a transaction of its own."""
    tries = 1
    while True:
        try:
            await _run(database_url, schema, revision)
            break
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            if tries == TRIES_MAX:
                raise
        tries += 1
        await asyncio.sleep(LOCK_WAIT_MS / 1_000)  # who waited behind us goes first


async def _run(database_url: str, schema: str, revision: str) -> None:
    engine = create_async_engine(
        "postgresql+asyncpg://",
        poolclass=NullPool,
        async_creator=lambda: asyncpg.connect(
            database_url,
            server_settings={"search_path": quoted(schema), "lock_timeout": str(LOCK_WAIT_MS)},
        ),
    )

    def run(connection: Connection) -> None:
        config = _config()
        config.attributes["connection"] = connection
        config.attributes["schema"] = schema
        command.upgrade(config, revision)

    try:
        async with engine.connect() as connection:
            await connection.run_sync(run)
            await connection.commit()
    finally:
        await engine.dispose()


async def is_newest(connection: AsyncConnection) -> bool:
    """The schema that the connection is in has every revision of this program, and none that it does not know."""
    scripts = _scripts()
    # the newest pre is in no row of its own where a post that was done depends on it
    implied = {name for revision in scripts.walk_revisions() for name in _names(revision.dependencies)}
    return await _done(connection) == set(scripts.get_heads()) - implied


async def _done(connection: AsyncConnection) -> set[str]:
    """The revisions that the connection's schema is at; none where nothing was done."""
    if not await connection.fetchval("SELECT to_regclass('alembic_version') IS NOT NULL"):
        return set()
    return {row[0] for row in await connection.fetch("SELECT version_num FROM alembic_version")}


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(files("ledger.migrations")))
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _names(names: str | Iterable[str] | None) -> Iterable[str]:
    return (names,) if isinstance(names, str) else names or ()
