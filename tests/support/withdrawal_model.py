"""The withdrawals' stages over a chain in memory: the product's own decisions, on tables that are dicts and topics that are
lists which deliver in any order, and again.

What the broken peers do otherwise is a method that a mutation overrides (tests/unit/test_withdrawal_model.py).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from agents.outcome import Done, Emit, Outcome, Retry
from agents.withdrawals import (
    broadcast_transactions,
    raise_fees,
    settle_withdrawals,
    sign_transactions,
    track_confirmations,
)
from agents.withdrawals.desks import Desk as SigningDesk
from agents.withdrawals.desks import Desks, Prepared
from agents.withdrawals.look import RESEND_S, ChainWriter, News, OpenAttempt, look
from agents.withdrawals.raising import RaisePolicy, Waiting
from agents.withdrawals.wishes import OPEN as OPEN_WISH
from agents.withdrawals.wishes import Wish
from agents.withdrawals.withdrawal import (
    ENDED,
    Attempt,
    AttemptStatus,
    Lane,
    Status,
    Withdrawal,
    transaction_ids,
    withdrawal_id,
)
from chain.answers import ACCEPTED, classify
from chain.errors import ChainError, RpcRefused
from chain.fees import FeeHistory, FeePolicy, Fees
from chain.hot_wallet import HotWallet, Look
from chain.signer import KeySigner
from chain.window import Window
from ledger.tables import ATTEMPT_WISHES, ATTEMPTS, CHAIN_CURSORS, LANES, WITHDRAWAL_HISTORY, WITHDRAWALS
from tests.support.chain_model import TOKEN, Net, Node, Tx
from topics.catalog import TRANSACTIONS_BROADCAST, TRANSACTIONS_CONFIRMED, TRANSACTIONS_SIGNED, WITHDRAWALS_SETTLED
from topics.envelope import Received
from topics.events import Chain, HeadSeen, TransactionSigned

CHAIN = Chain.MATIC.value
KEY = KeySigner(b"\x05" * 32)
SIGNER = KEY.address
FEE = 100
DEPTH = 4
LOWEST = 2
"""Nonces that are in no block, looked at under one head."""
START = datetime(2026, 1, 1, tzinfo=UTC)
OPEN = (AttemptStatus.SIGNED, AttemptStatus.BROADCAST)
HEAD = HeadSeen(chain=CHAIN, chain_id=1, number=1, block_hash="0x" + "1" * 64, timestamp_s=1)
DESK = SigningDesk(
    Chain.MATIC, 1, KEY, TOKEN, HotWallet((), SIGNER, TOKEN), FeePolicy(priority_floor=1, max_fee_cap=10**9)
)
RULE = RaisePolicy(blocks=2, attempts_max=3, stuck_s=2 * RESEND_S)
ATTEMPTS_MAX = 5


@dataclass
class Desk:
    net: Net
    runner: asyncio.Runner
    nodes: list[Node] = field(default_factory=list)
    now: datetime = START
    withdrawals: dict[str, Withdrawal] = field(default_factory=dict)
    attempts: dict[str, Attempt] = field(default_factory=dict)
    lane: Lane = field(default_factory=lambda: Lane(CHAIN, SIGNER, 0, 0, "open", "", 1, START))
    cursor: Window | None = None
    history: set[tuple[str, int]] = field(default_factory=set)
    holds: dict[str, str] = field(default_factory=dict)
    """Withdrawal -> open, paid, released."""
    topics: dict[str, list[Emit]] = field(default_factory=dict)
    """What was told and may come, any time and any number of times."""
    inbox: set[tuple[str, str]] = field(default_factory=set)
    news: News | None = None
    """Read, and not decided on yet."""
    remembered: dict[str, Any] = field(default_factory=dict)
    """Of the nonces that wait, by raise_fees."""
    wishes: dict[str, Wish] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = self.nodes or [Node(self.net, "one"), Node(self.net, "two")]

    # -- before the chain -----------------------------------------------------------------------------------------------

    def request(self) -> None:
        number = len(self.withdrawals) + 1
        id = withdrawal_id("ada", str(number))
        hold, to = transaction_ids(id)[0], f"0x{number:040x}"
        self.withdrawals[id] = Withdrawal(
            id, "ada", str(number), "0" * 32, "chain", CHAIN, "USDC", 100, to, Status.SIGNING.value, None, hold, self.now,
            self.now, None, 1,
        )  # fmt: skip
        self.holds[id] = "open"

    def sign(self, room: int = 16) -> None:
        """One commit of sign_waiting: nonces, attempts, the withdrawals' steps; then it is told. `room`: how many."""
        waiting = {withdrawal.id: withdrawal for withdrawal in self.in_state(Status.SIGNING)}
        look = Look(self.net.head, self.net.count(SIGNER, self.net.head), 0, 10**30, 10**30, FeeHistory(1, ()))
        queue = sign_transactions.Queue(
            DESK, look, Fees(FEE, FEE), self.lane, True, room=room, wei=10**30, units=10**30, cost=FEE
        )
        facts = sign_transactions.Facts(self.now, {DESK.key: queue}, {Chain.MATIC: waiting})
        decided = sign_transactions.decide(Received("x", "test", HEAD, 1, None), facts)
        self.complete(decided)

    def complete(self, decided: Outcome) -> None:
        """Signs what was decided, and commits it."""
        completed = self.runner.run(Desks([DESK]).complete(Prepared({DESK.key: DESK}, {}), [decided]))
        assert completed is not None
        self.apply(completed[0])

    def take_nonce(self) -> int:
        nonce = self.lane.next_nonce
        self.lane = self.lane._replace(next_nonce=nonce + 1, version=self.lane.version + 1)
        return nonce

    def again(self, withdrawal: Withdrawal, kind: str) -> None:
        """A person's speed-up or cancel: the next attempt of the same nonce, stored before it is sent."""
        wish = Wish(
            withdrawal.id, CHAIN, kind, ATTEMPTS_MAX, OPEN_WISH, None, None, "ann", "why", self.now, None
        )  # fmt: skip
        self.raise_fees(wish)
        if any(not node.down for node in self.nodes):
            assert self.wishes[withdrawal.id].state != OPEN_WISH, "granted or refused"

    def raise_fees(self, wish: Wish | None = None) -> None:
        """One commit of raise_fees under the newest head of the nodes that answer: by its rule, and what is wished."""
        up = [node for node in self.nodes if not node.down]
        if not up:
            return  # no evidence
        look = Look(
            min(node.head for node in up), max(self.net.count(SIGNER, node.head) for node in up), 0, 10**30, 10**30,
            FeeHistory(1, ()),
        )  # fmt: skip
        waiting: dict[int, Waiting] = {}
        groups: dict[int, list[Attempt]] = {}
        for attempt in sorted(self.attempts.values(), key=lambda a: (a.nonce, a.n)):
            groups.setdefault(attempt.nonce, []).append(attempt)
        for nonce, group in groups.items():
            if nonce >= look.nonce and not waiting and all(a.status in OPEN for a in group):
                known = self.remembered.get(f"{SIGNER}:{nonce}")
                before = Waiting.of_plain(known) if known else Waiting(0, self.net.head, self.now)
                n = group[-1].n
                waiting[nonce] = before if before.n == n else Waiting(n, self.net.head, before.at)
        line = raise_fees.Line(
            DESK, RULE, look, self.net.head, Fees(FEE, FEE), waiting, self.lane, groups,
            {wish.withdrawal_id: wish} if wish is not None else {}, 10**30,
        )  # fmt: skip
        facts = raise_fees.Facts(self.now, {DESK.key: line}, dict(self.withdrawals), {Chain.MATIC: self.remembered})
        self.complete(raise_fees.decide(Received("x", "test", HEAD, 1, None), facts))

    def attempt(self, withdrawal: Withdrawal, nonce: int, n: int, kind: str, fee: int) -> Attempt:
        attempt = self.signed(withdrawal, nonce, n, kind, fee)
        self.store(attempt)
        return attempt

    def signed(self, withdrawal: Withdrawal, nonce: int, n: int, kind: str, fee: int) -> Attempt:
        tx_hash = f"0x{len(self.net.signed) + 1:064x}"
        amount = withdrawal.amount if kind == "payment" else 0
        to = withdrawal.recipient if kind == "payment" else SIGNER
        self.net.signed[tx_hash] = Tx(tx_hash, SIGNER, nonce, to, amount, fee)
        return Attempt(
            CHAIN, tx_hash, SIGNER, nonce, n, kind, withdrawal.id, b"", 1, fee, fee, "signed", None, None, None, self.now,
            None, self.now, 1,
        )  # fmt: skip

    def store(self, attempt: Attempt) -> None:
        self.attempts[attempt.tx_hash] = attempt
        names = ("chain", "signer", "nonce", "n", "tx_hash", "withdrawal_id")
        event = TransactionSigned.model_validate({name: getattr(attempt, name) for name in names})
        self.tell(Emit(TRANSACTIONS_SIGNED, self.lane.key, event, attempt.tx_hash))

    # -- the chain ------------------------------------------------------------------------------------------------------

    def broadcast(self, place: int, reply: str) -> None:
        """`reply`: heard; lost, after the node has it; none, before; died, as lost, and the worker is gone as well."""
        waiting = self.waiting(TRANSACTIONS_SIGNED.name)
        emit = waiting[place % len(waiting)]
        assert isinstance(emit.event, TransactionSigned)
        attempt = self.attempts[emit.event.tx_hash]
        answer = broadcast_transactions.NOT_SENT
        if attempt.status in broadcast_transactions.SENDABLE and reply != "none":
            refusal = self.net.receive(self.net.signed[attempt.tx_hash])
            if reply == "heard":
                refused = RpcRefused("one", "eth_sendRawTransaction", -32000, refusal)
                answer = classify(refused) if refusal else ACCEPTED
            else:
                self.unheard(attempt)
        if reply == "died":
            return
        facts = broadcast_transactions.Facts(
            self.now,
            {(CHAIN, attempt.tx_hash): answer},
            {(CHAIN, a.tx_hash): a for a in self.attempts.values()},
            dict(self.withdrawals),
        )
        outcome = broadcast_transactions.decide(Received(emit.id, "test", emit.event, 1, None), facts)
        if not isinstance(outcome, Retry):  # which comes again
            self.apply(outcome)
            self.inbox.add((TRANSACTIONS_SIGNED.name, emit.id))

    def unheard(self, _attempt: Attempt) -> None:
        """Nobody knows whether the node has it: it comes again."""

    def look(self) -> None:
        """The first half of a head: the chain is read."""
        writer = ChainWriter(self.nodes, TOKEN, DEPTH)

        async def attempts(seen: Sequence[str], _lowest: int) -> list[OpenAttempt]:
            waiting = [a for a in self.attempts.values() if a.status in OPEN]
            lowest = sorted({a.nonce for a in waiting})[:LOWEST]
            found = [a for a in self.attempts.values() if a.status == AttemptStatus.MINED]
            found += [a for a in waiting if a.nonce in lowest or a.tx_hash in seen]
            return [
                OpenAttempt(
                    *(a.tx_hash, a.signer, a.nonce, a.n, a.status, a.block_hash, a.block_number, a.updated_at),
                    self.review(self.withdrawals[a.withdrawal_id or ""]),
                )
                for a in sorted(found, key=lambda a: (a.nonce, a.n))
            ]

        async def signed(nonces: Any) -> dict[tuple[str, int], list[str]]:
            return {key: [a.tx_hash for a in self.attempts.values() if (a.signer, a.nonce) == key] for key in nonces}

        up = [node for node in self.nodes if not node.down]
        if up:
            try:
                self.news = self.runner.run(look(writer, up, self.cursor, attempts, signed, self.now))
            except ChainError:
                self.news = None

    def review(self, withdrawal: Withdrawal) -> str | None:
        return (withdrawal.code or "") if withdrawal.status == Status.MANUAL_REVIEW else None

    def decide(self) -> None:
        """The second half, in its transaction, whatever happened in between."""
        news, self.news = self.news, None
        if news is None:
            return
        groups: dict[tuple[str, str, int], list[Attempt]] = {}
        for attempt in sorted(self.attempts.values(), key=lambda a: a.n):
            if (attempt.signer, attempt.nonce) in news.touched:
                groups.setdefault((CHAIN, attempt.signer, attempt.nonce), []).append(attempt)
        facts = track_confirmations.Facts(
            self.now, {CHAIN: news}, groups, dict(self.withdrawals), {(CHAIN, SIGNER): self.lane}
        )
        self.apply(track_confirmations.decide(Received("x", "test", HEAD, 1, None), facts))

    def settle(self, place: int) -> None:
        waiting = self.waiting(TRANSACTIONS_CONFIRMED.name)
        emit = waiting[place % len(waiting)]
        facts = settle_withdrawals.Facts(
            self.now, 1, dict(self.withdrawals), {(CHAIN, a.tx_hash): a for a in self.attempts.values()}
        )
        self.apply(settle_withdrawals.decide(Received(emit.id, "test", emit.event, 1, None), facts))
        self.inbox.add((TRANSACTIONS_CONFIRMED.name, emit.id))

    def apply(self, outcome: Any) -> None:
        assert isinstance(outcome, Done), outcome
        for table, row in outcome.inserts:
            if table is ATTEMPTS:
                assert row.tx_hash not in self.attempts
                withdrawal = self.withdrawals[row.withdrawal_id]
                others = [a for a in self.attempts.values() if a.nonce == row.nonce]
                assert all(a.withdrawal_id == withdrawal.id and a.n < row.n for a in others)
                assert {a.nonce for a in self.of(withdrawal)} <= {row.nonce}, "one nonce for life"
                to, amount = (withdrawal.recipient, withdrawal.amount) if row.kind == "payment" else (SIGNER, 0)
                self.net.signed[row.tx_hash] = Tx(row.tx_hash, SIGNER, row.nonce, to, amount, row.max_fee)
                self.attempts[row.tx_hash] = row
            else:
                assert table is WITHDRAWAL_HISTORY
                self._line((table, row))
        for table, row in (*outcome.upserts, *outcome.updates):
            if table is ATTEMPTS:
                assert row.version > self.attempts[row.tx_hash].version
                self.attempts[row.tx_hash] = row
            elif table is WITHDRAWALS:
                self.withdrawals[row.id] = row
            elif table is LANES:
                self.lane = row
            elif table is ATTEMPT_WISHES:
                self.wishes[row.withdrawal_id] = row
            elif row[0] == raise_fees.cursor_of(CHAIN):
                self.remembered = row[1]
            else:
                assert table is CHAIN_CURSORS
                self.cursor = Window.of_json(row[1])
        for posting in outcome.postings:
            assert self.holds[posting.reference] == "open", f"{posting.kind} after {self.holds[posting.reference]}"
            self.holds[posting.reference] = {"withdrawal": "paid", "withdrawal_release": "released"}[posting.kind]
        for emit in outcome.emits:
            self.tell(emit)

    def _line(self, line: Any) -> None:
        key = (line[1][0], line[1][1])
        assert key not in self.history
        self.history.add(key)

    # -- topics ---------------------------------------------------------------------------------------------------------

    def tell(self, emit: Emit) -> None:
        if emit.topic is TRANSACTIONS_BROADCAST:
            return  # for the world: nobody here decides by it
        told = self.topics.setdefault(emit.topic.name, [])
        assert emit.id not in [other.id for other in told], (
            "an id is told once, or its event would be dropped as a repeat"
        )
        told.append(emit)

    def waiting(self, topic: str) -> list[Emit]:
        return [emit for emit in self.topics.get(topic, ()) if (topic, emit.id) not in self.inbox]

    def repeat(self, topic: str) -> None:
        """Everything comes again, as after a rebuild of a group's offsets; the stages' rows are all that protects."""
        self.inbox = {key for key in self.inbox if key[0] != topic}

    # -- judging --------------------------------------------------------------------------------------------------------

    def of(self, withdrawal: Withdrawal) -> list[Attempt]:
        return [attempt for attempt in self.attempts.values() if attempt.withdrawal_id == withdrawal.id]

    def in_state(self, *states: Status) -> list[Withdrawal]:
        return [withdrawal for withdrawal in self.withdrawals.values() if withdrawal.status in states]

    def check(self) -> None:
        """At any moment: nobody is paid twice, and nobody is paid whose money went back."""
        for withdrawal in self.withdrawals.values():
            paid = self.net.paid(withdrawal.recipient)
            assert paid <= 1, f"{withdrawal.recipient} is paid {paid} times"
            if withdrawal.status == Status.COMPLETED:
                assert paid == 1, "completed and not paid"
                assert self.holds[withdrawal.id] == "paid"
            elif withdrawal.status in (Status.FAILED, Status.CANCELLED):
                assert paid == 0, "released and paid"
                assert self.holds[withdrawal.id] == "released"
            else:
                assert self.holds[withdrawal.id] == "open"
        mined = Counter(a.nonce for a in self.attempts.values() if a.status in ("mined", "confirmed", "reverted"))
        assert all(times == 1 for times in mined.values()), "two mined transactions of one nonce"

    def drain(self) -> None:
        """Faults stop: everything that was asked for must end."""
        for node in self.nodes:
            node.down, node.lag = False, 0
        for _ in range(6 * DEPTH):
            self.sign()
            for place in range(len(self.waiting(TRANSACTIONS_SIGNED.name)) - 1, -1, -1):
                self.broadcast(place, "heard")
            self.net.mine(10)
            self.look()
            self.decide()
            self.raise_fees()
            while self.waiting(TRANSACTIONS_CONFIRMED.name):
                self.settle(0)
            self.now += timedelta(seconds=RESEND_S + 1)
            self.check()
        left = [(w.status, w.code) for w in self.withdrawals.values() if w.status not in ENDED]
        assert not left, f"stranded: {left}"
        unended = [(a.kind, a.status) for a in self.attempts.values() if a.status in (*OPEN, AttemptStatus.MINED)]
        assert not unended, f"attempts of an ended nonce: {unended}"
        told = [emit.id for emit in self.topics.get(WITHDRAWALS_SETTLED.name, ())]
        assert sorted(told) == sorted(self.withdrawals)
        for withdrawal in self.withdrawals.values():
            blocked = withdrawal.recipient in self.net.blacklist
            assert not (blocked and withdrawal.status == Status.COMPLETED)
