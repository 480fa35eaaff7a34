"""What became of our own transactions: asked of every endpoint, believed when enough of them agree, and more than say otherwise.

An endpoint that fails, is behind or contradicts itself says nothing. What moves money never raises for what an endpoint does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from chain.endpoints import ranked, votes
from chain.errors import ChainError, RpcRefused, RpcTooLarge
from chain.finality import is_final
from chain.heads import readable
from chain.logs import transfers_of
from chain.rpc import Asks, Block, Call, Reads, Receipt, read_receipt
from chain.window import latest, numbered
from chain.wire import address20, hash32, items, mapping, quantity

ERROR_STRING: Final = "0x08c379a0"
"""The selector of Solidity's Error(string)."""


class Place(NamedTuple):
    block_hash: str
    block_number: int


@dataclass(frozen=True, slots=True)
class Executed:
    """It is final in that place."""

    place: Place
    succeeded: bool
    transfers: tuple[tuple[str, str, int], ...]
    """(from, to, amount) of every transfer of the token that it made."""


@dataclass(frozen=True, slots=True)
class Gone:
    """It is not in that place: the block at that depth is another."""

    place: Place


Verdict = Executed | Gone


async def verdicts(
    rpcs: Sequence[Asks], agree: int, wanted: dict[str, Place], token: str, depth: int
) -> dict[str, Verdict]:
    """By hash, of those transactions whose place is final: what `agree` endpoints at least say, and more than say otherwise."""
    return await votes(rpcs, agree, list(wanted), lambda rpc: _of_endpoint(rpc, wanted, token, depth))


async def _of_endpoint(rpc: Asks, wanted: dict[str, Place], token: str, depth: int) -> dict[str, Verdict]:
    numbers = sorted({place.block_number for place in wanted.values()})
    head, *blocks = await rpc.ask([latest(), *map(numbered, numbers)])
    found: dict[str, Verdict] = {}
    for block in blocks:
        if block is None or not is_final(head.number, block.number, depth):
            continue
        ours = {tx_hash: place for tx_hash, place in wanted.items() if place.block_number == block.number}
        there = {tx_hash for tx_hash, place in ours.items() if place.block_hash == block.hash}
        there &= set(block.tx_hashes)
        found.update({tx_hash: Gone(place) for tx_hash, place in ours.items() if tx_hash not in there})
        for receipt in await _receipts(rpc, block, there) if there else ():
            found[receipt.tx_hash] = _executed(receipt, token)
    return found


async def _receipts(rpc: Asks, block: Block, tx_hashes: set[str]) -> list[Receipt]:
    """Of those transactions, in that block: all of the block's in one call, or one by one where the endpoint has no such
    method. One whose block is another meanwhile is left out."""

    def whole(raw: Any) -> list[Receipt]:
        return [read_receipt(one) for one in items(raw) if hash32(mapping(one)["transactionHash"]) in tx_hashes]

    found: Iterable[Receipt | None]
    try:
        ((found),) = await rpc.ask([Call("eth_getBlockReceipts", [hex(block.number)], whole)])
    except (RpcRefused, RpcTooLarge):
        found = await receipts(rpc, sorted(tx_hashes))
    return [receipt for receipt in found if receipt is not None and receipt.block_hash == block.hash]


async def receipts(rpc: Reads, tx_hashes: Sequence[str]) -> list[Receipt | None]:
    """In their order. Raises RpcError."""

    def of(tx_hash: str) -> Call:
        def read(raw: Any) -> Receipt | None:
            found = None if raw is None else read_receipt(raw)
            if found is not None and found.tx_hash != tx_hash:
                raise ValueError(f"asked for the receipt of {tx_hash}, got that of {found.tx_hash}")
            return found

        return Call("eth_getTransactionReceipt", [tx_hash], read)

    return await rpc.ask([of(tx_hash) for tx_hash in tx_hashes])


def _executed(receipt: Receipt, token: str) -> Executed:
    transfers = transfers_of(receipt.logs, token) if receipt.succeeded else []
    moved = tuple((transfer.sender, transfer.to, transfer.amount) for transfer in transfers)
    return Executed(Place(receipt.block_hash, receipt.block_number), receipt.succeeded, moved)


def nonce(signer: str, block: int | None = None) -> Call:
    """How many transactions of the signer are mined up to the block; the newest when None."""
    return Call("eth_getTransactionCount", [signer, "latest" if block is None else hex(block)], quantity)


