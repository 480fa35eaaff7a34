"""Reading: landmarks among an account's entries, and the function that finds its last entry at a time.

Revision ID: 0004
"""

from ledger.migrations import run_file

revision = "0004"
down_revision = "0001"


def upgrade() -> None:
    run_file("0004_reading_pre.sql")
