"""withdrawals.accepted, chain.heads -> withdrawals, attempts, lanes -> transactions.signed

Decides:  which of the withdrawals that wait are signed now: the oldest first, while their lane is open and has room, gas and USDC.
Key:      the chain.
Repeats:  harmless; the rows say what waits, an event only wakes. A withdrawal that was signed or cancelled waits no more.
Refuses:  nothing; what cannot be signed now waits for the next head.

A nonce, the signature made with it and the bytes to send are stored in one commit, before anybody sends them. Nonces come from
the lane's row; the chain's own count is a floor when the row is made.

A lane pauses before it signs what cannot be paid for. Its row says why:

| reason | until |
| --- | --- |
| low_gas | the signer's coins cover what is in flight and one transfer more |
| low_usdc | its USDC, less what is in flight, covers the oldest withdrawal; younger ones do not overtake it |
| fees_over_cap | the chain costs less than the network's cap |
| foreign_nonce | a person has found out who else uses the key: the chain counts transactions that we did not sign |
| restored | the database was restored: `stablerail recovery open` has compared the lane with its chain |
| anything else | the person who paused it opens it |

Two stages are made here: `sign_transactions` is woken by an accepted withdrawal, `sign_waiting` by a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import structlog

from agents.outcome import Done, Emit, Outcome, Stage
from agents.withdrawals.attempts import lock_lanes
from agents.withdrawals.withdrawal import (
    RESTORED,
    Attempt,
    AttemptStatus,
    Lane,
    Status,
    Withdrawal,
    attempt_row,
    lane_row,
    moved,
)
from chain.assets import USDC
from chain.fees import NOTHING_GAS, TRANSFER_GAS, FeePolicy, Fees, fees
from chain.hot_wallet import HotWallet, Look
from chain.signer import Signer
from chain.transactions import sign_call, transfer_data
from ledger.rows import Connection, Row, Table
from ledger.sql import load as load_sql
from ledger.tables import ATTEMPTS, LANES
from topics.catalog import CHAIN_HEADS, TRANSACTIONS_SIGNED, WITHDRAWALS_ACCEPTED
from topics.envelope import Received
from topics.events import Chain, HeadSeen, TransactionSigned, WithdrawalAccepted

_log = structlog.get_logger()
_sql = load_sql("agents.withdrawals", "sending.sql")

NAME: Final = "sign_transactions"
NAME_WAITING: Final = "sign_waiting"
IN_FLIGHT_MAX: Final = 16
"""Of one lane, signed and in no block: what nodes keep of one sender, and what Circle allows itself."""
SIGNED_MAX: Final = 2_000
"""Under one event; the rest under the next."""

OPEN: Final = "open"
PAUSED: Final = "paused"
LOW_GAS: Final = "low_gas"
LOW_USDC: Final = "low_usdc"
FEES_OVER_CAP: Final = "fees_over_cap"
FOREIGN_NONCE: Final = "foreign_nonce"
CLEARS_ITSELF: Final = frozenset({LOW_GAS, LOW_USDC, FEES_OVER_CAP})

PAYMENT: Final = "payment"
CANCEL: Final = "cancel"
GAS: Final[Mapping[str, int]] = {PAYMENT: TRANSFER_GAS[USDC], CANCEL: NOTHING_GAS}
"""Gas limit by kind."""


@dataclass(frozen=True)
class Desk:
    """What signs for a chain: one lane. More lanes are more desks."""

    chain: Chain
    chain_id: int
    signer: Signer
    token: str
    """USDC's contract."""
    wallet: HotWallet
    fees: FeePolicy
    in_flight_max: int = IN_FLIGHT_MAX


@dataclass
class Queue:
    """One lane and what waits for it, folded as it is decided."""

    desk: Desk
    look: Look
    fees: Fees | None
    lane: Lane
    """As it is stored, or as it is to be made."""
    stored: bool
    waiting: dict[str, Withdrawal]
    """By id, the oldest first."""
    room: int
    wei: int
    """The signer's coins less what everything in flight may cost."""
    units: int
    """Its USDC less what is in flight."""
    cost: int
    """The most that one transfer may cost, in wei."""


@dataclass
class Facts:
    now: datetime
    queues: dict[Chain, Queue] = field(default_factory=dict)


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, (WithdrawalAccepted, HeadSeen))
    queue = facts.queues.get(event.chain)
    if queue is None:
        return Done()
    upto = event.withdrawal_id if isinstance(event, WithdrawalAccepted) else None
    return _signed(queue, _taken(queue.waiting, upto), facts.now)


def _taken(waiting: Mapping[str, Withdrawal], upto: str | None) -> Sequence[Withdrawal]:
    """What the event wakes. Of an accepted one: it and what is older; what is younger has an event of its own. Where it waits
    no more, or not in front, it wakes whatever does."""
    taken: list[Withdrawal] = []
    for withdrawal in waiting.values():
        taken.append(withdrawal)
        if withdrawal.id == upto:
            break
    return taken


