"""/v1/admin/dlq: dead letters, redriven and discarded by hand. Scope `admin`; every act is in the audit."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Annotated, Any, Final, cast
from uuid import UUID

from fastapi import Depends, Path, Query, Request
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, ConfigDict, Field

from agents.recovery import redrive_dead_letters as letters
from agents.recovery.errors import LetterRefused
from agents.recovery.letters import Letter, State, headers_of, plain
from agents.recovery.redrive_dead_letters import AT_ONCE, Filter
from ledger.rows import Connection
from stablerail.answers import Answer
from stablerail.api import reads
from stablerail.api.auth import needs
from stablerail.api.models import Storable
from stablerail.api.routes import problem, router_of
from stablerail.keys import Key, Scope
from stablerail.problems import Problem
from topics.codes import Whose

_STATUS: Final = {"unknown_letter": 404, "not_redrivable": 409, "letter_ended": 409}
"""Of each refusal's code; 422 where it is not named."""
_BAD_CURSOR: Final = ("bad_cursor", "`after` is not a cursor of ours; take it from `next`.")
_UNKNOWN: Final = problem(404, "unknown_letter", "there is no dead letter with this id", "Not Found")
_CONFLICT: Final = problem(409, "not_redrivable", "its code says that the same event cannot be settled", "Conflict")
_ENDED: Final = problem(409, "letter_ended", "it is resolved", "Conflict")
_TEXT: Final = r"^[^\x00-\x1f\x7f]+$"

Caller = Annotated[Key, Depends(needs(Scope.ADMIN))]
LetterId = Annotated[UUID, Path(description="the letter's id", examples=["6f1c2f6f0d0c4c38a3c1f0c4a6a8d7e1"])]
router = router_of(Scope.ADMIN)


class DeadLetter(Answer):
    id: str = Field(examples=["6f1c2f6f0d0c4c38a3c1f0c4a6a8d7e1"])
    topic: str = Field(description="the dead-letter topic", examples=["deposits.notified.dlq"])
    stage: str = Field(description="who refused it; of a webhook the vendor", examples=["credit_deposits"])
    code: str = Field(description="why: a stable code", examples=["unknown_wallet"])
    whose: Whose = Field(alias="class", description="who has to do something about it")
    reason: str
    state: State
    redrivable: bool = Field(description="whether sending it again can help")
    origin: str | None = Field(description="the topic that it goes to again; null: it was a webhook")
    partition: int | None
    offset: int | None
    attempts: int
    redrives: int
    due_at: datetime | None = Field(description="when it is redriven by itself")
    first_at: datetime
    last_at: datetime = Field(description="when it was refused last")
    code_version: str = Field(description="the release that refused it")


class DeadLetterContents(DeadLetter):
    key: str | None = Field(description="base64")
    value: str | None = Field(description="base64: the bytes as they came")
    headers: list[tuple[str, str | None]] = Field(description="text, or hex behind 0x")


class DeadLetters(Answer):
    dead_letters: list[DeadLetter]
    next: str | None = Field(description="pass it as `after` for the next page; null: there is none")


class RedriveOrder(Answer):
    """Which letters. A field that it does not know is refused: a filter that was misspelt would be none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    topic: Storable | None = Field(None, description="only of this topic", max_length=200)
    code: Storable | None = Field(None, description="only with this code", max_length=200)


class Redriven(Answer):
    redriven: list[str] = Field(description="ids; at most 100, ask again for more")


def _in_utc(time: datetime) -> datetime:
    try:
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except OverflowError:
        raise ValueError("a time is in the years 1 to 9999 of UTC") from None


Since = Annotated[datetime, AfterValidator(_in_utc)]


def _now() -> datetime:
    return datetime.now(UTC)


async def on_letter_refused(_request: Request, error: Exception) -> JSONResponse:
    """What cannot be done to a letter, as a problem with the refusal's own code."""
    assert isinstance(error, LetterRefused)
    return Problem(_STATUS.get(error.code, 422), error.code, str(error)).response()


def _cursor(text: str | None) -> tuple[datetime, str] | None:
    try:
        return None if text is None else letters.place(text)
    except ValueError:
        raise Problem(400, *_BAD_CURSOR) from None


