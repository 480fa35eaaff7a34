"""dead_letters -> the topic that each came from. By hand, and by itself where time heals.

| who | what |
| --- | --- |
| a person (CLI, API) | redrives letters, or discards them with a reason; each is a log of the audit |
| one worker of the deployment | redrives those that are due, and notes which its stage has settled |

The event goes out as it came, with its id and a higher attempt: its stage takes that of what it refused, and of nothing else.
So it may be sent twice, by whomever: what was settled is a repeat. Row, log and message are one commit.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import structlog

from agents.lone_writer import SILENCE_S, LoneWriter
from agents.recovery.errors import BadReason, LetterEnded, LetterRefused, NotRedrivable, UnknownLetter
from agents.recovery.letters import Letter, State, again, bytes_of, plain, readable_as, sent_headers, with_event
from agents.recovery.store_dead_letters import letter_of_row, lock
from agents.services import Services, tell
from ledger.audit_logs import Log
from ledger.commit import Sealed, lock_writer, seal
from ledger.cursors import opaque, opened
from ledger.rows import Block, Connection, Op, block, uuids
from ledger.sql import load as load_sql
from ledger.tables import DEAD_LETTERS
from topics.catalog import fits
from topics.codes import Whose, nature

_log = structlog.get_logger()
_sql = load_sql("agents.recovery", "letters.sql")

WRITER: Final = "dead_letters"
REASON_LENGTH_MAX: Final = 500
AT_ONCE: Final = 100
"""Letters of one commit: each carries its event."""
BYTES_AT_ONCE: Final = 16 * 1024 * 1024
"""Of events in one commit, far below what a record may hold."""
LOOK_S: Final = 2.0
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Redriven:
    sent: list[Letter] = field(default_factory=list)
    refused: list[LetterRefused] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Ids for another commit: together they are too large for one."""
    sealed: Sealed | None = None


@dataclass(frozen=True, slots=True)
class Filter:
    """Which letters; None: all."""

    topic: str | None = None
    """With or without `.dlq`."""
    code: str | None = None
    whose: Whose | None = None
    states: tuple[State, ...] | None = None
    since: datetime | None = None
    eligible: bool = False
    """Only those that redriving can help."""


async def find(connection: Connection, id: str) -> Letter:
    """Raises UnknownLetter."""
    rows = await connection.fetch(_sql.one, id)
    if not rows:
        raise UnknownLetter(id, f"there is no dead letter {id}")
    return letter_of_row(rows[0])


def place_of(letter: Letter) -> str:
    """A cursor: the letter after which a next page begins."""
    return opaque(f"{(letter.last_at - _EPOCH) // timedelta(microseconds=1)}.{letter.id}".encode())


def place(cursor: str) -> tuple[datetime, str]:
    """Raises ValueError for what is no cursor of ours."""
    try:
        micros, _, id = opened(cursor).decode("ascii").partition(".")
        return _EPOCH + timedelta(microseconds=int(micros)), UUID(hex=id).hex
    except OverflowError:
        raise ValueError("out of range") from None


async def page(
    connection: Connection, wanted: Filter, limit: int, after: tuple[datetime, str] | None = None
) -> list[Letter]:
    """The letters that were refused last first; `after` the (last_at, id) of one of them."""
    codes = None
    if wanted.whose is not None or wanted.eligible:
        there = [row[0] for row in await connection.fetch(_sql.codes)]
        codes = [
            code
            for code in there
            if wanted.whose in (None, nature(code).whose) and (nature(code).redrivable or not wanted.eligible)
        ]
    states = None if wanted.states is None else [state.value for state in wanted.states]
    rows = await connection.fetch(
        _sql.page,
        wanted.topic,
        wanted.code,
        states,
        codes,
        wanted.since,
        *(after or (None, None)),
        limit,
        wanted.eligible,
    )
    return [letter_of_row(row) for row in rows]


async def eligible(connection: Connection, wanted: Filter, limit: int) -> list[Letter]:
    """Of the open letters those that redriving can help, refused last first."""
    return await page(connection, replace(wanted, states=(State.OPEN,), eligible=True), limit)


