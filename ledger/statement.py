"""An account's statement: opening balance, lines, closing balance, in pages.

A statement is fixed when it is opened: for each shard the first and the last version that belong to it. Entries never change
and come only behind the last version, so pages read later, on whatever connection, are pages of the same statement; no
snapshot is held between them.

The lines of the shards are merged by (time, shard, version); each line's balance is that of the whole account after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, NamedTuple
from uuid import UUID

import orjson

from ledger.cursors import opaque, opened
from ledger.errors import AccountNotFound, BadCursor, BadPeriod
from ledger.reading import AccountName, Reader
from ledger.sql import load

_sql = load("ledger", "sql/reading.sql")

LINES_MAX: Final = 1_000
"""Of one page: a thousand lines are read in a few milliseconds and take less than a megabyte."""
_VERSION_MAX: Final = 2**63 - 1


class Line(NamedTuple):
    """`amount` base units; `balance` of the account after this line, all its shards together."""

    at: datetime
    shard: str
    version: int
    transaction_id: UUID
    kind: str
    reference: str
    direction: str
    amount: int
    balance: int


class Span(NamedTuple):
    """One shard's part: its versions after `first` up to `last`, of which those up to `done` were read."""

    account_id: UUID
    shard: str
    first: int
    done: int
    last: int


@dataclass(frozen=True, slots=True)
class Statement:
    """Of the entries with since <= time < until; None is open. Balances in base units."""

    account: AccountName
    since: datetime | None
    until: datetime | None
    spans: tuple[Span, ...]
    opening: int
    closing: int
    balance: int
    """After the lines that were read."""

    @property
    def lines(self) -> int:
        """How many there are."""
        return sum(span.last - span.first for span in self.spans)

    @property
    def ended(self) -> bool:
        return all(span.done == span.last for span in self.spans)

    def cursor(self) -> str | None:
        """Where the next page begins; None after the last. Opaque to callers, so that it may change."""
        if self.ended:
            return None
        places = [(span.shard, span.first, span.done, span.last) for span in self.spans]
        packed = _question(self.account, self.since, self.until) + orjson.dumps(places)
        return opaque(packed)


async def open_statement(
    connection: Reader, account: AccountName, since: datetime | None = None, until: datetime | None = None
) -> Statement:
    """Fixes which lines it has. Raises AccountNotFound, BadPeriod."""
    if since is not None and until is not None and until < since:
        raise BadPeriod(since, until)
    rows = await connection.fetch(_sql.open_statement, *account, since, until)
    if not rows:
        raise AccountNotFound(str(account))
    spans = tuple(Span(id_, shard, first, first, last) for id_, shard, first, _, last, _ in rows)
    opening, closing = sum(int(row[3]) for row in rows), sum(int(row[5]) for row in rows)
    return Statement(account, since, until, spans, opening, closing, opening)


async def resume_statement(
    connection: Reader, account: AccountName, since: datetime | None, until: datetime | None, cursor: str
) -> Statement:
    """The statement that `cursor` is of, at its place. Raises BadCursor, also when account or period are others."""
    places = _places(cursor, _question(account, since, until))
    rows = await connection.fetch(
        _sql.resume_statement, account.owner, account.type, account.asset, *map(list, zip(*places, strict=True))
    )
    if [row[1] for row in rows] != [place[0] for place in places]:
        raise BadCursor
    spans = tuple(Span(row[0], *place) for row, place in zip(rows, places, strict=True))
    opening, balance, closing = (sum(int(row[column]) for row in rows) for column in (2, 3, 4))
    return Statement(account, since, until, spans, opening, closing, balance)


async def read_page(connection: Reader, statement: Statement, limit: int = LINES_MAX) -> tuple[list[Line], Statement]:
    """The next lines, at most `limit`, and the statement behind them."""
    open_spans = [span for span in statement.spans if span.done < span.last]
    ids, shards, _, done, last = map(list, zip(*open_spans, strict=True)) if open_spans else ([], [], [], [], [])
    rows = await connection.fetch(_sql.statement_lines, ids, shards, done, last, limit)
    balance, reached, lines = statement.balance, {span.shard: span.done for span in statement.spans}, []
    for at, shard, version, transaction_id, kind, reference, direction, text in rows:
        amount = int(text)
        balance += amount if direction == "d" else -amount
        reached[shard] = version
        lines.append(Line(at, shard, version, transaction_id, kind, reference, direction, amount, balance))
    spans = tuple(span._replace(done=reached[span.shard]) for span in statement.spans)
    return lines, replace(statement, spans=spans, balance=balance)


async def pages(
    acquire: Callable[[], AbstractAsyncContextManager[Reader]], statement: Statement, limit: int = LINES_MAX
) -> AsyncIterator[list[Line]]:
    """All that is left of a statement. A connection is taken for each page, so that a slow reader holds none."""
    while not statement.ended:
        async with acquire() as connection:
            lines, statement = await read_page(connection, statement, limit)
        yield lines


def _question(account: AccountName, since: datetime | None, until: datetime | None) -> bytes:
    """Tells a cursor of another question."""
    times = [None if time is None else time.astimezone(UTC).isoformat() for time in (since, until)]
    return hashlib.blake2b(orjson.dumps([*account, *times]), digest_size=6).digest()


def _places(cursor: str, question: bytes) -> list[tuple[str, int, int, int]]:
    try:
        packed = opened(cursor)
        asked, places = packed[: len(question)], orjson.loads(packed[len(question) :])
    except ValueError:
        raise BadCursor from None
    if asked != question or not isinstance(places, list) or not places or not all(map(_is_place, places)):
        raise BadCursor
    return [(shard, first, done, last) for shard, first, done, last in places]


def _is_place(place: object) -> bool:
    match place:
        case [str(shard), int(first), int(done), int(last)]:
            return shard.isprintable() and 0 <= first <= done <= last <= _VERSION_MAX
    return False
