"""What is told of an order in any sequence, and twice: the money ends the same."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.investing import reserve_orders
from agents.investing.order_facts import Facts
from agents.outcome import Done, Rejected
from ledger.accounts import buffer, fiat_buffer, fiat_exposure, pending_investment, spendable
from ledger.errors import (
    ClosedAccount,
    FillReused,
    FillsDisagree,
    InsufficientFunds,
    OrderNotReserved,
    OrderOverfilled,
    OrderRefused,
    OrderReused,
    TransactionReused,
    UnknownOrder,
)
from ledger.groups import try_post
from ledger.orders import UNSHARDED, Fill, Order, Status, Step, ended, filled, placed, rejected
from ledger.posting import Balance, Fold, Transaction, credit, debit
from topics.envelope import Received
from topics.events import OrderFilled, OrderPlaced

AT = datetime(2026, 7, 1, 12, tzinfo=UTC)
ACCOUNTS = (spendable("ada"), pending_investment("ada"), fiat_exposure("ada"), buffer(), fiat_buffer())
HAS = 1_000


class Owns(NamedTuple):
    spendable: int
    pending: int
    exposed: int
    buffer: int
    fiat_buffer: int


class Desk:
    """One order as the database would keep it."""

    def __init__(self, has: int = HAS) -> None:
        self.fold = Fold({account: Balance() for account in ACCOUNTS}, AT)
        legs = (debit(spendable("ada"), has), credit(buffer(), has))
        self.fold.post(Transaction("f" * 32, "test", "", legs))
        self.order: Order | None = None
        self.fills: dict[str, Fill] = {}
        self.ends: list[tuple[str, int]] = []

    def place(self, amount: int = 100) -> None:
        self._take(placed(self.order, "o1", "ada", amount, AT))

    def fill(self, fill_id: str, amount: int, total: int | None = None) -> None:
        self._take(filled(self.order, self.fills.get(fill_id), "o1", fill_id, amount, total, AT, UNSHARDED))

    def end(self, end: Status, total: int | None = None) -> None:
        self._take(ended(self.order, "o1", end, total, AT))

    def _take(self, step: Step | None) -> None:
        if step is None:
            return
        refusal = try_post(self.fold, step.postings)
        if refusal is not None:
            raise refusal
        assert self.order is None or step.order.version == self.order.version + 1
        self.order = step.order
        if step.fill is not None:
            self.fills[step.fill.fill_id] = step.fill
        if step.released is not None:
            self.ends.append((step.order.status, step.released))

    @property
    def owns(self) -> Owns:
        return Owns(*(self.fold.balances[account].balance for account in ACCOUNTS))

    @property
    def held(self) -> int:
        (hold,) = self.fold.states.values()
        return int(hold.remaining)

    def copy(self) -> Desk:
        """Another that goes on from here; what was posted before is forgotten."""
        other = copy(self)
        balances = {account: copy(balance) for account, balance in self.fold.balances.items()}
        other.fold = Fold(balances, AT, dict(self.fold.states))
        other.fills, other.ends = dict(self.fills), list(self.ends)
        return other

    @property
    def state(self) -> tuple[Order | None, frozenset[Fill], Owns, tuple[tuple[str, int], ...]]:
        return self.order, frozenset(self.fills.values()), self.owns, tuple(self.ends)

    def check(self) -> None:
        """Each unit that the order reserved is spent, given back, or held while it is open; it ends once."""
        order = self.order
        assert order is not None
        filled = sum(fill.amount for fill in self.fills.values())
        of_hold = sum(fill.amount for fill in self.fills.values() if fill.paid_from == "hold")
        held = 0 if order.ended_at else order.amount - filled
        assert order.filled == filled <= order.amount
        assert self.held == held
        assert self.owns == Owns(HAS - filled - held, held, filled, -HAS + filled, -filled)
        assert self.ends == ([(order.status, order.amount - of_hold)] if order.ended_at else [])
        assert (held > 0) == (order.status == "reserved")
        if order.fills_due is not None:
            assert (order.filled == order.fills_due) == (order.ended_at is not None)


Event = Callable[[Desk], None]


def play(desk: Desk, events: list[Event]) -> None:
    """What waits for its order comes again after all others."""
    waiting = list(events)
    while waiting:
        event = waiting.pop(0)
        try:
            event(desk)
        except UnknownOrder:
            waiting.append(event)


def fills_of(parts: list[int], total: int | None) -> list[Event]:
    def of(n: int, part: int) -> Event:
        return lambda desk: desk.fill(f"f{n}", part, total if n == len(parts) - 1 else None)

    return [of(n, part) for n, part in enumerate(parts)]


def _to_the_last_unit(parts: list[int]) -> list[int]:
    return [*parts, 100 - sum(parts)]


_LESS = st.lists(st.integers(1, 24), max_size=4)
_PARTS = _LESS | _LESS.map(_to_the_last_unit)


@given(parts=_PARTS, end=st.sampled_from(sorted({Status.FILLED, Status.CANCELLED, Status.EXPIRED})), data=st.data())
def test_in_any_sequence_and_told_twice_an_order_ends_once_and_holds_nothing(
    parts: list[int], end: Status, data: st.DataObject
) -> None:
    total = sum(parts)
    if end is Status.FILLED:
        parts = parts or [1]
        total = sum(parts)
    events: list[Event] = [Desk.place, *fills_of(parts, total if end is Status.FILLED else None)]
    if end is not Status.FILLED:
        events.append(lambda desk: desk.end(end, total))
    told = [*events, *data.draw(st.lists(st.sampled_from(events), max_size=4))]
    desk = Desk()
    play(desk, data.draw(st.permutations(told)))
    assert desk.order is not None
    everything = end if total < 100 else desk.order.status
    assert desk.ends == [(everything, 100 - total)]
    assert (desk.order.status, desk.order.filled) == (everything, total)
    assert desk.held == 0
    assert desk.owns == Owns(HAS - total, 0, total, -HAS + total, -total)


@given(parts=_PARTS, data=st.data())
def test_an_end_that_tells_no_total_gives_back_at_once_and_late_fills_are_paid_all_the_same(
    parts: list[int], data: st.DataObject
) -> None:
    desk = Desk()
    desk.place()
    play(desk, data.draw(st.permutations([*fills_of(parts, None), lambda desk: desk.end(Status.CANCELLED)])))
    total = sum(parts)
    assert desk.held == 0
    assert len(desk.ends) == 1
    assert desk.owns == Owns(HAS - total, 0, total, -HAS + total, -total)


def fill_of(fill_id: str, amount: int, total: int | None = None) -> Event:
    return lambda desk: desk.fill(fill_id, amount, total)


def end_of(end: Status, total: int | None = None) -> Event:
    return lambda desk: desk.end(end, total)


WORLD: tuple[Event, ...] = (
    lambda desk: desk.place(3),
    lambda desk: desk.place(2),
    *(fill_of(id, amount, total) for id in "ab" for amount in (1, 2) for total in (None, 2, 3)),
    fill_of("c", 1),
    fill_of("d", 4),
    *(end_of(end, total) for end in (Status.CANCELLED, Status.EXPIRED) for total in (None, 0, 2, 3, 4)),
)
"""What an honest and a confused producer may say of an order of three units, or of two."""


def test_whatever_is_told_in_whatever_sequence_no_unit_is_held_spent_or_given_back_twice() -> None:
    """Every state that any sequence of the world's events comes to, however long, and each event in each of them."""
    start = Desk()
    seen, waiting, refusals = {start.state}, [start], set[str]()
    while waiting:
        desk = waiting.pop()
        for event in WORLD:
            after = desk.copy()
            try:
                event(after)
            except OrderRefused as refusal:
                refusals.add(refusal.code)
                assert after.state == desk.state, "what is refused moves nothing"
                continue
            after.check()
            told = after.state
            event(after)
            assert after.state == told, "told twice it is the same, and no refusal"
            if told not in seen:
                seen.add(told)
                waiting.append(after)
    assert refusals == {one.code for one in (FillReused, FillsDisagree, OrderOverfilled, OrderReused, UnknownOrder)}
    ends = {(order.status, order.filled, order.amount) for order, *_ in seen if order is not None and order.ended_at}
    assert ends >= {(end, filled, 3) for end in ("cancelled", "expired") for filled in range(4)}
    assert ends >= {("filled", 2, 2), ("filled", 2, 3), ("filled", 3, 3)}