async def redrive(
    connection: Connection, ids: Iterable[str], actor: str, at: datetime, *, force: bool = False
) -> Redriven:
    """Sends the letters' events again, in one commit, at most AT_ONCE of them. `force`: also those whose code says that it cannot
    help. Each that cannot be sent is in `refused`, and stays as it is."""
    wanted = set(ids)
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        there = await lock(connection, wanted)
        refused: list[LetterRefused] = [
            UnknownLetter(id, f"there is no dead letter {id}") for id in wanted - there.keys()
        ]
        settled = await _settled(connection, there.values())
        sent: list[Letter] = []
        left: list[str] = []
        size = 0
        for letter in sorted(there.values(), key=lambda one: (one.last_at, one.id)):
            why = _refusal(letter, settled, force)
            if why is not None:
                refused.append(why)
                continue
            size += bytes_of(letter)
            if sent and size > BYTES_AT_ONCE:
                left.append(letter.id)
                continue
            sent.append(
                with_event(letter, readable_as(letter))._replace(
                    state=State.REDRIVEN, redrives=letter.redrives + 1, due_at=None, updated_at=at,
                    version=letter.version + 1,
                )
            )  # fmt: skip
        if not sent:
            return Redriven([], refused)
        logs = [
            Log(actor, "dead_letter.redriven", "dead_letter", one.id, {"state": there[one.id].state}, {"redrives": one.redrives})
            for one in sent
        ]  # fmt: skip
        sealed = await seal(
            connection, WRITER, owners, blocks=[_changed(sent)], messages=[again(one) for one in sent], at=at, actor=actor,
            summary={"redriven": len(sent)}, logs=logs,
        )  # fmt: skip
    return Redriven(sent, refused, left, sealed)


def _refusal(letter: Letter, settled: set[tuple[str, str | None]], force: bool) -> LetterRefused | None:
    about = nature(letter.code)
    if letter.state in (State.DISCARDED, State.RESOLVED):
        return LetterEnded(letter.id, f"{letter.id} is {letter.state}")
    if letter.origin is None:
        return NotRedrivable(letter.id, f"{letter.id} is no event of a topic; {about.remedy or 'discard it'}")
    if not fits(letter.origin, letter.key, letter.value, sent_headers(letter)):
        return NotRedrivable(letter.id, f"{letter.id} is as large as its topic takes, and would be larger; discard it")
    if any((letter.stage, id) in settled for id in (letter.event_id, *letter.events)):
        return LetterEnded(letter.id, f"{letter.id}: its stage took the event; {about.remedy or 'discard the letter'}")
    if not about.redrivable and not force:
        remedy = about.remedy or "the event must come again, right and with an id of its own"
        return NotRedrivable(letter.id, f"{letter.id} is {letter.code}: {about.meaning}; {remedy}")
    return None


async def _settled(connection: Connection, letters: Iterable[Letter]) -> set[tuple[str, str | None]]:
    """(stage, event id) of those whose event its stage has settled."""
    wanted = sorted({(one.stage, id) for one in letters for id in (one.event_id, *one.events) if id is not None})
    rows = await connection.fetch(_sql.done, [stage for stage, _ in wanted], uuids([id for _, id in wanted]))
    return {(stage, event_id) for stage, event_id in rows}


async def discard(
    connection: Connection, id: str, reason: str, actor: str, at: datetime
) -> tuple[Letter, Sealed | None]:
    """Ends a letter for good; the audit keeps its bytes and the reason. Discarding a discarded one answers it. Raises
    UnknownLetter, LetterEnded, BadReason."""
    if not 0 < len(reason.strip()) <= REASON_LENGTH_MAX or "\0" in reason:
        raise BadReason(id, f"say why, in at most {REASON_LENGTH_MAX} characters")
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        there = await lock(connection, {id})
        if id not in there:
            raise UnknownLetter(id, f"there is no dead letter {id}")
        letter = there[id]
        if letter.state == State.DISCARDED:
            return letter, None
        if letter.state == State.RESOLVED:
            raise LetterEnded(id, f"{id} is {letter.state}")
        after = letter._replace(state=State.DISCARDED, due_at=None, updated_at=at, version=letter.version + 1)
        log = Log(actor, "dead_letter.discarded", "dead_letter", id, _contents_of(letter), {"reason": reason})
        sealed = await seal(
            connection, WRITER, owners, blocks=[_changed([after])], messages=[], at=at, actor=actor,
            summary={"discarded": 1}, logs=[log],
        )  # fmt: skip
    return after, sealed


