"""Where the sources that we ask have been read up to, and Circle's transactions that are not at their end.

Revision ID: 0008_pre
"""

from ledger.migrations import run_file

revision = "0008_pre"
down_revision = "0007_pre"


def upgrade() -> None:
    run_file("0008_sources_pre.sql")
