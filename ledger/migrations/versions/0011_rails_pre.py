"""Lanes that come and go, their keys and gas, and the second rail of withdrawals.

Revision ID: 0011_pre
"""

from ledger.migrations import run_file

revision = "0011_pre"
down_revision = "0010_pre"


def upgrade() -> None:
    run_file("0011_rails_pre.sql")
