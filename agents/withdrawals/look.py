"""What a chain says of our open attempts under a new head: read before the transaction, decided on within it.

| step     | why there                                                                                               |
| -------- | ------------------------------------------------------------------------------------------------------- |
| walk     | new blocks with the hashes of their transactions; before the attempts are read, so that each of them     |
|          | that could be in one of these blocks is known by then: an attempt is stored before it is sent           |
| attempts | the open ones that the new blocks, or the chain's next step, may be about                                |
| places   | which of them are in the new blocks; by receipt where blocks were missed, or the nonce is used          |
| verdicts | of those deep enough, from every endpoint                                                               |
| taken    | nonces that are finally used by none of our attempts, from every endpoint                               |
| unseen   | those that are long in no block: whether the endpoint still has them                                    |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from agents.withdrawals.withdrawal import NONCE_TAKEN, UNEXPECTED_TRANSFERS, AttemptStatus
from chain.endpoints import Hedged
from chain.finality import is_final
from chain.outcomes import Executed, Place, Verdict, nonce, receipts, revert_reason, taken, unknown, verdicts
from chain.rpc import Asks, Reads
from chain.window import Walked, Window, walk

AGREE_MIN: Final = 2
"""Endpoints that must say the same, where there are as many."""
LOWEST: Final = 100
"""Nonces of a lane that are in no block, looked at under one head: the lowest."""
LOWEST_MAX: Final = 500
"""The same where blocks were missed or do not show what the chain counts, or where it leaves all of LOWEST waiting."""
DUE_MAX: Final = 2_000
"""Attempts judged under one head; the rest follows under the next."""
UNSEEN_MAX: Final = 500
"""Asked of one head whether the endpoint still has them."""
RESEND_S: Final = 60.0
"""In no block for so long: the endpoint is asked whether it still has the transaction, which is sent again if not."""
TAKEN_MAX: Final = 20
"""Nonces asked about under one head for having been used by none of ours."""

LaneNonce = tuple[str, int]
"""(signer, nonce)"""


@dataclass(frozen=True)
class ChainWriter:
    """A chain that we send to."""

    rpcs: Sequence[Asks]
    """Where there are two or more, two must agree before anything is final."""
    token: str
    """USDC's contract, lower case."""
    depth_blocks: int

    @property
    def agree(self) -> int:
        """How many endpoints must say the same before it is believed."""
        return min(AGREE_MIN, len(self.rpcs))


class OpenAttempt(NamedTuple):
    tx_hash: str
    signer: str
    nonce: int
    n: int
    status: str
    block_hash: str | None
    block_number: int | None
    updated_at: datetime
    review: str | None
    """Why a person looks at its withdrawal."""


@dataclass(frozen=True)
class News:
    """Facts about the chain: they stay true whatever became of the attempts meanwhile."""

    window: Window
    places: Mapping[str, Place] = field(default_factory=dict)
    """By hash: in which canonical block it is."""
    lost: frozenset[tuple[str, Place]] = frozenset()
    """Not there any more."""
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Of those that reverted, by hash."""
    taken: frozenset[LaneNonce] = frozenset()
    unseen: frozenset[str] = frozenset()
    nonces: Mapping[str, int] = field(default_factory=dict)
    """By signer: the chain's own count at its newest block."""
    touched: frozenset[LaneNonce] = frozenset()
    """Whose attempts something is said about."""


async def look(
    chain: ChainWriter,
    rpcs: Sequence[Asks],
    window: Window | None,
    attempts: Callable[[Sequence[str], int], Awaitable[Sequence[OpenAttempt]]],
    signed: Callable[[Collection[LaneNonce]], Awaitable[Mapping[LaneNonce, Sequence[str]]]],
    now: datetime,
) -> News | None:
    """`rpcs`: the chain's endpoints; the first is read, another where it is slow or fails. `attempts` reads the open ones: those in
    blocks, those of the hashes it is given, so many of the lowest nonces of each lane. `signed` reads the hashes of all that were ever signed with
    these nonces. None: nothing is open. Raises ChainError, and nothing is known then."""
    rpc = Hedged(rpcs)
    walked = await walk(rpc, window, chain.depth_blocks)
    new = [tx_hash for block in walked.blocks for tx_hash in block.tx_hashes]
    some = await attempts(new, LOWEST_MAX if walked.gap else LOWEST)
    if not some:
        return None
    counts = await _counts(rpc, {attempt.signer for attempt in some})
    if not walked.gap and (_all_late(some, now) or _withheld(some, counts)):
        some = await attempts(new, LOWEST_MAX)
        # a lane may have signed its first meanwhile
        counts |= await _counts(rpc, {attempt.signer for attempt in some} - counts.keys())
    places = await _places(rpc, walked, some, counts)
    mined = {
        a.tx_hash: Place(a.block_hash, a.block_number) for a in some if a.block_hash and a.block_number is not None
    }
    lost = {
        (tx_hash, place)
        for tx_hash, place in mined.items()
        if tx_hash not in places and walked.window.took_back(place.block_number, place.block_hash)
    }
    stands = {tx_hash: place for tx_hash, place in mined.items() if (tx_hash, place) not in lost}
    due = _due(some, stands, walked.window.last, chain.depth_blocks)
    found = await verdicts(rpcs, chain.agree, due, chain.token, chain.depth_blocks) if due else {}
    in_no_block = _in_no_block(some, places.keys() | stands.keys())
    used = [key for key, group in in_no_block.items() if key[1] < counts[key[0]] and group[0].review != NONCE_TAKEN]
    used = used[:TAKEN_MAX]
    waiting = [
        group[-1].tx_hash for key, group in in_no_block.items() if key[1] >= counts[key[0]] and _is_late(group[-1], now)
    ]
    gone = await _taken(chain, rpcs, used, await signed(used)) if used else frozenset()
    unseen = await unknown(rpc, waiting[:UNSEEN_MAX]) if waiting else frozenset()
    said = {*places, *found, *unseen, *(tx_hash for tx_hash, _ in lost)}
    return News(
        walked.window,
        {tx_hash: place for tx_hash, place in places.items() if mined.get(tx_hash) != place},
        frozenset(lost),
        found,
        await _reasons(rpcs, found),
        gone,
        unseen,
        counts,
        frozenset(used) | {(a.signer, a.nonce) for a in some if a.tx_hash in said},
    )


