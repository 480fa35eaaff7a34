"""A dead letter as a row: what was refused, why, and what became of it. Pure.

    open ──redrive──▶ redriven ──(its stage settled it)──▶ resolved
      ▲                  │
      └──(refused again)─┘          open | redriven ──discard──▶ discarded

One row for an event, however often it is refused: its id is made of the stage and of the event as the inbox knows it. A
message that could not be read is known by its bytes and where they stood first, which a redriven one carries in a header.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, NamedTuple

from agents.dead_letters import LETTER, PREFIX, REASON_LENGTH_MAX
from agents.item import position_uid
from agents.transport import Record
from ledger.record import Message
from topics import catalog
from topics.codes import nature
from topics.envelope import ATTEMPT_MAX, read, with_attempt
from topics.errors import EventRefused

REDRIVES_MAX: Final = 8
"""By themselves: after 1, 2, 4, 8, 16, 32 and twice 60 minutes; then people look."""
WAIT_MAX: Final = timedelta(hours=1)
_TEXT_MAX: Final = 200
_UID: Final = re.compile("[0-9a-f]{32}").fullmatch
_INT_MAX: Final = 2**31 - 1


class State(StrEnum):
    OPEN = "open"
    REDRIVEN = "redriven"
    """Sent again, and not refused since."""
    RESOLVED = "resolved"
    """Its stage has settled it."""
    DISCARDED = "discarded"


class Letter(NamedTuple):
    """A row of `dead_letters`."""

    id: str
    topic: str
    """The dead-letter topic."""
    stage: str
    event_id: str | None
    """As the inbox knows it; None where the message has no such id."""
    code: str
    reason: str
    origin: str | None
    """The topic that it came from; None: it was no event of ours (a webhook)."""
    partition: int | None
    position: int | None
    """Offset, of where it stood when it was refused last."""
    key: bytes | None
    value: bytes | None
    headers: list[list[str | None]]
    """As they came, in hex: a header may hold any bytes."""
    attempts: int
    code_version: str
    state: str
    redrives: int
    due_at: datetime | None
    """When it is redriven by itself."""
    first_at: datetime
    last_at: datetime
    updated_at: datetime
    version: int
    events: Sequence[str] = ()
    """Further ids by which the inbox knows it: it stood elsewhere when it was redriven, or could be read since."""


def letter_of(record: Record, topic: str, at: datetime) -> tuple[Letter, str | None]:
    """A record of the dead-letter topic (`topic`, without prefix) as a new letter, and the id of the letter that its message was
    redriven as. Total: no bytes make it raise."""
    said = {name: value or b"" for name, value in record.headers if name.startswith(PREFIX)}
    plain = {name: value or b"" for name, value in record.headers if not name.startswith(PREFIX)}
    is_webhook = topic == catalog.WEBHOOKS_DLQ.name
    found = plain if is_webhook else {name.removeprefix(PREFIX): value for name, value in said.items()}
    stage = _text(found.get("vendor" if is_webhook else "stage", b"")) or "-"
    event_id = _uid(found.get("event", b""))
    origin = _text(found.get("topic", b"")) or None
    if is_webhook or origin is None or f"{origin}.dlq" != topic:
        origin = None if is_webhook else topic.removesuffix(".dlq")
    here = position_uid(record)
    item = _text(found.get("item", b""))
    own = _hashed(stage, event_id or here, item)
    last_at = _time(found.get("received_at" if is_webhook else "last_at"), at)
    letter = Letter(
        id=own, topic=topic, stage=stage, event_id=event_id,
        code=_text(found.get("code", b"")) or "-", reason=_text(found.get("reason", b""), REASON_LENGTH_MAX),
        origin=origin, partition=_number(found.get("partition")), position=_number(found.get("offset"), 2**63 - 1),
        key=record.key, value=record.value,
        headers=[
            [name.encode(errors="surrogateescape").hex(), None if value is None else value.hex()]
            for name, value in record.headers
            if is_webhook or not name.startswith(PREFIX)
        ],
        attempts=_number(found.get("attempts")) or 1, code_version=_text(found.get("code_version", b"")),
        state=State.OPEN, redrives=0, due_at=None, first_at=_time(found.get("first_at"), last_at), last_at=last_at,
        updated_at=at, version=1,
    )  # fmt: skip
    return letter, _uid(said.get(LETTER, b""))


def id_by_position(letter: Letter, record: Record) -> str:
    """Where another letter has its id: the event's was used with other contents."""
    return _hashed(letter.stage, position_uid(record), "")


