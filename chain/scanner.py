"""One pass over a chain: heads and transfers to our addresses.

| step    | why there                                                                                        |
| ------- | ------------------------------------------------------------------------------------------------ |
| head    | read first: it is the anchor of the pass                                                         |
| compare | the newest checkpoint against the chain; on a mismatch back to one that is canonical             |
| logs    | of the planned range; a refusal narrows the next pass's range                                    |
| anchor  | the head's number is read again: the same hash means that everything between the two reads came  |
|         | from one chain, the end block's hash and the logs included; another one ends the pass, ChainMoved |

No database and no Kafka: the caller stores the state and publishes, both in one commit, and repeats are harmless.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Protocol

from chain.errors import ChainMoved, RpcRefused, RpcTimeout, RpcTooLarge
from chain.logs import TransferLog
from chain.rpc import Block
from chain.scan import Cursor, ScanSettings, ScanState, advance, narrow, plan, rewind


class ReadsChain(Protocol):
    """What a pass needs of an endpoint; `Rpc` is one."""

    async def head(self) -> Block: ...

    async def block_by_number(self, number: int) -> Block | None: ...

    async def logs(
        self, token: str, addresses: AbstractSet[str] | None, first: int, last: int
    ) -> list[TransferLog]: ...


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass found. Store `state` in the commit that carries the rest."""

    state: ScanState
    transfers: tuple[TransferLog, ...] = ()
    """To watched addresses, above zero, by block and log index; the overlap's are repeats."""
    heads: tuple[Block, ...] = ()
    """The head; empty when it is the one of the last pass, or when the endpoint is behind it."""
    rewound_from: Cursor | None = None
    """The newest checkpoint, when it was not canonical any more."""
    caught_up: bool = True
    """False: call again at once, there is more to read."""


async def scan_once(
    rpc: ReadsChain,
    state: ScanState,
    watched: AbstractSet[str] | None,
    settings: ScanSettings,
    head: Block | None = None,
    *,
    agreed: bool = False,
    doubtful: bool = False,
) -> Pass:
    """One pass. `watched`: lower-case addresses, loaded just before; None: transfers to whomever. Raises ChainError; the stored state then still holds.
    `head`: the endpoint's, where the caller has just read it; `agreed`: another endpoint has reached it too;
    `doubtful`: there are others, and none has.

    ChainMoved is ordinary (call again); ReorgTooDeep needs a person.
    """
    head = head or await rpc.head()
    before = state.cursor
    if before is not None and (head.number, head.hash) == (before.number, before.block_hash):
        return Pass(state)
    canonical = await _newest_canonical(rpc, state, head)
    rewound_from = None
    if before is not None and canonical != before:
        # two endpoints far below the cursor are not both behind: it came from one that lied about its head
        lied = agreed and before.number - head.number > settings.overlap_blocks
        if not lied and canonical is not None and canonical == _newest_below(state, head):
            return Pass(state)  # the endpoint is behind: it agrees with us as far as it goes
        if not lied and head.number < state.recent[0].number:
            return Pass(state)  # below everything we stored, so it proves nothing
        state, rewound_from = rewind(state, canonical), before
    wanted = plan(state.cursor, head.number, state.span_blocks, settings.overlap_blocks, state.start_block)
    if wanted is None:
        return Pass(state, heads=(head,), rewound_from=rewound_from)
    try:
        transfers = await rpc.logs(settings.token, watched, wanted.first, wanted.last)
    except (RpcRefused, RpcTooLarge, RpcTimeout):
        narrowed = narrow(state, wanted)
        if narrowed is None:
            raise
        return Pass(narrowed, heads=(head,), rewound_from=rewound_from, caught_up=False)
    end = head if wanted.last == head.number else await _block(rpc, wanted.last)
    if (await _block(rpc, head.number)).hash != head.hash:
        raise ChainMoved(f"block {head.number} changed while it was read")
    _check_hashes(transfers, {head.number: head.hash, end.number: end.hash})
    return Pass(
        advance(state, wanted, end.hash, settings, doubtful=doubtful),
        # A zero transfer moves nothing; they are sent in masses to poison address books.
        transfers=tuple(transfer for transfer in transfers if transfer.amount > 0),
        heads=(head,),
        rewound_from=rewound_from,
        caught_up=wanted.last == head.number,
    )


async def reread(rpc: ReadsChain, state: ScanState, first: int) -> ScanState:
    """The state from which the next pass reads that block again, though it is far back or nothing that is stored is canonical any
    more. Not below the scan's start: who came before it may have been given that money otherwise."""
    if first <= state.start_block:
        return replace(state, recent=(), pruned=False)
    before = await _block(rpc, first - 1)
    return replace(state, recent=(Cursor(before.number, before.hash),), pruned=True)


def _newest_below(state: ScanState, head: Block) -> Cursor | None:
    return next((cursor for cursor in reversed(state.recent) if cursor.number <= head.number), None)


async def _newest_canonical(rpc: ReadsChain, state: ScanState, head: Block) -> Cursor | None:
    """The newest checkpoint on the head's chain, stepping back one by one: reorgs are shallow."""
    for cursor in reversed(state.recent):
        if cursor.number > head.number:
            continue
        found = head if cursor.number == head.number else await _block(rpc, cursor.number)
        if found.hash == cursor.block_hash:
            return cursor
    return None


async def _block(rpc: ReadsChain, number: int) -> Block:
    block = await rpc.block_by_number(number)
    if block is None:
        raise ChainMoved(f"block {number} is gone, though it was not above the head")
    return block


def _check_hashes(transfers: list[TransferLog], known: dict[int, str]) -> None:
    for transfer in transfers:
        if known.setdefault(transfer.block_number, transfer.block_hash) != transfer.block_hash:
            raise ChainMoved(f"logs of block {transfer.block_number} are of {transfer.block_hash}")
