"""What a stage may decide about an event. Pure values; `stage.py` carries them out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from ledger.audit_logs import Log
from ledger.errors import PostingRefused
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
    alerts: tuple[Alert, ...] = ()


class Alert(NamedTuple):
    """What a person should hear of: logged and counted when it is committed. `code` is one of a few, for the metric's label."""

    code: str
    about: dict[str, str]


class Done(NamedTuple):
    """All of it or nothing. An empty Done: there is nothing to do (any more)."""

    postings: tuple[Transaction, ...] = ()
    inserts: tuple[tuple[Table, Row], ...] = ()
    upserts: tuple[tuple[Table, Row], ...] = ()
    emits: tuple[Emit, ...] = ()
    calls: tuple[Call, ...] = ()
    if_refused: Outcome | Callable[[PostingRefused], Outcome] | None = None
    """What a refusal of the ledger means, or a pure function that says so; None: dead letter with the refusal's own code. A
    Done may post in its turn; what is refused then is a dead letter, unless its own `if_refused` is no Done."""
    alerts: tuple[Alert, ...] = ()
    updates: tuple[tuple[Table, Row], ...] = ()
    """As upserts, of rows that are there and locked: of the whole row only the columns that may change are written, at half the
    price."""
    logs: tuple[Log, ...] = ()
    """For `audit_logs`: what a person may ask about later."""


Outcome: TypeAlias = Done | Rejected | Retry

F = TypeVar("F")


async def _nothing(_events: Sequence[Received]) -> Any:
    return None


def _unfolded(_facts: Any, _done: Done) -> None: ...


def _unread(_received: Received) -> None: ...


def _all(_event: Any) -> bool:
    return True


async def _as_decided(_prepared: Any, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    return outcomes


def _uncounted(_observer: Any, _items: Sequence[Any], _outcomes: Sequence[Outcome]) -> None: ...


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
    reads: Callable[[Any], Event] | None = None
    """Of a stage whose source are messages that need not be events (dead letters): any Kafka record as what `decide` is given,
    whatever its bytes. Its id is made of its position and its bytes; such a stage has no dead letters."""
    takes: Callable[[Any], bool] = _all
    """Which events of a topic that several stages share are this one's, by the event alone. Of the others, which are another
    stage's, nothing is read, decided or stored: they are acknowledged. `stablerail verify --kafka` must know of it."""
    ahead: Callable[[Received], None] = _unread
    """What can be worked out of an event alone, and is remembered: done while the batch before is in PostgreSQL."""
    prepare: Callable[[Sequence[Received]], Awaitable[Any]] = _nothing
    complete: Callable[[Any, Sequence[Outcome]], Awaitable[Sequence[Outcome] | None]] = _as_decided
    """(prepared, a batch's outcomes): adds what no pure function can, under the locks of `load` and before anything is written: a
    signature of a key that is elsewhere. None: it cannot be had, `prepared` says so now, and the batch is decided again."""
    prepares_ahead: bool = False
    """`prepare` of one batch may run while the one before is in PostgreSQL: it depends on nothing that a commit of this stage
    changes, and doing it twice, or for events that another worker settles, is harmless."""
    bystanders: frozenset[str] = frozenset()
    """Codes of refusals that anybody outside can cause: dead letters as ever, but to the fuse no sign of a mistake of ours."""
    ordered: bool = False
    """Events of a key that waits in the schedule wait behind it."""
    partner: str = ""
    """Whom an acting stage calls; empty for others."""
    operation: str = ""
    figures: Callable[[Any, Sequence[Any], Sequence[Outcome]], None] = _uncounted
    """(observer, items, their outcomes) of a batch that is committed: metrics of the stage's own."""
    emits: tuple[Topic, ...] = field(default=())
    """For people and for AsyncAPI."""
