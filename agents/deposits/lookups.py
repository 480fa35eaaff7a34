"""Equal transfers of one transaction on chains that we do not read: how many the custodian's own list has, asked before a
batch's transaction. A vendor's second id for one transfer must not be a second credit, and no chain of ours can tell. And
whether a transfer has failed: what was credited is not taken back on one notification.

Asked only for what may be a second one or has failed: most batches ask nothing. What is not answered within the time is not
known, and `credit_deposits` takes the event again later.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, NamedTuple

import structlog

from agents.deposits.deposit import CUSTODIAN
from agents.deposits.facts import named
from agents.looking import Kept
from chain.errors import ChainError
from connectors.circle.chains import Network, to_circle
from connectors.circle.client import CircleClient
from connectors.circle.transactions import notified
from connectors.errors import ConnectorError
from ledger.commit import TRANSIENT
from ledger.rows import Connection, uuids
from ledger.sql import load as load_sql
from topics.envelope import Received
from topics.events import Chain, DepositNotified, Evidence

_log = structlog.get_logger()
_sql = load_sql("agents.deposits", "deposits.sql")

ASKED_MAX: Final = 10
"""Groups asked for before one batch: two seconds of what Circle allows."""
AT_ONCE: Final = 3
ANSWER_S_MAX: Final = 10.0
"""A batch waits no longer; its other events are not to blame."""

Listing = Callable[[str, str, str], Awaitable[Sequence[DepositNotified]]]
"""(chain, transaction hash, address) -> the custodian's inbound transfers. Raises ConnectorError."""
Looked = Mapping[str, Mapping[str, Evidence]]
"""Group -> the custodian's transfer ids in it, with what it says of each."""


def circle_listing(client: CircleClient, network: Network, usdc_tokens: Mapping[str, str]) -> Listing:
    """Circle's own list, in our words. `usdc_tokens`: Circle's token id -> our asset."""

    async def listing(chain: str, tx_hash: str, address: str) -> list[DepositNotified]:
        blockchain = to_circle(Chain(chain), network)
        found = await client.list_transactions(blockchain=blockchain, tx_hash=tx_hash, destination_address=address)
        told = [notified(transaction, network, usdc_tokens) for transaction in found]
        return [event for event in told if isinstance(event, DepositNotified)]

    return listing


class _Asked(NamedTuple):
    chain: str
    tx_hash: str
    to: str


class Lookups:
    """`prepare` of the stage."""

    def __init__(
        self, listing: Listing, chains_read: frozenset[str], connect: Callable[[], Awaitable[Connection]]
    ) -> None:
        self._listing = listing
        self._chains_read = chains_read
        self._reading = Kept(connect)

    async def prepare(self, events: Sequence[Received]) -> Looked:
        transfers: defaultdict[str, set[str]] = defaultdict(set)
        groups: dict[str, _Asked] = {}
        failed: set[str] = set()
        for received in events:
            event = received.event
            assert isinstance(event, DepositNotified)
            if event.chain in self._chains_read:
                continue
            names = named(event)
            if isinstance(names, ChainError):
                continue  # decide refuses it
            transfers[names.group_id].add(names.report_id)
            fails = event.evidence is Evidence.FAILED and event.source == CUSTODIAN
            if fails:
                failed.add(names.group_id)
            if fails or event.evidence is Evidence.COMPLETE:
                groups[names.group_id] = _Asked(event.chain, names.tx_hash, names.to)
        if not groups:
            return {}
        try:
            async with self._reading.open() as connection:
                known = await connection.fetch(_sql.grouped, uuids(list(groups)))
        except TRANSIENT as error:
            _log.warning("lookups.retry", error=type(error).__name__)
            return {}
        for group_id, report_id in known:
            transfers[group_id].add(report_id)
        wanted = [id for id in groups if id in failed or len(transfers[id]) > 1][:ASKED_MAX]
        return await self._ask({group_id: groups[group_id] for group_id in wanted}) if wanted else {}

    async def _ask(self, groups: Mapping[str, _Asked]) -> Looked:
        looked: dict[str, dict[str, Evidence]] = {}
        limit = asyncio.Semaphore(AT_ONCE)

        async def ask(group_id: str, asked: _Asked) -> None:
            try:
                async with limit:
                    listed = await self._listing(*asked)
            except ConnectorError as error:
                _log.warning("lookups.unanswered", error=error.code)
                return
            found: dict[str, Evidence] = {}
            for event in listed:
                names = named(event)
                if not isinstance(names, ChainError) and names.group_id == group_id:
                    found[event.transfer_id] = event.evidence
            looked[group_id] = found

        try:
            async with asyncio.timeout(ANSWER_S_MAX), asyncio.TaskGroup() as tasks:
                for group_id, asked in groups.items():
                    tasks.create_task(ask(group_id, asked))
        except TimeoutError:
            _log.warning("lookups.unanswered", error="too_slow")
        return looked
