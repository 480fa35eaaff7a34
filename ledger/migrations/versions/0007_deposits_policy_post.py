"""What deposits may be, checked of the rows that were there.

Revision ID: 0007_post
"""

from ledger.migrations import run_file

revision = "0007_post"
down_revision = "0002_post"
depends_on = "0007_pre"


def upgrade() -> None:
    run_file("0007_deposits_policy_post.sql")
