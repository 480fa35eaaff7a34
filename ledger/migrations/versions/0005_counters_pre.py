"""Counters that several workers share, limits, denied addresses.

Revision ID: 0005_pre
"""

from ledger.migrations import run_file

revision = "0005_pre"
down_revision = "0004_pre"


def upgrade() -> None:
    run_file("0005_counters_pre.sql")
