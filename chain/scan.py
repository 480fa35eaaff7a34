"""Where a scan stands and where it goes next. Pure: what the chain says comes in as values.

A pass: compare the stored checkpoints with the chain -> rewind to the newest one that is still canonical -> plan a range
-> (read it) -> advance. Checkpoints are the ends of passes, so they are at least one block apart, and N of them
reach back at least N - 1 blocks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from chain.errors import ReorgTooDeep


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last block that was read, by number and by hash."""

    number: int
    block_hash: str


@dataclass(frozen=True, slots=True)
class Range:
    """Blocks from `first` to `last`, both included."""

    first: int
    last: int

    @property
    def blocks(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True, slots=True)
class ScanSettings:
    token: str
    """The contract whose transfers are read, lower case."""
    span_max_blocks: int = 2_000
    """Blocks per read at most. Public endpoints refuse more than 500 to 10,000; the span finds out by halving."""
    overlap_blocks: int = 6
    """Blocks read again each pass: a node behind a load balancer may have answered without its newest logs."""
    recent_max: int = 128
    """Checkpoints kept, at times half of them far back (`advance`). A reorg past the oldest stops the scan, so it must exceed the
    depth of finality."""

    def __post_init__(self) -> None:
        if not (self.span_max_blocks >= 1 and self.overlap_blocks >= 0 and self.recent_max >= 1):
            raise ValueError("span_max_blocks and recent_max are at least 1, overlap_blocks at least 0")


@dataclass(frozen=True, slots=True)
class ScanState:
    """What is stored between passes."""

    start_block: int
    """The first block that is of interest; nothing below it is read."""
    span_blocks: int
    """What the endpoint answered last, growing; see `advance` and `narrow`."""
    recent: tuple[Cursor, ...] = ()
    """Checkpoints, oldest first."""
    pruned: bool = False
    """Whether older checkpoints were dropped: then a rewind cannot go back to the start."""

    @property
    def cursor(self) -> Cursor | None:
        return self.recent[-1] if self.recent else None

    def as_json(self) -> dict[str, Any]:
        """For a JSONB column."""
        return asdict(self)

    @classmethod
    def of_json(cls, stored: dict[str, Any]) -> ScanState:
        return cls(**{**stored, "recent": tuple(Cursor(**cursor) for cursor in stored["recent"])})


def begin(start_block: int, settings: ScanSettings) -> ScanState:
    """A scan that has read nothing."""
    return ScanState(start_block, settings.span_max_blocks)


def plan(cursor: Cursor | None, head: int, span_blocks: int, overlap_blocks: int, start_block: int) -> Range | None:
    """What to read next; None when there is no new block. The range always ends above the cursor, so a narrow span gives
    up overlap, never progress."""
    if cursor is None:
        first = start_block
    else:
        first = max(start_block, cursor.number + 1 - min(overlap_blocks, span_blocks // 2))
    last = min(head, first + span_blocks - 1)
    done = start_block - 1 if cursor is None else cursor.number
    return Range(first, last) if last > done else None


def narrow(state: ScanState, refused: Range) -> ScanState | None:
    """After a refusal: half of what was asked. None when it was one block: then the refusal is not about size."""
    return replace(state, span_blocks=refused.blocks // 2) if refused.blocks > 1 else None


def advance(
    state: ScanState, read: Range, end_hash: str, settings: ScanSettings, *, doubtful: bool = False
) -> ScanState:
    """After `read` was read and its last block has `end_hash`. `doubtful`: on the word of one endpoint of several. Its blocks may turn
    out to be made up, however many: the older half of the checkpoints then stays as it is, for the way back."""
    assert state.cursor is None or read.last > state.cursor.number
    recent = (*state.recent, Cursor(read.last, end_hash))
    kept = recent[: settings.recent_max // 2] if doubtful else ()
    dropped = max(len(recent) - settings.recent_max, 0)
    span_blocks = min(state.span_blocks, settings.span_max_blocks)
    if 2 * read.blocks >= span_blocks:  # a much shorter read says nothing about the limit
        span_blocks = min(settings.span_max_blocks, span_blocks + max(1, span_blocks // 8))
    return replace(
        state,
        recent=(*kept, *recent[len(kept) + dropped :]),
        pruned=state.pruned or dropped > 0,
        span_blocks=span_blocks,
    )


def rewind(state: ScanState, canonical: Cursor | None) -> ScanState:
    """Forget every checkpoint after `canonical`, one of `state.recent`; None when none of them is on the chain any more:
    back to the start, or ReorgTooDeep when the way back was dropped."""
    if canonical is not None:
        return replace(state, recent=state.recent[: state.recent.index(canonical) + 1])
    if state.pruned:
        oldest = state.recent[0]
        raise ReorgTooDeep(f"block {oldest.number} is not {oldest.block_hash} any more, and nothing older is stored")
    return replace(state, recent=())
