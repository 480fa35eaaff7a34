"""Holds, reversals, closed accounts: what needs every writer to be new.

Revision ID: 0002_post
"""

from ledger.migrations import run_file

revision = "0002_post"
down_revision = "0001"
branch_labels = ("post",)
depends_on = "0002_pre"


def upgrade() -> None:
    run_file("0002_ledger_core_post.sql")
