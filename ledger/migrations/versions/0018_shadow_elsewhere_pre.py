"""An outbox for a legacy table in another server.

Revision ID: 0018_pre
"""

from ledger.migrations import run_file

revision = "0018_pre"
down_revision = "0017_pre"


def upgrade() -> None:
    run_file("0018_shadow_elsewhere_pre.sql")
