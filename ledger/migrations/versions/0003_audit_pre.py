"""Proof: rows that say which commit sealed them, append-only tables, audit_logs, corrections.

Revision ID: 0003
"""

from ledger.migrations import run_file

revision = "0003"
down_revision = "0001"


def upgrade() -> None:
    run_file("0003_audit_pre.sql")
