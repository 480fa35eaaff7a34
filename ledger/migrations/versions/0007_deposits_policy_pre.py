"""Deposits that wait for finality, and what becomes of those that nobody is credited for.

Revision ID: 0007_pre
"""

from ledger.migrations import run_file

revision = "0007_pre"
down_revision = "0006_pre"


def upgrade() -> None:
    run_file("0007_deposits_policy_pre.sql")
