"""The ledger beside a legacy table: phases, marks, discrepancies.

Revision ID: 0013_pre
"""

from ledger.migrations import run_file

revision = "0013_pre"
down_revision = "0012_pre"


def upgrade() -> None:
    run_file("0013_shadow_pre.sql")
