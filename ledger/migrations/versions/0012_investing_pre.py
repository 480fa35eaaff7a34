"""Orders, what they hold, and a legacy table beside the ledger.

Revision ID: 0012_pre
"""

from ledger.migrations import run_file

revision = "0012_pre"
down_revision = "0011_pre"


def upgrade() -> None:
    run_file("0012_investing_pre.sql")
