"""An index of final deposits by block, for custody.

Revision ID: 0022_pre
"""

from ledger.migrations import run_file

revision = "0022_pre"
down_revision = "0021_pre"


def upgrade() -> None:
    run_file("0022_deposits_final_pre.sql")