async def taken(
    rpcs: Sequence[Asks], agree: int, signer: str, number: int, tx_hashes: Sequence[str], depth: int
) -> bool:
    """Whether a nonce is finally used, and by none of those transactions: `agree` endpoints at least say so, and more than know
    of one of them. `tx_hashes`: every attempt that was ever signed with it."""

    async def of_endpoint(rpc: Asks) -> dict[int, bool]:
        (head,) = await rpc.ask([latest()])
        if head.number < depth:
            return {}
        (count,) = await rpc.ask([nonce(signer, head.number - depth)])
        return {number: not any(await receipts(rpc, tx_hashes))} if count > number else {}

    return (await votes(rpcs, agree, [number], of_endpoint)).get(number, False)


async def fates(
    rpcs: Sequence[Asks],
    agree: int,
    tx_hashes: Sequence[str],
    token: str,
    depth: int,
    used: tuple[str, int] | None = None,
) -> dict[str, Executed] | None:
    """Those of the transactions that are final; `agree` endpoints say so of all of them alike, and the others are in no block. None:
    that cannot be said yet. `used`: the (signer, nonce) of ours, which then is finally used, so that they never will be; without it
    they are in no pool either."""
    hashes = sorted(set(tx_hashes))
    try:
        reached = (await readable(rpcs)).head.number
    except ChainError:
        return None

    async def of_endpoint(rpc: Asks) -> dict[int, tuple[Executed | None, ...]]:
        head = await rpc.head_of_chain()
        if head.number < max(reached, depth):
            return {}
        if used is not None:
            (count,) = await rpc.ask([nonce(used[0], head.number - depth)])
            if count <= used[1]:
                return {}
        places = {one.tx_hash: Place(one.block_hash, one.block_number) for one in await receipts(rpc, hashes) if one}
        done = await _of_endpoint(rpc, places, token, depth) if places else {}
        final = {tx_hash: one for tx_hash, one in done.items() if isinstance(one, Executed)}
        absent = [tx_hash for tx_hash in hashes if tx_hash not in places]
        if final.keys() != places.keys() or (used is None and absent and await unknown(rpc, absent) != {*absent}):
            return {}
        return {0: tuple(final.get(tx_hash) for tx_hash in hashes)}

    found = (await votes(rpcs, agree, [0], of_endpoint)).get(0)
    return None if found is None else {tx_hash: one for tx_hash, one in zip(hashes, found, strict=True) if one}


async def unknown(rpc: Reads, tx_hashes: Sequence[str]) -> frozenset[str]:
    """Those that the endpoint has neither mined nor in its mempool. Raises RpcError."""
    known = await rpc.ask([Call("eth_getTransactionByHash", [tx_hash], bool) for tx_hash in tx_hashes])
    return frozenset(tx_hash for tx_hash, found in zip(tx_hashes, known, strict=True) if not found)


async def revert_reason(rpcs: Sequence[Asks], tx_hash: str, block: int) -> str:
    """Why a transaction reverted, in the contract's words, by calling again what it called; empty when that cannot be told."""
    for rpc in ranked(rpcs):
        try:
            (call,) = await rpc.ask([Call("eth_getTransactionByHash", [tx_hash], _as_call)])
            await rpc.ask([Call("eth_call", [call, hex(block)], str)])
        except RpcRefused as refused:
            return _reason(refused)
        except ChainError:
            continue
    return ""


def _as_call(raw: Any) -> dict[str, Any]:
    tx = mapping(raw)
    return {"from": address20(tx["from"]), "to": address20(tx["to"]), "data": tx["input"], "gas": tx["gas"]}


def _reason(refused: RpcRefused) -> str:
    if refused.data.startswith(ERROR_STRING):
        # Here, because it is seldom needed and is a sixth of what every worker and command would load at its start.
        from eth_abi.abi import decode
        from eth_abi.exceptions import DecodingError

        try:
            (text,) = decode(["string"], bytes.fromhex(refused.data[len(ERROR_STRING) :]))
            return _storable(str(text)[:200])
        except (DecodingError, ValueError, OverflowError):  # OverflowError: a length that no text can have
            pass
    before, marked, text = refused.message.partition("execution reverted")
    return _storable(text.lstrip(": ")[:200] if marked and not before else refused.message)


def _storable(text: str) -> str:
    """PostgreSQL keeps no NUL."""
    return text.replace("\0", "\ufffd")
