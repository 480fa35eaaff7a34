"""The application's own role: it may add rows to the append-only tables and change only the others.

`stablerail migrate` runs as the owner, makes the role when it is missing, and grants again after every migration, so that
new tables are covered. Every other connection starts under the role, whoever logs in.
"""

from __future__ import annotations

from typing import Final

import asyncpg

from ledger.errors import RoleRefused
from ledger.rows import Connection
from ledger.tables import APPEND_ONLY

ROLE: Final = "stablerail_app"

_MADE_BY_ANOTHER: Final = (asyncpg.DuplicateObjectError, asyncpg.UniqueViolationError)
"""Roles belong to the whole server: another database's migration may make the same one at this moment."""


async def make_role(connection: Connection, role: str) -> None:
    """Makes the role without a login when it is missing, and lets our user act as it. Raises RoleRefused."""
    user = await connection.fetchval("SELECT current_user")
    if not await connection.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", role):
        try:
            await connection.execute(f"CREATE ROLE {quoted(role)} NOLOGIN")
        except _MADE_BY_ANOTHER:
            pass
        except asyncpg.InsufficientPrivilegeError:
            remedy = (
                f"as an administrator run: CREATE ROLE {quoted(role)} NOLOGIN; GRANT {quoted(role)} TO {quoted(user)}"
            )
            raise RoleRefused(f"role {role} is missing and {user} may not create it; {remedy}") from None
    may = "SET" if connection.get_server_version().major >= 16 else "MEMBER"
    if not await connection.fetchval("SELECT pg_has_role($1::name, $2::name, $3)", user, role, may):
        try:
            await connection.execute(f"GRANT {quoted(role)} TO {quoted(user)}")
        except (*_MADE_BY_ANOTHER, asyncpg.InsufficientPrivilegeError):
            pass  # a login of its own may run the application; where it is this one, its first connection says so


async def grant(connection: Connection, schema: str, role: str) -> None:
    """Gives the role what it needs of every table of the schema, and takes away what it must not have."""
    to, within = quoted(role), quoted(schema)
    sealed = ", ".join(f"{within}.{table.name}" for table in APPEND_ONLY)
    async with connection.transaction():
        await connection.execute(
            f"GRANT USAGE ON SCHEMA {within} TO {to};"  # noqa: S608  (quoted names only)
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {within} TO {to};"
            f"GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA {within} TO {to};"
            f"REVOKE UPDATE, DELETE, TRUNCATE ON {sealed} FROM {to};"
            f"REVOKE INSERT, UPDATE, DELETE ON {within}.alembic_version FROM {to}"
        )


def quoted(name: str) -> str:
    """A name as an identifier."""
    return '"' + name.replace('"', '""') + '"'
