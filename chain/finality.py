"""When a block counts as final: when enough blocks are above it.

| chain      | depth | time   | reason                                                                          |
| ---------- | ----- | ------ | ------------------------------------------------------------------------------- |
| ETH        | 64    | 13 min | two epochs, the least after which Casper finalises. 12 would be faster, but a   |
|            |       |        | deposit is credited at once and only the custody mirror waits                   |
| MATIC      | 12    | 24 s   | several milestones; between Circle Gateway's 2 to 3 and CCTP v1's 33            |
| AVAX       | 1     | 2 s    | Snowman accepts blocks for good, and a node shows accepted ones only; one more  |
|            |       |        | lets the other endpoints arrive                                                 |
| SOL, APTOS | -     | -      | not read by us: Circle's COMPLETE is finality                                   |

A deployment may set another depth. ScanSettings.recent_max must exceed it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from topics.events import Chain

DEPTH_BLOCKS: Mapping[Chain, int] = MappingProxyType({Chain.ETH: 64, Chain.MATIC: 12, Chain.AVAX: 1})
"""Defaults; a chain that is absent is not read by us."""


def is_final(head: int, block: int, depth_blocks: int) -> bool:
    """Whether at least `depth_blocks` blocks are above `block` when `head` is the newest. All are block numbers."""
    return head - block >= depth_blocks
