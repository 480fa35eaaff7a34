"""Who may do what to the tables: the application adds rows, the owner must take a guard away, migrations make the role."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import asyncpg
import pytest

from ledger.errors import RoleRefused
from ledger.migrate import upgrade
from ledger.roles import ROLE, make_role
from ledger.tables import APPEND_ONLY, JOURNALED
from stablerail.config import load_settings
from stablerail.connections import connector
from stablerail.dev.postgres import Postgres
from tests.support import ledger_rig
from tests.support.ledger_rig import connect_to, owner

dsn = ledger_rig.dsn
databases = ledger_rig.databases
CHANGES = ("UPDATE {0} SET at = at", "DELETE FROM {0}", "TRUNCATE {0}")


@pytest.fixture(scope="module")
def shared(postgres: Postgres) -> Iterator[str]:
    with ledger_rig.database_of(postgres) as made:
        yield made


@pytest.mark.parametrize("table", [table.name for table in APPEND_ONLY])
async def test_no_row_of_the_books_is_changed_by_the_application_or_unknowingly_by_the_owner(
    table: str, shared: str
) -> None:
    application, over = await connect_to(shared)(), await owner(shared)
    for change in CHANGES:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await application.execute(change.format(table))
        with pytest.raises(asyncpg.RestrictViolationError, match="append-only"):
            await over.execute(change.format(table))
    assert await application.fetchval("SELECT current_user") == ROLE
    await application.close()
    await over.close()


async def test_the_application_may_write_every_other_table_and_change_no_definition(shared: str) -> None:
    connection = await connect_to(shared)()
    for table in JOURNALED:
        await connection.execute(f"SELECT FROM {table.name}")
        if table not in APPEND_ONLY:
            await connection.execute(f"DELETE FROM {table.name}")
    for statement in (
        "ALTER TABLE entries DISABLE TRIGGER append_only", "DROP TABLE entries", "CREATE TABLE own (n int)",
        "UPDATE alembic_version SET version_num = 'x'",
    ):  # fmt: skip
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    await connection.close()


@pytest.fixture
def login(postgres: Postgres, database: str) -> Iterator[Callable[..., str]]:
    """Makes a login that may make schemas in the database; its DSN."""
    made: list[str] = []

    def make(options: str) -> str:
        made.append(f"login_{uuid.uuid4().hex[:12]}")
        postgres.execute(f"CREATE ROLE {made[-1]} LOGIN PASSWORD 'p' {options}")
        name = urlsplit(database).path[1:]
        postgres.execute(f"GRANT CREATE ON DATABASE {name} TO {made[-1]}")
        parts = urlsplit(database)
        return parts._replace(netloc=f"{made[-1]}:p@{parts.hostname}:{parts.port}").geturl()

    yield make
    postgres.execute(f'DROP DATABASE "{urlsplit(database).path[1:]}" WITH (FORCE)')
    for name in made:
        postgres.execute(f"DROP OWNED BY {name}")
        for role in ROLES:
            postgres.execute(f"DROP ROLE IF EXISTS {role}")
        postgres.execute(f"DROP ROLE {name}")


ROLES = [f"app_{uuid.uuid4().hex[:12]}" for _ in range(2)]


async def test_an_owner_that_is_no_superuser_makes_the_role_and_runs_under_it(login: Callable[..., str]) -> None:
    theirs = login("CREATEROLE")
    await upgrade(theirs, "books", role=ROLES[0])
    await upgrade(theirs, "books", role=ROLES[0])
    settings = load_settings(env_file=None, database_url=theirs, database_schema="books", database_role=ROLES[0])
    connection = await connector(settings)()
    assert await connection.fetchval("SELECT current_user") == ROLES[0]
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute("DELETE FROM entries")
    await connection.close()


async def test_a_schema_that_an_administrator_made_is_enough_for_its_owner(
    login: Callable[..., str], postgres: Postgres, database: str
) -> None:
    theirs = login("CREATEROLE")
    parts = urlsplit(theirs)
    postgres.execute(f"REVOKE CREATE ON DATABASE {parts.path[1:]} FROM {parts.username}")
    connection = await asyncpg.connect(database)
    await connection.execute(f"CREATE SCHEMA books AUTHORIZATION {parts.username}")
    await connection.close()
    await upgrade(theirs, "books", role=ROLES[0])


async def test_an_owner_that_may_not_make_the_role_is_told_what_an_administrator_must_run(
    login: Callable[..., str],
) -> None:
    theirs = login("")
    with pytest.raises(RoleRefused, match=f'CREATE ROLE "{ROLES[1]}" NOLOGIN; GRANT "{ROLES[1]}" TO "login_'):
        await upgrade(theirs, "books", role=ROLES[1])


async def test_a_login_that_may_not_act_as_the_role_is_told_what_it_needs(login: Callable[..., str], dsn: str) -> None:
    theirs = login("")
    for role, told in ((ROLE, "permission denied to set role"), ("nobody_made_it", "nobody_made_it")):
        settings = load_settings(env_file=None, database_url=theirs, database_role=role)
        with pytest.raises(RoleRefused, match=told) as refused:
            await connector(settings)()
        assert "stablerail migrate" in str(refused.value)


async def test_databases_that_are_migrated_at_once_make_one_role(
    postgres: Postgres, databases: Callable[[], str]
) -> None:
    role = f"app_{uuid.uuid4().hex[:12]}"
    connections = [await owner(databases()) for _ in range(2)] + [await owner(postgres.dsn) for _ in range(4)]
    await asyncio.gather(*(make_role(connection, role) for connection in connections))
    for connection in connections:
        await connection.close()
    postgres.execute(f"DROP ROLE {role}")
