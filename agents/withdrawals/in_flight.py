"""What a lane has in flight: how many, the most wei and the units they may cost. As cheap with ten thousand as with ten.

Beside what the chain has counted the sum is kept, by nonce: what a nonce's first attempt costs never changes, so each is read
once. A dearer attempt of the same nonce is rare and has an index of its own. Below the chain's count the rows are summed: they
are of the last blocks. Wherever that line is drawn the sum is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from agents.withdrawals.withdrawal import Lane
from chain.hot_wallet import Look
from ledger.rows import Connection
from ledger.sql import load as load_sql

_sql = load_sql("agents.withdrawals", "sending.sql")

LaneKey = tuple[str, str]
"""(chain, signer)"""


class Sum(NamedTuple):
    unmined: int
    """Signed and in no block."""
    wei: int
    """Of those, and of what is in blocks that the lane's own balances may not show yet: gas and coins, at the dearest."""
    units: int
    """Of the same: the amounts of the withdrawals."""


NOTHING: Final = Sum(0, 0, 0)
_NO_NONCE: Final = 2**63 - 1


async def summed(connection: Connection, lane: LaneKey, block_number: int) -> Sum:
    """All of it from the rows, as of a block; for who asks once. As dear as there are rows."""
    columns = [[lane[0]], [lane[1]], [block_number], [_NO_NONCE], [_NO_NONCE]]
    ((*_, unmined, wei, units),) = await connection.fetch(_sql.in_flight, *columns, None)
    return Sum(unmined, int(wei), int(units))


@dataclass
class _Kept:
    """The first attempts of the nonces from `start` to `end`."""

    start: int
    end: int
    costs: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Nonce -> wei, units; in their order."""
    wei: int = 0
    units: int = 0

    def take(self, nonce: int, wei: int, units: int) -> None:
        if nonce >= self.end:
            self.costs[nonce] = (wei, units)
            self.wei, self.units, self.end = self.wei + wei, self.units + units, nonce + 1

    def begin(self, nonce: int) -> None:
        """Forgets what is below."""
        while self.costs and (lowest := next(iter(self.costs))) < nonce:
            wei, units = self.costs.pop(lowest)
            self.wei, self.units = self.wei - wei, self.units - units
        self.start = nonce
        self.end = max(self.end, nonce)


class InFlight:
    """Of the lanes of one process. Whoever asks holds the lanes' locks: nobody else signs for them meanwhile."""

    def __init__(self) -> None:
        self._kept: dict[LaneKey, _Kept] = {}

    async def of(
        self, connection: Connection, looks: Mapping[LaneKey, Look], lanes: Mapping[LaneKey, Lane]
    ) -> dict[LaneKey, Sum]:
        """`lanes`: as they are stored, those that are."""
        asked: list[tuple[str, str, int, int, int]] = []
        for key, look in looks.items():
            kept = self._kept.get(key)
            lane = lanes.get(key)
            if kept is None or look.nonce < kept.start or lane is None or lane.next_nonce < kept.end:
                kept = self._kept[key] = _Kept(look.nonce, look.nonce)
            kept.begin(look.nonce)
            asked.append((*key, look.block_number, look.nonce, kept.end))
        sums = dict.fromkeys(looks, NOTHING)
        raised: dict[tuple[LaneKey, int], int] = {}
        for chain, signer, part, nonce, unmined, wei, units in await connection.fetch(
            _sql.in_flight, *map(list, zip(*asked, strict=True)), None
        ):
            key = (chain, signer)
            if part == "counted":
                sums[key] = Sum(unmined, int(wei), int(units))
            elif part == "first":
                self._kept[key].take(nonce, int(wei), int(units))
            else:
                raised[key, nonce] = int(wei)
        for key, counted in sums.items():
            kept = self._kept[key]
            sums[key] = Sum(counted.unmined + len(kept.costs), counted.wei + kept.wei, counted.units + kept.units)
        for (key, nonce), wei in raised.items():
            first, _ = self._kept[key].costs.get(nonce, (0, 0))
            sums[key] = sums[key]._replace(wei=sums[key].wei + max(0, wei - first))
        return sums
