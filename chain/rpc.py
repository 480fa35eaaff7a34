"""What is asked of one endpoint of an EVM chain. Every answer is checked; whatever goes wrong is an RpcError.

Nothing is retried here: a read may be repeated by the caller (stamina), and what repeating means is the caller's to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from chain.errors import RpcGarbled
from chain.health import Health
from chain.line import Line
from chain.logs import TRANSFER_TOPIC, TransferLog, decode_transfer, topic_of
from chain.wire import hash32, items, mapping, quantity, uint256

FILTER_ADDRESSES_MAX: Final = 1_000
"""Addresses in one topic filter; with more, all transfers are fetched and filtered here."""
BATCH_CALLS_MAX: Final = 100
"""Calls in one request of `ask`; hosted endpoints refuse more."""
BALANCE_OF: Final = "0x70a08231"
"""The selector of balanceOf(address)."""
BALANCES_AT_ONCE: Final = 100
TIMESTAMP_S_END: Final = 2**40
"""What an event can carry."""


@dataclass(frozen=True, slots=True)
class Block:
    number: int
    hash: str
    parent_hash: str
    timestamp_s: int
    tx_hashes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Receipt:
    tx_hash: str
    block_hash: str
    block_number: int
    succeeded: bool
    logs: tuple[Any, ...]
    """As the node sent them; `logs.transfers_of` reads them."""


class Call(NamedTuple):
    """One question. `read` checks the result; ValueError, KeyError or BadLog of it mean that the answer is garbled."""

    method: str
    params: list[Any]
    read: Callable[[Any], Any]


class Reads(Protocol):
    """What can be asked of a chain."""

    @property
    def endpoint(self) -> str: ...

    async def ask(self, calls: Sequence[Call]) -> list[Any]: ...


class Asks(Reads, Protocol):
    """What readers of a chain need of an endpoint; `Rpc` is one."""

    health: Health

    async def verify_chain_id(self) -> None: ...

    async def head_of_chain(self) -> Block: ...


class Rpc(Line):
    """Safe for concurrent calls of one loop."""

    async def head(self) -> Block:
        """The newest block."""
        return self._latest(await self._call("eth_getBlockByNumber", "latest", False))

    async def head_of_chain(self) -> Block:
        """The newest block, with the proof that it is of our chain. WrongChainId: the endpoint may have changed its mind."""
        chain_id, latest = await self._batch([("eth_chainId", []), ("eth_getBlockByNumber", ["latest", False])])
        self._check_chain(chain_id)
        return self._latest(latest)

    async def block_by_number(self, number: int) -> Block | None:
        """The canonical block of that number; None when the endpoint has none."""
        return self._numbered(number, await self._call("eth_getBlockByNumber", hex(number), False))

    async def block_by_hash(self, block_hash: str) -> Block | None:
        """The block of that hash, canonical or not; None when the endpoint does not know it."""
        return self._hashed(block_hash, await self._call("eth_getBlockByHash", block_hash, False))

    async def block_both_ways(self, block_hash: str, number: int) -> tuple[Block | None, Block | None]:
        """(by hash, by number), in one batch."""
        by_hash, by_number = await self._batch(
            [("eth_getBlockByHash", [block_hash, False]), ("eth_getBlockByNumber", [hex(number), False])]
        )
        return self._hashed(block_hash, by_hash), self._numbered(number, by_number)

    async def receipt_and_head(self, tx_hash: str) -> tuple[Receipt | None, Block]:
        """Both in one batch: behind a load balancer, a missing receipt and the head then come from one node. WrongChainId."""
        chain_id, latest, raw = await self._batch(
            [
                ("eth_chainId", []),
                ("eth_getBlockByNumber", ["latest", False]),
                ("eth_getTransactionReceipt", [tx_hash]),
            ]
        )
        self._check_chain(chain_id)
        return self._receipt(tx_hash, raw), self._latest(latest)

    async def logs(self, token: str, addresses: AbstractSet[str] | None, first: int, last: int) -> list[TransferLog]:
        """Transfers of `token` in blocks `first` to `last`, by block and log index; only those to `addresses` (lower
        case) unless None."""
        if addresses is not None and not addresses:
            return []
        topics: list[Any] = [TRANSFER_TOPIC]
        if addresses is not None and len(addresses) <= FILTER_ADDRESSES_MAX:
            topics += [None, [topic_of(address) for address in sorted(addresses)]]
        query = {"address": token, "fromBlock": hex(first), "toBlock": hex(last), "topics": topics}
        transfers: dict[tuple[int, int], TransferLog] = {}
        for raw in self._checked(items, await self._call("eth_getLogs", query)):
            transfer = self._checked(decode_transfer, raw)
            if transfer is None:
                continue
            if transfer.token != token or not first <= transfer.block_number <= last:
                raise RpcGarbled(self.endpoint, "eth_getLogs answered a log that was not asked for")
            if transfers.setdefault((transfer.block_number, transfer.log_index), transfer) != transfer:
                raise RpcGarbled(self.endpoint, f"eth_getLogs answered two logs at one place: {transfer.tx_hash}")
        wanted = (t for t in transfers.values() if addresses is None or t.to in addresses)
        return sorted(wanted, key=lambda transfer: (transfer.block_number, transfer.log_index))

    async def balance_of(self, token: str, address: str, block: int | None = None) -> int:
        """Base units of `token` that `address` holds at `block` (the newest when None)."""
        call = {"to": token, "data": BALANCE_OF + topic_of(address)[2:]}
        answer = await self._call("eth_call", call, "latest" if block is None else hex(block))
        return self._checked(uint256, answer)

    async def ask(self, calls: Sequence[Call]) -> list[Any]:
        """What the calls' `read` made of the results, in their order. The first refusal raises."""
        found: list[Any] = []
        for start in range(0, len(calls), BATCH_CALLS_MAX):
            some = calls[start : start + BATCH_CALLS_MAX]
            results = await self._batch([(call.method, call.params) for call in some])
            found += [self._checked(call.read, result) for call, result in zip(some, results, strict=True)]
        return found

    async def balances_of(self, token: str, addresses: Sequence[str], block: int) -> list[int]:
        """Base units of `token` that each address holds at `block`, a hundred to a request."""
        found: list[int] = []
        for start in range(0, len(addresses), BALANCES_AT_ONCE):
            some = addresses[start : start + BALANCES_AT_ONCE]
            calls: list[tuple[str, list[Any]]] = [
                ("eth_call", [{"to": token, "data": BALANCE_OF + topic_of(address)[2:]}, hex(block)])
                for address in some
            ]
            found += [self._checked(uint256, raw) for raw in await self._batch(calls)]
        return found

    def _latest(self, raw: Any) -> Block:
        block = self._block(raw)
        if block is None:
            raise RpcGarbled(self.endpoint, "there is no latest block")
        return block

    def _receipt(self, tx_hash: str, raw: Any) -> Receipt | None:
        receipt = None if raw is None else self._checked(read_receipt, raw)
        if receipt is not None and receipt.tx_hash != tx_hash:
            raise RpcGarbled(self.endpoint, f"asked for the receipt of {tx_hash}, got that of {receipt.tx_hash}")
        return receipt

    def _numbered(self, number: int, raw: Any) -> Block | None:
        block = self._block(raw)
        if block is not None and block.number != number:
            raise RpcGarbled(self.endpoint, f"asked for block {number}, got {block.number}")
        return block

    def _hashed(self, block_hash: str, raw: Any) -> Block | None:
        block = self._block(raw)
        if block is not None and block.hash != block_hash:
            raise RpcGarbled(self.endpoint, f"asked for block {block_hash}, got {block.hash}")
        return block

    def _block(self, raw: Any) -> Block | None:
        return None if raw is None else self._checked(read_block, raw)


def read_block(raw: Any) -> Block:
    """A block with the hashes of its transactions."""
    block = mapping(raw)
    timestamp_s = quantity(block["timestamp"])
    if timestamp_s >= TIMESTAMP_S_END:
        raise ValueError(f"timestamp {timestamp_s}")
    return Block(
        number=quantity(block["number"]),
        hash=hash32(block["hash"]),
        parent_hash=hash32(block["parentHash"]),
        timestamp_s=timestamp_s,
        tx_hashes=tuple(map(hash32, items(block["transactions"]))),
    )


def read_receipt(raw: Any) -> Receipt:
    """The receipt of a mined transaction."""
    receipt = mapping(raw)
    status = quantity(receipt["status"])
    if status not in (0, 1):
        raise ValueError(f"status {status}")
    return Receipt(
        tx_hash=hash32(receipt["transactionHash"]),
        block_hash=hash32(receipt["blockHash"]),
        block_number=quantity(receipt["blockNumber"]),
        succeeded=status == 1,
        logs=tuple(items(receipt["logs"])),
    )
