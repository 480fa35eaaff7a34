"""Circle's transfers that have not ended here -> custodian_wallets -> transfers.notified

Asks Circle how each of them stands, one by one, the older the rarer: what a lost webhook would have told arrives here. One poller
in the whole deployment. Whichever was asked for least lately is next, so that neither many that stay as they are nor one for which
Circle has no answer keep it from the others. What is known already is not said again; an end that is not settled is said anew
every hour, so that it is looked at again; so is one that Circle has not shown, or not readably, for UNSHOWN_FOR, and as it was before
when it shows it again. Remembers nothing: after a start it asks for all of them.

Before that it looks, once, which address each wallet has that withdrawals leave from: what it holds is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

import structlog

from agents.lone_writer import SILENCE_S, LoneWriter
from agents.services import Services
from agents.withdrawals.custodian import ENDS, NOT_SHOWN, Source, Transfer, open_transfers, rank
from chain.addresses import check_address
from chain.errors import ChainError
from connectors.circle.chains import Network, from_circle
from connectors.circle.client import CircleWallet
from connectors.circle.transactions import SOURCE, transferred
from connectors.errors import ConnectorError, Refused
from ledger.record import Message
from ledger.rows import Connection, Op, block
from ledger.sql import load
from ledger.tables import CUSTODIAN_WALLETS
from topics.catalog import TRANSFERS_NOTIFIED
from topics.envelope import value_of
from topics.events import TransferNotified

_log = structlog.get_logger()
_sql = load("agents.withdrawals", "custodian.sql")

WRITER: Final = "poll_transfers"
LOOKUPS_MAX: Final = 20
"""In one round: a second of what Circle allows."""
PAUSE_SHARE: Final = 0.1
"""Of its age, until a transfer is looked up again."""
PAUSE_MAX: Final = timedelta(hours=1)
UNSHOWN_FOR: Final = timedelta(minutes=10)
"""Circle may be slow to show what it has just made, and not all that answers there may know it."""


class CircleLooks(Protocol):
    """What the poller asks of Circle; connectors.circle.client has it."""

    async def transaction(self, transaction_id: str) -> dict[str, Any]: ...
    async def wallet(self, wallet_id: str) -> CircleWallet: ...


def news(said: TransferNotified, transfer: Transfer) -> bool:
    """Whether it says what the row does not have. An end does: the row of a withdrawal that is open is not settled by it."""
    known = said.tx_hash is None or said.tx_hash in transfer.hashes
    later = said.state != transfer.state and rank(said.state) >= rank(transfer.state)  # it is stuck, and not any more
    return said.state in ENDS or later or not known


def message(said: TransferNotified, withdrawal_id: str, now: datetime) -> Message:
    said = said.model_copy(update={"reference": withdrawal_id})
    # the hour: what was said before is said again, as it is the news again
    event_id = f"{said.transfer_id}:{said.state}:{said.tx_hash or ''}:{now:%Y-%m-%dT%H}"
    return Message(TRANSFERS_NOTIFIED.name, withdrawal_id.encode(), value_of(said), event_id, said.ce_type())


class PollTransfers:
    """`work` never returns."""

    def __init__(
        self,
        circle: CircleLooks,
        network: Network,
        usdc_tokens: Mapping[str, str],
        sources: Mapping[str, Source],
        interval_s: float,
        services: Services,
    ) -> None:
        """`sources`: by chain."""
        self._circle = circle
        self._network: Network = network
        self._usdc_tokens = usdc_tokens
        self._sources = sources
        self._interval_s = interval_s
        self._services = services
        self._lone = LoneWriter(WRITER, services, max(SILENCE_S, 3 * interval_s))
        self._looked_at: dict[str, datetime] = {}
        """By withdrawal: Circle answered."""
        self._asked: dict[str, int] = {}
        """By withdrawal: which question of this poller's was its last, answered or not."""
        self._questions = 0
        self._unshown: dict[str, datetime] = {}
        """By withdrawal: since when Circle does not show its transfer, whenever it was asked."""
        self._reviewed: frozenset[str] = frozenset()
        """Withdrawals that wait for any word of Circle's."""
        self._told: dict[str, str] = {}
        """By withdrawal: the newest event's id."""

    async def work(self) -> None:
        await self._lone.rounds(self._work, self._failed, (ConnectorError,))

    async def _work(self, connection: Connection) -> float:
        await self.round(connection)
        return self._interval_s

    def _failed(self, error: Exception) -> float:
        if isinstance(error, Refused):
            # a person must look: the API key, or a wallet of the settings that Circle does not know
            _log.critical("circle.refuses_a_look", status=error.status, reason=str(error))
            self._services.unready[WRITER] = error.code
        else:
            _log.warning("transfers.retry", error=getattr(error, "code", type(error).__name__), reason=str(error))
        return self._interval_s

    async def round(self, connection: Connection) -> None:
        """The wallets, then what is due. For who leads."""
        if await self._wallets(connection):
            self._services.unready.pop(WRITER, None)
        now = self._services.clock()
        waiting, self._reviewed = await open_transfers(connection)
        self._looked_at = {one.withdrawal_id: at for one in waiting if (at := self._looked_at.get(one.withdrawal_id))}
        self._unshown = {one.withdrawal_id: at for one in waiting if (at := self._unshown.get(one.withdrawal_id))}
        self._told = {one.withdrawal_id: id for one in waiting if (id := self._told.get(one.withdrawal_id))}
        self._asked = {one.withdrawal_id: self._asked.get(one.withdrawal_id, 0) for one in waiting}
        due = [one for one in waiting if self._is_due(one, now)]
        due.sort(key=lambda one: self._asked[one.withdrawal_id])  # the oldest of those that were not asked for yet
        answered, messages, failure = await self._answers(due[:LOOKUPS_MAX])
        if messages:
            await self._lone.commit([], messages, {"told": len(messages)})
            self._told |= {(said.key or b"").decode(): said.id for said in messages}
        self._looked_at |= dict.fromkeys(answered, now)
        if failure is not None:
            raise failure

    async def _answers(self, due: Sequence[Transfer]) -> tuple[list[str], list[Message], ConnectorError | None]:
        """The withdrawals for which Circle answered, what is to be told, and the failure that ended it before all were asked for."""
        answered: list[str] = []
        messages: list[Message] = []
        for one in due:
            self._questions += 1
            self._asked[one.withdrawal_id] = self._questions
            try:
                said = await self._look(one)
            except ConnectorError as error:
                return answered, messages, error
            answered.append(one.withdrawal_id)
            if said is not None:
                messages.append(said)
        return answered, messages, None

    def _is_due(self, transfer: Transfer, now: datetime) -> bool:
        looked_at = self._looked_at.get(transfer.withdrawal_id)
        if looked_at is None:
            return True
        pause = min((looked_at - transfer.created_at) * PAUSE_SHARE, PAUSE_MAX)
        return now - looked_at >= max(pause, timedelta(seconds=self._interval_s))

    async def _look(self, transfer: Transfer) -> Message | None:
        assert transfer.transfer_id is not None
        try:
            found = await self._circle.transaction(transfer.transfer_id)
        except Refused as error:
            if error.ours:
                raise
            return self._not_shown(transfer, f"status {error.status}")
        said = transferred({**found, "id": transfer.transfer_id}, self._network, self._usdc_tokens)
        if not isinstance(said, TransferNotified):
            return self._not_shown(transfer, getattr(said, "reason", "not ours"))
        self._unshown.pop(transfer.withdrawal_id, None)
        tells = news(said, transfer) or transfer.withdrawal_id in self._reviewed
        return self._untold(said, transfer.withdrawal_id) if tells else None

    def _not_shown(self, transfer: Transfer, reason: str) -> Message | None:
        key, now = transfer.withdrawal_id, self._services.clock()
        _log.error("circle.transfer_not_shown", id=transfer.transfer_id, withdrawal=key, reason=reason)
        if now - self._unshown.setdefault(key, now) < UNSHOWN_FOR:
            return None
        said = {"source": SOURCE, "transfer_id": transfer.transfer_id, "state": NOT_SHOWN}
        return self._untold(TransferNotified.model_validate(said), key)

    def _untold(self, said: TransferNotified, withdrawal_id: str) -> Message | None:
        told = message(said, withdrawal_id, self._services.clock())
        return None if self._told.get(withdrawal_id) == told.id else told

    async def _wallets(self, connection: Connection) -> bool:
        """Makes a row of each wallet that has none; whether each is of its chain."""
        known = {tuple(row) for row in await connection.fetch(_sql.wallets, SOURCE)}
        rows, right = [], True
        for chain, source in self._sources.items():
            if (chain, source.wallet_id) in known:
                continue
            address = blockchain = ""
            try:
                wallet = await self._circle.wallet(source.wallet_id)
                blockchain = wallet.blockchain
                address = check_address(chain, wallet.address)
            except ChainError:
                pass
            except Refused as error:  # it knows none of this id: no reason to ask for no transfer
                if error.ours:
                    raise
            if not address or from_circle(blockchain, self._network) != chain:
                _log.critical("circle.wrong_wallet", chain=chain, wallet=source.wallet_id, blockchain=blockchain)
                self._services.unready[WRITER], right = "wrong_wallet", False
                continue
            rows.append((chain, address, SOURCE, source.wallet_id, self._services.clock()))
        if rows:
            await self._lone.commit([block(CUSTODIAN_WALLETS, Op.UPSERT, rows)], [], {"wallets": len(rows)})
        return right
