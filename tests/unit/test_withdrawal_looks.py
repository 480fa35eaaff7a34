"""What a look at a chain makes of what changes while it looks. The endpoint is a list of answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from agents.withdrawals.look import ChainWriter, LaneNonce, News, OpenAttempt, look
from chain.health import Health
from chain.rpc import Block, Call
from chain.window import Window

AT = datetime(2027, 1, 1, tzinfo=UTC)
FIRST, SECOND = "0x" + "1" * 40, "0x" + "2" * 40


class Node:
    """One block for ever; of the first signer it counts a transaction that the block does not show."""

    endpoint = "https://a.example"

    def __init__(self) -> None:
        self.health = Health()

    async def verify_chain_id(self) -> None: ...

    async def head_of_chain(self) -> Block:
        raise NotImplementedError

    async def ask(self, calls: Sequence[Call]) -> list[Any]:
        return [call.read(self._answer(call.method, call.params)) for call in calls]

    def _answer(self, method: str, params: list[Any]) -> Any:
        if method == "eth_getBlockByNumber":
            word = "0x" + "a" * 64
            return {"number": "0x1", "hash": word, "parentHash": word, "timestamp": "0x1", "transactions": []}
        if method == "eth_getTransactionCount":
            return "0x3" if params[0] == FIRST else "0x0"
        assert method == "eth_getTransactionReceipt"
        return None


def _attempt(signer: str, nonce: int) -> OpenAttempt:
    return OpenAttempt(f"0x{signer[2:10]}{nonce:056x}", signer, nonce, 1, "broadcast", None, None, AT, None)


async def test_a_lane_that_signs_its_first_while_another_is_looked_at_again_is_looked_at_too() -> None:
    reads = [[_attempt(FIRST, 0)], [_attempt(FIRST, 0), _attempt(SECOND, 0)]]

    async def attempts(_hashes: Sequence[str], _lowest: int) -> Sequence[OpenAttempt]:
        return reads.pop(0)

    async def signed(_nonces: Collection[LaneNonce]) -> Mapping[LaneNonce, Sequence[str]]:
        return {}

    node = Node()
    chain = ChainWriter([node], "0x" + "9" * 40, 3)
    found = await look(chain, [node], Window(1, ("0x" + "a" * 64,)), attempts, signed, AT)
    assert not reads
    assert isinstance(found, News)
    assert found.nonces == {FIRST: 3, SECOND: 0}
