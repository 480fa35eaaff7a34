"""Proof: rows that say which commit sealed them, append-only tables, audit_logs, corrections.

Revision ID: 0003_pre
"""

from ledger.migrations import run_file

revision = "0003_pre"
down_revision = "0002_pre"


def upgrade() -> None:
    run_file("0003_audit_pre.sql")
