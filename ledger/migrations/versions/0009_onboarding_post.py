"""Calls for several members, the jobs of wallet provisioning: what needs every writer to be new.

Revision ID: 0009_post
"""

from ledger.migrations import run_file

revision = "0009_post"
down_revision = "0007_post"
depends_on = "0009_pre"


def upgrade() -> None:
    run_file("0009_onboarding_post.sql")
