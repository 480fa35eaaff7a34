"""Whether a withdrawal may be made as it was asked for: each rule, and that no wish makes the decision fail."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.outcome import Done, Outcome, Rejected
from agents.withdrawals import accept_withdrawals
from agents.withdrawals.accept_withdrawals import Facts, decide, fold
from agents.withdrawals.limits import WithdrawalPolicy, taken_back
from agents.withdrawals.withdrawal import Withdrawal, asked, released
from ledger.counters import Count
from ledger.errors import (
    AmountOutOfRange,
    ClosedAccount,
    InsufficientFunds,
    LimitExceeded,
    PostingRefused,
    TransactionReused,
)
from ledger.tables import WITHDRAWAL_HISTORY, WITHDRAWALS
from topics.envelope import Received
from topics.events import WithdrawalAccepted, WithdrawalRequested, WithdrawalSettled
from topics.money import SCALE

NOW = datetime(2026, 7, 1, 23, 59, tzinfo=UTC)
TOKEN = "0x41e94eb019c0762f9bfcf9fb1e58725bfb0e7582"
OUTSIDE = "0x5b38da6a701c568545dcfcb03fcb875f56beddc4"
OUTSIDE_MIXED = "0x5B38Da6a701c568545dCfcB03FcB875f56beddC4"
OWN = "0x" + "17" * 20
DENIED = "0x" + "66" * 20
POLICY = WithdrawalPolicy(
    {"MATIC": TOKEN}, minimum=SCALE, maximum=100 * SCALE, user_day=150 * SCALE, network_day=1_000 * SCALE
)


def facts(**limits: int) -> Facts:
    set_ = {f"withdrawal.{name.replace('_MATIC', '.MATIC')}": value for name, value in limits.items()}
    known = {**POLICY.limits(POLICY.tokens), **set_}
    return Facts(NOW, POLICY, known, frozenset({OWN}), frozenset({DENIED}), frozen=frozenset({"frozen"}))


def event(**fields: Any) -> WithdrawalRequested:
    wish = {
        "user_id": "ada",
        "idempotency_key": "k1",
        "chain": "MATIC",
        "asset": "USDC",
        "amount": "25.00",
        "to": OUTSIDE,
    }
    return WithdrawalRequested(**{**wish, **fields})


def ask(known: Facts, **fields: Any) -> Outcome:
    wish = event(**fields)
    return decide(Received(wish.identity(), "external", wish, 1, None), known)


def rows(done: Outcome) -> tuple[Withdrawal, list[tuple[Any, ...]]]:
    """The withdrawal's row and the lines of its history."""
    assert isinstance(done, Done)
    written = [*done.inserts, *done.upserts]
    (row,) = [Withdrawal(*row) for table, row in written if table is WITHDRAWALS]
    return row, [row for table, row in written if table is WITHDRAWAL_HISTORY]


def told(done: Outcome) -> Any:
    assert isinstance(done, Done)
    (emit,) = done.emits
    assert type(emit.event).model_validate_json(emit.event.model_dump_json()) == emit.event
    return emit.event


REFUSED: list[tuple[str, dict[str, str]]] = [
    ("frozen_customer", {"user_id": "frozen"}),
    ("unsupported_rail", {"rail": "circle"}),
    ("unsupported_rail", {"rail": "pigeon"}),
    ("unsupported_network", {"chain": "DOGE"}),
    ("unsupported_network", {"chain": "matic"}),
    ("unsupported_network", {"chain": "ETH"}),
    ("unsupported_token", {"asset": "POL"}),
    ("unsupported_token", {"asset": "MATIC"}),
    ("unsupported_token", {"asset": "usdc"}),
    ("bad_amount", {"amount": "0"}),
    ("bad_amount", {"amount": "0.000000"}),
    ("bad_amount", {"amount": "-5"}),
    ("bad_amount", {"amount": "1e3"}),
    ("bad_amount", {"amount": "1,5"}),
    ("bad_amount", {"amount": "9" * 40}),
    ("bad_amount", {"amount": "٣"}),
    ("too_many_decimals", {"amount": "5.0000001"}),
    ("too_many_decimals", {"amount": "5.0000000"}),
    ("bad_address", {"to": "0x" + "34" * 19}),
    ("bad_address", {"to": OUTSIDE_MIXED.replace("B", "b", 1)}),
    ("bad_address", {"to": "alice.eth"}),
    ("zero_address", {"to": "0x" + "0" * 40}),
    ("token_contract", {"to": TOKEN}),
    ("own_wallet", {"to": OWN}),
    ("denied_address", {"to": DENIED}),
    ("below_minimum", {"amount": "0.999999"}),
    ("above_maximum", {"amount": "100.000001"}),
]


