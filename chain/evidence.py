"""Whether a transfer is on its chain, at finality, in the words of two endpoints.

| an endpoint                                    | its word                                                           |
| ---------------------------------------------- | ------------------------------------------------------------------ |
| is behind, fails, is slow, of another chain    | none                                                               |
| contradicts itself                             | none                                                               |
| has the transfer in a canonical block          | there, in that block, at those places, final or not                |
| has no such transfer, its head past the depth  | missing                                                            |

What `QUORUM` endpoints say alike, and more of them than say anything else, is found; everything else is `Undecided`, ask
again. So one endpoint that lies, of three, neither makes money final nor takes it back. The exception is a chain with one
endpoint configured: there its word is all there is. Give endpoints of different operators for two words to mean something.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from chain.errors import ChainError
from chain.finality import is_final
from chain.logs import transfers_of
from chain.rpc import Receipt, Rpc

QUORUM: Final = 2
"""Endpoints that must say the same, where so many are configured."""


class Doubt(StrEnum):
    """Why nothing can be said yet."""

    BEHIND = "behind"
    """An endpoint's head is below the head that the question was asked at."""
    NOT_FINAL = "not_final"
    """The transaction is in a block that is not deep enough."""
    CONTRADICTION = "contradiction"
    """One endpoint's answers do not fit together: it is being reorganised, or balances load over several nodes."""
    DISAGREEMENT = "disagreement"
    """Endpoints say different things."""
    FAILED = "failed"
    """An endpoint did not answer, or with garbage."""


@dataclass(frozen=True, slots=True)
class Canonical:
    """It is there, final, in the block it was reported in."""

    block_hash: str
    block_number: int
    log_indexes: tuple[int, ...]
    """Of all equal transfers (token, to, amount) in the transaction, in log order."""


@dataclass(frozen=True, slots=True)
class Moved:
    """It is in another block than it was reported in. Final or not: ask again with this block once it is deep enough."""

    block_hash: str
    block_number: int
    log_indexes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Missing:
    """The endpoints say that the chain has no such transfer."""


@dataclass(frozen=True, slots=True)
class Undecided:
    reason: Doubt
    detail: str = ""


