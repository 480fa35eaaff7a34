"""<topic>.dlq, webhooks.dlq -> dead_letters

Decides:  whether a dead letter is a new one or an event that was refused once more, and when it is redriven by itself.
Key:      as the refused message's; the topics have one partition.
Repeats:  harmless; a record is known by its position and bytes, a letter by its event.
Refuses:  nothing, whatever the bytes; the topic keeps them for 90 days all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar, Final

import orjson
from pydantic import ConfigDict

from agents.outcome import Done, Outcome, Stage
from agents.recovery.letters import Letter, id_by_position, letter_of, refused_again, waiting
from agents.services import Observer
from agents.transport import Record
from ledger.rows import Connection, uuids
from ledger.sql import load as load_sql
from ledger.tables import DEAD_LETTERS
from topics.catalog import INPUTS, WEBHOOKS_DLQ, Topic
from topics.codes import nature
from topics.envelope import Received
from topics.events import Event

_sql = load_sql("agents.recovery", "letters.sql")

TOPICS: Final = (*(topic.dlq for topic in INPUTS), WEBHOOKS_DLQ)


class Refused(Event):
    """A record of a dead-letter topic, which may be anything."""

    # Nobody publishes its fields. To read what is said of them, pydantic would look through every module that is loaded: a
    # fifteenth of what a worker's start costs.
    model_config = ConfigDict(use_attribute_docstrings=False)
    type: ClassVar[str] = "dead_letter"

    record: Any
    letter: Any
    redriven_as: str | None
    """The id of a letter, as the message says."""

    def ids(self) -> tuple[str, ...]:
        """Which letter it may be, the likeliest first."""
        ids = (self.redriven_as, self.letter.id, id_by_position(self.letter, self.record))
        return tuple(id for id in ids if id is not None)


@dataclass
class Facts:
    now: datetime
    letters: dict[str, Letter] = field(default_factory=dict)
    """Locked, by id."""


def read(topic: str, record: Record) -> Event:
    # the times that a letter lacks are the record's; `decide` says when it is stored
    try:
        at = datetime.fromtimestamp(record.timestamp / 1000, UTC)
    except (OverflowError, ValueError, OSError):
        at = datetime.fromtimestamp(0, UTC)
    letter, redriven_as = letter_of(record, topic, at)
    return Refused.known(record=record, letter=letter, redriven_as=redriven_as)


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, Refused)
    new: Letter = event.letter._replace(updated_at=facts.now)
    known = next((one for id in event.ids() if (one := facts.letters.get(id)) and _same(one, new)), None)
    if known is None:
        free = [id for id in event.ids() if id != event.redriven_as and id not in facts.letters]
        new = new._replace(id=free[0])
        return Done(inserts=((DEAD_LETTERS, waiting(new)),))
    if (new.partition, new.position, new.last_at) == (known.partition, known.position, known.last_at):
        return Done()  # the same refusal, told twice
    return Done(updates=((DEAD_LETTERS, waiting(refused_again(known, new, facts.now))),))


def _same(known: Letter, new: Letter) -> bool:
    """Of several stages that read a topic each refuses for itself, and anybody can write a header."""
    return (known.topic, known.stage, known.value) == (new.topic, new.stage, new.value)


def fold(facts: Facts, done: Done) -> None:
    for _, row in (*done.inserts, *done.updates):
        assert isinstance(row, Letter)
        facts.letters[row.id] = row


async def load(connection: Connection, events: Sequence[Received], _prepared: None, at: datetime) -> Facts:
    ids: set[str] = set()
    for received in events:
        event = received.event
        assert isinstance(event, Refused)
        ids |= set(event.ids())
    return Facts(at, await lock(connection, ids))


async def lock(connection: Connection, ids: set[str]) -> dict[str, Letter]:
    """Those of the letters that are there, locked."""
    rows = await connection.fetch(_sql.lock, uuids(ids)) if ids else []
    return {row[0]: letter_of_row(row) for row in rows}


def letter_of_row(row: Any) -> Letter:
    found = Letter(*row)
    headers, events = (orjson.loads(text) for text in (found.headers, found.events))  # type: ignore[arg-type]
    return found._replace(headers=headers, events=events)


def figures(observer: Observer, _items: Sequence[Any], outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        assert isinstance(outcome, Done)
        for _, row in (*outcome.inserts, *outcome.updates):
            observer.letter(nature(row[4]).whose.value)


def stage(source: Topic) -> Stage[Facts]:
    return Stage(
        name=f"store_dead_letters.{source.name.removesuffix('.dlq')}",
        source=source,
        reads=partial(read, source.name),
        load=load,
        decide=decide,
        fold=fold,
        figures=figures,
    )


def stages() -> tuple[Stage[Facts], ...]:
    """One for each topic of dead letters."""
    return tuple(stage(topic) for topic in TOPICS)