def _signed(queue: Queue, taken: Sequence[Withdrawal], now: datetime) -> Done:
    """Signs them in order until something is short."""
    nonce, room, wei, units, cost = queue.lane.next_nonce, queue.room, queue.wei, queue.units, queue.cost
    inserts: list[tuple[Table, Row]] = []
    updates: list[tuple[Table, Row]] = []
    emits: list[Emit] = []
    reason, tried = _shut(queue), False
    for withdrawal in taken:
        if reason or room <= 0:
            break
        tried = True
        reason = _short(queue, wei - cost, units - withdrawal.amount)
        if reason:
            break
        assert queue.fees is not None
        attempt = signed_attempt(queue.desk, withdrawal, nonce, 1, PAYMENT, queue.fees, now)
        nonce, room, wei, units = nonce + 1, room - 1, wei - cost, units - withdrawal.amount
        _after, (row, line) = moved(withdrawal, Status.BROADCASTING, now, NAME)
        inserts += (attempt_row(attempt), line)
        updates.append(row)
        emits.append(told(attempt, queue.lane.key))
    if not reason and not tried and queue.waiting:
        reason = queue.lane.reason  # nothing was tried, so nothing is known of it
    lane = queue.lane
    if not queue.stored or (nonce, reason) != (lane.next_nonce, lane.reason):
        changed = lane._replace(
            next_nonce=nonce,
            chain_nonce=max(lane.chain_nonce, queue.look.nonce),
            status=PAUSED if reason else OPEN,
            reason=reason,
            version=lane.version + 1,
            updated_at=now,
        )
        # a new one is inserted, so that two who make it are noticed
        (updates if queue.stored else inserts).append(lane_row(changed))
    return Done(inserts=tuple(inserts), updates=tuple(updates), emits=tuple(emits))


def _shut(queue: Queue) -> str:
    """Why nothing at all may be signed."""
    if queue.lane.status == PAUSED and queue.lane.reason not in CLEARS_ITSELF:
        return queue.lane.reason or PAUSED
    return FOREIGN_NONCE if queue.look.nonce > queue.lane.next_nonce else ""


def _short(queue: Queue, wei_left: int, units_left: int) -> str:
    """What one withdrawal more would lack."""
    if queue.fees is None:
        return FEES_OVER_CAP
    if wei_left < 0:
        return LOW_GAS
    return LOW_USDC if units_left < 0 else ""


def signed_attempt(
    desk: Desk, withdrawal: Withdrawal, nonce: int, n: int, kind: str, offer: Fees, now: datetime
) -> Attempt:
    """The n-th attempt of a nonce, signed: of a payment the transfer, of a cancel a transfer of nothing to ourselves. Whoever
    calls this stores it before anybody sends it."""
    is_payment = kind == PAYMENT
    gas_limit = GAS[kind]
    signed = sign_call(
        desk.signer,
        chain_id=desk.chain_id,
        nonce=nonce,
        priority_fee=offer.priority_fee,
        max_fee=offer.max_fee,
        gas_limit=gas_limit,
        to=desk.token if is_payment else desk.signer.address,
        data=transfer_data(withdrawal.recipient, withdrawal.amount) if is_payment else b"",
    )
    return Attempt(
        desk.chain.value, signed.tx_hash, desk.signer.address, nonce, n, kind, withdrawal.id, signed.raw,
        gas_limit, offer.max_fee, offer.priority_fee, AttemptStatus.SIGNED.value,
        None, None, None, now, None, now, 1,
    )  # fmt: skip


def told(attempt: Attempt, lane: str) -> Emit:
    """For broadcast_transactions. `lane`: its key."""
    assert attempt.withdrawal_id is not None
    event = TransactionSigned.known(
        chain=Chain(attempt.chain),
        signer=attempt.signer,
        nonce=attempt.nonce,
        n=attempt.n,
        tx_hash=attempt.tx_hash,
        withdrawal_id=attempt.withdrawal_id,
    )
    return Emit(TRANSACTIONS_SIGNED, lane, event, attempt.tx_hash)


def fold(facts: Facts, done: Done) -> None:
    for table, row in (*done.inserts, *done.updates):
        if table is ATTEMPTS:
            assert isinstance(row, Attempt)
            queue = facts.queues[Chain(row.chain)]
            withdrawal = queue.waiting.pop(row.withdrawal_id or "")
            queue.room -= 1
            queue.wei -= row.gas_limit * row.max_fee
            queue.units -= withdrawal.amount
        elif table is LANES:
            assert isinstance(row, Lane)
            queue = facts.queues[Chain(row.chain)]
            queue.lane, queue.stored = row, True


