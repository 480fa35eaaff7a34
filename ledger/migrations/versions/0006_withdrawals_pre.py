"""Withdrawals, their history, lanes, and the transactions that were signed.

Revision ID: 0006_pre
"""

from ledger.migrations import run_file

revision = "0006_pre"
down_revision = "0005_pre"


def upgrade() -> None:
    run_file("0006_withdrawals_pre.sql")
