"""How an endpoint does, as one process has seen it: who is asked first, and what people are told. Nothing is believed or doubted
for it; that is for the votes (endpoints.py).

| state           | when                                                                        | until                        |
| --------------- | --------------------------------------------------------------------------- | ---------------------------- |
| ok              |                                                                             |                              |
| slow            | an answer took over SLOW_S, or others were enough before it came            | an answer in time            |
| behind          | its head is far below one that two endpoints have reached                   | its head is near again       |
| apart           | its head is far above any that another has reached; of two, either is wrong | its head is near again       |
| an error's code | the last request failed so                                                  | an answer in time            |
| outvoted        | it said something else than what was agreed on                              | OUTVOTED_S later             |
| rpc_rate_limited| it told us to wait; until then nothing is sent to it                        | the time that it told        |

What was seen over FORGET_S ago, by a process that has not asked since, says nothing any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

OK: Final = "ok"
SLOW: Final = "slow"
BEHIND: Final = "behind"
APART: Final = "apart"
OUTVOTED: Final = "outvoted"
RATE_LIMITED: Final = "rpc_rate_limited"
FAILURES: Final = ("rpc_unavailable", "rpc_timeout", "rpc_garbled", "wrong_chain_id")
"""Codes of errors (errors.py). A refusal is an answer, and what is too large was asked too widely."""
STATES: Final = (OK, SLOW, BEHIND, APART, *FAILURES, OUTVOTED, RATE_LIMITED)
"""The better first: in this order they are asked."""

SLOW_S: Final = 2.0
FAR_BLOCKS: Final = 5
"""Heads of honest endpoints differ by less."""
FORGET_S: Final = 120.0
OUTVOTED_S: Final = 600.0
"""Long enough that a person is told (the alert waits for five minutes), short enough for one that was only being reorganised."""


class Health:
    """Of one endpoint. Each method is told by whoever has just seen it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failure, self._failure_at = "", 0.0
        self._place, self._place_at = "", 0.0
        self._outvoted_until = 0.0
        self._rests_until = 0.0

    @property
    def state(self) -> str:
        """One of STATES."""
        now = self._clock()
        if now < self._rests_until:
            return RATE_LIMITED
        if now < self._outvoted_until:
            return OUTVOTED
        if self._failure and now - self._failure_at < FORGET_S:
            return self._failure
        if self._place and now - self._place_at < FORGET_S:
            return self._place
        return OK

    @property
    def rests_s(self) -> float:
        """For how long nothing is to be sent to it."""
        return max(0.0, self._rests_until - self._clock())

    def answered(self, after_s: float) -> None:
        self._failure = ""
        if after_s > SLOW_S:
            self.failed(SLOW)

    def failed(self, code: str) -> None:
        """`code`: one of FAILURES, or SLOW; others say nothing of the endpoint."""
        if code in FAILURES or code == SLOW:
            self._failure, self._failure_at = code, self._clock()

    def rest(self, for_s: float) -> None:
        self._rests_until = self._clock() + for_s

    def compared(self, above_agreed: int) -> None:
        """By how many blocks its head is above the highest that two endpoints have reached."""
        self._place = BEHIND if above_agreed < -FAR_BLOCKS else APART if above_agreed > FAR_BLOCKS else ""
        self._place_at = self._clock()

    def outvoted(self) -> None:
        self._outvoted_until = self._clock() + OUTVOTED_S
