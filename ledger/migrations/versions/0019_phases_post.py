"""Without the indexes that name the status of attempts and withdrawals.

Revision ID: 0019_post
"""

from ledger.migrations import run_file

revision = "0019_post"
down_revision = "0009_post"
depends_on = "0019_pre"


def upgrade() -> None:
    run_file("0019_phases_post.sql")
