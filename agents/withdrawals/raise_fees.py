"""chain.heads -> attempts: speed-ups and cancels; withdrawals, attempt_wishes, chain_cursors -> transactions.signed

Decides:  which nonces get another attempt now: the next of a lane that was in no block for N blocks, those that offer less than
          the base fee, and what people wish (`stablerail tx speed-up|cancel`).
Key:      the chain.
Repeats:  harmless; blocks are counted from the newest attempt on, so a head that comes again finds that one too young.
Refuses:  nothing; what cannot be raised now is looked at again at the next head. A wish that cannot be granted says why in its row.

A nonce behind one that is stuck is not stuck itself. The count begins at the head, and ends at the lowest block that any
endpoint which answers has: one that is behind is no evidence. Signed and stored in one commit, sent by broadcast_transactions
after it; which attempt is mined is the chain's to say (track_confirmations). How much more, and why not: raising.py.

What is next of its lane and in no block for too long goes to a person (`stuck`): it stays watched, goes on being raised while
there is room under the caps, and leaves the review by itself when it is mined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import orjson

from agents.outcome import Alert, Done, Outcome, Stage
from agents.withdrawals.attempts import lock_lanes, lock_nonces
from agents.withdrawals.desks import Desk, Desks, Prepared
from agents.withdrawals.in_flight import LaneKey
from agents.withdrawals.raising import (
    ENDS_NONCE,
    IN_A_BLOCK,
    IN_FLIGHT,
    LANE_PAUSED,
    RaisePolicy,
    Waiting,
    dearer,
    hopeless,
    is_shut,
    is_unsent,
    next_kind,
    not_by_rule,
    offer,
)
from agents.withdrawals.sign_transactions import CANCEL, KEY_UNAVAILABLE, LOW_GAS, unsigned
from agents.withdrawals.top_ups import TopUp
from agents.withdrawals.top_ups import unsigned as unsigned_top_up
from agents.withdrawals.wishes import DONE, OPEN, REFUSED, Wish, wished, wishes_of
from agents.withdrawals.withdrawal import STUCK, Attempt, Lane, Status, Withdrawal, attempt_row, moved, paid_for
from chain.fees import Fees, fees
from chain.hot_wallet import Look
from chain.wire import QUANTITY_MAX
from ledger.audit_logs import Log
from ledger.rows import Connection, Row, Table
from ledger.sql import load as load_sql
from ledger.tables import ATTEMPT_WISHES, CHAIN_CURSORS
from topics.catalog import CHAIN_HEADS, TRANSACTIONS_SIGNED
from topics.envelope import Received
from topics.events import Chain, HeadSeen

_sql = load_sql("agents.withdrawals", "raising.sql")

NAME: Final = "raise_fees"
NONCES_MAX: Final = 64
"""Of a lane, looked at under one head: the next ones, which others wait for."""
WITHDRAWAL_STUCK: Final = "withdrawal_stuck"
"""Alert: next of its lane, in no block for too long."""
NOT_RAISED: Final = "speed_up_not_signed"
"""Alert: it is due, and why it is not raised."""


@dataclass
class Line:
    """One lane under a head."""

    desk: Desk
    policy: RaisePolicy
    look: Look
    head: int
    """The highest that is known of."""
    market: Fees | None
    waiting: dict[int, Waiting]
    """By nonce: what the chain could take next. The lowest is what its others wait for."""
    lane: Lane | None = None
    groups: dict[int, list[Attempt]] = field(default_factory=dict)
    """Locked, by nonce: every attempt of what may be due, in order of n."""
    wishes: dict[str, Wish] = field(default_factory=dict)
    """By withdrawal, those of the groups."""
    wei: int = 0
    """The signer's coins less what everything in flight may cost."""
    away: bool = False
    """Its key does not sign now."""
    top_ups: dict[int, TopUp] = field(default_factory=dict)
    """Of the gas account, by nonce."""

    def is_due(self, nonce: int) -> bool:
        one = self.waiting.get(nonce)
        return one is not None and self.look.block_number - one.block >= self.policy.blocks

    def is_stuck(self, nonce: int, now: datetime) -> bool:
        one = self.waiting.get(nonce)
        is_next = nonce == min(self.waiting, default=None)
        return one is not None and is_next and (now - one.at).total_seconds() >= self.policy.stuck_s


