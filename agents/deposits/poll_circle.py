"""Circle's list of inbound transactions -> source_cursors, circle_transfers -> deposits.notified

Asks Circle what came in, on its own: what its webhooks forget arrives here, under the same transfer id, so that both meet at
one deposit. One poller of each product (W3S, Mint) in the whole deployment; cursor and messages are one commit.

A round reads the list from the cursor less the overlap to its end: Circle orders it by when a transaction was made, and one may
show up late. Of a list that begins with its newest the cursor moves when all of it is read. What changes its state after that, no
later part of the list says: transactions that are not at their end are remembered and looked up one by one, the older the rarer.
What `credit_deposits` has from the webhook already is not said again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple, Protocol

import orjson
import structlog

from agents.deposits.deposit import report_id
from agents.deposits.evidence import is_news
from agents.lone_writer import SILENCE_S, LoneWriter
from agents.services import Services
from connectors.circle import mint_webhooks, transactions
from connectors.circle.chains import Network
from connectors.circle.transactions import created_at, notified
from connectors.errors import ConnectorError, Refused, Unknown
from connectors.webhooks.source import NotUnderstood, Publish, Translation
from ledger.record import Message
from ledger.rows import Block, Connection, Op, block
from ledger.sql import load
from ledger.tables import CIRCLE_TRANSFERS, SOURCE_CURSORS
from topics.catalog import DEPOSITS_NOTIFIED, WEBHOOKS_DLQ
from topics.envelope import headers_of, value_of
from topics.events import DepositNotified, Evidence

_log = structlog.get_logger()
_sql = load("agents.deposits", "poll_circle.sql")

RETRY_FIRST_S: Final = 1.0
"""Then doubled up to the interval: a look that failed is never waited for longer than one that did not."""
LOOKUPS_MAX: Final = 20
"""Single look-ups between two rounds: a second of what Circle allows."""
LOOKUP_PAUSE: Final = 10
"""A transaction that is not at its end is looked up again after a tenth of its age: one that a chain dropped never ends."""
FORGET_MAX: Final = 1_000

Transaction = dict[str, Any]


class CircleLists(Protocol):
    """What the poller asks of a product of Circle's; connectors.circle.client has both."""

    async def inbound_page(self, *, since: datetime | None = None, after: str | None = None) -> list[Transaction]: ...
    async def transaction(self, transaction_id: str) -> Transaction: ...


class Product(NamedTuple):
    """What is particular about the list of one of Circle's products."""

    source: str
    writer: str
    path: str
    status: str
    """The field that says how far a transaction is."""
    ended: frozenset[str]
    newest_first: bool
    rows: str
    """What its ids in circle_transfers begin with."""
    read: Callable[[Transaction, Polled], Translation]


def _read_w3s(transaction: Transaction, polled: Polled) -> Translation:
    said = notified(transaction, polled.network, polled.usdc_tokens)
    if isinstance(said, NotUnderstood):
        return said
    # of its contents too: a transaction that was mined again has the same state in another block
    contents = hashlib.blake2b(value_of(said), digest_size=8).hexdigest()
    event_id = f"{identity(transaction)}:{transaction.get('state')}:{contents}"
    return Publish(DEPOSITS_NOTIFIED, said.to.encode(), said, event_id, W3S.writer)


def _read_mint(transfer: Transaction, _polled: Polled) -> Translation:
    """In the notification's own envelope: whichever comes second is a repeat."""
    return mint_webhooks.notified(transfer)


W3S: Final = Product(
    transactions.SOURCE, "poll_circle", "/v1/w3s/transactions", "state", transactions.ENDED,
    newest_first=False, rows="", read=_read_w3s,
)  # fmt: skip
MINT: Final = Product(
    mint_webhooks.SOURCE, "poll_circle.mint", "/v1/businessAccount/transfers", "status", mint_webhooks.ENDED,
    newest_first=True, rows="circle_mint:", read=_read_mint,
)  # fmt: skip


@dataclass(frozen=True)
class Polled:
    """What is polled, and how."""

    network: Network
    usdc_tokens: Mapping[str, str]
    """Circle's token id -> our asset."""
    interval_s: float = 30.0
    overlap: timedelta = timedelta(minutes=10)
    page_size: int = 50
    product: Product = W3S


