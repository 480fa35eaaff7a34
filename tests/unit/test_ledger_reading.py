"""Names of accounts, times and cursors: what is read from text, and what is refused."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.accounts import Account, AccountType
from ledger.errors import BadAccountName, BadCursor
from ledger.reading import AccountName, OwnerBalance, ReferenceCursor
from ledger.statement import Span, Statement, _places, _question
from stablerail.answers import format_time, parse_time

PRINTABLE = st.characters(min_codepoint=0x20, max_codepoint=0x7E)
OWNERS = st.text(PRINTABLE, min_size=1, max_size=30)
SHARDS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="[]"), max_size=9)
TIMES = st.none() | st.datetimes(timezones=st.just(UTC))
ADA = AccountName("ada", "usdc_balance", "USDC")


@given(OWNERS, st.sampled_from(AccountType), st.sampled_from(("USDC", "USD")), st.none() | SHARDS)
def test_a_name_is_read_as_it_is_written(owner: str, type_: str, asset: str, shard: str | None) -> None:
    name = AccountName(owner, type_, asset, shard)
    assert AccountName.parse(str(name)) == name


@given(OWNERS, SHARDS)
def test_the_ledgers_own_way_to_write_an_account_is_understood(owner: str, shard: str) -> None:
    account = Account(owner, AccountType.USDC_BALANCE, shard=shard)
    name = AccountName.parse(str(account))
    assert name == (owner, "usdc_balance", "USDC", shard or None)
    assert name.account() is account


@pytest.mark.parametrize(
    "text",
    [
        "", "ada", "ada.usdc_balance", ".usdc_balance:USDC", "ada.usdc_balance:", "ada.usdc_balance:usdc", "ada.:USDC",
        "ada.Usdc:USDC", "ada.usdc_balance[0:USDC", "ada.usdc_balance0]:USDC", "ada.usdc_balance[[0]]:USDC",
        "ada.usdc_balance[0]x:USDC", "ada.usdc_balance:USDC ", "ada.usdc_balance:USDC\n", "a\0da.usdc_balance:USDC",
        "ada.usdc_balance[\x1b]:USDC", "u" * 201 + ".usdc_balance:USDC", "\ud800.usdc_balance:USDC",
    ],
)  # fmt: skip
def test_what_names_no_account_is_refused_with_what_is_expected(text: str) -> None:
    with pytest.raises(BadAccountName, match=r"owner\.type:ASSET") as refusal:
        AccountName.parse(text)
    assert (refusal.value.code, refusal.value.name) == ("bad_account", text)


def test_a_customers_money_is_available_pending_or_neither_and_all_of_it_in_the_total() -> None:
    held = OwnerBalance("USDC", {"usdc_balance": 10, "pending_withdrawal": 5, "pending_investment": 2, "other": 1})
    assert (held.available, held.pending, held.total) == (10, 7, 18)


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-11-25", datetime(2026, 11, 25, tzinfo=UTC)),
        ("2026-11-25T14:00Z", datetime(2026, 11, 25, 14, tzinfo=UTC)),
        ("2026-11-25t14:00:01.5z", datetime(2026, 11, 25, 14, 0, 1, 500_000, tzinfo=UTC)),
        ("2026-11-25 14:00:00.000001+02:00", datetime(2026, 11, 25, 12, 0, 0, 1, tzinfo=UTC)),
    ],
)
def test_a_time_has_a_zone_or_is_a_date(text: str, time: datetime) -> None:
    assert parse_time(text) == time
    assert parse_time(format_time(time)) == time


@pytest.mark.parametrize(
    "text",
    ["", "now", "1763700000", "2026", "2026-11", "2026-13-01", "2026-02-30", "2026-11-25T14:00:00", "2026-11-25T25:00Z",
     "0001-01-01T00:00:00+10:00", "2026-11-25T14:00:00 02:00", "2026-11-25T14:00Z\n", 1763700000, None],
)  # fmt: skip
def test_a_time_that_could_be_another_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="RFC 3339 with a zone"):
        parse_time(text)


@given(st.datetimes(timezones=st.just(UTC)), st.uuids())
def test_the_cursor_of_a_reference_survives_its_text(at: datetime, transaction_id: UUID) -> None:
    cursor = ReferenceCursor(at, transaction_id)
    assert ReferenceCursor.parse(cursor.text()) == cursor


@given(TIMES, TIMES, st.lists(st.tuples(SHARDS, st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)), min_size=1))
def test_a_statements_cursor_belongs_to_one_account_and_period(
    since: datetime | None, until: datetime | None, parts: list[tuple[str, int, int, int]]
) -> None:
    spans = tuple(Span(UUID(int=0), shard, a, a + b, a + b + c) for shard, a, b, c in parts)
    text = Statement(ADA, since, until, spans, 0, 0, 0).cursor()
    assert text is not None
    assert _places(text, _question(ADA, since, until)) == [tuple(span[1:]) for span in spans]
    later = (until or since or datetime(2026, 1, 1, tzinfo=UTC)).replace(year=2027, month=1, day=1) + timedelta(hours=1)
    for question in (
        _question(ADA._replace(shard="0"), since, until),
        _question(ADA._replace(owner="bob"), since, until),
        _question(ADA, since, later if later != until else None),
    ):
        with pytest.raises(BadCursor):
            _places(text, question)


def test_a_statement_that_was_read_has_no_next_page() -> None:
    assert Statement(ADA, None, None, (Span(UUID(int=0), "", 3, 7, 7),), 0, 0, 0).cursor() is None


@pytest.mark.parametrize(
    "places",
    [None, [], {}, [1], [["", 0, 0]], [["", 1, 0, 2]], [["", 0, 3, 2]], [["", -1, 0, 2]], [["", 0, 0, 2**63]],
     [["", 0, 0, "2"]], [["\0", 0, 0, 2]], [[None, 0, 0, 2]], [["", 0.5, 1, 2]]],
)  # fmt: skip
def test_a_cursor_that_somebody_made_is_refused(places: object) -> None:
    question = _question(ADA, None, None)
    text = base64.urlsafe_b64encode(question + orjson.dumps(places)).decode().rstrip("=")
    for one in (text, text[:-1], text + "=", "ж", "", "a"):
        with pytest.raises(BadCursor):
            _places(one, question)
    with pytest.raises(BadCursor):
        ReferenceCursor.parse(text)
