"""Sends signed transactions to the endpoints of a chain. Never raises for what a node or a network does: that is an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from chain.answers import ACCEPTED, NOT_RECOGNISED, Answer, Verdict, classify
from chain.errors import RpcError, RpcRefused
from chain.rpc import Rpc

BATCH_MAX: Final = 100
"""Transactions in one request: measured, more brings nothing; providers allow this many."""
UNSENT: Final = Answer(Verdict.UNREACHED, "rpc_unavailable")


class Bytes(NamedTuple):
    """A signed transaction."""

    tx_hash: str
    raw: bytes


class Broadcaster:
    """The endpoints of one chain, the preferred first."""

    def __init__(self, rpcs: Sequence[Rpc]) -> None:
        self._rpcs = rpcs

    async def send(self, transactions: Sequence[Bytes]) -> list[Answer]:
        """An answer for each, in their order. In nonce order one request follows the other: a node that gets a later one
        first keeps few of them. What the first endpoint has not taken is tried at the next."""
        found = [UNSENT] * len(transactions)
        left = list(range(len(transactions)))
        for rpc in self._rpcs:
            answers = await self._send(rpc, [transactions[index] for index in left])
            for index, answer in zip(left, answers, strict=False):
                found[index] = max(found[index], answer, key=lambda one: one.verdict)
            left = [index for index in left if found[index].verdict is not Verdict.KNOWN]
            if not left:
                break
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
