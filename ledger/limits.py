"""Limits that people change while the system runs: rows of `limits`, each change with its log in `audit_logs`.

Which names there are, and what holds where nobody set one, is their readers' business; amounts are in base units.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final, NamedTuple

from ledger.audit_logs import Log
from ledger.commit import Sealed, Unchanged, lock_writer, seal
from ledger.rows import Connection, Op, block
from ledger.sql import load
from ledger.tables import LIMITS

_sql = load("ledger", "sql/limits.sql")

WRITER: Final = "limits"


class Limit(NamedTuple):
    """A row of `limits`."""

    name: str
    value: int
    updated_by: str
    updated_at: datetime


async def list_limits(connection: Connection) -> dict[str, Limit]:
    """Those that are set, by name."""
    rows = await connection.fetch(_sql.list)
    return {row[0]: Limit(row[0], int(row[1]), row[2], row[3]) for row in rows}


async def set_limits(
    connection: Connection, values: dict[str, int | None], at: datetime, *, actor: str
) -> Sealed | None:
    """Sets each to its value, or unsets it (None), all in one commit; None when nothing changed. ValueError, and nothing is done, for a value below zero."""
    if bad := [name for name, value in values.items() if value is not None and value < 0]:
        raise ValueError(f"{bad[0]}: a limit is not below zero")
    try:
        async with connection.transaction():
            owners = await lock_writer(connection, WRITER)
            known = await list_limits(connection)
            logs, upserts, deletes = [], [], []
            for name, value in sorted(values.items()):
                before = known[name].value if name in known else None
                if value == before:
                    continue
                if value is None:
                    deletes.append((name,))
                else:
                    upserts.append(Limit(name, value, actor, at))
                verb = "unset" if value is None else "set"
                logs.append(Log(actor, f"limit.{verb}", "limit", name, _plain(before), _plain(value)))
            if not logs:
                raise Unchanged
            changes = ((Op.UPSERT, upserts), (Op.DELETE, deletes))
            return await seal(
                connection, WRITER, owners, blocks=[block(LIMITS, op, some) for op, some in changes if some],
                messages=[], at=at, actor=actor, summary={log.action: 1 for log in logs}, logs=logs,
            )  # fmt: skip
    except Unchanged:
        return None


def _plain(value: int | None) -> dict[str, str] | None:
    return None if value is None else {"value": str(value)}
