"""What open orders hold, as an invariant.

Revision ID: 0015_pre
"""

from ledger.migrations import run_file

revision = "0015_pre"
down_revision = "0014_pre"


def upgrade() -> None:
    run_file("0015_orders_held_pre.sql")
