"""withdrawals.accepted, chain.heads -> withdrawals, attempts, lanes -> transactions.signed

Takes:    of accepted withdrawals those of the rail `chain`.
Decides:  which of the withdrawals that wait are signed now, and by which lane: the oldest first, each by the open lane with the
          most room that has gas and USDC for it. What would be refused by now goes on waiting, keeps nobody else waiting and may
          be cancelled: its customer was rejected, or its recipient denied, after it was accepted.
Key:      the chain.
Repeats:  harmless; the rows say what waits, an event only wakes. A withdrawal that was signed or cancelled waits no more.
Refuses:  nothing; what cannot be signed now waits for the next head.

A nonce, the signature made with it (desks.py) and the bytes to send are stored in one commit, before anybody sends them. Nonces
come from the lane's row; the chain's own count is a floor when the row is made.

A lane pauses before it signs what cannot be paid for. Its row says why; the others go on:

| reason | until |
| --- | --- |
| low_gas | the signer's coins cover what is in flight and one transfer more |
| low_usdc | its USDC, less what is in flight, covers the oldest withdrawal; younger ones do not overtake it |
| fees_over_cap | the chain costs less than the network's cap |
| key_unavailable | its key store signs again |
| foreign_nonce | the chain counts no transactions any more that we did not sign; if it does for good, a person finds out who else |
|               | uses the key                                                                                                    |
| nonce_taken | a person has found out who else uses the key: one of our nonces was used for good, by none of ours (track_confirmations) |
| restored | the database was restored: `stablerail recovery open` has compared the lane with its chain |
| anything else | the person who paused it opens it |

A lane that is `draining` or `retired` signs nothing more (lanes.py).

Two stages are made here: `sign_transactions` is woken by an accepted withdrawal, `sign_waiting` by a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

import structlog

from agents.outcome import Done, Outcome, Stage
from agents.withdrawals.desks import Desk, Desks, Prepared
from agents.withdrawals.in_flight import LaneKey, Sum
from agents.withdrawals.stored import withdrawal_of
from agents.withdrawals.withdrawal import (
    RESTORED,
    TOP_UP,
    Attempt,
    AttemptStatus,
    Lane,
    Status,
    Withdrawal,
    attempt_row,
    lane_row,
    moved,
)
from chain.addresses import EVM_CHAINS
from chain.assets import USDC
from chain.fees import NOTHING_GAS, TRANSFER_GAS, Fees, fees
from chain.hot_wallet import Look
from chain.transactions import transfer_data, unsigned_call
from ledger.rows import Connection, Row, Table
from ledger.sql import load as load_sql
from ledger.tables import ATTEMPTS, LANES
from topics.catalog import CHAIN_HEADS, TRANSACTIONS_SIGNED, WITHDRAWALS_ACCEPTED
from topics.envelope import Received
from topics.events import Chain, HeadSeen, Rail, WithdrawalAccepted

_log = structlog.get_logger()
_sql = load_sql("agents.withdrawals", "sending.sql")

NAME: Final = "sign_transactions"
NAME_WAITING: Final = "sign_waiting"
SIGNED_MAX: Final = 2_000
"""Under one event; the rest under the next."""

_WITHDRAWAL: Final = len(Withdrawal._fields)

OPEN: Final = "open"
PAUSED: Final = "paused"
DRAINING: Final = "draining"
RETIRED: Final = "retired"
LOW_GAS: Final = "low_gas"
LOW_USDC: Final = "low_usdc"
FEES_OVER_CAP: Final = "fees_over_cap"
KEY_UNAVAILABLE: Final = "key_unavailable"
FOREIGN_NONCE: Final = "foreign_nonce"
CLEARS_ITSELF: Final = frozenset({LOW_GAS, LOW_USDC, FEES_OVER_CAP, KEY_UNAVAILABLE})
OPENS_ITSELF: Final = CLEARS_ITSELF | {FOREIGN_NONCE}
"""Beside the usual: what endpoints count too many may be a lie, or go with a reorg. What is final stays in their count, so a lane
that somebody else really uses opens by no look."""

PAYMENT: Final = "payment"
CANCEL: Final = "cancel"
GAS: Final[Mapping[str, int]] = {PAYMENT: TRANSFER_GAS[USDC], CANCEL: NOTHING_GAS, TOP_UP: NOTHING_GAS}
"""Gas limit by kind."""


@dataclass
class Queue:
    """One lane, folded as it is decided."""

    desk: Desk
    look: Look
    fees: Fees | None
    lane: Lane
    """As it is stored, or as it is to be made."""
    stored: bool
    room: int
    wei: int
    """The signer's coins less what everything in flight may cost."""
    units: int
    """Its USDC less what is in flight."""
    cost: int
    """The most that one transfer may cost, in wei."""
    away: bool = False
    """Its key does not sign now."""


