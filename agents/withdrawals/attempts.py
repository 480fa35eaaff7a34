"""Attempts and lanes as they are stored. Rows are locked in one order: withdrawals, attempts, lanes, each sorted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final, NamedTuple

from agents.withdrawals import stored
from agents.withdrawals.withdrawal import Attempt, Lane, Withdrawal
from ledger.rows import Connection
from ledger.sql import load as load_sql

_sql = load_sql("agents.withdrawals", "tracking.sql")

_MAX_FEE: Final = Attempt._fields.index("max_fee")
_PRIORITY_FEE: Final = Attempt._fields.index("priority_fee")


class ToSend(NamedTuple):
    """What is needed of an attempt to send it."""

    chain: str
    tx_hash: str
    signer: str
    nonce: int
    n: int
    withdrawal_id: str | None
    raw: bytes
    status: str
    held: bool
    """Its lane was restored, and sends nothing until it was compared with its chain."""

    @property
    def key(self) -> tuple[str, str]:
        return self.chain, self.tx_hash


async def lock_nonces(
    connection: Connection, nonces: Sequence[tuple[str, str, int]]
) -> tuple[dict[str, Withdrawal], dict[tuple[str, str, int], list[Attempt]]]:
    """Of each (chain, signer, nonce): its withdrawal, by id, and all its attempts in order of n. Whoever signs another
    attempt has locked the withdrawal, so none is missed."""
    if not nonces:
        return {}, {}
    columns = _columns(sorted(nonces))
    ids = [row[0] for row in await connection.fetch(_sql.withdrawals_of_nonces, *columns)]
    withdrawals = await stored.lock(connection, ids)
    return withdrawals, await lock_attempts(connection, nonces)


async def lock_attempts(
    connection: Connection, nonces: Collection[tuple[str, str, int]]
) -> dict[tuple[str, str, int], list[Attempt]]:
    """All attempts of each (chain, signer, nonce), in order of n. Their withdrawals are locked before."""
    columns = _columns(sorted(nonces)) if nonces else [[], [], []]
    groups: dict[tuple[str, str, int], list[Attempt]] = {}
    for row in await connection.fetch(_sql.lock_attempts, *columns):
        attempt = _attempt(row)
        groups.setdefault((attempt.chain, attempt.signer, attempt.nonce), []).append(attempt)
    return groups


async def lock_lanes(connection: Connection, keys: Collection[tuple[str, str]]) -> dict[tuple[str, str], Lane]:
    """By (chain, signer)."""
    rows = await connection.fetch(_sql.lock_lanes, *_columns(sorted(keys))) if keys else []
    return {(lane.chain, lane.signer): lane for lane in (Lane(*row) for row in rows)}


async def read_attempts(connection: Connection, keys: Collection[tuple[str, str]]) -> dict[tuple[str, str], Attempt]:
    """By (chain, hash); not locked."""
    rows = await connection.fetch(_sql.attempts_by_hash, *_columns(sorted(keys))) if keys else []
    return {(attempt.chain, attempt.tx_hash): attempt for attempt in map(_attempt, rows)}


async def read_to_send(connection: Connection, keys: Collection[tuple[str, str]]) -> list[ToSend]:
    """Those that are there; not locked."""
    rows = await connection.fetch(_sql.to_send, *_columns(sorted(keys))) if keys else []
    return [ToSend(*row) for row in rows]


async def attempts_of(connection: Connection, withdrawal_id: str) -> list[Attempt]:
    """All attempts of a withdrawal, in order of n; not locked. Under its withdrawal's lock nobody signs another."""
    return [_attempt(row) for row in await connection.fetch(_sql.attempts_of, withdrawal_id)]


def _columns(keys: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*keys, strict=True)]


def _attempt(row: Any) -> Attempt:
    values = [*row]
    values[_MAX_FEE] = int(values[_MAX_FEE])
    values[_PRIORITY_FEE] = int(values[_PRIORITY_FEE])
    return Attempt._make(values)