def refused_again(known: Letter, now: Letter, at: datetime) -> Letter:
    """A letter that is there, refused once more."""
    return with_event(known, now.event_id)._replace(
        code=now.code, reason=now.reason, partition=now.partition, position=now.position,
        attempts=max(known.attempts, now.attempts), code_version=now.code_version,
        state=State.DISCARDED if known.state == State.DISCARDED else State.OPEN,
        last_at=max(known.last_at, now.last_at), updated_at=at, version=known.version + 1,
    )  # fmt: skip


def with_event(letter: Letter, event_id: str | None) -> Letter:
    """One that the inbox may know by this id too."""
    if event_id is None or event_id == letter.event_id or event_id in letter.events:
        return letter
    return letter._replace(events=[*letter.events, event_id])


def readable_as(letter: Letter) -> str | None:
    """The id that its event has to this release; None: it cannot be read."""
    assert letter.origin is not None
    try:
        return read(catalog.by_name(letter.origin), letter.value, sent_headers(letter)).uid
    except (EventRefused, KeyError):
        return None


def waiting(letter: Letter) -> Letter:
    """With the time of its next redriving by itself, where time heals its code."""
    heals = letter.state == State.OPEN and nature(letter.code).heals and letter.redrives < REDRIVES_MAX
    wait = min(timedelta(minutes=2**letter.redrives), WAIT_MAX)
    return letter._replace(due_at=letter.updated_at + wait if heals and letter.origin else None)


def again(letter: Letter) -> Message:
    """The event as it came, to be settled once more: its stage takes a higher attempt of what it refused."""
    assert letter.origin is not None
    again = with_attempt(sent_headers(letter), min(letter.attempts + 1, ATTEMPT_MAX))
    return Message(letter.origin, letter.key, letter.value, headers=[*again, (LETTER, letter.id.encode())])


def sent_headers(letter: Letter) -> list[tuple[str, bytes | None]]:
    return [
        (bytes.fromhex(name or "").decode(errors="surrogateescape"), None if value is None else bytes.fromhex(value))
        for name, value in letter.headers
    ]


def bytes_of(letter: Letter) -> int:
    """What it takes in a message."""
    return catalog.bytes_of(letter.key, letter.value, sent_headers(letter))


def plain(letter: Letter) -> dict[str, Any]:
    """What people and programs are shown, contents apart. JSON-able but for the times."""
    about = nature(letter.code)
    return {
        "id": letter.id, "topic": letter.topic, "stage": letter.stage, "code": letter.code, "class": about.whose.value,
        "reason": letter.reason, "state": letter.state, "redrivable": about.redrivable and letter.origin is not None,
        "origin": letter.origin, "partition": letter.partition, "offset": letter.position, "attempts": letter.attempts,
        "redrives": letter.redrives, "due_at": letter.due_at, "first_at": letter.first_at, "last_at": letter.last_at,
        "code_version": letter.code_version,
    }  # fmt: skip


def headers_of(letter: Letter) -> list[tuple[str, str | None]]:
    """The headers as text, where they are text."""
    return [(shown(bytes.fromhex(name or "")), None if value is None else shown(bytes.fromhex(value))) for name, value in letter.headers]  # fmt: skip


def shown(raw: bytes) -> str:
    """Bytes for people: text where they are text, else hex."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return "0x" + raw.hex()
    return text if text.translate(_BLANKS).isprintable() else "0x" + raw.hex()


_BLANKS: Final[Mapping[int, str]] = dict.fromkeys(map(ord, "\n\r\t"), " ")


def _hashed(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16, person=b"letter").hexdigest()


def _text(raw: bytes, length_max: int = _TEXT_MAX) -> str:
    """What PostgreSQL and a terminal take of it."""
    return raw.decode(errors="replace").replace("\0", "\ufffd")[:length_max]


def _uid(raw: bytes) -> str | None:
    text = raw.decode(errors="replace")
    return text if _UID(text) else None


def _number(raw: bytes | None, highest: int = _INT_MAX) -> int | None:
    if raw is None or not raw.isdigit() or len(raw) > 19 or int(raw) > highest:
        return None
    return int(raw)


def _time(raw: bytes | None, other: datetime) -> datetime:
    """What is no time of ours (a producer may have chosen one before every calendar) is `other`."""
    try:
        found = datetime.fromisoformat((raw or b"").decode()).astimezone(UTC)
    except (ValueError, OverflowError):
        return other
    return found if 1970 <= found.year < 9999 else other