def _contents_of(letter: Letter) -> dict[str, Any]:
    """All that the event was, as the audit keeps it."""
    about = plain(letter)
    kept = {
        name: about[name] for name in ("topic", "stage", "code", "reason", "origin", "partition", "offset", "attempts")
    }
    contents = {
        name: None if raw is None else base64.b64encode(raw).decode()
        for name, raw in (("key", letter.key), ("value", letter.value))
    }
    return {**kept, **contents, "headers": letter.headers}


def _changed(letters: Sequence[Letter]) -> Block:
    names = [name for name, _ in DEAD_LETTERS.columns]
    places = [names.index(name) for name in DEAD_LETTERS.written(Op.UPDATE)]
    return block(DEAD_LETTERS, Op.UPDATE, [tuple(one[place] for place in places) for one in letters])


Counted = Callable[[Mapping[str, int] | None], None]
"""Is told how many letters are open, by class; None where another worker counts."""


class RedriveDeadLetters:
    """One in the deployment. `work` never returns."""

    def __init__(self, services: Services, counted: Counted, *, look_s: float = LOOK_S) -> None:
        self._writer = LoneWriter(WRITER, services, SILENCE_S)
        self._services = services
        self._counted = counted
        self._look_s = look_s

    async def work(self) -> None:
        await self._writer.rounds(self._work, self._failed, standing_by=lambda: self._counted(None))

    async def _work(self, connection: Connection) -> float:
        busy = await self.look(connection)
        self._counted(await open_by_class(connection))
        return 0.0 if busy else self._look_s

    def _failed(self, error: Exception) -> float:
        _log.warning("dead_letters.retry", error=type(error).__name__)
        return self._look_s

    async def look(self, connection: Connection) -> bool:
        """Redrives what is due, notes what is settled; whether there may be more."""
        now = self._services.clock()
        ids = [row[0] for row in await connection.fetch(_sql.due, now, AT_ONCE)]
        if ids:
            done = await redrive(connection, ids, WRITER, now)
            if done.sealed is not None:
                await tell(self._services, done.sealed)
            if done.refused:  # a stage that took it meanwhile; the letter is due no more
                await self._quiet(connection, {one.id for one in done.refused}, now)
        settled = {row[0] for row in await connection.fetch(_sql.settled, AT_ONCE)}
        if settled:
            await self._resolve(connection, settled, now)
        return AT_ONCE in (len(ids), len(settled)) or bool(ids and done.left)

    async def _resolve(self, connection: Connection, ids: set[str], at: datetime) -> None:
        def ended(letter: Letter) -> Letter | None:
            if letter.state != State.REDRIVEN:
                return None
            return letter._replace(state=State.RESOLVED, due_at=None, updated_at=at, version=letter.version + 1)

        await self._change(connection, ids, ended, at, "resolved")

    async def _quiet(self, connection: Connection, ids: set[str], at: datetime) -> None:
        def quiet(letter: Letter) -> Letter | None:
            if letter.state != State.OPEN or letter.due_at is None:
                return None
            return letter._replace(due_at=None, updated_at=at, version=letter.version + 1)

        await self._change(connection, ids, quiet, at, "left")

    async def _change(
        self, connection: Connection, ids: set[str], change: Callable[[Letter], Letter | None], at: datetime, what: str
    ) -> None:
        async with connection.transaction():
            owners = await lock_writer(connection, WRITER)
            changed = [new for old in (await lock(connection, ids)).values() if (new := change(old)) is not None]
            if not changed:
                return
            sealed = await seal(
                connection, WRITER, owners, blocks=[_changed(changed)], messages=[], at=at, actor=WRITER,
                summary={what: len(changed)},
            )  # fmt: skip
        await tell(self._services, sealed)


async def open_by_class(connection: Connection) -> dict[str, int]:
    found = dict.fromkeys((whose.value for whose in Whose), 0)
    for code, letters in await connection.fetch(_sql.open):
        found[nature(code).whose.value] += letters
    return found
