"""What a stage may decide about an event. Pure values; `stage.py` carries them out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeVar

from ledger.audit_logs import Log
from ledger.posting import Transaction
from ledger.rows import Connection, Row, Table
from topics.catalog import Topic
from topics.envelope import Received
from topics.events import Event


class Emit(NamedTuple):
    """An event to tell, with the id its cause gives it."""

    topic: Topic
    key: str
    event: Event
    id: str


@dataclass(frozen=True, slots=True)
class Call:
    """What this event wants of a partner. `item` tells the wishes of one event apart. Performers make one call of several."""

    item: str
    request: dict[str, Any]
    """What is asked, in our terms, without secrets; stored."""
    context: dict[str, Any]
    """What `conclude` needs to know of the event."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """This event can never succeed: dead letter with a stable code."""

    code: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Retry:
    """Later. `decide` sees the attempt's number and ends the retries itself."""

    code: str
    after_s: float


class Done(NamedTuple):
    """All of it or nothing. An empty Done: there is nothing to do (any more)."""

    postings: tuple[Transaction, ...] = ()
    inserts: tuple[tuple[Table, Row], ...] = ()
    upserts: tuple[tuple[Table, Row], ...] = ()
    emits: tuple[Emit, ...] = ()
    calls: tuple[Call, ...] = ()
    if_refused: Rejected | Retry | None = None
    """What a refusal of the ledger means; None: dead letter with the refusal's own code."""
    logs: tuple[Log, ...] = ()
    """For `audit_logs`: what a person may ask about later."""


Outcome = Done | Rejected | Retry

F = TypeVar("F")


async def _nothing(_events: Sequence[Received]) -> Any:
    return None


def _unfolded(_facts: Any, _done: Done) -> None: ...


def _unread(_received: Received) -> None: ...


@dataclass(frozen=True)
class Stage(Generic[F]):
    """One arrow of the flow.

    `decide(event, facts)` is pure and total: no clock, network or database. `load(connection, events, prepared, time)`
    reads the facts of a whole batch in the batch's transaction and locks the state rows that decisions change; `fold`
    makes a decision visible to the next event of the batch. `prepare`, for stages that look outside (a chain), runs
    before the transaction.
    """

    name: str
    source: Topic
    load: Callable[[Connection, Sequence[Received], Any, datetime], Awaitable[F]]
    decide: Callable[[Received, F], Outcome]
    fold: Callable[[F, Done], None] = _unfolded
    ahead: Callable[[Received], None] = _unread
    """What can be worked out of an event alone, and is remembered: done while the batch before is in PostgreSQL."""
    prepare: Callable[[Sequence[Received]], Awaitable[Any]] = _nothing
    ordered: bool = False
    """Events of a key that waits in the schedule wait behind it."""
    partner: str = ""
    """Whom an acting stage calls; empty for others."""
    operation: str = ""
    emits: tuple[Topic, ...] = field(default=())
    """For people and for AsyncAPI."""
