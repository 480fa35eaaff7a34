"""The rows of `wallet_requests`: which wallets a customer was promised, and which are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from agents.outcome import Done
from ledger.rows import Connection
from ledger.sql import load as load_sql
from ledger.tables import WALLET_REQUESTS
from topics.envelope import Received
from topics.events import KycApproved, WalletsRequested

_sql = load_sql("agents.onboarding", "onboarding.sql")

REQUESTED = "requested"
READY = "ready"


class WalletRequest(NamedTuple):
    user_id: str
    chain: str
    status: str
    requested_at: datetime
    ready_at: datetime | None


@dataclass
class Facts:
    now: datetime
    requests: dict[tuple[str, str], WalletRequest] = field(default_factory=dict)
    """(user id, chain) -> its row."""


async def load(connection: Connection, events: Sequence[Received], _prepared: Any, at: datetime) -> Facts:
    """The rows of the events' customers, locked."""
    users = {r.event.user_id for r in events if isinstance(r.event, KycApproved | WalletsRequested)}
    rows = [WalletRequest(*row) for row in await connection.fetch(_sql.requests, sorted(users))]
    return Facts(at, {(row.user_id, row.chain): row for row in rows})


def fold(facts: Facts, done: Done) -> None:
    for table, row in (*done.inserts, *done.upserts):
        if table is WALLET_REQUESTS:
            facts.requests[(row[0], row[1])] = WalletRequest(*row)
