"""What this process signs with, and the signatures: made between a decision and its commit, of attempts that have none yet.

A stage decides on attempts without a hash, whose `raw` is what is to be signed (`unsigned`), and has `Desks.complete` as its own.
The lane is locked meanwhile: one writer per lane, whether the key is in this process or answers in 50 ms. A signature that was
rolled back was stored nowhere, so nobody sends it; one that was stored is sent as it is, and is never made again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from agents.outcome import Done, Emit, Outcome
from agents.withdrawals.in_flight import InFlight, LaneKey
from agents.withdrawals.withdrawal import Attempt, paid_for
from chain.errors import SignerError
from chain.fees import FeePolicy
from chain.hot_wallet import HotWallet, Look
from chain.signer import Signer
from chain.transactions import digest, signed
from ledger.tables import ATTEMPTS
from topics.catalog import TRANSACTIONS_SIGNED
from topics.events import Chain, TransactionSigned

_log = structlog.get_logger()

IN_FLIGHT_MAX: Final = 16
"""Of one lane, signed and in no block: what nodes keep of one sender, and what Circle allows itself."""
AT_ONCE: Final = 50
"""Between so many the loop serves others: a node that has answered gets its next request."""
AWAY_S: Final = 5.0
"""A lane whose key did not sign is left alone so long: other lanes do not wait for its time-outs meanwhile."""


@dataclass(frozen=True)
class Desk:
    """What signs for one lane."""

    chain: Chain
    chain_id: int
    signer: Signer
    token: str
    """USDC's contract."""
    wallet: HotWallet
    fees: FeePolicy
    in_flight_max: int = IN_FLIGHT_MAX
    gives_gas: bool = False
    """The gas account's: it signs top-ups of lanes (top_up_lanes.py), and no withdrawal."""

    @property
    def key(self) -> LaneKey:
        return self.chain.value, self.signer.address


@dataclass
class Prepared:
    """What is known outside when a batch begins."""

    desks: Mapping[LaneKey, Desk]
    looks: Mapping[LaneKey, Look]
    """What the chain says; of those that did answer."""
    away: set[LaneKey] = field(default_factory=set)
    """Their key does not sign now."""


class Desks:
    """All of them. Lanes come and go while the process runs (key_ring.py)."""

    def __init__(self, desks: Iterable[Desk] = ()) -> None:
        self._desks = {desk.key: desk for desk in desks}
        self.in_flight = InFlight()
        self._away: dict[LaneKey, float] = {}
        """Until when, by the loop's clock."""

    def put(self, desk: Desk) -> None:
        self._desks[desk.key] = desk
        self._away.pop(desk.key, None)

    def drop(self, key: LaneKey) -> None:
        self._desks.pop(key, None)

    def get(self, key: LaneKey) -> Desk | None:
        return self._desks.get(key)

    async def look(self, heads: Mapping[Chain, int]) -> Prepared:
        """What the lanes of these chains see of a block or a later one. Where no endpoint answers a lane is left out: what waits
        for it is signed under the first head that comes when they do."""
        desks = {key: desk for key, desk in sorted(self._desks.items()) if desk.chain in heads}
        looks = await asyncio.gather(*(desk.wallet.look(heads[desk.chain]) for desk in desks.values()))
        seen: dict[LaneKey, Look] = {}
        for (key, desk), look in zip(desks.items(), looks, strict=True):
            if look is None:
                _log.warning("lane.unseen", chain=key[0], signer=key[1], reason=desk.wallet.failure)
            else:
                seen[key] = look
        now = asyncio.get_running_loop().time()
        return Prepared(desks, seen, {key for key, until in self._away.items() if until > now})

    async def complete(self, prepared: Prepared, outcomes: Sequence[Outcome]) -> Sequence[Outcome] | None:
        """The outcomes with their attempts signed and told of. None where a key did not sign: its lane is `away` now."""
        waiting: dict[LaneKey, list[Attempt]] = {}
        for outcome in outcomes:
            for table, row in outcome.inserts if isinstance(outcome, Done) else ():
                if table is ATTEMPTS:
                    assert isinstance(row, Attempt)
                    waiting.setdefault((row.chain, row.signer), []).append(row)
        if not waiting:
            return outcomes
        made = await asyncio.gather(
            *(_signed(prepared.desks[key].signer, attempts) for key, attempts in waiting.items()),
            return_exceptions=True,
        )
        found: dict[tuple[str, str, int, int], Attempt] = {}
        for key, one in zip(waiting, made, strict=True):
            if isinstance(one, SignerError):
                _log.error("lane.key_unavailable", chain=key[0], signer=key[1], code=one.code, reason=one.detail)
                prepared.away.add(key)
                self._away[key] = asyncio.get_running_loop().time() + AWAY_S
            elif isinstance(one, BaseException):
                raise one
            else:
                found.update((_place(attempt), attempt) for attempt in one)
        if prepared.away & waiting.keys():
            return None
        await asyncio.sleep(0)
        return [_whole(outcome, found) if isinstance(outcome, Done) else outcome for outcome in outcomes]


async def _signed(signer: Signer, attempts: Sequence[Attempt]) -> list[Attempt]:
    signatures = await signer.signatures([digest(attempt.raw) for attempt in attempts])
    whole = []
    for n, (attempt, signature) in enumerate(zip(attempts, signatures, strict=True), start=1):
        if n % AT_ONCE == 0:
            await asyncio.sleep(0)
        raw, tx_hash = signed(attempt.raw, signature)
        whole.append(attempt._replace(tx_hash=tx_hash, raw=raw))
    return whole


def _place(attempt: Attempt) -> tuple[str, str, int, int]:
    return attempt.chain, attempt.signer, attempt.nonce, attempt.n


def _whole(done: Done, found: Mapping[tuple[str, str, int, int], Attempt]) -> Done:
    inserts, emits = [], list(done.emits)
    for table, row in done.inserts:
        if table is ATTEMPTS:
            assert isinstance(row, Attempt)
            row = found[_place(row)]
            emits.append(_told(row))
        inserts.append((table, row))
    return done._replace(inserts=tuple(inserts), emits=tuple(emits))


def _told(attempt: Attempt) -> Emit:
    event = TransactionSigned.known(
        chain=Chain(attempt.chain),
        signer=attempt.signer,
        nonce=attempt.nonce,
        n=attempt.n,
        tx_hash=attempt.tx_hash,
        withdrawal_id=paid_for(attempt),
    )
    return Emit(TRANSACTIONS_SIGNED, f"{attempt.chain}:{attempt.signer}", event, attempt.tx_hash)
