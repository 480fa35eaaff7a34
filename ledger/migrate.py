"""Alembic migrations, run from code: `stablerail migrate`, tests and the demo use the same function."""

from __future__ import annotations

from importlib.resources import files

import asyncpg
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool


async def upgrade(database_url: str, schema: str) -> None:
    """Makes the schema when missing and brings it to the newest revision. Safe to run from many processes at once."""
    connection = await asyncpg.connect(database_url)
    try:
        # one at a time: two first starts would both create the tables
        await connection.execute("SELECT pg_advisory_lock(hashtext($1))", f"migrate {schema}")
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {_quoted(schema)}")
        await _run(database_url, schema)
    finally:
        await connection.close()


async def _run(database_url: str, schema: str) -> None:
    engine = create_async_engine(
        "postgresql+asyncpg://",
        poolclass=NullPool,
        async_creator=lambda: asyncpg.connect(
            database_url,
            server_settings={"search_path": _quoted(schema)},
        ),
    )

    def run(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(files("ledger.migrations")))
        config.attributes["connection"] = connection
        config.attributes["schema"] = schema
        command.upgrade(config, "head")

    try:
        async with engine.connect() as connection:
            await connection.run_sync(run)
            await connection.commit()
    finally:
        await engine.dispose()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
