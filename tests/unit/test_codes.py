"""Every code that a dead letter may have is declared, with whose affair it is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from hypothesis import given
from hypothesis import strategies as st

from agents.outcome import Done
from agents.recovery.letters import Letter, State, again, letter_of, plain, waiting
from agents.recovery.store_dead_letters import Facts, decide, fold, read
from agents.transport import Record
from chain.errors import ChainError
from connectors.errors import ConnectorCode
from ledger.errors import PostingRefused
from topics.catalog import DEPOSITS_NOTIFIED, WEBHOOKS_DLQ
from topics.codes import CODES, Whose, nature
from topics.envelope import Received
from topics.errors import EventCode

ROOT: Final = Path(__file__).parents[2]
REFUSALS: Final = {"Rejected", "NotUnderstood"}
TRANSFER_CODES: Final = {"unknown_chain", "bad_address", "bad_tx_hash"}
"""Of the chain's errors those that an event can be refused with; the others are of nodes and keys."""


def _trees() -> Iterator[ast.Module]:
    for package in ("agents", "connectors", "ledger"):
        for path in (ROOT / package).rglob("*.py"):
            yield ast.parse(path.read_text())


def _constants() -> dict[str, set[str]]:
    """Name -> what it stands for, of everything that looks like a code."""
    found: dict[str, set[str]] = {}
    for tree in _trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Constant):
                continue
            text = node.value.value
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name) and target.id.isupper() and re.fullmatch("[a-z_]+", str(text)):
                    found.setdefault(target.id, set()).add(text)
    return found


def _said() -> set[str]:
    """Codes that are written where something is refused."""
    constants, found = _constants(), set()
    for tree in _trees():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REFUSALS):
                continue
            first = node.args[0]
            if isinstance(first, ast.Constant):
                found.add(first.value)
            name = first.id if isinstance(first, ast.Name) else first.attr if isinstance(first, ast.Attribute) else ""
            found |= constants.get(name, set())
    return found


def _kinds(kind: type[Exception]) -> Iterator[type[Exception]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _kinds(child)


def test_every_code_of_a_refusal_is_declared() -> None:
    said = _said()
    assert {"unknown_wallet", "bug", "wallet_missing", "event_id_reused", "unknown_type"} <= said
    said |= {code.value for code in EventCode}
    said |= {kind.code for kind in _kinds(PostingRefused)} - {"posting_refused"}  # type: ignore[attr-defined]
    said |= {kind.code for kind in _kinds(ChainError)} & TRANSFER_CODES  # type: ignore[attr-defined]
    said |= {code.value for code in ConnectorCode} & {name for name in CODES if name.startswith("partner_")}
    assert said - CODES.keys() == set()


def test_what_time_heals_can_be_redriven_and_a_code_of_another_release_is_ours() -> None:
    assert [name for name, code in CODES.items() if code.heals and not code.redrivable] == []
    assert nature("of_next_year").whose is Whose.OURS
    assert nature("of_next_year").redrivable
    assert all(code.meaning for code in CODES.values())


class Raw:
    """A record of a dead-letter topic."""

    def __init__(self, value: bytes | None, key: bytes | None, headers: list[tuple[str, bytes | None]]) -> None:
        self.topic, self.partition, self.offset, self.timestamp = "p.deposits.notified.dlq", 0, 7, 0
        self.value, self.key, self.headers = value, key, headers
        self.serialized_key_size = self.serialized_value_size = 0


_names = st.sampled_from(
    [f"dlq_{n}" for n in ("stage", "event", "code", "reason", "topic", "partition", "offset", "attempts", "first_at")]
    + ["dlq_last_at", "dlq_letter", "dlq_item", "vendor", "received_at", "attempt", "ce_id"]
) | st.text(max_size=20)
_values = st.binary(max_size=40) | st.none() | st.text(max_size=40).map(str.encode) | st.just(b"9" * 30)


@given(
    st.none() | st.binary(max_size=50),
    st.none() | st.binary(max_size=10),
    st.lists(st.tuples(_names, _values), max_size=8),
    st.sampled_from([DEPOSITS_NOTIFIED.dlq.name, WEBHOOKS_DLQ.name]),
)
def test_any_bytes_are_a_letter_and_what_came_goes_out_again(
    value: bytes | None, key: bytes | None, headers: list[tuple[str, bytes | None]], topic: str
) -> None:
    record: Record = Raw(value, key, headers)  # type: ignore[assignment]
    letter, _ = letter_of(record, topic, datetime(2026, 1, 1, tzinfo=UTC))
    assert "\0" not in f"{letter.stage}{letter.code}{letter.reason}{letter.code_version}"
    assert plain(letter)["class"] in {whose.value for whose in Whose}
    assert waiting(letter).state == State.OPEN
    if letter.origin is None:
        return
    message = again(letter)
    assert (message.topic, message.key, message.value) == ("deposits.notified", key, value)
    kept = [(n, v) for n, v in headers if not n.startswith("dlq_") and n != "attempt"]
    assert message.headers is not None
    assert list(message.headers)[: len(kept)] == kept
    assert [n for n, _ in message.headers][len(kept) :] == ["attempt", "dlq_letter"]


def test_a_letter_waits_longer_each_time_and_then_for_people() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    record: Record = Raw(b"{}", b"k", [("dlq_stage", b"s"), ("dlq_code", b"unknown_wallet")])  # type: ignore[assignment]
    letter: Letter = letter_of(record, DEPOSITS_NOTIFIED.dlq.name, now)[0]
    waits = []
    for redrives in range(10):
        due = waiting(letter._replace(redrives=redrives)).due_at
        waits.append(None if due is None else (due - now).total_seconds() / 60)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, None, None]
    assert waiting(letter._replace(code="bad_address")).due_at is None


def test_each_of_several_stages_that_refuse_a_redriven_message_has_a_letter_of_its_own() -> None:
    """Three stages read a topic; the header names the letter of one of them."""
    topic = DEPOSITS_NOTIFIED.dlq.name
    facts = Facts(datetime(2026, 1, 1, tzinfo=UTC))

    def refuse(stage: str, offset: int, said: str | None = None, value: bytes = b"{}") -> str:
        about = {"stage": stage, "event": "e" * 32, "code": "bug", "partition": "0", "offset": str(offset)}
        headers: list[tuple[str, bytes | None]] = [(f"dlq_{name}", text.encode()) for name, text in about.items()]
        raw: Any = Raw(value, b"k", headers if said is None else [("dlq_letter", said.encode()), *headers])
        raw.offset = offset
        done = decide(Received(str(offset), "kafka", read(topic, raw), 1, None), facts)
        assert isinstance(done, Done)
        fold(facts, done)
        ((_, row),) = (*done.inserts, *done.updates)
        return str(row[0])

    one, other = refuse("one", 1), refuse("other", 1)
    assert one != other
    assert refuse("one", 2, said=one) == one
    assert refuse("other", 2, said=one) == other, "refused again by a stage that was not redriven"
    assert len({one, refuse("one", 3, said=one, value=b"forged"), refuse("third", 3, said=one)}) == 3
    assert facts.letters[one].value == b"{}"
