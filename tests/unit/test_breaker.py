"""A partner's circuit breaker, with the time in the test's hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from agents.breaker import Breaker, BreakerState
from agents.concluding import CallPolicy

START = datetime(2026, 7, 1, tzinfo=UTC)


class Times:
    def __init__(self) -> None:
        self.now = START
        self.shown: list[BreakerState] = []

    def breaker(self) -> Breaker:
        return Breaker(3, 30.0, lambda: self.now, self.shown.append)


def test_three_failures_in_a_row_open_it_and_an_answer_between_them_does_not() -> None:
    times = Times()
    breaker = times.breaker()
    for _ in range(5):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert (breaker.closed, breaker.admits(5, 0)) == (True, 5)
    for _ in range(3):
        breaker.failed()
    assert (breaker.closed, breaker.admits(5, 0)) == (False, 0)
    assert times.shown == [BreakerState.CLOSED, BreakerState.OPEN]


def test_after_its_rest_one_request_tries_alone_and_its_answer_closes_it() -> None:
    times = Times()
    breaker = times.breaker()
    for _ in range(3):
        breaker.failed()
    times.now += timedelta(seconds=31)
    assert breaker.admits(5, 1) == 0, "others are still under way"
    assert breaker.admits(5, 0) == 1
    breaker.failed()
    assert breaker.admits(5, 0) == 0
    times.now += timedelta(seconds=31)
    assert breaker.admits(5, 0) == 1
    breaker.succeeded()
    assert breaker.admits(5, 0) == 5
    assert times.shown[-3:] == [BreakerState.OPEN, BreakerState.PROBING, BreakerState.CLOSED]


def test_pauses_double_to_half_an_hour_and_spread_by_a_tenth_that_the_call_decides() -> None:
    policy = CallPolicy()
    for attempts, minutes in enumerate((1, 2, 4, 8, 16, 30, 30), 1):
        waits = [policy.wait_s(f"{call:032x}", attempts) / 60 for call in range(500)]
        assert all(0.9 * minutes <= wait <= 1.1 * minutes for wait in waits)
        assert max(waits) - min(waits) > 0.15 * minutes
        assert waits == [policy.wait_s(f"{call:032x}", attempts) / 60 for call in range(500)]


def test_what_a_partner_says_of_when_is_kept_within_the_longest_wait() -> None:
    policy = CallPolicy()
    assert 600 <= policy.wait_s("a", 1, 600.0) <= 660
    assert policy.retry_max_s <= policy.wait_s("a", 1, 999_999.0) <= policy.retry_max_s * 1.1
