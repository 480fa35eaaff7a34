"""The first path: inbox, outbox, ledger, calls, wallets, deposits.

Revision ID: 0001
"""

from ledger.migrations import run_file

revision = "0001"
down_revision = None


def upgrade() -> None:
    run_file("0001_first_path.sql")
