"""The newest blocks of a chain, by parent: what is new, and what was taken back.

| step     | why there                                                                                             |
| -------- | ----------------------------------------------------------------------------------------------------- |
| head     | read first: everything else is read up to it                                                          |
| blocks   | above the window, in one batch; each must name the one before it as its parent, or the chain moved    |
| compare  | where the first does not follow the window, the window is read again, down to what both have          |

A window that is too far behind, or of which no block is left, is dropped: `gap` then says that what lies between was not
read, and that whoever waits for a transaction must ask for it by hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from chain.errors import ChainMoved
from chain.rpc import Block, Call, Reads, read_block

SPAN_BLOCKS_MAX: Final = 200
"""Blocks read under one head at most; a window further behind begins anew."""
MARGIN_BLOCKS: Final = 8
"""Kept below finality: a reorg that deep is still told from a gap."""


@dataclass(frozen=True, slots=True)
class Window:
    """Contiguous blocks, by number and hash."""

    first: int
    hashes: tuple[str, ...]
    """From `first` on; never empty."""

    @property
    def last(self) -> int:
        return self.first + len(self.hashes) - 1

    def hash_of(self, number: int) -> str | None:
        """None: below the window."""
        return self.hashes[number - self.first] if self.first <= number <= self.last else None

    def took_back(self, number: int, block_hash: str) -> bool:
        """Whether a block is known not to be canonical any more."""
        return number > self.last or self.hash_of(number) not in (None, block_hash)

    def as_json(self) -> dict[str, Any]:
        """For a JSONB column."""
        return {"first": self.first, "hashes": list(self.hashes)}

    @classmethod
    def of_json(cls, stored: dict[str, Any]) -> Window:
        return cls(stored["first"], tuple(stored["hashes"]))


@dataclass(frozen=True, slots=True)
class Walked:
    """The window after a walk, and the blocks that were not in it before, oldest first."""

    window: Window
    blocks: tuple[Block, ...] = ()
    gap: bool = False


def latest() -> Call:
    """The newest block."""
    return Call("eth_getBlockByNumber", ["latest", False], read_block)


def numbered(number: int) -> Call:
    """The canonical block of that number, or None."""

    def read(raw: Any) -> Block | None:
        found = None if raw is None else read_block(raw)
        if found is not None and found.number != number:
            raise ValueError(f"asked for block {number}, got {found.number}")
        return found

    return Call("eth_getBlockByNumber", [hex(number), False], read)


async def walk(rpc: Reads, window: Window | None, depth: int) -> Walked:
    """Up to the endpoint's head. Raises ChainError: ChainMoved when the chain changed meanwhile (ask again under the next
    head), RpcError. An endpoint that is behind the window and agrees with it changes nothing."""
    (head,) = await rpc.ask([latest()])
    known = window if window is not None and head.number - window.last <= SPAN_BLOCKS_MAX else None
    if known is None:
        blocks = await _read(rpc, max(0, head.number - depth), head)
        return Walked(_window((), blocks, depth), blocks, gap=True)
    blocks = await _read(rpc, known.last + 1, head) if head.number > known.last else ()
    if blocks and blocks[0].parent_hash == known.hashes[-1]:
        return Walked(_window(_kept(known, known.last), blocks, depth), blocks)
    if head.number < known.first:
        raise ChainMoved(f"{rpc.endpoint} is at {head.number}, far behind")
    again = await _read(rpc, known.first, head)
    same = [block.number for block in again if block.hash == known.hash_of(block.number)]
    if same and same[-1] == head.number:
        return Walked(known)
    if not same:
        return Walked(_window((), again, depth), again, gap=True)
    fresh = again[same[-1] - known.first + 1 :]
    return Walked(_window(_kept(known, same[-1]), fresh, depth), fresh)


async def _read(rpc: Reads, first: int, head: Block) -> tuple[Block, ...]:
    """The blocks from `first` to the head, each the parent of the next."""
    found: list[Block | None] = await rpc.ask([numbered(number) for number in range(first, head.number)])
    blocks = [block for block in (*found, head) if block is not None]
    linked = all(one.hash == other.parent_hash for one, other in pairwise(blocks))
    if len(blocks) < head.number - first + 1 or not linked:
        raise ChainMoved(f"blocks {first} to {head.number} of {rpc.endpoint} are not one chain")
    return tuple(blocks)


def _kept(window: Window, last: int) -> tuple[tuple[int, str], ...]:
    return tuple(enumerate(window.hashes[: last - window.first + 1], window.first))


def _window(kept: Sequence[tuple[int, str]], blocks: Sequence[Block], depth: int) -> Window:
    pairs = [*kept, *((block.number, block.hash) for block in blocks)][-(depth + MARGIN_BLOCKS) :]
    return Window(pairs[0][0], tuple(block_hash for _, block_hash in pairs))
