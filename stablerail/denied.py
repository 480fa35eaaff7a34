"""The deny-list: addresses we take no money from and send none to. Each change is one commit with its log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from chain.addresses import check_address
from ledger.audit_logs import Log
from ledger.commit import lock_writer, seal
from ledger.rows import Changes, Connection
from ledger.sql import load
from ledger.tables import DENIED_ADDRESSES

_sql = load("stablerail", "operations.sql")

WRITER: Final = "denied"
REASON_LENGTH_MAX: Final = 1_000


@dataclass(frozen=True, slots=True)
class Denied:
    """A row of `denied_addresses`."""

    chain: str
    address: str
    reason: str
    denied_by: str
    denied_at: datetime

    @property
    def resource_id(self) -> str:
        return f"{self.chain}:{self.address}"


async def add(connection: Connection, chain: str, address: str, reason: str, actor: str, at: datetime) -> bool:
    """From now on denied. False: it was already. Raises ChainError for what is no address of the chain, ValueError without a
    reason."""
    if not 0 < len(reason.strip()) <= REASON_LENGTH_MAX:
        raise ValueError(f"say why, in at most {REASON_LENGTH_MAX} characters")
    row = Denied(chain, check_address(chain, address), reason.strip(), actor, at)
    changes = Changes()
    changes.insert(DENIED_ADDRESSES, (row.chain, row.address, row.reason, row.denied_by, row.denied_at))
    log = Log(actor, "address.denied", "address", row.resource_id, after={"reason": row.reason})
    return await _change(connection, row.chain, row.address, changes, log, at, there=False)


async def remove(connection: Connection, chain: str, address: str, reason: str, actor: str, at: datetime) -> bool:
    """Denied no more. False: it was not. Raises as `add`."""
    if not 0 < len(reason.strip()) <= REASON_LENGTH_MAX:
        raise ValueError(f"say why, in at most {REASON_LENGTH_MAX} characters")
    place = (chain, check_address(chain, address))
    changes = Changes()
    changes.delete(DENIED_ADDRESSES, place)
    log = Log(actor, "address.allowed", "address", ":".join(place), after={"reason": reason.strip()})
    return await _change(connection, *place, changes, log, at, there=True)


async def listed(connection: Connection, chain: str | None = None) -> Sequence[Denied]:
    """By chain and address."""
    return [Denied(*row) for row in await connection.fetch(_sql.denied, chain)]


async def _change(
    connection: Connection, chain: str, address: str, changes: Changes, log: Log, at: datetime, *, there: bool
) -> bool:
    """Whether it was as expected, and the change is made."""
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)  # one change after the other
        if await connection.fetchval(_sql.is_denied, chain, address) != there:
            return False
        await seal(
            connection, WRITER, owners, blocks=changes.blocks(), messages=[], at=at, actor=log.actor,
            summary={log.action: 1}, logs=[log],
        )  # fmt: skip
    return True