def _is_late(attempt: OpenAttempt, now: datetime) -> bool:
    return attempt.updated_at <= now - timedelta(seconds=RESEND_S)


def _all_late(some: Sequence[OpenAttempt], now: datetime) -> bool:
    """Of a lane with as many in no block as were looked at, all: there may be more."""
    waiting = [attempt for attempt in some if attempt.status != AttemptStatus.MINED]
    late = Counter(attempt.signer for attempt in waiting if _is_late(attempt, now))
    return any(number >= LOWEST for number in late.values())


def _withheld(some: Sequence[OpenAttempt], counts: Mapping[str, int]) -> bool:
    """The chain has counted more of a lane than its blocks showed us."""
    looked_at: dict[str, int] = {}
    for attempt in some:
        looked_at[attempt.signer] = max(attempt.nonce, looked_at.get(attempt.signer, 0))
    return any(counts[signer] > nonce + 1 for signer, nonce in looked_at.items())


async def _counts(rpc: Reads, signers: Collection[str]) -> dict[str, int]:
    """The nonces of each that the chain has counted."""
    asked = sorted(signers)
    return dict(zip(asked, await rpc.ask([nonce(signer) for signer in asked]) if asked else (), strict=True))


async def _places(
    rpc: Reads, walked: Walked, some: Sequence[OpenAttempt], counts: Mapping[str, int]
) -> dict[str, Place]:
    ours = {attempt.tx_hash for attempt in some}
    places = {
        tx_hash: Place(block.hash, block.number)
        for block in walked.blocks
        for tx_hash in block.tx_hashes
        if tx_hash in ours
    }
    asked = [
        a.tx_hash
        for a in some
        if a.tx_hash not in places and (walked.gap or (a.status != AttemptStatus.MINED and a.nonce < counts[a.signer]))
    ]
    for receipt in await receipts(rpc, asked) if asked else ():
        if receipt is not None and not walked.window.took_back(receipt.block_number, receipt.block_hash):
            places[receipt.tx_hash] = Place(receipt.block_hash, receipt.block_number)
    return places


def _due(some: Sequence[OpenAttempt], stands: Mapping[str, Place], head: int, depth_blocks: int) -> dict[str, Place]:
    """What is deep enough to be judged, the lowest first; not again where a person looks at what it moved."""
    reviewed = {attempt.tx_hash for attempt in some if attempt.review == UNEXPECTED_TRANSFERS}
    deep = [
        (tx_hash, place)
        for tx_hash, place in stands.items()
        if tx_hash not in reviewed and is_final(head, place.block_number, depth_blocks)
    ]
    return dict(sorted(deep, key=lambda item: item[1].block_number)[:DUE_MAX])


def _in_no_block(some: Sequence[OpenAttempt], in_blocks: Collection[str]) -> dict[LaneNonce, list[OpenAttempt]]:
    """The nonces none of whose attempts is in a block, as far as we know, with these attempts."""
    by_nonce: dict[LaneNonce, list[OpenAttempt]] = {}
    for attempt in some:
        by_nonce.setdefault((attempt.signer, attempt.nonce), []).append(attempt)
    return {key: group for key, group in by_nonce.items() if not any(attempt.tx_hash in in_blocks for attempt in group)}


async def _taken(
    chain: ChainWriter, rpcs: Sequence[Asks], used: Sequence[LaneNonce], signed: Mapping[LaneNonce, Sequence[str]]
) -> frozenset[LaneNonce]:
    return frozenset(
        [key for key in used if await taken(rpcs, chain.agree, *key, signed.get(key, ()), chain.depth_blocks)]
    )


async def _reasons(rpcs: Sequence[Asks], found: Mapping[str, Verdict]) -> dict[str, str]:
    return {
        tx_hash: await revert_reason(rpcs, tx_hash, verdict.place.block_number)
        for tx_hash, verdict in found.items()
        if isinstance(verdict, Executed) and not verdict.succeeded
    }
