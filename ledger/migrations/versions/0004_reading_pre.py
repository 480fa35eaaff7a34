"""Reading: the function that finds an account's last entry at a time.

Revision ID: 0004_pre
"""

from ledger.migrations import run_file

revision = "0004_pre"
down_revision = "0003_pre"


def upgrade() -> None:
    run_file("0004_reading_pre.sql")
