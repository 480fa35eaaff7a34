"""What the hash chain hashes: rows that are stored for ever must give the same hash in every later version."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from ledger.audit_logs import Cursor, Log
from ledger.checkpoint import BEGINNING, Checkpoint
from ledger.commit import link
from ledger.proof import ledger_blocks, ledger_digest, logs_digest

AT = datetime(2026, 7, 1, 12, 0, 0, 5, tzinfo=UTC)
TRANSACTIONS = [
    ("b" * 32, "deposit", 'ref,"}\\ NULL', "f" * 32, AT, "c" * 32, "capture", None, 7),
    ("a" * 32, "deposit", "", "0" * 32, AT, None, None, "d" * 32, 7),
]
ENTRIES = [
    ("2" * 32, 9, "b" * 32, 1, "c", 10**30, -(10**30), AT), ("1" * 32, 10, "b" * 32, 0, "d", 10**30, 10**30, AT),
    ("1" * 32, 9, "a" * 32, 0, "d", 1, 1, AT), ("2" * 32, 8, "a" * 32, 1, "c", 1, -1, AT),
]  # fmt: skip
LOG = Log("ann", "api_key.created", "api_key", "k1", after={"b": [1, True, None], "a": "é"}, address="::1")


def test_the_hash_of_ledger_rows_is_for_ever() -> None:
    digest = ledger_digest(ledger_blocks(TRANSACTIONS, ENTRIES))
    assert digest is not None
    assert digest.hex() == "0b771ed677ef82ce85ccf0fe8598c5fe4b01db10070a1972845545862055099a"
    assert digest == ledger_digest(ledger_blocks(TRANSACTIONS[::-1], ENTRIES[::-1])), "whatever order they came in"


def test_the_hash_of_logs_and_the_link_are_for_ever() -> None:
    digest = logs_digest([LOG.row(7, 0, AT), LOG.row(7, 1, AT)])
    assert digest is not None
    assert digest.hex() == "70588f4140e264b1905613bd7cefccf18ac43c4eaad732f3f88caed1c0393c4e"
    assert (
        link(b"h", b"d", AT, "ann", {"n": 1}, (7, digest, None)).hex()
        == "1598f88404169feada6097d845e2cd2ed6b1f98448c9ff15d0c46243b03fcc1a"
    )
    assert (
        link(b"h", b"d", AT, "ann", {"n": 1}, (None, None, None)).hex()
        == "83177361c664cbf7d1a16b81f1431607c1b1e58372a623f18c609fe5dac5b34d"
    )


def test_nothing_has_no_hash() -> None:
    assert ledger_digest(ledger_blocks([], [])) is None
    assert logs_digest([]) is None


def test_a_cursor_and_a_checkpoint_are_read_back() -> None:
    cursor = Cursor(AT, 7, 2)
    assert Cursor.parse(str(cursor)) == cursor
    checkpoint = Checkpoint(9, {("cli", "-", 0): (3, b"\x00\xff"), ("a", "t", 1): (1, b"")})
    assert Checkpoint.load(checkpoint.dump()) == checkpoint
    assert checkpoint != BEGINNING


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b'{"checkpoint": 2}', b'{"checkpoint": 1, "batch": 1, "owners": [1]}']
)
def test_what_is_no_checkpoint_is_said_to_be_none(text: bytes) -> None:
    with pytest.raises(ValueError, match="not a checkpoint"):
        Checkpoint.load(text)


@pytest.mark.parametrize("text", ["", "x", "MQ", "é"])
def test_what_is_no_cursor_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ValueError, match="not a cursor"):
        Cursor.parse(text)
