"""What became of a custodian's transfers, step by step.

Revision ID: 0016_pre
"""

from ledger.migrations import run_file

revision = "0016_pre"
down_revision = "0015_pre"


def upgrade() -> None:
    run_file("0016_transfers_pre.sql")
