"""Alembic migrations, run from code: `stablerail migrate`, tests and the demo use the same function."""

from __future__ import annotations

from importlib.resources import files

import asyncpg
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from ledger.roles import ROLE, grant, make_role, quoted


async def upgrade(database_url: str, schema: str, role: str = ROLE) -> None:
    """Makes the schema and the application's role when missing and brings the schema to the newest revision. Safe to run
    from many processes at once. Raises RoleRefused."""
    connection = await asyncpg.connect(database_url)
    try:
        # one at a time: two first starts would both create the tables
        await connection.execute("SELECT pg_advisory_lock(hashtext($1))", f"migrate {schema}")
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)}")
        await make_role(connection, role)
        await _run(database_url, schema)
        await grant(connection, schema, role)
    finally:
        await connection.close()


async def _run(database_url: str, schema: str) -> None:
    engine = create_async_engine(
        "postgresql+asyncpg://",
        poolclass=NullPool,
        async_creator=lambda: asyncpg.connect(
            database_url,
            server_settings={"search_path": quoted(schema)},
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