def test_a_fill_to_the_last_unit_ends_the_hold_without_a_release() -> None:
    desk = Desk()
    desk.place()
    desk.fill("f1", 99)
    desk.fill("f2", 1)
    assert desk.ends == [("filled", 0)]
    assert desk.held == 0
    assert [transaction.kind for transaction in desk.fold.transactions[1:]] == [
        "order_reserved", "order_filled", "order_filled",
    ]  # fmt: skip


def test_a_fill_that_is_told_again_as_the_last_one_gives_the_rest_back() -> None:
    desk = Desk()
    desk.place()
    desk.fill("f1", 90)
    desk.fill("f1", 90, 90)
    assert desk.ends == [("filled", 10)]
    assert desk.owns == Owns(HAS - 90, 0, 90, -HAS + 90, -90)


def test_a_fill_that_is_told_again_as_the_last_one_is_another_event() -> None:
    """A producer without an envelope has no other id: the same one with other contents would be refused."""
    first = OrderFilled.model_validate({"order_id": "o", "fill_id": "f1", "amount": "90"})
    last = OrderFilled.model_validate({"order_id": "o", "fill_id": "f1", "amount": "90", "filled_total": "90"})
    assert first.identity() == "o:f1"
    assert last.identity() != first.identity()


def test_a_late_fill_that_the_customer_has_spent_moves_nothing() -> None:
    desk = Desk(has=100)
    desk.place()
    desk.end(Status.EXPIRED)
    desk.fold.post(Transaction("e" * 32, "test", "", (debit(buffer(), 60), credit(spendable("ada"), 60))))
    desk.fill("f1", 40)
    before = desk.owns
    with pytest.raises(InsufficientFunds):
        desk.fill("f2", 1)
    assert desk.owns == before == Owns(0, 0, 40, 0, -40)


