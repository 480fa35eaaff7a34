"""What a restored database and the world outside say of each other: lanes and their chains, calls and their partners. Reads only.

| what | agrees when | where not |
| --- | --- | --- |
| lane | on two endpoints (one, where one is configured) nothing of the signer's has a nonce from our next one on, in no block and | nonces_unknown |
|      | no pool, and each used nonce that is not final in our books was used by an attempt of ours: there is its receipt          |                |
| circle | each wallet that Circle has made for a customer of ours since shortly before our last record is one that we have, or of  | wallets_unknown |
|        | a call of ours that is repeated with its key                                                                              |                |
| circle | each transfer of Circle's with a reference that can be ours, made since then, is one that we have, or of such a call      | transfers_unknown |
| either | the other side answers                                                                                                   | not_reached    |

What is unknown was done by a commit that the database has forgotten, or by somebody else: a person's business, listed.

Final nonces were compared on two endpoints when they became final. A nonce below our next one that we never signed for was
skipped by a person (`lanes resume` after foreign_nonce): a commit that gives a nonce stores its attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from agents.recovery.restoring import COMPARED, WRITER, Gate
from agents.withdrawals.custodian import is_ours
from agents.withdrawals.withdrawal import Lane
from chain.addresses import check_address
from chain.errors import ChainError
from chain.evidence import QUORUM
from chain.outcomes import receipts
from chain.rpc import Asks, Call
from chain.wire import mapping, quantity
from connectors.circle.chains import Network, from_circle
from connectors.circle.client import PAGE_SIZE, CircleClient, CircleWallet
from connectors.errors import ConnectorError
from ledger.audit_logs import Log
from ledger.rows import Connection, uuids
from ledger.sql import load

_sql = load("agents.recovery", "restoring.sql")

NOT_REACHED: Final = "not_reached"
NONCES_UNKNOWN: Final = "nonces_unknown"
WALLETS_UNKNOWN: Final = "wallets_unknown"
TRANSFERS_UNKNOWN: Final = "transfers_unknown"
NO_COMPARISON: Final = "no_comparison"
"""A partner that nobody knows how to ask: a person decides."""
SINCE_MARGIN: Final = timedelta(hours=1)
"""Before our last record, for clocks that differ: a call is in the journal before it is made."""
LISTED_MAX: Final = 50
"""Unknown things in one log; the command prints all."""
PAGES_MAX: Final = 20_000
"""A million wallets; a server that ignores `pageAfter` must not hold us for ever."""


@dataclass(frozen=True)
class Compared:
    """What became of one comparison."""

    name: str
    """The lane's key or the gate's name."""
    code: str = ""
    """Why it does not agree; empty: it does."""
    told: str = ""
    """For people: what was seen."""
    unknown: tuple[str, ...] = ()
    """What the other side has and the database does not."""

    def log(self, actor: str) -> Log:
        shown = ", ".join(self.unknown[:LISTED_MAX])
        after = {"told": self.told, "unknown": shown, "unknown_count": len(self.unknown)}
        resource = "gate" if self.name.startswith("partner:") else "lane"
        status = ("refused", self.code) if self.code else ("done", None)
        return Log(actor, COMPARED, resource, self.name, None, after, *status)


# -- lanes ---------------------------------------------------------------------------------------------------------------


class _Word(NamedTuple):
    """One endpoint's."""

    head: int
    latest: int
    """Nonces that are used."""
    pending: int
    """With those in its pool."""


async def compare_lane(connection: Connection, lane: Lane, rpcs: Sequence[Asks]) -> Compared:
    """The lane with what its endpoints say."""
    if not rpcs:
        return Compared(lane.key, NOT_REACHED, f"no endpoint is set for {lane.chain}")
    agree = min(QUORUM, len(rpcs))
    seen: int = await connection.fetchval(_sql.highest_block, lane.chain) or 0
    words: list[tuple[Asks, _Word]] = []
    failures: list[str] = []
    for rpc, word in zip(rpcs, await asyncio.gather(*(_ask(rpc, lane.signer) for rpc in rpcs)), strict=True):
        if isinstance(word, str):
            failures.append(word)
        elif word.head < seen:
            failures.append(f"{rpc.endpoint} is at block {word.head}, behind {seen} that we have seen")
        else:
            words.append((rpc, word))
    if len(words) < agree:
        return Compared(lane.key, NOT_REACHED, f"{len(words)} of {agree} endpoints answer: " + "; ".join(failures))
    used = max(word.latest for _, word in words)
    wanted = max(used, *(word.pending for _, word in words))
    rows = await connection.fetch(_sql.used_nonces, lane.chain, lane.signer, used)
    ours = {nonce: list(hashes) for nonce, hashes in rows}
    found: dict[int, int] = dict.fromkeys(ours, 0)
    for mined in await asyncio.gather(*(_mined(rpc, ours) for rpc, _ in words)):
        for nonce in mined:
            found[nonce] += 1
    unknown = [nonce for nonce, endpoints in found.items() if endpoints < agree]
    unknown += range(lane.next_nonce, wanted)
    told = f"next nonce {lane.next_nonce}, the chain's {used}, with its pools {wanted}; {len(words)} endpoints"
    return Compared(lane.key, NONCES_UNKNOWN if unknown else "", told, tuple(f"nonce {nonce}" for nonce in unknown))


