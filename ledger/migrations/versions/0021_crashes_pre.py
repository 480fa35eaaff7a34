"""Which event the crashes at a place are of.

Revision ID: 0021_pre
"""

from ledger.migrations import run_file

revision = "0021_pre"
down_revision = "0020_pre"


def upgrade() -> None:
    run_file("0021_crashes_pre.sql")
