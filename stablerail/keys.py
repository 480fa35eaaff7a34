"""API keys: `Authorization: Bearer sr_<id>_<secret>`. Made by `stablerail keys create`, shown once, stored hashed.

The stored hash is one SHA-256 on purpose. A slow hash (argon2, bcrypt) makes guessing costly where people choose the
secret; ours is 256 random bits, which nobody guesses at any speed, and a slow hash would only let anybody spend our CPU
with wrong keys. The table is a credential: outside the journal, so its rows are written directly; that a key was made or ended
is a log in `audit_logs`, in the same transaction.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias, cast

import asyncpg
from pydantic import SecretStr

from ledger.audit_logs import Log
from ledger.commit import Owner, lock_writer, seal
from ledger.rows import Connection as Locked
from ledger.sql import load

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

# A string: only the type checker knows asyncpg's classes as generic.
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"

_SQL = load("stablerail", "keys.sql")
_HEADER: Final = re.compile(r"Bearer +sr_([0-9a-f]{16})_([0-9a-f]{64})", re.ASCII | re.IGNORECASE)
NAME_LENGTH_MAX: Final = 100
WRITER: Final = "keys"
NOBODY: Final = "unnamed"
"""The actor where nobody said who acts."""


class Scope(StrEnum):
    """What a key may do."""

    READ = "read"
    """Read balances, wallets and deposits of every customer, and the ledger."""
    WITHDRAW = "withdraw"
    """Ask for withdrawals, and cancel them, of every customer."""
    ADMIN = "admin"
    """Everything: reading, withdrawing, changing limits."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it may be shown: without its secret."""

    id: str
    name: str
    scopes: frozenset[str]
    created_at: datetime
    revoked_at: datetime | None = None

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes


@dataclass(frozen=True, slots=True)
class CreatedKey:
    """A new key and the only copy of its text; what is stored cannot give it again."""

    key: Key
    token: SecretStr


async def create_key(connection: Connection, scopes: Iterable[Scope], name: str, *, actor: str = NOBODY) -> CreatedKey:
    """Makes a key. ValueError without a scope or with a name that is empty or over 100 characters."""
    granted = sorted(set(scopes))
    if not granted:
        raise ValueError(f"a key needs a scope: {', '.join(Scope)}")
    if not 0 < len(name) <= NAME_LENGTH_MAX or not name.isprintable():
        raise ValueError(f"a key needs a printable name of at most {NAME_LENGTH_MAX} characters")
    key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
    async with connection.transaction():
        owners = await lock_writer(cast(Locked, connection), WRITER)
        created_at = await connection.fetchval(_SQL.create, key_id, name, granted, _digest(secret))
        after = {"name": name, "scopes": [scope.value for scope in granted]}
        await _logged(connection, owners, Log(actor, "api_key.created", "api_key", key_id, after=after))
    return CreatedKey(Key(key_id, name, frozenset(granted), created_at), SecretStr(f"sr_{key_id}_{secret}"))


async def revoke_key(connection: Connection, key_id: str, *, actor: str = NOBODY) -> bool:
    """The key opens nothing from now on. False when there is no such key, or it is revoked already."""
    async with connection.transaction():
        owners = await lock_writer(cast(Locked, connection), WRITER)
        row = await connection.fetchrow(_SQL.revoke, key_id)
        if row is None:
            return False
        before = {"name": row["name"], "scopes": sorted(row["scope"]), "revoked": False}
        after = {**before, "revoked": True}
        await _logged(connection, owners, Log(actor, "api_key.revoked", "api_key", key_id, before, after))
    return True


async def _logged(connection: Connection, owners: Sequence[Owner], log: Log) -> None:
    """The commit's record is journaled by whoever commits, or the next relay's turn."""
    await seal(
        cast(Locked, connection), WRITER, owners, blocks=[], messages=[], at=datetime.now(UTC), actor=log.actor,
        summary={log.action: 1}, logs=[log],
    )  # fmt: skip


async def list_keys(connection: Connection) -> tuple[Key, ...]:
    """Every key, revoked ones too, oldest first."""
    return tuple(_key(row) for row in await connection.fetch(_SQL.list))


async def authenticate(connection: Connection, header: str | None) -> Key | None:
    """The key of an Authorization header; None when there is none, it is malformed, unknown, revoked or wrong."""
    match = _HEADER.fullmatch(header) if header is not None else None
    if match is None:
        return None
    row = await connection.fetchrow(_SQL.find, match[1].lower())
    # Compared for an unknown id too, so that the time says nothing about which ids exist.
    stored: bytes = row["secret_sha256"] if row is not None else bytes(32)
    right = hmac.compare_digest(stored, _digest(match[2].lower()))
    return _key(row) if right and row is not None else None


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _key(row: asyncpg.Record) -> Key:
    return Key(row["id"], row["name"], frozenset(row["scope"]), row["created_at"], row["revoked_at"])
