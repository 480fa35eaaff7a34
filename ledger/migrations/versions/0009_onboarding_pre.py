"""Calls for several members, the jobs of wallet provisioning, frozen customers.

Revision ID: 0009_pre
"""

from ledger.migrations import run_file

revision = "0009_pre"
down_revision = "0008_pre"


def upgrade() -> None:
    run_file("0009_onboarding_pre.sql")