@dataclass
class Facts:
    now: datetime
    lines: dict[LaneKey, Line] = field(default_factory=dict)
    withdrawals: dict[str, Withdrawal] = field(default_factory=dict)
    """Locked, by id."""
    stored: dict[Chain, dict[str, Any]] = field(default_factory=dict)
    """What is remembered of each chain's nonces, by `<signer>:<nonce>`."""


def decide(received: Received, facts: Facts) -> Outcome:
    event = received.event
    assert isinstance(event, HeadSeen)
    lines = [line for (chain, _), line in sorted(facts.lines.items()) if chain == event.chain.value]
    if not lines:
        return Done()
    before = facts.stored[event.chain]
    looked = {line.desk.signer.address for line in lines}
    after = {key: one for key, one in before.items() if key.partition(":")[0] not in looked}
    step = _Step(facts)
    for line in lines:
        waiting = step.judge(line)
        after |= {f"{line.desk.signer.address}:{nonce}": one.plain() for nonce, one in waiting.items()}
    if after != before:
        step.upserts.append((CHAIN_CURSORS, (cursor_of(event.chain), after, facts.now)))
    return step.done()


class _Step:
    """What one head changes, gathered."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._inserts: list[tuple[Table, Row]] = []
        self._updates: list[tuple[Table, Row]] = []
        self.upserts: list[tuple[Table, Row]] = []
        self._alerts: list[Alert] = []
        self._logs: list[Log] = []

    def done(self) -> Done:
        return Done(
            inserts=tuple(self._inserts), updates=tuple(self._updates), upserts=tuple(self.upserts),
            alerts=tuple(self._alerts), logs=tuple(self._logs),
        )  # fmt: skip

    def judge(self, line: Line) -> dict[int, Waiting]:
        """What is to be remembered of its nonces."""
        waiting, wei = dict(line.waiting), line.wei
        for nonce, group in sorted(line.groups.items()):
            if nonce in line.top_ups:
                wei -= self._top_up(line, nonce, group, waiting, wei)
                continue
            withdrawal = self._facts.withdrawals.get(group[0].withdrawal_id or "")
            if withdrawal is None:
                continue
            wish = line.wishes.get(withdrawal.id)
            why = IN_A_BLOCK if nonce < line.look.nonce else hopeless(withdrawal, group)
            if not why and line.is_stuck(nonce, self._facts.now) and withdrawal.status in IN_FLIGHT:
                withdrawal = self._move(withdrawal, Status.MANUAL_REVIEW, STUCK)
                self._alerts.append(Alert(WITHDRAWAL_STUCK, _about(group)))
            if wish is None:
                why = why or not_by_rule(withdrawal, group[-1], line.look.history.base_fee)
                if why or not line.is_due(nonce):
                    continue
            kind = next_kind(group, wish.kind if wish is not None else None)
            found = why or _offer(line, group, kind, wish, wei)
            if isinstance(found, Fees):
                attempt = self._sign(line, group[-1], withdrawal, kind, found, wish)
                wei -= dearer(group, attempt.gas_limit * attempt.max_fee)
                if nonce in waiting:
                    waiting[nonce] = Waiting(attempt.n, line.head, waiting[nonce].at)
            elif wish is not None:
                self._not_granted(wish, found)
            else:
                self._not_raised(group, waiting, found)
        return waiting

    def _not_raised(self, group: Sequence[Attempt], waiting: dict[int, Waiting], why: str) -> None:
        """A person is told, once for each reason."""
        nonce = group[0].nonce
        if waiting[nonce].told != why:
            waiting[nonce] = waiting[nonce]._replace(told=why)
            self._alerts.append(Alert(NOT_RAISED, {**_about(group), "reason": why}))

    def _top_up(self, line: Line, nonce: int, group: Sequence[Attempt], waiting: dict[int, Waiting], wei: int) -> int:
        """The same for coins that the gas account gives: by the rule alone. What its nonce may cost more."""
        newest = group[-1]
        is_open = nonce >= line.look.nonce and not any(attempt.status in ENDS_NONCE for attempt in group)
        if not is_open or not line.is_due(nonce) or is_unsent(newest, line.look.history.base_fee):
            return 0
        found = _offer(line, group, newest.kind, None, wei)
        if not isinstance(found, Fees):
            self._not_raised(group, waiting, found)
            return 0
        attempt = unsigned_top_up(line.desk, line.top_ups[nonce], newest.n + 1, found, self._facts.now)
        self._inserts.append(attempt_row(attempt))
        self._logs.append(Log(NAME, "top_up.sped_up", "top_up", paid_for(attempt), _plain(newest), _plain(attempt)))
        waiting[nonce] = Waiting(attempt.n, line.head, waiting[nonce].at)
        return dearer(group, attempt.gas_limit * attempt.max_fee)

    def _sign(
        self, line: Line, newest: Attempt, withdrawal: Withdrawal, kind: str, found: Fees, wish: Wish | None
    ) -> Attempt:
        now = self._facts.now
        attempt = unsigned(line.desk, withdrawal, newest.nonce, newest.n + 1, kind, found, now)
        self._inserts.append(attempt_row(attempt))
        if withdrawal.status == Status.CONFIRMING:
            self._move(withdrawal, Status.BROADCASTING)
        if wish is not None:
            granted = wish._replace(state=DONE, code=None, n=attempt.n, ended_at=now)
            self.upserts.append((ATTEMPT_WISHES, granted))
        action = "withdrawal.cancel_signed" if kind == CANCEL else "withdrawal.sped_up"
        actor = NAME if wish is None else wish.asked_by
        self._logs.append(Log(actor, action, "withdrawal", withdrawal.id, _plain(newest), _plain(attempt)))
        return attempt

    def _not_granted(self, wish: Wish, why: str) -> None:
        """A wish waits for gas, for its lane to be opened and for its key; anything else does not change by waiting."""
        waits = why in (LOW_GAS, LANE_PAUSED, KEY_UNAVAILABLE)
        after = wish._replace(code=why) if waits else wish._replace(state=REFUSED, code=why, ended_at=self._facts.now)
        if after != wish:
            self.upserts.append((ATTEMPT_WISHES, after))

    def _move(self, withdrawal: Withdrawal, status: Status, code: str | None = None) -> Withdrawal:
        after, (row, line) = moved(withdrawal, status, self._facts.now, NAME, code)
        self._updates.append(row)
        self._inserts.append(line)
        return after


def _offer(line: Line, group: Sequence[Attempt], kind: str, wish: Wish | None, wei: int) -> Fees | str:
    if is_shut(line.lane):
        return LANE_PAUSED
    if line.away:
        return KEY_UNAVAILABLE
    attempts_max = wish.attempts_max if wish is not None else line.policy.attempts_max
    return offer(group, kind, attempts_max, line.market, line.desk.fees, wei)


def _about(group: Sequence[Attempt]) -> dict[str, str]:
    one = group[-1]
    names = ("chain", "signer", "nonce", "n", "tx_hash")
    return {name: str(getattr(one, name)) for name in names} | {"withdrawal_id": paid_for(one)}


def _plain(attempt: Attempt) -> dict[str, Any]:
    return {
        "n": attempt.n,
        "kind": attempt.kind,
        "max_fee": str(attempt.max_fee),
        "priority_fee": str(attempt.priority_fee),
    }


def fold(facts: Facts, done: Done) -> None:
    """What one head changed, the next head of the batch leaves alone."""
    rows = [row for _, row in (*done.inserts, *done.updates, *done.upserts)]
    changed = {row.chain for row in rows if isinstance(row, (Attempt, Withdrawal, Wish))}
    changed |= {row[0].removeprefix(CURSOR) for table, row in done.upserts if table is CHAIN_CURSORS}
    for key in [key for key in facts.lines if key[0] in changed]:
        del facts.lines[key]


CURSOR: Final = "waiting:"


def cursor_of(chain: str) -> str:
    """Its row in chain_cursors."""
    return CURSOR + chain


async def remembered(connection: Connection, chain: str) -> dict[str, Any]:
    """By `<signer>:<nonce>`, as `Waiting.plain` has it."""
    state = await connection.fetchval(_sql.cursor, cursor_of(chain))
    found: dict[str, Any] = {} if state is None else orjson.loads(state)
    return found


class RaiseFees:
    def __init__(self, desks: Desks, policies: Mapping[Chain, RaisePolicy]) -> None:
        self._desks = desks
        self._policies = policies

    async def prepare(self, events: Sequence[Received]) -> tuple[Prepared, Mapping[Chain, int]]:
        """Before the transaction: what each chain that has a head says of our signers, and the head. One whose endpoints do not
        answer is left out: silence is no evidence."""
        heads: dict[Chain, int] = {}
        for received in events:
            if isinstance(received.event, HeadSeen):
                event = received.event
                heads[event.chain] = max(event.number, heads.get(event.chain, 0))
        return await self._desks.look(heads), heads

    async def load(
        self,
        connection: Connection,
        _events: Sequence[Received],
        prepared: tuple[Prepared, Mapping[Chain, int]],
        at: datetime,
    ) -> Facts:
        facts = Facts(at)
        ids: list[str] = []
        seen, heads = prepared
        for chain in sorted({seen.desks[key].chain for key in seen.looks}):
            facts.stored[chain] = await remembered(connection, chain.value)
            ids += await wished(connection, chain.value)
        locked = [(row[0], row[1], row[2]) for row in await connection.fetch(_sql.nonces_of, ids)]
        for key in sorted(seen.looks):
            facts.lines[key] = await self._line(connection, key, seen, heads, facts)
            locked += [(*key, nonce) for nonce in self._found(facts.lines[key], at)]
        await self._lock(connection, facts, sorted(set(locked)))
        return facts

    async def _line(
        self, connection: Connection, key: LaneKey, seen: Prepared, heads: Mapping[Chain, int], facts: Facts
    ) -> Line:
        desk, look = seen.desks[key], seen.looks[key]
        head = max(look.block_number, heads[desk.chain])
        # an endpoint may count as far as a column goes
        rows = await connection.fetch(_sql.waiting, *key, look.nonce, min(look.nonce + NONCES_MAX, QUANTITY_MAX))
        waiting: dict[int, Waiting] = {}
        for nonce, n, max_fee in rows:
            if waiting and int(max_fee) >= look.history.base_fee:
                continue
            known = facts.stored[desk.chain].get(f"{desk.signer.address}:{nonce}")
            before = Waiting.of_plain(known) if known is not None else Waiting(0, head, facts.now)
            before = before._replace(block=min(before.block, head))  # it was seen under a head that was made up
            waiting[nonce] = before if before.n == n else Waiting(n, head, before.at)
        market = fees(look.history, desk.fees)
        policy = self._policies.get(desk.chain, RaisePolicy())
        return Line(desk, policy, look, head, market, waiting, away=key in seen.away)

    def _found(self, line: Line, now: datetime) -> list[int]:
        return [nonce for nonce in line.waiting if line.is_due(nonce) or line.is_stuck(nonce, now)]

    async def _lock(self, connection: Connection, facts: Facts, nonces: Sequence[tuple[str, str, int]]) -> None:
        """Withdrawals, attempts, then lanes; the wishes are under their withdrawals' locks."""
        facts.withdrawals, groups = await lock_nonces(connection, nonces)
        for (*lane, nonce), group in groups.items():
            line = facts.lines.get((lane[0], lane[1]))
            if line is not None:
                line.groups[nonce] = group
        busy = {key: line for key, line in sorted(facts.lines.items()) if line.groups}
        if not busy:
            return
        lanes = await lock_lanes(connection, set(busy))
        wishes = await wishes_of(connection, sorted(facts.withdrawals))
        for key, line in busy.items():
            line.lane = lanes.get(key)
            if line.desk.gives_gas:
                rows = await connection.fetch(_sql.top_ups, *key, sorted(line.groups))
                line.top_ups = {row[2]: TopUp(*row)._replace(amount=int(row[4])) for row in rows}
            ids = {group[0].withdrawal_id for group in line.groups.values()}
            line.wishes = {id: wish for id, wish in wishes.items() if id in ids and wish.state == OPEN}
        flying = await self._desks.in_flight.of(connection, {key: line.look for key, line in busy.items()}, lanes)
        for key, line in busy.items():
            line.wei = line.look.native - flying[key].wei


def stage(desks: Desks, policies: Mapping[Chain, RaisePolicy]) -> Stage[Facts]:
    """The desks that sign_transactions has: both sign under the lane's lock, and share what was seen of the chain."""
    agent = RaiseFees(desks, policies)

    async def complete(
        prepared: tuple[Prepared, Mapping[Chain, int]], outcomes: Sequence[Outcome]
    ) -> Sequence[Outcome] | None:
        return await desks.complete(prepared[0], outcomes)

    return Stage(
        name=NAME,
        source=CHAIN_HEADS,
        prepare=agent.prepare,
        load=agent.load,
        decide=decide,
        fold=fold,
        complete=complete,
        emits=(TRANSACTIONS_SIGNED,),
    )
