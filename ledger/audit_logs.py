"""Who did what beside the flow of events: rows of `audit_logs`, written in the commit of the act itself.

`seal(..., logs=[Log(...)])` writes them, so an act and its log are there together or not at all, in the journal too. The
commit's row in `audit` holds their hash: a log that is edited, deleted, inserted or moved breaks the chain (`verify_logs`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple

import orjson

from ledger.cursors import opaque, opened
from ledger.rows import Connection, Row
from ledger.sql import load

_sql = load("ledger", "sql/audit_logs.sql")


class Caller(NamedTuple):
    """From where a request came."""

    address: str | None = None
    user_agent: str | None = None


NOBODY: Final = Caller()
CALLER: Final[ContextVar[Caller]] = ContextVar("caller", default=NOBODY)
"""Set while a request is answered; what is logged of it says so."""


@dataclass(frozen=True, slots=True)
class Log:
    """One act. `before` and `after`: the resource as JSON of texts, integers and booleans; never a secret."""

    actor: str
    action: str
    """A past-tense fact: `api_key.created`."""
    resource: str
    """The kind of thing: `api_key`."""
    resource_id: str
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    status: Literal["done", "refused"] = "done"
    error: str | None = None
    """The refusal's code."""
    address: str | None = field(default_factory=lambda: CALLER.get().address)
    user_agent: str | None = field(default_factory=lambda: CALLER.get().user_agent)

    def row(self, batch: int, n: int, at: datetime) -> Row:
        """A row of `audit_logs`: the n-th log of its commit."""
        return (
            batch, n, at.astimezone(UTC), self.actor, self.action, self.resource, self.resource_id, self.before,
            self.after, self.status, self.error, self.address, self.user_agent,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cursor:
    """The place after a log: (at, batch, n)."""

    at: datetime
    batch: int
    n: int

    def __str__(self) -> str:
        micros = (self.at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        return opaque(f"{micros}.{self.batch}.{self.n}".encode())

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Raises ValueError for what is no cursor of ours."""
        try:
            micros, batch, n = map(int, opened(text).decode("ascii").split("."))
            return cls(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros), batch, n)
        except (ValueError, OverflowError):
            raise ValueError("not a cursor of ours; take it from the page before") from None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which logs; None = any. `since` is included, `until` is not."""

    actor: str | None = None
    action: str | None = None
    resource: str | None = None
    resource_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Logged:
    """A log as it is stored."""

    log: Log
    at: datetime
    cursor: Cursor

    def plain(self) -> dict[str, Any]:
        """For JSON and CSV, in the order of the columns."""
        log = self.log
        return {
            "at": self.at.isoformat(), "actor": log.actor, "action": log.action, "resource": log.resource,
            "resource_id": log.resource_id, "before": log.before, "after": log.after, "status": log.status,
            "error": log.error, "address": log.address, "user_agent": log.user_agent,
        }  # fmt: skip


async def page(connection: Connection, wanted: Wanted, after: Cursor | None, limit: int) -> list[Logged]:
    """Oldest first, after the cursor."""
    place = (after.at, after.batch, after.n) if after else (None, None, None)
    return [_logged(row) for row in await connection.fetch(_sql.page, *_filters(wanted), *place, limit)]


async def every(connection: Connection, wanted: Wanted) -> AsyncIterator[Logged]:
    """Oldest first, streamed. In a transaction."""
    async for row in connection.cursor(_sql.page, *_filters(wanted), None, None, None, None, prefetch=1_000):
        yield _logged(row)


def _filters(wanted: Wanted) -> tuple[Any, ...]:
    return wanted.actor, wanted.action, wanted.resource, wanted.resource_id, wanted.since, wanted.until


def _logged(row: Any) -> Logged:
    batch, n, at, actor, action, resource, resource_id, before, after, *rest = row
    log = Log(
        actor, action, resource, resource_id, *(value and orjson.loads(value) for value in (before, after)), *rest
    )
    return Logged(log, at, Cursor(at, batch, n))
