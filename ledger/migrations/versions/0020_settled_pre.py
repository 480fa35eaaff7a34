"""Withdrawals that two people have ended.

Revision ID: 0020_pre
"""

from ledger.migrations import run_file

revision = "0020_pre"
down_revision = "0019_pre"


def upgrade() -> None:
    run_file("0020_settled_pre.sql")