def _cancelled_at(total: int | None) -> Event:
    return lambda desk: desk.end(Status.CANCELLED, total)


@pytest.mark.parametrize(
    ("before", "event", "refusal"),
    [
        ([], lambda desk: desk.fill("f1", 1), UnknownOrder),
        ([], _cancelled_at(None), UnknownOrder),
        ([Desk.place], lambda desk: desk.place(101), OrderReused),
        ([Desk.place], lambda desk: desk.fill("f1", 101), OrderOverfilled),
        ([Desk.place], lambda desk: desk.fill("f1", 1, 101), OrderOverfilled),
        ([Desk.place], _cancelled_at(101), OrderOverfilled),
        ([Desk.place, *fills_of([60], None)], lambda desk: desk.fill("f0", 61), FillReused),
        ([Desk.place, *fills_of([60], None)], lambda desk: desk.fill("f1", 41), OrderOverfilled),
        ([Desk.place, *fills_of([60], None)], _cancelled_at(59), FillsDisagree),
        ([Desk.place, _cancelled_at(50)], lambda desk: desk.fill("f1", 51), FillsDisagree),
        ([Desk.place, _cancelled_at(50)], _cancelled_at(49), FillsDisagree),
        ([Desk.place, _cancelled_at(0)], lambda desk: desk.fill("f1", 1), FillsDisagree),
        ([Desk.place, *fills_of([100], None)], lambda desk: desk.fill("f1", 1), OrderOverfilled),
    ],
)
def test_what_contradicts_the_order_is_refused_and_moves_nothing(
    before: list[Event], event: Event, refusal: type[Exception]
) -> None:
    desk = Desk()
    play(desk, before)
    known: Any = (desk.order, desk.owns)
    with pytest.raises(refusal):
        event(desk)
    assert (desk.order, desk.owns) == known


def test_a_second_end_changes_nothing_while_the_first_waits_for_fills() -> None:
    desk = Desk()
    play(desk, [Desk.place, _cancelled_at(50), lambda desk: desk.end(Status.EXPIRED), _cancelled_at(50)])
    assert desk.ends == []
    assert desk.held == 100
    desk.fill("f1", 50)
    assert desk.ends == [("cancelled", 50)]


def test_nothing_is_filled_or_given_back_of_an_order_that_was_rejected() -> None:
    desk = Desk()
    step = placed(None, "o1", "ada", 100, AT)
    assert step is not None
    desk.order = rejected(step.order, "insufficient_funds")
    for event in (lambda desk: desk.fill("f1", 1), _cancelled_at(None)):
        with pytest.raises(OrderNotReserved):
            event(desk)


def test_a_refusal_of_the_hold_that_no_customer_can_cause_is_a_dead_letter() -> None:
    event = OrderPlaced(order_id="o1", user_id="ada", amount="1")
    done = reserve_orders.decide(Received("o1", "test", event, 1, None), Facts(AT, UNSHARDED))
    assert isinstance(done, Done)
    assert callable(done.if_refused)
    refused = done.if_refused(TransactionReused("t", "a", "b"))
    assert isinstance(refused, Rejected)
    assert refused.code == "transaction_reused"
    told = done.if_refused(ClosedAccount("ada.usdc_balance", AT))
    assert isinstance(told, Done)
    ((_, row),) = told.inserts
    assert isinstance(row, Order)
    assert (row.status, row.code, row.hold_id, told.postings) == ("rejected", "closed_account", None, ())
