"""Several endpoints of a chain: in which order they are asked, when a second is asked too, and when they agree.

| what   | how                                                                                                          |
| ------ | ------------------------------------------------------------------------------------------------------------ |
| ranked | the healthy first, then as they are configured: the order of failover                                        |
| Hedged | a read of one of them: the next is asked too after HEDGE_S without an answer, or at once after a failure;     |
|        | the first answer counts. For hints: what they say moves no money                                             |
| votes  | all of them are asked; `agree` must say the same, and more of them than say anything else                     |
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Any, Final, TypeVar

from chain.errors import ChainError
from chain.health import SLOW, STATES
from chain.rpc import Asks, Call

HEDGE_S: Final = 0.5
"""Most endpoints answer within a tenth of it: few reads are asked twice."""
GRACE_S: Final = 0.5
"""How long enough answers wait for the others: an endpoint that hangs must not set the pace of those that answer."""

A = TypeVar("A", bound=Asks)
K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Hashable)
T = TypeVar("T")


def ranked(rpcs: Sequence[A]) -> list[A]:
    """The healthy first, else in their order."""
    return sorted(rpcs, key=lambda rpc: STATES.index(rpc.health.state))


class Hedged:
    """Endpoints in the order in which they are asked, as one that is read."""

    def __init__(self, rpcs: Sequence[Asks]) -> None:
        self._rpcs = rpcs

    @property
    def endpoint(self) -> str:
        return self._rpcs[0].endpoint

    async def ask(self, calls: Sequence[Call]) -> list[Any]:
        """Raises the first one's ChainError when none answers."""
        return await hedged(self._rpcs, lambda rpc: rpc.ask(calls))


async def hedged(rpcs: Sequence[A], ask: Callable[[A], Awaitable[T]]) -> T:
    """The first answer. Raises the first endpoint's ChainError when none answers."""
    left = list(rpcs)
    asked: dict[asyncio.Task[T], A] = {}
    waiting: set[asyncio.Task[T]] = set()
    try:
        while left or waiting:
            if left:
                rpc = left.pop(0)
                task = asyncio.create_task(_awaited(ask(rpc)))
                asked[task] = rpc
                waiting.add(task)
            done, waiting = await asyncio.wait(
                waiting, timeout=HEDGE_S if left else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                if _error(task) is None:
                    _overtaken(asked, task)
                    return task.result()
        raise next(error for task in asked if (error := _error(task)) is not None)
    finally:
        await _ended(asked)


def _overtaken(asked: Mapping[asyncio.Task[T], A], winner: asyncio.Task[T]) -> None:
    for task, rpc in asked.items():
        if task is winner:
            return
        if not task.done():
            rpc.health.failed(SLOW)


async def votes(
    rpcs: Sequence[A], agree: int, wanted: Sequence[K], ask: Callable[[A], Awaitable[Mapping[K, V]]]
) -> dict[K, V]:
    """Of what is wanted: the word of `agree` endpoints at least, and of more than have another. What an endpoint leaves out, and
    one that fails, is no word. Nobody waits for an endpoint whose word could change nothing, nor long for one that is slow
    once `agree` have answered."""
    asked = {asyncio.create_task(_awaited(ask(rpc))): rpc for rpc in rpcs}
    waiting = set(asked)
    words: dict[A, Mapping[K, V]] = {}
    try:
        while waiting:
            timeout = GRACE_S if len(words) >= agree else None
            done, waiting = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            words |= {asked[task]: task.result() for task in done if _error(task) is None}
            if not done:
                for task in waiting:
                    asked[task].health.failed(SLOW)
                break
            if len(_agreed(words, agree, wanted, len(waiting))) == len(set(wanted)):
                break
    finally:
        await _ended(asked)
    # one whose answer came while the others were ended is heard too
    words |= {asked[task]: task.result() for task in asked if task.done() and not task.cancelled() and not _error(task)}
    found = _agreed(words, agree, wanted, 0)
    for rpc, said in words.items():
        if any(key in said and said[key] != word for key, word in found.items()):
            rpc.health.outvoted()
    return found


def _agreed(words: Mapping[A, Mapping[K, V]], agree: int, wanted: Sequence[K], silent: int) -> dict[K, V]:
    """`silent`: endpoints that may still say anything."""
    found: dict[K, V] = {}
    for key in wanted:
        said = Counter(word[key] for word in words.values() if key in word).most_common(2)
        others = said[1][1] if len(said) > 1 else 0
        if said and said[0][1] >= agree and said[0][1] > others + silent:
            found[key] = said[0][0]
    return found


async def _awaited(one: Awaitable[T]) -> T:
    return await one


def _error(task: asyncio.Task[Any]) -> ChainError | None:
    """Why it has no answer. What is no ChainError is raised."""
    error = task.exception()
    if error is not None and not isinstance(error, ChainError):
        raise error
    return error


async def _ended(tasks: Mapping[asyncio.Task[Any], Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