class Seen(NamedTuple):
    """A row of circle_transfers."""

    id: str
    state: str
    created_at: datetime
    looked_at: datetime
    ended_at: datetime | None


class Known(NamedTuple):
    """What we have of a transaction: the poller's own row, and the evidence that a report of it has brought."""

    state: str | None
    created_at: datetime | None
    evidence: str | None


class Found(NamedTuple):
    seen: Seen
    message: Message | None


def decide(
    transaction: Transaction, known: Known, polled: Polled, now: datetime, *, looked_up: bool = False
) -> Found | None:
    """What a transaction of the list says that we do not have; None for nothing. Pure and total."""
    product = polled.product
    state = _text(transaction.get(product.status), 40) or "unknown"
    if state == known.state and not looked_up:
        return None
    key = identity(transaction)
    made = known.created_at or created_at(transaction) or now
    seen = Seen(product.rows + key, state, made, now, now if state in product.ended else None)
    if state == known.state:
        return Found(seen, None)
    said = product.read(transaction, polled)
    if said == mint_webhooks.NOT_INCOMING:
        return None
    if isinstance(said, NotUnderstood):
        return Found(seen, _unreadable(transaction, said, product, now))
    if not isinstance(said, Publish):
        return Found(seen, None)
    event = said.event
    assert isinstance(event, DepositNotified)
    if known.evidence is not None and not is_news(event.evidence, Evidence(known.evidence)):
        return Found(seen, None)
    headers = headers_of(event.ce_type(), event_id=said.event_id, source=said.source, time=now)
    return Found(seen, Message(said.topic.name, said.key, value_of(event), headers=headers))


def identity(transaction: Transaction) -> str:
    """Circle's id of it; where there is none that can be one, its contents'."""
    return _text(transaction.get("id"), 200) or f"sha256:{hashlib.sha256(_json(transaction)).hexdigest()}"


def _text(given: object, length_max: int) -> str | None:
    fits = isinstance(given, str) and 0 < len(given) <= length_max and given.isascii() and given.isprintable()
    return str(given) if fits else None


def _json(transaction: Transaction) -> bytes:
    return orjson.dumps(transaction, option=orjson.OPT_SORT_KEYS)


def _unreadable(transaction: Transaction, said: NotUnderstood, product: Product, now: datetime) -> Message | None:
    if said.code == "unknown_state":
        return None  # on its way, in a word of Circle's that we do not know: the end will be another one
    fields = {"vendor": product.source, "path": f"GET {product.path}", "code": said.code, "reason": said.reason}
    headers = [(name, value.encode()) for name, value in fields.items()]
    headers.append(("received_at", now.isoformat().encode()))
    return Message(WEBHOOKS_DLQ.name, product.source.encode(), _json(transaction), headers=headers)