@pytest.mark.parametrize(("code", "wish"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_customers_mistake_is_an_answer_with_its_code(code: str, wish: dict[str, str]) -> None:
    outcome = ask(facts(), **wish)
    row, history = rows(outcome)
    assert (row.status, row.code, row.hold_id, row.settled_at) == ("failed", code, None, NOW)
    assert [line[1:4] for line in history] == [(1, "pending", None), (2, "failed", code)]
    answer = told(outcome)
    assert isinstance(answer, WithdrawalSettled)
    as_asked = event(**wish)
    assert (answer.outcome, answer.code, answer.withdrawal_id) == ("failed", code, row.id)
    assert [getattr(answer, name) for name in ("rail", "chain", "asset", "amount", "to")] == [
        getattr(as_asked, name) for name in ("rail", "chain", "asset", "amount", "to")
    ]
    assert isinstance(outcome, Done)
    assert outcome.postings == ()


SOLANA = "9WzDXwBbmkg8ZTbNMqUxvQRAyrZzDsGYdLVL9zYtAWWM"
APTOS = "0x" + "6f" * 32
BY_CIRCLE = dict.fromkeys(("ETH", "SOL", "APTOS", "AVAX")) | {"MATIC": TOKEN}


@pytest.mark.parametrize(
    ("chain", "to", "end"),
    [
        ("MATIC", OUTSIDE_MIXED, OUTSIDE), ("ETH", OUTSIDE, OUTSIDE), ("AVAX", OUTSIDE_MIXED, OUTSIDE), ("SOL", SOLANA, SOLANA),
        ("APTOS", APTOS, APTOS), ("MATIC", SOLANA, "bad_address"), ("ETH", OUTSIDE_MIXED.replace("B", "b", 1), "bad_address"),
        ("AVAX", APTOS, "bad_address"), ("SOL", OUTSIDE, "bad_address"), ("SOL", SOLANA[:-3], "bad_address"),
        ("SOL", SOLANA.replace("W", "0"), "bad_address"), ("APTOS", OUTSIDE, "bad_address"), ("APTOS", "0x1", "bad_address"),
        ("APTOS", APTOS.upper(), "bad_address"), ("SOL", "1" * 32, "zero_address"), ("APTOS", "0x" + "0" * 64, "zero_address"),
        ("ETH", "0x" + "0" * 40, "zero_address"), ("MATIC", TOKEN, "token_contract"), ("ETH", OWN, "own_wallet"),
        ("DOGE", OUTSIDE, "unsupported_network"),
    ],
)  # fmt: skip
def test_circle_sends_to_addresses_of_each_chains_own_rules(chain: str, to: str, end: str) -> None:
    policy = replace(POLICY, tokens={}, custodian=BY_CIRCLE)
    known = replace(facts(), policy=policy, limits=policy.limits(policy.chains))
    assert ask(known, rail="chain", chain=chain, to=to) != ask(known, rail="circle", chain=chain, to=to)
    row, _ = rows(ask(known, rail="circle", chain=chain, to=to))
    assert end in ((row.recipient,) if row.status == "signing" else (row.code,))


def test_every_code_of_the_table_is_refused_by_a_test() -> None:
    table = [line.split("|")[1] for line in (accept_withdrawals.__doc__ or "").splitlines() if line.startswith("| ")]
    documented = {code.strip() for cell in table[2:] for code in cell.split(",")}
    ledgers = {"insufficient_funds", "closed_account", "user_day_limit", "network_day_limit"}
    assert documented == {code for code, _ in REFUSED} | ledgers


@pytest.mark.parametrize("to", [OUTSIDE, OUTSIDE_MIXED, "0x" + OUTSIDE[2:].upper()])
def test_what_may_be_made_is_held_and_goes_to_the_canonical_address(to: str) -> None:
    outcome = ask(facts(), to=to)
    row, history = rows(outcome)
    assert (row.status, row.amount, row.recipient, row.version) == ("signing", 25 * SCALE, OUTSIDE, 2)
    assert [line[2] for line in history] == ["pending", "signing"]
    assert isinstance(outcome, Done)
    (hold,) = outcome.postings
    assert hold.id == row.hold_id
    assert hold.counts == (
        Count("withdrawn 2026-07-01 user ada", 25 * SCALE, 150 * SCALE),
        Count("withdrawn 2026-07-01 network MATIC", 25 * SCALE, 1_000 * SCALE),
    )
    answer = told(outcome)
    assert isinstance(answer, WithdrawalAccepted)
    assert (answer.to, answer.amount, answer.withdrawal_id) == (OUTSIDE, 25 * SCALE, row.id)
    assert [(emit.topic.name, emit.key) for emit in outcome.emits] == [("withdrawals.accepted", "MATIC")]


def test_what_was_held_and_is_released_counts_no_more_whatever_day_it_is_then() -> None:
    row, _ = rows(ask(facts()))
    counts = taken_back("ada", "MATIC", 25 * SCALE, NOW)
    assert released(row._replace(updated_at=NOW + timedelta(days=3))).counts == counts
    assert {count.counter: count.change for count in counts} == {
        "withdrawn 2026-07-01 user ada": -25 * SCALE,
        "withdrawn 2026-07-01 network MATIC": -25 * SCALE,
    }


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (InsufficientFunds("ada", 1, 2), "insufficient_funds"),
        (ClosedAccount("ada", NOW), "closed_account"),
        (LimitExceeded("withdrawn 2026-07-01 user network MATIC", 1, 2, 2), "user_day_limit"),
        (LimitExceeded("withdrawn 2026-07-01 network MATIC", 1, 2, 2), "network_day_limit"),
    ],
)
def test_a_refused_hold_is_an_answer_too(refusal: PostingRefused, code: str) -> None:
    outcome = ask(facts())
    assert isinstance(outcome, Done)
    assert callable(outcome.if_refused)
    answered = outcome.if_refused(refusal)
    row, history = rows(answered)
    assert (row.status, row.code, row.hold_id, row.recipient) == ("failed", code, None, OUTSIDE)
    assert [line[2] for line in history] == ["pending", "failed"]
    assert told(answered).code == code