Finding = Canonical | Moved | Missing | Undecided


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one endpoint has the transfer."""

    block_hash: str
    block_number: int
    log_indexes: tuple[int, ...]
    final: bool


_Answer = _Place | Missing | Undecided


@dataclass(frozen=True, slots=True)
class _Wanted:
    tx_hash: str
    block_hash: str | None
    token: str
    transfers: tuple[tuple[str, int], ...]
    """(to, amount)"""


async def find_transfer(
    rpcs: Sequence[Rpc],
    tx_hash: str,
    block_hash: str | None,
    token: str,
    to: str,
    amount: int,
    head: int,
    depth: int,
) -> Finding:
    """Look the transfer up on the endpoints. Raises nothing but a programmer's error.

    Ask when `head` (a number) is at least `depth` blocks above the block it was reported in; only the word of an endpoint that
    has reached `head` counts. `block_hash` None: reported without a block, so the first final one is canonical. Hashes and
    addresses are lower case, `amount` is in base units. Nobody waits for an endpoint whose word could change nothing.
    """
    (finding,) = await find_transfers(rpcs, tx_hash, block_hash, token, [(to, amount)], head, depth)
    return finding


async def find_transfers(
    rpcs: Sequence[Rpc],
    tx_hash: str,
    block_hash: str | None,
    token: str,
    transfers: Sequence[tuple[str, int]],
    head: int,
    depth: int,
) -> list[Finding]:
    """As `find_transfer`, several (to, amount) of one transaction, in their order. An endpoint is asked once for all of them:
    anybody can have a thousand transfers to us in one receipt."""
    assert rpcs, "without an endpoint nothing can be known"
    wanted = _Wanted(tx_hash, block_hash, token, tuple(transfers))
    said: list[tuple[Rpc, list[_Answer]]] = []

    async def ask(rpc: Rpc) -> None:
        said.append((rpc, await _ask(rpc, wanted, head, depth)))

    asked = [asyncio.create_task(ask(rpc)) for rpc in rpcs]
    heard: list[tuple[Rpc, list[_Answer]]] = []
    agreed: list[_Place | Missing | None] = []
    try:
        for answer in asyncio.as_completed(asked):
            await answer
            heard = list(said)
            agreed = [_agreed([words[n] for _, words in heard], len(rpcs)) for n in range(len(transfers))]
            if None not in agreed:
                break
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    return [_found([(rpc, words[n]) for rpc, words in heard], one, block_hash) for n, one in enumerate(agreed)]


def _found(said: Sequence[tuple[Rpc, _Answer]], agreed: _Place | Missing | None, block_hash: str | None) -> Finding:
    if agreed is None:
        return _doubt([word for _, word in said])
    _tell_outvoted(said, agreed)
    return _finding(agreed, block_hash)


def _tell_outvoted(said: Sequence[tuple[Rpc, _Answer]], agreed: _Place | Missing) -> None:
    """Of what is final: short of that, honest endpoints differ while the chain is reorganised."""

    def firm(word: _Answer) -> bool:
        return isinstance(word, Missing) or (isinstance(word, _Place) and word.final)

    for rpc, word in said:
        if firm(word) and firm(agreed) and word != agreed:
            rpc.health.outvoted()


def _place_of(word: _Place | Missing) -> _Place | Missing:
    """Whether it is final aside: one that is a block ahead calls final what the other will call final next."""
    return replace(word, final=False) if isinstance(word, _Place) else word


def _agreed(answers: Sequence[_Answer], endpoints: int) -> _Place | Missing | None:
    """What enough endpoints say, and more than can still say anything else; None while there is no such thing."""
    needed = min(QUORUM, endpoints)
    said = [answer for answer in answers if not isinstance(answer, Undecided)]
    ranked = Counter(map(_place_of, said)).most_common(2)
    others = ranked[1][1] if len(ranked) > 1 else 0
    if not ranked or ranked[0][1] < needed or ranked[0][1] <= others + endpoints - len(answers):
        return None
    agreed = ranked[0][0]
    if isinstance(agreed, Missing):
        return agreed
    final = replace(agreed, final=True)
    return final if said.count(final) >= needed else agreed


def _finding(agreed: _Place | Missing, block_hash: str | None) -> Finding:
    if isinstance(agreed, Missing):
        return agreed
    found = (agreed.block_hash, agreed.block_number, agreed.log_indexes)
    if agreed.block_hash == block_hash or (block_hash is None and agreed.final):
        return Canonical(*found) if agreed.final else Undecided(Doubt.NOT_FINAL)
    return Moved(*found)


def _doubt(answers: Sequence[_Answer]) -> Undecided:
    """Why they do not agree: what an endpoint itself could not say, else that they say different things."""
    unsaid = [answer for answer in answers if isinstance(answer, Undecided)]
    return unsaid[0] if unsaid else Undecided(Doubt.DISAGREEMENT)


async def _ask(rpc: Rpc, wanted: _Wanted, head: int, depth: int) -> list[_Answer]:
    """Its word on each of the transfers."""
    alike: _Answer
    try:
        receipt, latest = await rpc.receipt_and_head(wanted.tx_hash)
        own_head = latest.number
        if own_head < head:
            alike = Undecided(Doubt.BEHIND, f"{rpc.endpoint} is at {own_head}, asked at {head}")
        elif receipt is None:
            alike = await _absent(rpc, wanted)
        else:
            return await _present(rpc, wanted, receipt, own_head, depth)
    except ChainError as error:
        alike = Undecided(Doubt.FAILED, str(error))
    return [alike] * len(wanted.transfers)


async def _absent(rpc: Rpc, wanted: _Wanted) -> Missing | Undecided:
    """No receipt. An endpoint that still has the transaction in the canonical block it was reported in contradicts itself."""
    reported = None if wanted.block_hash is None else await rpc.block_by_hash(wanted.block_hash)
    if reported is not None and wanted.tx_hash in reported.tx_hashes:
        canonical = await rpc.block_by_number(reported.number)
        if canonical is None or canonical.hash == reported.hash:
            return Undecided(Doubt.CONTRADICTION, f"{rpc.endpoint} has the block of {wanted.tx_hash}, not its receipt")
    return Missing()


async def _present(rpc: Rpc, wanted: _Wanted, receipt: Receipt, own_head: int, depth: int) -> list[_Answer]:
    def contradicts(detail: str) -> list[_Answer]:
        return [Undecided(Doubt.CONTRADICTION, f"{rpc.endpoint}: {detail}")] * len(wanted.transfers)

    by_hash, by_number = await rpc.block_both_ways(receipt.block_hash, receipt.block_number)
    if (
        by_hash is None
        or by_hash.number != receipt.block_number
        or by_number is None
        or by_number.hash != receipt.block_hash
        or wanted.tx_hash not in by_number.tx_hashes
    ):
        return contradicts(f"the receipt's block {receipt.block_number} is another")
    final = is_final(own_head, receipt.block_number, depth)
    place = (receipt.block_hash, receipt.block_number, receipt.tx_hash)
    there: dict[tuple[str, int], tuple[int, ...]] = {}
    for transfer in transfers_of(receipt.logs, wanted.token) if receipt.succeeded else ():
        if (transfer.block_hash, transfer.block_number, transfer.tx_hash) != place:
            return contradicts("logs of another block in the receipt")
        key = (transfer.to, transfer.amount)
        there[key] = (*there.get(key, ()), transfer.log_index)
    absent = (
        Missing()
        if final
        else Undecided(Doubt.NOT_FINAL, "the transaction is there without the transfer, in a block that may still go")
    )
    return [
        _Place(receipt.block_hash, receipt.block_number, there[one], final) if one in there else absent
        for one in wanted.transfers
    ]
