"""The first path: inbox, outbox, ledger, calls, wallets, deposits.

Revision ID: 0001
"""

from importlib.resources import files

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.get_bind().exec_driver_sql(files("ledger.migrations").joinpath("0001_first_path.sql").read_text())