@dataclass
class Facts:
    now: datetime
    queues: dict[LaneKey, Queue] = field(default_factory=dict)
    waiting: dict[Chain, dict[str, Withdrawal]] = field(default_factory=dict)
    """Of each chain by id, the oldest first."""


@dataclass
class _Turn:
    """A lane in one decision."""

    queue: Queue
    nonce: int
    room: int
    wei: int
    units: int
    reason: str
    """Why it signs nothing, or nothing more."""
    tried: bool = False

    def short(self, amount: int) -> str:
        """What one withdrawal more would lack."""
        if self.queue.fees is None:
            return FEES_OVER_CAP
        if self.wei < self.queue.cost:
            return LOW_GAS
        return LOW_USDC if self.units < amount else ""

    def take(self, withdrawal: Withdrawal, now: datetime) -> Attempt:
        assert self.queue.fees is not None
        attempt = unsigned(self.queue.desk, withdrawal, self.nonce, 1, PAYMENT, self.queue.fees, now)
        self.nonce += 1
        self.room -= 1
        self.wei -= self.queue.cost
        self.units -= withdrawal.amount
        return attempt


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, (WithdrawalAccepted, HeadSeen))
    queues = [queue for queue in facts.queues.values() if queue.desk.chain == event.chain]
    if not queues:
        return Done()
    waiting = facts.waiting[event.chain]
    upto = event.withdrawal_id if isinstance(event, WithdrawalAccepted) else None
    return _signed(queues, _taken(waiting, upto), bool(waiting), facts.now)


def _taken(waiting: Mapping[str, Withdrawal], upto: str | None) -> Sequence[Withdrawal]:
    """What the event wakes. Of an accepted one: it and what is older; what is younger has an event of its own. Where it waits
    no more, or not in front, it wakes whatever does."""
    taken: list[Withdrawal] = []
    for withdrawal in waiting.values():
        taken.append(withdrawal)
        if withdrawal.id == upto:
            break
    return taken


def _signed(queues: Sequence[Queue], taken: Sequence[Withdrawal], waits: bool, now: datetime) -> Done:
    """Takes them in order until no lane can."""
    turns = [
        _Turn(one, one.lane.next_nonce, one.room, one.wei, one.units, shut(one.lane, one.look, one.away))
        for one in queues
    ]
    inserts: list[tuple[Table, Row]] = []
    updates: list[tuple[Table, Row]] = []
    for withdrawal in taken:
        turn = _chosen(turns, withdrawal)
        if turn is None:
            break
        attempt = turn.take(withdrawal, now)
        _after, (row, line) = moved(withdrawal, Status.BROADCASTING, now, NAME)
        inserts += (attempt_row(attempt), line)
        updates.append(row)
    for turn in turns:
        changed = _changed(turn, waits, now)
        if changed is not None:
            # a new one is inserted, so that two who make it are noticed
            (updates if turn.queue.stored else inserts).append(lane_row(changed))
    return Done(inserts=tuple(inserts), updates=tuple(updates))


def _chosen(turns: Sequence[_Turn], withdrawal: Withdrawal) -> _Turn | None:
    """The lane with the most room that can pay it. One that cannot says why, and signs nothing more under this event."""
    while True:
        turn = max((one for one in turns if not one.reason and one.room > 0), key=_room, default=None)
        if turn is None:
            return None
        turn.tried = True
        turn.reason = turn.short(withdrawal.amount)
        if not turn.reason:
            return turn


def _room(turn: _Turn) -> int:
    return turn.room