Seen = Callable[[str, str, int], None]
"""Is told a lane's chain, why it is paused ("" = it is open), and how many of its transactions are in no block."""


class SignTransactions:
    """Of both stages: they share what was seen of the chain."""

    def __init__(self, desks: Sequence[Desk], seen: Seen) -> None:
        self._desks = {desk.chain: desk for desk in desks}
        self._seen = seen
        self._known: dict[Chain, str] = {}

    async def prepare(self, events: Sequence[Received]) -> Mapping[Chain, Look]:
        """Before the transaction: what each chain that is asked for says of our signer. One whose endpoints do not answer is
        left out: what waits for it is signed under the first head that comes when they do."""
        heads: dict[Chain, int] = {}
        for received in events:
            event = received.event
            if isinstance(event, HeadSeen):
                heads[event.chain] = max(event.number, heads.get(event.chain, 0))
            elif isinstance(event, WithdrawalAccepted):
                heads.setdefault(event.chain, 0)
        looks: dict[Chain, Look] = {}
        for chain in sorted(heads.keys() & self._desks.keys()):
            wallet = self._desks[chain].wallet
            look = await wallet.look(heads[chain])
            if look is None:
                _log.warning("lane.unseen", chain=chain.value, reason=wallet.failure)
            else:
                looks[chain] = look
        return looks

    async def load(
        self, connection: Connection, events: Sequence[Received], looks: Mapping[Chain, Look], at: datetime
    ) -> Facts:
        facts = Facts(at)
        accepted = Counter(one.event.chain for one in events if isinstance(one.event, WithdrawalAccepted))
        for chain, look in sorted(looks.items()):
            desk = self._desks[chain]
            # a block wakes all that there may be room for, an accepted withdrawal as many as there are events
            rows_max = min(accepted[chain] or SIGNED_MAX, desk.in_flight_max)
            facts.queues[chain] = await self._queue(connection, desk, look, rows_max, at)
        return facts

    async def _queue(self, connection: Connection, desk: Desk, look: Look, rows_max: int, at: datetime) -> Queue:
        chain, signer = desk.chain.value, desk.signer.address
        rows = await connection.fetch(_sql.waiting, chain, USDC, rows_max)
        found = (Withdrawal(*row) for row in rows)
        waiting = {one.id: one._replace(amount=int(one.amount)) for one in found}
        stored = (await lock_lanes(connection, {(chain, signer)})).get((chain, signer))
        # asked under the lane's lock: nobody else signs for it meanwhile
        ((in_flight, wei, units),) = await connection.fetch(_sql.in_flight, chain, signer, look.block_number)
        lane = stored or await self._first(connection, chain, signer, look, at)
        self._tell(desk.chain, lane, in_flight)
        offer = fees(look.history, desk.fees)
        return Queue(
            desk,
            look,
            offer,
            lane,
            stored is not None,
            waiting,
            room=desk.in_flight_max - in_flight,
            wei=look.native - int(wei),
            units=look.tokens - int(units),
            cost=TRANSFER_GAS[USDC] * offer.max_fee if offer is not None else 0,
        )

    async def _first(self, connection: Connection, chain: str, signer: str, look: Look, at: datetime) -> Lane:
        """A signer that we have no lane of. One that has sent something is not used unseen where a database was restored: what
        it sent may have been ours."""
        first = max(look.nonce, look.pending_nonce)
        if first and await connection.fetchval(_sql.any_restore):
            return Lane(chain, signer, first, look.nonce, PAUSED, RESTORED, 0, at)
        return Lane(chain, signer, first, look.nonce, OPEN, "", 0, at)

    def _tell(self, chain: Chain, lane: Lane, in_flight: int) -> None:
        self._seen(lane.chain, lane.reason, in_flight)
        if self._known.get(chain, "") != lane.reason:
            log = _log.error if lane.reason else _log.info
            log(
                "lane.paused" if lane.reason else "lane.opened",
                chain=lane.chain,
                signer=lane.signer,
                reason=lane.reason,
            )
            self._known[chain] = lane.reason


def stages(
    desks: Sequence[Desk], seen: Seen = lambda _chain, _reason, _in_flight: None
) -> tuple[Stage[Any], Stage[Any]]:
    """Woken by an accepted withdrawal, and by a block."""
    agent = SignTransactions(desks, seen)
    woken = (
        Stage(
            name=name,
            source=source,
            prepare=agent.prepare,
            load=agent.load,
            decide=decide,
            fold=fold,
            emits=(TRANSACTIONS_SIGNED,),
        )
        for name, source in ((NAME, WITHDRAWALS_ACCEPTED), (NAME_WAITING, CHAIN_HEADS))
    )
    first, second = woken
    return first, second
