"""Indexes that do not name the status of attempts and withdrawals.

Revision ID: 0019_pre
"""

from ledger.migrations import run_file

revision = "0019_pre"
down_revision = "0018_pre"


def upgrade() -> None:
    run_file("0019_phases_pre.sql")
