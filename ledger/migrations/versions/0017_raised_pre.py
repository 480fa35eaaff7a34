"""What a lane has sped up has an index.

Revision ID: 0017_pre
"""

from ledger.migrations import run_file

revision = "0017_pre"
down_revision = "0016_pre"


def upgrade() -> None:
    run_file("0017_raised_pre.sql")