def _changed(turn: _Turn, waits: bool, now: datetime) -> Lane | None:
    """The lane's row, where it is another than before."""
    queue, lane, reason = turn.queue, turn.queue.lane, turn.reason
    if lane.status in (DRAINING, RETIRED):
        return None
    if not reason and not turn.tried and waits and lane.reason != FOREIGN_NONCE:
        reason = lane.reason  # nothing was tried, so nothing is known of it
    if queue.stored and (turn.nonce, reason) == (lane.next_nonce, lane.reason):
        return None
    status = PAUSED if reason else OPEN
    chain_nonce = counted(lane, queue.look, reason)
    return Lane(lane.chain, lane.signer, turn.nonce, chain_nonce, status, reason, lane.version + 1, now)


def shut(lane: Lane, look: Look, away: bool) -> str:
    """Why nothing at all may be signed for it. `away`: its key does not sign now."""
    if lane.status != OPEN and lane.reason not in OPENS_ITSELF:
        return lane.reason or lane.status
    if look.nonce > lane.next_nonce:
        return FOREIGN_NONCE
    return KEY_UNAVAILABLE if away else ""


def counted(lane: Lane, look: Look, reason: str) -> int:
    """The chain's count as the row has it then. One that was taken back is forgotten: whoever opens the lane goes on from it."""
    taken_back = lane.reason == FOREIGN_NONCE and reason != FOREIGN_NONCE
    return look.nonce if taken_back else max(lane.chain_nonce, look.nonce)


def unsigned(desk: Desk, withdrawal: Withdrawal, nonce: int, n: int, kind: str, offer: Fees, now: datetime) -> Attempt:
    """The n-th attempt of a nonce, as `Desks.complete` signs it: of a payment the transfer, of a cancel a transfer of nothing to
    ourselves. It is stored before anybody sends it."""
    is_payment = kind == PAYMENT
    gas_limit = GAS[kind]
    fields = unsigned_call(
        chain_id=desk.chain_id,
        nonce=nonce,
        priority_fee=offer.priority_fee,
        max_fee=offer.max_fee,
        gas_limit=gas_limit,
        to=desk.token if is_payment else desk.signer.address,
        data=transfer_data(withdrawal.recipient, withdrawal.amount) if is_payment else b"",
    )
    return Attempt(
        desk.chain.value, "", desk.signer.address, nonce, n, kind, withdrawal.id, fields, gas_limit,
        offer.max_fee, offer.priority_fee, AttemptStatus.SIGNED.value, None, None, None, now, None, now, 1,
    )  # fmt: skip


def fold(facts: Facts, done: Done) -> None:
    for table, row in (*done.inserts, *done.updates):
        if table is ATTEMPTS:
            assert isinstance(row, Attempt)
            queue = facts.queues[(row.chain, row.signer)]
            withdrawal = facts.waiting[queue.desk.chain].pop(row.withdrawal_id or "")
            queue.room -= 1
            queue.wei -= row.gas_limit * row.max_fee
            queue.units -= withdrawal.amount
        elif table is LANES:
            assert isinstance(row, Lane)
            queue = facts.queues[(row.chain, row.signer)]
            queue.lane, queue.stored = row, True


def takes(event: WithdrawalAccepted) -> bool:
    return event.rail == Rail.CHAIN


class LaneTeller:
    """Tells the log of a lane that is another than before."""

    def __init__(self) -> None:
        self._known: dict[LaneKey, str] = {}

    def __call__(self, lane: Lane) -> None:
        key = (lane.chain, lane.signer)
        if self._known.get(key, "") != lane.reason:
            log = _log.error if lane.reason else _log.info
            log(
                "lane.paused" if lane.reason else "lane.opened",
                chain=lane.chain,
                signer=lane.signer,
                reason=lane.reason,
            )
            self._known[key] = lane.reason