async def _ask(rpc: Asks, signer: str) -> _Word | str:
    """Its word, or why it has none."""
    calls = [
        Call("eth_getBlockByNumber", ["latest", False], lambda block: quantity(mapping(block)["number"])),
        Call("eth_getTransactionCount", [signer, "latest"], quantity),
        Call("eth_getTransactionCount", [signer, "pending"], quantity),
    ]
    try:
        await rpc.verify_chain_id()
        return _Word(*await rpc.ask(calls))
    except ChainError as error:
        return str(error)


async def _mined(rpc: Asks, attempts: dict[int, list[str]]) -> set[int]:
    """The nonces of which the endpoint has a receipt; none where it does not answer."""
    places = [(nonce, tx_hash) for nonce, hashes in attempts.items() for tx_hash in hashes]
    try:
        answers = await receipts(rpc, [tx_hash for _, tx_hash in places]) if places else []
    except ChainError:
        return set()
    return {nonce for (nonce, _), receipt in zip(places, answers, strict=True) if receipt is not None}


# -- partners ------------------------------------------------------------------------------------------------------------


async def compare_circle(
    connection: Connection, gate: Gate, client: CircleClient | None, network: Network, wallet_set_id: str | None
) -> Compared:
    """The wallets and the transfers that Circle has with those that we know of. `wallet_set_id`: as it is set, else as it is
    stored."""
    if client is None:
        return Compared(gate.name, NOT_REACHED, "no credentials for Circle are set")
    last: datetime | None = await connection.fetchval(_sql.last_before, WRITER, gate.closed_at)
    since = None if last is None else last - SINCE_MARGIN
    within = wallet_set_id or await connection.fetchval(_sql.wallet_set, network)
    try:
        wallets = await _compare_wallets(connection, gate, client, network, since, within)
        if wallets.code:
            return wallets
        transfers = await _compare_transfers(connection, gate, client, since)
        return replace(transfers, told=f"{wallets.told}, {transfers.told}")
    except ConnectorError as error:
        return Compared(gate.name, NOT_REACHED, f"{error.code}: {error}")


async def _compare_wallets(
    connection: Connection,
    gate: Gate,
    client: CircleClient,
    network: Network,
    since: datetime | None,
    within: str | None,
) -> Compared:
    seen = 0
    unknown: list[str] = []
    after: str | None = None
    for _ in range(PAGES_MAX):
        page = await client.wallets_page(since=since, after=after, wallet_set_id=within)
        seen += len(page)
        unknown += await _unknown(connection, page, network)
        if len(page) < PAGE_SIZE:
            told = f"{seen} wallets made since {since:%Y-%m-%d %H:%M}" if since else f"{seen} wallets"
            return Compared(gate.name, WALLETS_UNKNOWN if unknown else "", told, tuple(unknown))
        if page[-1].id == after:
            break
        after = page[-1].id
    return Compared(gate.name, NOT_REACHED, "Circle's list of wallets does not end")


async def _compare_transfers(
    connection: Connection, gate: Gate, client: CircleClient, since: datetime | None
) -> Compared:
    seen = 0
    unknown: list[str] = []
    after: str | None = None
    for _ in range(PAGES_MAX):
        page = await client.outbound_page(since=since, after=after)
        ours = {str(one.get("id")): str(one["refId"]) for one in page if is_ours(one.get("refId"))}
        seen += len(ours)
        rows = await connection.fetch(_sql.transfers_known, list(ours), uuids(list(ours.values())))
        known = {row[0] for row in rows}
        unknown += [f"transfer {key} of withdrawal {reference}" for key, reference in ours.items() if key not in known]
        if len(page) < PAGE_SIZE:
            told = f"{seen} transfers"
            return Compared(gate.name, TRANSFERS_UNKNOWN if unknown else "", told, tuple(unknown))
        if str(page[-1].get("id")) == after:
            break
        after = str(page[-1].get("id"))
    return Compared(gate.name, NOT_REACHED, "Circle's list of transfers does not end")


async def _unknown(connection: Connection, page: Sequence[CircleWallet], network: Network) -> list[str]:
    """Those with a reference of ours that the database neither has nor has a call for."""
    found: dict[tuple[str, str], str] = {}
    for wallet in page:
        chain = from_circle(wallet.blockchain, network)
        if chain is None or not wallet.ref_id:
            continue
        try:
            address = check_address(chain, wallet.address)
        except ChainError:
            address = wallet.address
        found[(chain.value, address)] = wallet.ref_id
    if not found:
        return []
    chains, addresses = [chain for chain, _ in found], [address for _, address in found]
    for place in await connection.fetch(_sql.wallets_known, chains, addresses):
        found.pop(tuple(place), None)
    wanted = [(user, chain) for (chain, _), user in found.items()]
    rows = await connection.fetch(_sql.wallets_wanted, [user for user, _ in wanted], [chain for _, chain in wanted])
    waiting = {tuple(row) for row in rows}
    return [f"{chain} {address} of {user}" for (chain, address), user in found.items() if (user, chain) not in waiting]
