"""chain.heads -> gas_top_ups, attempts, lanes -> ledger: gas_coins moved between our signers -> transactions.signed

Decides:  which lanes are given coins by the gas account now, how many, and how the top-ups that were on their way have ended.
Key:      the chain.
Repeats:  harmless; a lane is given nothing while a top-up for it is not final, nor before its balance was seen behind the last one.
Refuses:  nothing; what cannot be given now is looked at again at the next head.

A top-up is a transaction of the gas account's own lane: row, nonce, signature and bytes are stored in one commit, and sent,
watched and sped up as those of withdrawals are (broadcast_transactions, track_confirmations, raise_fees). The ledger has it
once it is final. The gas account's lane pauses as others do (sign_transactions): `low_gas` is the account itself.

A balance is the least that any endpoint says, so one that is behind or lies makes us give what was not needed, at most `upto` each
time and `day_max` a day: the coins stay ours. What is paused by a person, draining, or used by somebody else is given nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NamedTuple

from agents.outcome import Alert, Done, Outcome, Stage
from agents.withdrawals.attempts import lock_lanes
from agents.withdrawals.desks import Desk, Desks, Prepared
from agents.withdrawals.in_flight import LaneKey
from agents.withdrawals.sign_transactions import (
    CLEARS_ITSELF,
    DRAINING,
    FEES_OVER_CAP,
    GAS,
    LOW_GAS,
    OPEN,
    PAUSED,
    RETIRED,
    LaneTeller,
    counted,
    first_lane,
    shut,
)
from agents.withdrawals.top_ups import DONE, FAILED, WEI, TopUp, TopUpPolicy, given, unsigned
from agents.withdrawals.top_ups import OPEN as ON_ITS_WAY
from agents.withdrawals.withdrawal import TOP_UP, Attempt, AttemptStatus, Lane, attempt_row, lane_row
from chain.fees import Fees, fees
from chain.hot_wallet import Look
from ledger.rows import Connection, Row, Table
from ledger.sql import load as load_sql
from ledger.tables import GAS_TOP_UPS
from topics.catalog import CHAIN_HEADS, TRANSACTIONS_SIGNED
from topics.envelope import Received
from topics.events import Chain, HeadSeen

_sql = load_sql("agents.withdrawals", "top_ups.sql")

NAME: Final = "top_up_lanes"
NOT_GIVEN: Final = "gas_top_up_reverted"
"""Alert: coins came back from a lane's address: it is no address of a key."""


class Payee(NamedTuple):
    """A lane that may be given coins."""

    signer: str
    coins: int
    """Millionths."""


class Ended(NamedTuple):
    """A top-up that the chain has ended."""

    top_up: TopUp
    status: str
    """Of the attempt that ended it."""
    block_number: int


@dataclass
class Tank:
    """A gas account under a head."""

    desk: Desk
    policy: TopUpPolicy
    look: Look
    fees: Fees | None
    lane: Lane
    """As it is stored, or as it is to be made."""
    stored: bool
    room: int
    wei: int
    """Its coins less what everything in flight may cost."""
    left: int
    """Millionths that may be given today."""
    away: bool
    """Its key does not sign now."""
    payees: Sequence[Payee] = ()
    """Those that have too little, the poorest first."""
    ended: Sequence[Ended] = ()


@dataclass
class Facts:
    now: datetime
    tanks: dict[Chain, Tank] = field(default_factory=dict)


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, HeadSeen)
    tank = facts.tanks.get(event.chain)
    if tank is None:
        return Done()
    closed = [_closed(one, facts.now) for one in tank.ended]
    made, lane = _given(tank, facts.now)
    inserts: list[tuple[Table, Row]] = []
    updates: list[tuple[Table, Row]] = [(GAS_TOP_UPS, row) for row in closed]
    for top_up in made:
        assert tank.fees is not None
        inserts += ((GAS_TOP_UPS, top_up), attempt_row(unsigned(tank.desk, top_up, 1, tank.fees, facts.now)))
    if lane is not None:
        # a new one is inserted, so that two who make it are noticed
        (updates if tank.stored else inserts).append(lane_row(lane))
    return Done(
        postings=tuple(given(row) for row in closed if row.state == DONE),
        inserts=tuple(inserts),
        upserts=tuple(updates),
        alerts=tuple(Alert(NOT_GIVEN, _about(row)) for row in closed if row.state == FAILED),
    )


def _closed(one: Ended, now: datetime) -> TopUp:
    state = DONE if one.status == AttemptStatus.CONFIRMED else FAILED
    return one.top_up._replace(state=state, block_number=one.block_number, ended_at=now)


def _about(top_up: TopUp) -> dict[str, str]:
    return {"chain": top_up.chain, "signer": top_up.signer, "lane": top_up.lane, "nonce": str(top_up.nonce)}