@router.get(
    "/admin/dlq", tags=["dead letters"], summary="Dead letters, last refused first",
    responses=problem(400, *_BAD_CURSOR, "Bad Request"),
)  # fmt: skip
async def list_dead_letters(
    request: Request,
    topic: Annotated[str | None, Query(description="with or without `.dlq`", max_length=200, pattern=_TEXT)] = None,
    code: Annotated[str | None, Query(description="only with this code", max_length=200, pattern=_TEXT)] = None,
    whose: Annotated[Whose | None, Query(alias="class", description="only of this class")] = None,
    state: Annotated[State | None, Query(description="only in this state")] = None,
    since: Annotated[Since | None, Query(description="refused at or after it")] = None,
    after: Annotated[str | None, Query(description="the `next` of the page before", max_length=100)] = None,
    limit: Annotated[int, Query(description="letters on a page", ge=1, le=200)] = 50,
) -> DeadLetters:
    """Without their contents. Pass `next` as `after`, with the same filters, for the next page."""
    place = _cursor(after)
    wanted = Filter(topic, code, whose, None if state is None else (state,), since)
    async with reads.snapshot(request.app.state.pool) as connection:
        found = await letters.page(cast(Connection, connection), wanted, limit + 1, place)
    shown = [DeadLetter(**plain(letter)) for letter in found[:limit]]
    return DeadLetters(dead_letters=shown, next=letters.place_of(found[limit - 1]) if len(found) > limit else None)


@router.get(
    "/admin/dlq/{letter_id}", tags=["dead letters"], summary="A dead letter with its contents", responses=_UNKNOWN
)
async def read_dead_letter(request: Request, letter_id: LetterId) -> DeadLetterContents:
    """The bytes, key and headers as they came."""
    async with reads.snapshot(request.app.state.pool) as connection:
        return _contents(await letters.find(cast(Connection, connection), letter_id.hex))


@router.post(
    "/admin/dlq/redrive",
    status_code=202,
    tags=["dead letters"],
    summary="Redrive what redriving can help",
)
async def redrive_eligible(request: Request, order: RedriveOrder, caller: Caller) -> Redriven:
    """The open letters whose code says that it can help, those refused last first. Doing it twice settles nothing twice."""
    journal = request.app.state.journal
    journal.check()
    async with request.app.state.pool.acquire(timeout=reads.ACQUIRE_TIMEOUT_S) as connection:
        found = await letters.eligible(connection, Filter(order.topic, order.code, states=(State.OPEN,)), AT_ONCE)
        done = await letters.redrive(connection, [one.id for one in found], _actor(caller), _now())
    await journal.take(done.sealed)
    return Redriven(redriven=[one.id for one in done.sent])


@router.post(
    "/admin/dlq/{letter_id}/redrive", status_code=202, tags=["dead letters"], summary="Redrive a dead letter",
    responses={**_UNKNOWN, **_CONFLICT},
)  # fmt: skip
async def redrive_dead_letter(
    request: Request,
    letter_id: LetterId,
    caller: Caller,
    force: Annotated[bool, Query(description="also where its code says that it cannot help")] = False,
) -> DeadLetter:
    """Its event goes to its topic again as it came, with its id. What was settled meanwhile is not settled again."""
    journal = request.app.state.journal
    journal.check()
    async with request.app.state.pool.acquire(timeout=reads.ACQUIRE_TIMEOUT_S) as connection:
        done = await letters.redrive(connection, [letter_id.hex], _actor(caller), _now(), force=force)
    if done.refused:
        raise done.refused[0]
    await journal.take(done.sealed)
    return DeadLetter(**plain(done.sent[0]))


@router.delete(
    "/admin/dlq/{letter_id}", tags=["dead letters"], summary="Discard a dead letter", responses={**_UNKNOWN, **_ENDED}
)
async def discard_dead_letter(
    request: Request,
    letter_id: LetterId,
    caller: Caller,
    reason: Annotated[str, Query(description="why, for the audit", min_length=1, max_length=500, pattern=_TEXT)],
) -> DeadLetter:
    """It is not redriven any more; the audit keeps its bytes and the reason."""
    journal = request.app.state.journal
    journal.check()
    async with request.app.state.pool.acquire(timeout=reads.ACQUIRE_TIMEOUT_S) as connection:
        letter, sealed = await letters.discard(connection, letter_id.hex, reason, _actor(caller), _now())
    await journal.take(sealed)
    return DeadLetter(**plain(letter))


def _contents(letter: Letter) -> DeadLetterContents:
    fields: dict[str, Any] = plain(letter)
    for name, raw in (("key", letter.key), ("value", letter.value)):
        fields[name] = None if raw is None else base64.b64encode(raw).decode()
    return DeadLetterContents(**fields, headers=headers_of(letter))


def _actor(key: Key) -> str:
    return f"key:{key.id}"
