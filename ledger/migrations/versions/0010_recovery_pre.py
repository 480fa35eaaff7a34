"""What recovery keeps: restores and what they closed, dead letters, the invariants as views.

Revision ID: 0010_pre
"""

from ledger.migrations import run_file

revision = "0010_pre"
down_revision = "0009_pre"


def upgrade() -> None:
    run_file("0010_recovery_pre.sql")