class SignTransactions:
    """Of both stages: they share what was seen of the chain."""

    def __init__(self, desks: Desks) -> None:
        self._desks = desks
        self._tell = LaneTeller()

    async def prepare(self, events: Sequence[Received]) -> Prepared:
        """Before the transaction: what each chain that is asked for says of our signers."""
        heads: dict[Chain, int] = {}
        for received in events:
            event = received.event
            if isinstance(event, HeadSeen):
                heads[event.chain] = max(event.number, heads.get(event.chain, 0))
            elif isinstance(event, WithdrawalAccepted):
                heads.setdefault(event.chain, 0)
        return await self._desks.look(heads)

    async def load(self, connection: Connection, events: Sequence[Received], prepared: Prepared, at: datetime) -> Facts:
        facts, looks = Facts(at), prepared.looks
        accepted = Counter(one.event.chain for one in events if isinstance(one.event, WithdrawalAccepted))
        desks = {key: prepared.desks[key] for key in sorted(looks) if not prepared.desks[key].gives_gas}
        if not desks:
            return facts
        # a block wakes all that there may be room for, an accepted withdrawal as many as there are events
        room: Counter[Chain] = Counter()
        for desk in desks.values():
            room[desk.chain] += desk.in_flight_max
        most = {chain: min(accepted[chain] or SIGNED_MAX, room[chain]) for chain in sorted(room)}
        facts.waiting, stored = await _locked(connection, most, desks)
        # asked under the lanes' locks: nobody else signs for them meanwhile
        flying = await self._desks.in_flight.of(connection, {key: looks[key] for key in desks}, stored)
        for key, desk in desks.items():
            lane = stored.get(key) or await first_lane(connection, key, looks[key], at)
            if lane is None:
                continue
            self._tell(lane)
            facts.queues[key] = _queue(desk, looks[key], lane, flying[key], key in stored, key in prepared.away)
        return facts


async def _locked(
    connection: Connection, most: Mapping[Chain, int], lanes: Iterable[LaneKey]
) -> tuple[dict[Chain, dict[str, Withdrawal]], dict[LaneKey, Lane]]:
    """What waits of each chain, the oldest first, at most so many; and those of the lanes that are stored."""
    chains, signers = zip(*lanes, strict=True)
    waiting: dict[Chain, dict[str, Withdrawal]] = {chain: {} for chain in most}
    stored: dict[LaneKey, Lane] = {}
    columns = [
        [chain.value for chain in most], [*most.values()], USDC, [*chains], [*signers], sorted(EVM_CHAINS),
    ]  # fmt: skip
    for row in await connection.fetch(_sql.to_sign, *columns):
        values = tuple(row)
        if values[0] is None:
            lane = Lane(*values[_WITHDRAWAL:])
            stored[(lane.chain, lane.signer)] = lane
        else:
            one = withdrawal_of(values[:_WITHDRAWAL])
            waiting[Chain(one.chain)][one.id] = one
    return waiting, stored


async def first_lane(connection: Connection, key: LaneKey, look: Look, at: datetime) -> Lane | None:
    """A signer that we have no lane of goes on where its chain counts: None while that is disputed, as it is where one endpoint of
    several answered, since every nonce waits for the ones before it. One that has sent something is not used unseen where a
    database was restored: what it sent may have been ours."""
    if look.disputed:
        _log.warning("lane.disputed", chain=key[0], signer=key[1], nonce=look.nonce, pending_nonce=look.pending_nonce)
        return None
    first = max(look.nonce, look.pending_nonce)
    if first and await connection.fetchval(_sql.any_restore):
        return Lane(*key, first, look.nonce, PAUSED, RESTORED, 0, at)
    return Lane(*key, first, look.nonce, OPEN, "", 0, at)


def _queue(desk: Desk, look: Look, lane: Lane, flying: Sum, stored: bool, away: bool) -> Queue:
    offer = fees(look.history, desk.fees)
    return Queue(
        desk,
        look,
        offer,
        lane,
        stored,
        room=min(desk.in_flight_max - flying.unmined, desk.signer.at_once_max),
        wei=look.native - flying.wei,
        units=look.tokens - flying.units,
        cost=TRANSFER_GAS[USDC] * offer.max_fee if offer is not None else 0,
        away=away,
    )


def stages(desks: Desks) -> tuple[Stage[Any], Stage[Any]]:
    """Woken by an accepted withdrawal, and by a block."""
    agent = SignTransactions(desks)
    woken = (
        Stage(
            name=name,
            source=source,
            prepare=agent.prepare,
            load=agent.load,
            decide=decide,
            fold=fold,
            complete=desks.complete,
            emits=(TRANSACTIONS_SIGNED,),
        )
        for name, source in ((NAME, WITHDRAWALS_ACCEPTED), (NAME_WAITING, CHAIN_HEADS))
    )
    first, second = woken
    return replace(first, takes=takes), second