def _given(tank: Tank, now: datetime) -> tuple[list[TopUp], Lane | None]:
    """The top-ups that are signed now, and the account's lane where it is another than before."""
    lane, nonce, wei, left, room = tank.lane, tank.lane.next_nonce, tank.wei, tank.left, tank.room
    reason, made = shut(lane, tank.look, tank.away), []
    for payee in tank.payees:
        amount = tank.policy.upto - payee.coins
        if reason or room <= 0 or amount > left:
            break
        cost = amount * WEI + GAS[TOP_UP] * tank.fees.max_fee if tank.fees is not None else 0
        reason = FEES_OVER_CAP if tank.fees is None else LOW_GAS if wei < cost else ""
        if reason:
            break
        made.append(TopUp(lane.chain, lane.signer, nonce, payee.signer, amount, ON_ITS_WAY, None, now, None))
        nonce, wei, left, room = nonce + 1, wei - cost, left - amount, room - 1
    if lane.status in (DRAINING, RETIRED) or (tank.stored and (nonce, reason) == (lane.next_nonce, lane.reason)):
        return made, None
    return made, lane._replace(
        next_nonce=nonce,
        chain_nonce=counted(lane, tank.look, reason),
        status=PAUSED if reason else OPEN,
        reason=reason,
        version=lane.version + 1,
        updated_at=now,
    )


def fold(facts: Facts, done: Done) -> None:
    """What one head changed, the next head of the batch leaves alone."""
    for _, row in (*done.inserts, *done.upserts):
        assert isinstance(row, (TopUp, Attempt, Lane))
        facts.tanks.pop(Chain(row.chain), None)


Low = Callable[[str, bool], None]
"""Is told of a chain whether its gas account has too little, or has given what it may today."""


class TopUpLanes:
    def __init__(self, desks: Desks, policies: Mapping[Chain, TopUpPolicy], low: Low) -> None:
        self._desks, self._policies, self._low = desks, policies, low
        self._tell = LaneTeller()

    async def prepare(self, events: Sequence[Received]) -> Prepared:
        """Before the transaction: what each chain that has a head says of our signers."""
        heads: dict[Chain, int] = {}
        for received in events:
            if isinstance(received.event, HeadSeen) and received.event.chain in self._policies:
                heads[received.event.chain] = max(received.event.number, heads.get(received.event.chain, 0))
        return await self._desks.look(heads)

    async def load(
        self, connection: Connection, _events: Sequence[Received], prepared: Prepared, at: datetime
    ) -> Facts:
        facts = Facts(at)
        for key, look in sorted(prepared.looks.items()):
            desk = prepared.desks[key]
            if desk.gives_gas and (tank := await self._tank(connection, desk, look, prepared, at)) is not None:
                facts.tanks[desk.chain] = tank
        return facts

    async def _tank(
        self, connection: Connection, desk: Desk, look: Look, prepared: Prepared, at: datetime
    ) -> Tank | None:
        key, policy = desk.key, self._policies[desk.chain]
        stored = (await lock_lanes(connection, {key})).get(key)
        # asked under its lane's lock: nobody else signs for it meanwhile
        ended = [_ended(row) for row in await connection.fetch(_sql.on_their_way, key[0]) if row[9] is not None]
        flying = (await self._desks.in_flight.of(connection, {key: look}, {} if stored is None else {key: stored}))[key]
        lane = stored or await first_lane(connection, key, look, at)
        if lane is None:
            return None
        today = at.replace(hour=0, minute=0, second=0, microsecond=0)
        spent = int(await connection.fetchval(_sql.given, key[0], today))
        rows = await connection.fetch(_sql.lanes, key[0], sorted(CLEARS_ITSELF))
        self._tell(lane)
        payees, left = _poor(policy, key, rows, prepared), policy.day_max - spent
        spent_out = any(policy.upto - payee.coins > left for payee in payees)
        self._low(key[0], look.native < policy.low * WEI or lane.reason == LOW_GAS or spent_out)
        return Tank(
            desk,
            policy,
            look,
            fees(look.history, desk.fees),
            lane,
            stored is not None,
            room=desk.in_flight_max - flying.unmined,
            wei=look.native - flying.wei,
            left=left,
            away=key in prepared.away,
            payees=payees,
            ended=ended,
        )


def _ended(row: Any) -> Ended:
    *columns, status, block_number = row
    top_up = TopUp(*columns)
    return Ended(top_up._replace(amount=int(top_up.amount)), status, block_number)


def _poor(policy: TopUpPolicy, giver: LaneKey, rows: Iterable[Any], prepared: Prepared) -> list[Payee]:
    """The lanes that have too little, and are known to: nothing is on its way, and the last top-up is in what was seen."""
    found = []
    for signer, on_its_way, block in rows:
        look = prepared.looks.get((giver[0], signer))
        if signer == giver[1] or on_its_way or look is None or look.block_number < (block or 0):
            continue
        coins = look.native // WEI
        if coins < policy.below:
            found.append(Payee(signer, coins))
    return sorted(found, key=lambda payee: (payee.coins, payee.signer))


def _untold(_chain: str, _is_low: bool) -> None: ...


def stage(desks: Desks, policies: Mapping[Chain, TopUpPolicy], low: Low = _untold) -> Stage[Facts]:
    """The desks that sign_transactions has, with one of a gas account for each chain that has a policy."""
    agent = TopUpLanes(desks, policies, low)
    return Stage(
        name=NAME,
        source=CHAIN_HEADS,
        prepare=agent.prepare,
        load=agent.load,
        decide=decide,
        fold=fold,
        complete=desks.complete,
        emits=(TRANSACTIONS_SIGNED,),
    )
