"""Alembic's scripts; each runs one SQL file of this folder."""

from importlib.resources import files

from alembic import op
from sqlalchemy.util import await_only


def run_file(name: str) -> None:
    """Runs a file of several statements in the migration's transaction (asyncpg prepares only one at a time)."""
    sql = files("ledger.migrations").joinpath(name).read_text(encoding="utf-8")
    bind = op.get_bind()
    # SQLAlchemy's own first statement begins it: without one the file would be a transaction of its own, and who is ended before its
    # revision is noted could never go on
    bind.exec_driver_sql("SELECT 1")
    driver = bind.connection.driver_connection
    assert driver is not None
    await_only(driver.execute(sql))
