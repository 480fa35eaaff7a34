"""What was reconciled, and what differed.

Revision ID: 0014_pre
"""

from ledger.migrations import run_file

revision = "0014_pre"
down_revision = "0013_pre"


def upgrade() -> None:
    run_file("0014_reconcile_pre.sql")