@pytest.mark.parametrize("refusal", [TransactionReused("1", "2", "3"), AmountOutOfRange(1, 0)])
def test_a_refused_hold_that_no_customer_can_cause_is_a_dead_letter(refusal: PostingRefused) -> None:
    outcome = ask(facts())
    assert isinstance(outcome, Done)
    assert callable(outcome.if_refused)
    assert outcome.if_refused(refusal) == Rejected(refusal.code, str(refusal))


def test_limits_that_people_set_go_before_the_settings() -> None:
    strict = facts(min_MATIC=30 * SCALE)
    assert rows(ask(strict))[0].code == "below_minimum"
    assert rows(ask(facts(max_MATIC=24 * SCALE)))[0].code == "above_maximum"
    outcome = ask(facts(user_day=7, network_day_MATIC=8))
    assert isinstance(outcome, Done)
    assert [count.limit for count in outcome.postings[0].counts] == [7, 8]


def test_a_request_that_was_stored_before_is_decided_once_and_never_for_other_contents() -> None:
    known = facts()
    pending = asked(event(), NOW - timedelta(hours=1))
    known.withdrawals[pending.id] = pending
    outcome = ask(known)
    assert isinstance(outcome, Done)
    assert [table.name for table, _ in outcome.inserts] == ["withdrawal_history"]
    assert rows(outcome)[0].requested_at == pending.requested_at
    fold(known, outcome)
    assert ask(known) == Done()
    other = ask(known, to="0x" + "55" * 20)
    assert isinstance(other, Rejected)
    assert other.code == "idempotency_key_reused"
    assert isinstance(ask(known, idempotency_key="k2"), Done)


def test_nobody_withdraws_the_companys_own() -> None:
    outcome = ask(facts(), user_id="system")
    assert isinstance(outcome, Rejected)
    assert outcome.code == "reserved_user"


def test_two_customers_whose_names_run_together_ask_for_two_withdrawals() -> None:
    one, other = event(user_id="a:b", idempotency_key="c"), event(user_id="a", idempotency_key="b:c")
    assert one.identity() != other.identity()
    assert asked(one, NOW).id != asked(other, NOW).id


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=200)


@given(
    chain=WORDS | st.just("MATIC"), asset=WORDS | st.just("USDC"), amount=WORDS | st.just("5"),
    to=WORDS | st.just(OUTSIDE), rail=WORDS | st.just("chain"),
)  # fmt: skip
def test_whatever_is_asked_for_is_accepted_or_refused_with_a_code(**wish: str) -> None:
    row, _ = rows(ask(facts(), **wish))
    assert (row.status == "signing") == (row.code is None)
    told(ask(facts(), **wish))


def test_no_limit_lacks_a_chain_that_withdrawals_leave_by() -> None:
    policy = replace(POLICY, tokens={"MATIC": TOKEN, "ETH": TOKEN})
    assert sorted(policy.limits(policy.tokens)) == [
        "withdrawal.max.ETH", "withdrawal.max.MATIC", "withdrawal.min.ETH", "withdrawal.min.MATIC",
        "withdrawal.network_day.ETH", "withdrawal.network_day.MATIC", "withdrawal.user_day",
    ]  # fmt: skip