class PollCircle:
    """`work` never returns."""

    def __init__(
        self, circle: CircleLists, polled: Polled, services: Services, read: Callable[[], None] = lambda: None
    ) -> None:
        """`read()` is called whenever the list was read to its end."""
        self._circle = circle
        self._read = read
        self._polled = polled
        self._product = polled.product
        self._writer = polled.product.writer
        self._services = services
        self._lone = LoneWriter(self._writer, services, max(SILENCE_S, 3 * polled.interval_s))
        self._log = _log.bind(stage=self._writer)
        self._failures = 0
        self._unanswered: dict[str, None] = {}
        """Transactions that Circle gave no answer for, latest last: the others are looked up before them."""

    async def work(self) -> None:
        await self._lone.rounds(self._work, self._failed, (ConnectorError,))

    async def _work(self, connection: Connection) -> float:
        await self.round(connection)
        self._services.unready.pop(self._writer, None)
        self._failures = 0
        return self._polled.interval_s

    def _failed(self, error: Exception) -> float:
        self._failures += 1
        if isinstance(error, Refused):
            # a person must look: the API key, most likely
            self._log.critical("circle.refuses_the_list", status=error.status, reason=str(error))
            self._services.unready[self._writer] = error.code
        else:
            self._log.warning("circle.retry", error=getattr(error, "code", type(error).__name__), reason=str(error))
        return min(self._polled.interval_s, RETRY_FIRST_S * 2.0 ** min(self._failures, 20))

    async def round(self, connection: Connection) -> None:
        """The list to its end, then single look-ups. For who leads."""
        since = await connection.fetchval(_sql.cursor, self._product.source)
        if since is None:
            since = self._services.clock()
            await self._commit([], since, moved=True)  # a crash in the first round must not move the start
        start, newest, after = since - self._polled.overlap, since, None
        while True:
            page = await self._circle.inbound_page(since=start, after=after)
            last = len(page) < self._polled.page_size
            found = await self._decide(connection, page)
            # a time of Circle's that is ahead of ours must not carry us over what is still to come
            made = [at for at in map(created_at, page) if at is not None and at <= self._services.clock()]
            newest = max([newest, *made])
            # what died between two pages must find the older ones behind them again
            moved = newest > since and (last or not self._product.newest_first)
            since = newest if moved else since
            await self._commit(found, since, moved=moved)
            if last:
                break
            before, after = after, next((id for each in reversed(page) if (id := _text(each.get("id"), 200))), None)
            if after in (None, before):
                raise Unknown("a page of Circle's list after which nothing can be asked for")
        self._read()
        failure = await self._look_up(connection, start, since)
        await self._forget(connection, start)
        if failure is not None:
            raise failure

    async def _look_up(self, connection: Connection, listed_from: datetime, since: datetime) -> ConnectorError | None:
        """Those that are not at their end and that the list from `listed_from` does not show; the failure that ended it before all
        were looked up."""
        rows = self._product.rows
        overdue = await connection.fetch(
            _sql.overdue,
            listed_from,
            self._services.clock(),
            LOOKUP_PAUSE,
            LOOKUPS_MAX,
            list(self._unanswered),
            bool(rows),
        )
        found = []
        failure: ConnectorError | None = None
        for row, state in overdue:
            self._unanswered.pop(row, None)
            key = row.removeprefix(rows)
            try:
                found.append({**await self._circle.transaction(key), "id": key})
            except ConnectorError as error:
                if isinstance(error, Refused) and not error.ours:
                    self._log.warning("circle.transaction_gone", id=key, status=error.status)
                    found.append({"id": key, self._product.status: state})
                    continue
                self._unanswered[row] = None
                failure = error
                break
        if len(self._unanswered) > FORGET_MAX:
            del self._unanswered[next(iter(self._unanswered))]
        await self._commit(await self._decide(connection, found, looked_up=True), since, moved=False)
        return failure

    async def _decide(
        self, connection: Connection, page: Sequence[Transaction], *, looked_up: bool = False
    ) -> list[Found]:
        by_id = {identity(transaction): transaction for transaction in page}
        product = self._product
        reports = [report_id(product.source, key) for key in by_id]
        rows = await connection.fetch(_sql.known, [product.rows + key for key in by_id], reports)
        known = {row.removeprefix(product.rows): Known(*rest) for row, *rest in rows}
        now = self._services.clock()
        decided = [decide(each, known[key], self._polled, now, looked_up=looked_up) for key, each in by_id.items()]
        return [one for one in decided if one is not None]

    async def _commit(self, found: Sequence[Found], since: datetime, *, moved: bool) -> None:
        """What was found and the cursor; nothing when nothing is new."""
        blocks: list[Block] = []
        if moved:
            blocks.append(block(SOURCE_CURSORS, Op.UPSERT, [(self._product.source, since, self._services.clock())]))
        if found:
            blocks.append(block(CIRCLE_TRANSFERS, Op.UPSERT, [one.seen for one in found]))
        if blocks:
            messages = [one.message for one in found if one.message is not None]
            await self._lone.commit(blocks, messages, {"transactions": len(found), "told": len(messages)})

    async def _forget(self, connection: Connection, before: datetime) -> None:
        """Rows of ended transactions that no round will meet again."""
        bound = before - self._polled.overlap
        past = [tuple(r) for r in await connection.fetch(_sql.past, bound, FORGET_MAX, bool(self._product.rows))]
        if past:
            await self._lone.commit([block(CIRCLE_TRANSFERS, Op.DELETE, past)], [], {"forgotten": len(past)})
