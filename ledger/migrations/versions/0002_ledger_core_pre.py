"""Holds, reversals, closed accounts: what writers of 0001 do not notice.

Revision ID: 0002_pre
"""

from ledger.migrations import run_file

revision = "0002_pre"
down_revision = "0001"
branch_labels = ("pre",)


def upgrade() -> None:
    run_file("0002_ledger_core_pre.sql")
