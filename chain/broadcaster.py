"""Sends signed transactions to the endpoints of a chain. Never raises for what a node or a network does: that is an answer.

To two at once, the healthiest: one that takes a transaction and passes it to nobody holds up no payment. What neither has taken
goes to the next, and so does what neither has answered within HEDGE_S. The bytes are the same, so more copies are harmless.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from chain.answers import ACCEPTED, NOT_RECOGNISED, Answer, Verdict, classify
from chain.endpoints import GRACE_S, HEDGE_S, ranked
from chain.errors import RpcError, RpcRefused
from chain.health import SLOW
from chain.rpc import Rpc

BATCH_MAX: Final = 100
"""Transactions in one request: measured, more brings nothing; providers allow this many."""
COPIES: Final = 2
UNSENT: Final = Answer(Verdict.UNREACHED, "rpc_unavailable")


class Bytes(NamedTuple):
    """A signed transaction."""

    tx_hash: str
    raw: bytes


class Broadcaster:
    """The endpoints of one chain."""

    def __init__(self, rpcs: Sequence[Rpc]) -> None:
        self._rpcs = rpcs

    async def send(self, transactions: Sequence[Bytes]) -> list[Answer]:
        """An answer for each, in their order: the best that an endpoint gave. To each endpoint one request follows the other in nonce
        order: a node that gets a later one first keeps few of them."""
        if len(self._rpcs) == 1:  # nobody to turn to
            answers = await self._send(self._rpcs[0], transactions)
            return answers + [UNSENT] * (len(transactions) - len(answers))
        found = [UNSENT] * len(transactions)
        left = list(range(len(transactions)))
        rpcs = ranked(self._rpcs)
        asked: dict[asyncio.Task[list[Answer]], tuple[Rpc, list[int]]] = {}
        waiting: set[asyncio.Task[list[Answer]]] = set()

        def send_to(rpc: Rpc) -> None:
            task = asyncio.create_task(self._send(rpc, [transactions[index] for index in left]))
            asked[task] = (rpc, left)
            waiting.add(task)

        while rpcs and len(waiting) < COPIES:
            send_to(rpcs.pop(0))
        try:
            while waiting:
                enough = not left or (not rpcs and any(answer.verdict for answer in found))
                timeout = GRACE_S if enough else HEDGE_S if rpcs else None
                done, waiting = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    for index, answer in zip(asked[task][1], task.result(), strict=False):
                        found[index] = max(found[index], answer, key=lambda one: one.verdict)
                if enough and not done:
                    break
                left = [index for index in left if found[index].verdict is not Verdict.KNOWN]
                if left and rpcs:
                    send_to(rpcs.pop(0))
        finally:
            for task in waiting:
                asked[task][0].health.failed(SLOW)
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        return found

    async def _send(self, rpc: Rpc, transactions: Sequence[Bytes]) -> list[Answer]:
        """Answers until the endpoint gives none: what is behind that is not sent to it."""
        answers: list[Answer] = []
        for start in range(0, len(transactions), BATCH_MAX):
            some = transactions[start : start + BATCH_MAX]
            calls = [("eth_sendRawTransaction", ["0x" + one.raw.hex()]) for one in some]
            try:
                results = await rpc.answers(calls)
            except RpcRefused as error:  # the batch as such
                return [*answers, *[classify(error)._replace(verdict=Verdict.AGAIN)] * len(some)]
            except RpcError as error:
                return [*answers, *[Answer(Verdict.UNREACHED, error.code)] * len(some)]
            answers += [_answer(one, result) for one, result in zip(some, results, strict=True)]
        return answers


def _answer(sent: Bytes, result: Any) -> Answer:
    if isinstance(result, RpcRefused):
        return classify(result)
    if type(result) is str and result.lower() == sent.tx_hash:
        return ACCEPTED
    return NOT_RECOGNISED
