"""Up to which block a chain may be read, and from which endpoint: the highest block that two endpoints have reached.

One endpoint's higher head is not believed until another is there too. Where only one of several answers, reading goes on
with it (money is credited at once on anyone's word) and is put right when a second is back; nothing becomes final on it
(evidence.py).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Generic

from chain.endpoints import GRACE_S, A, ranked
from chain.errors import ChainError
from chain.evidence import QUORUM
from chain.health import OK, SLOW
from chain.rpc import Block


@dataclass(frozen=True, slots=True)
class Readable(Generic[A]):
    """What to read from, and how far."""

    rpc: A
    head: Block
    agreed: bool
    """Whether another endpoint has reached this head."""
    left_out: tuple[tuple[str, str], ...]
    """(endpoint, error code) of those that gave no head of our chain."""


async def readable(rpcs: Sequence[A], last: A | None = None, avoid: Collection[A] = ()) -> Readable[A]:
    """Asks every endpoint for its head. Of those not above what two have reached: one with the very block that two have, else
    none of `avoid`, else one that is healthy, else `last`, else the highest. Raises the first endpoint's ChainError when none answers."""
    rpcs = ranked(rpcs)
    tasks = {asyncio.create_task(rpc.head_of_chain()): rpc for rpc in rpcs}
    waiting = set(tasks)
    try:
        while waiting:
            enough = sum(_answered(task) for task in tasks) >= QUORUM
            done, waiting = await asyncio.wait(
                waiting, timeout=GRACE_S if enough else None, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                break
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    heads: list[tuple[A, Block]] = []
    errors: dict[A, ChainError | None] = {}
    for task, rpc in tasks.items():
        if _answered(task):
            heads.append((rpc, task.result()))
        else:
            errors[rpc] = None if task.cancelled() else _error(task)
            if errors[rpc] is None:
                rpc.health.failed(SLOW)
    left_out = tuple((rpc.endpoint, SLOW if error is None else error.code) for rpc, error in errors.items())
    if not heads:
        raise next(error for error in errors.values() if error is not None)
    reached = sorted(head.number for _, head in heads)
    agreed = len(reached) >= QUORUM
    limit = reached[-QUORUM] if agreed else reached[-1]
    if agreed:
        for rpc, head in heads:
            rpc.health.compared(head.number - limit)
    alike = Counter((head.number, head.hash) for _, head in heads)

    def worth(one: tuple[A, Block]) -> tuple[bool, bool, bool, bool, int]:
        rpc, head = one
        two_have_it = alike[head.number, head.hash] >= QUORUM
        return two_have_it, rpc not in avoid, rpc.health.state == OK, rpc is last, head.number

    rpc, head = max((one for one in heads if one[1].number <= limit), key=worth)
    return Readable(rpc, head, agreed, left_out)


def _answered(task: asyncio.Task[Block]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _error(task: asyncio.Task[Block]) -> ChainError:
    error = task.exception()
    assert error is not None
    if not isinstance(error, ChainError):
        raise error
    return error
