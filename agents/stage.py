"""How every stage settles a batch: one PostgreSQL transaction. The only place, with delivery.py, that knows the rules.

| phase | what | why there |
| --- | --- | --- |
| owner rows | locked, epoch checked | a worker that lost the partition stops before it reads anything |
| inbox | ids claimed in the same statement; repeats drop out; an id with other contents is refused | a second delivery meets the row of the first |
| facts | loaded for all events; state rows locked | what is read stays true until the commit |
| decide | each event in order, folded into the facts | the second event sees what the first did |
| accounts | locked, sorted, after everything else | one lock order everywhere |
| post | folded in memory; a refusal is what `if_refused` says, and discards the decisions after it | they may have seen what was refused |
| complete | what no pure function can make: signatures | nothing is written yet; where it cannot be had, the batch is decided again |
| seal | rows, audit, owner rows; then the commit record, last | ledger/commit.py |

A batch that fails for one event's sake is split by the caller (delivery.py) until that event stands alone.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import chain
from typing import Any, Final, Literal

from agents.dead_letters import dead_letter
from agents.intents import intent_rows
from agents.item import Item
from agents.outcome import Alert, Done, Outcome, Rejected, Retry, Stage
from agents.parking import PARKED, PARKED_STEP_S, Parked, parked_keys
from ledger import inbox, store
from ledger.commit import Owner, Sealed, seal
from ledger.errors import PostingRefused
from ledger.groups import try_post
from ledger.levels import buffer_levels
from ledger.posting import Fold, Transaction
from ledger.record import Message
from ledger.rows import Block, Changes, Connection, Op, columns
from ledger.tables import INBOX, SCHEDULE
from topics.catalog import fits
from topics.envelope import value_of
from topics.errors import EventCode

REFUSALS_MAX: Final = 8
"""Refused postings in one batch before it is split: each makes the whole batch be decided again."""
DECIDED_AT_ONCE: Final = 50
REUSED: Final = "event_id_reused"
"""Dead-letter code: the id was settled with other contents."""


Kind = Literal["done", "rejected", "retry", "repeat"]


class SplitBatch(Exception):
    """Too many refusals in one batch; smaller ones are cheaper."""


@dataclass(slots=True)
class Settled:
    """A committed batch. `sealed` is None when every event was a repeat."""

    sealed: Sealed | None
    outcomes: Counter[tuple[Kind, str]]
    """(done | rejected | retry | repeat, code) -> events."""
    refused: list[bool]
    """For each event that was not a repeat: whether it was refused. The fuse judges it."""
    told: list[tuple[Item, Rejected | Retry]] = field(default_factory=list)
    """The events that were not done, for the log."""
    decided: tuple[Sequence[Item], Sequence[Outcome]] = ((), ())
    """The events that were no repeats, and what became of each."""
    alerts: list[Alert] = field(default_factory=list)


async def settle(
    connection: Connection,
    stage: Stage[Any],
    items: Sequence[Item],
    epochs: dict[tuple[str, int], int],
    at: datetime,
    prepared: Any,
    *,
    careful: bool = False,
    approve: Callable[[Sequence[bool]], None] = lambda _refused: None,
) -> Settled:
    """Settles the items in one transaction. `careful`: look for transactions that exist already (after a conflict).
    `approve` sees which events are refused and may veto the commit by raising.

    Raises Fenced, SplitBatch, what `approve` raises, a transient database error, or whatever a bug raises; nothing is committed then.
    """
    async with connection.transaction():
        owners, live = await _claim(connection, stage, items, epochs, at)
        repeats = len(items) - len(live)
        if not live:
            return Settled(None, Counter({("repeat", ""): repeats}), [])
        claimed_at = at
        completed: Sequence[Outcome] | None = None
        while completed is None:
            outcomes, fold, at = await _decide(connection, stage, live, at, prepared, careful)
            completed = await stage.complete(prepared, outcomes)
        outcomes = list(completed)
        refused = [isinstance(o, Rejected) and o.code not in stage.bystanders for o in outcomes]
        approve(refused)
        counts = Counter(map(_label, outcomes))
        sealed = await _seal(connection, stage, owners, live, outcomes, fold, at, claimed_at, counts)
    told = [(item, o) for item, o in zip(live, outcomes, strict=True) if not isinstance(o, Done)]
    counts[("repeat", "")] = repeats
    alerts = [alert for outcome in outcomes if not isinstance(outcome, Rejected) for alert in outcome.alerts]
    return Settled(sealed, counts, refused, told, decided=(live, outcomes), alerts=alerts)


async def _claim(
    connection: Connection, stage: Stage[Any], items: Sequence[Item], epochs: dict[tuple[str, int], int], at: datetime
) -> tuple[list[Owner], list[Item]]:
    """The owner rows, and those items that are ours to settle now."""
    placed = [item for item in items if item.received is None or stage.reads is not None]
    if former := await _former(connection, stage, placed):
        items = [replace(item, uid=former.get(item.uid, item.uid)) for item in items]
    chosen: dict[str, Item] = {}
    for item in items:
        other = chosen.setdefault(item.uid, item)
        if other is not item and item.attempt > other.attempt:
            chosen[item.uid] = item
    owners, claimed = await inbox.own_and_claim(connection, stage.name, epochs, list(chosen.values()), at)
    if claimed.all_fresh and len(chosen) == len(items):
        return owners, list(items)
    true = {uid: claimed.known.get(uid, item.fingerprint) for uid, item in chosen.items()}
    reused = [item for item in items if item.fingerprint != true[item.uid]]
    marks: frozenset[str] = frozenset()
    if reused:
        # settled under an id of the message's position and bytes, so that its redelivery is a repeat
        former = await _former(connection, stage, reused)
        new = [item for item in reused if item.position_uid not in former]
        positions = [inbox.Claim(item.position_uid, item.attempt, item.fingerprint) for item in new]
        marks = (await inbox.own_and_claim(connection, stage.name, epochs, positions, at))[1].fresh
    live: list[Item] = []
    odd = {id(item) for item in reused}
    for item in items:
        if id(item) in odd:
            if item.position_uid in marks:
                refusal = Rejected(REUSED, "this id was settled before with other contents")
                live.append(replace(item, refusal=refusal, uid=item.position_uid))
        elif chosen[item.uid] is item and item.uid in claimed.fresh:
            live.append(item)
        elif chosen[item.uid] is item and item.uid in claimed.again:
            live.append(replace(item, again=True))
    return owners, live


async def _former(connection: Connection, stage: Stage[Any], items: Sequence[Item]) -> dict[str, str]:
    """position_uid -> former_uid of those that were settled under the latter: they are repeats."""
    known = await inbox.known(connection, stage.name, [item.former_uid for item in items]) if items else {}
    return {item.position_uid: item.former_uid for item in items if known.get(item.former_uid) == item.fingerprint}


async def _decide(
    connection: Connection,
    stage: Stage[Any],
    live: Sequence[Item],
    at: datetime,
    prepared: Any,
    careful: bool,
) -> tuple[list[Outcome], Fold, datetime]:
    """Outcomes in the items' order and the ledger's fold of their postings."""
    events = [item.received for item in live if item.refusal is None and item.received]
    parked = await parked_keys(connection, stage, live, at)
    refused: dict[int, Outcome] = {}
    fold = Fold({}, at)
    while True:
        facts = await stage.load(connection, events, prepared, at) if events else None
        outcomes = await _decide_all(stage, live, facts, parked, refused)
        postings = [p for outcome in outcomes if isinstance(outcome, Done) for p in outcome.postings]
        if not postings:
            return outcomes, fold, at
        fold = await store.lock(connection, postings, at)
        at = fold.at
        known = await store.already_posted(connection, postings) if careful else {}
        for index, outcome in enumerate(outcomes):
            if not isinstance(outcome, Done) or not outcome.postings:
                continue
            refusal = _post(fold, outcome.postings, known)
            if refusal is not None and not careful and await store.already_posted(connection, outcome.postings):
                careful = True  # refused for what it did itself the first time: the money is spent, the hold has ended
                break
            if refusal is not None:
                refused[index] = _meaning(outcome, refusal, again=index in refused)
                break
        else:
            return outcomes, fold, at
        if len(refused) > REFUSALS_MAX and len(live) > 1:
            raise SplitBatch


def _meaning(outcome: Done, refusal: PostingRefused, *, again: bool) -> Outcome:
    """What the ledger's refusal makes of an event. `again`: the outcome was a refusal's meaning already, and ends here."""
    meaning = outcome.if_refused
    if callable(meaning):
        meaning = meaning(refusal)
    if meaning is None or (again and isinstance(meaning, Done)):
        return Rejected(refusal.code, str(refusal))
    return meaning


def _post(
    fold: Fold, postings: Sequence[Transaction], known: Mapping[str, PostingRefused | None]
) -> PostingRefused | None:
    """All of an event's postings or none. `known`: those whose id exists, with the refusal where the contents differ."""
    if not known:
        return try_post(fold, postings)
    other = next((refusal for p in postings if (refusal := known.get(p.id)) is not None), None)
    return other or try_post(fold, [p for p in postings if p.id not in known])


async def _decide_all(
    stage: Stage[Any],
    live: Sequence[Item],
    facts: Any,
    parked: dict[bytes, Parked],
    refused: dict[int, Outcome],
) -> list[Outcome]:
    """In slices, between which the loop serves others: a node that has answered gets its next request."""
    outcomes: list[Outcome] = []
    waiting = dict(parked)
    for index, item in enumerate(live):
        if index % DECIDED_AT_ONCE == DECIDED_AT_ONCE - 1:
            await asyncio.sleep(0)
        before = waiting.get(item.key) if waiting and item.key is not None else None
        if before is not None and item.again:
            before = replace(before, sent=before.sent - {item.uid})
        outcome: Outcome
        if item.refusal is not None:
            outcome = item.refusal
        elif index in refused:
            outcome = refused[index]
        elif before is not None and (before.head or (before.waits and not item.again)):
            outcome = Retry(PARKED, before.after_s + PARKED_STEP_S)
        else:
            assert item.received is not None
            outcome = stage.decide(item.received, facts)
        if isinstance(outcome, Retry) and not fits(stage.source.name, item.key, item.record.value, item.record.headers):
            outcome = Rejected(
                EventCode.TOO_LARGE, "with its headers it is as large as its topic takes, and was to come again"
            )
        if isinstance(outcome, Done):
            stage.fold(facts, outcome)
        elif isinstance(outcome, Retry) and stage.ordered and item.key is not None:
            head = outcome.code != PARKED or (before is not None and before.head)
            before = Parked(outcome.after_s, head, True, before.sent if before else frozenset())
        if before is not None and item.key is not None:
            waiting[item.key] = before
        outcomes.append(outcome)
    return outcomes


async def _seal(
    connection: Connection,
    stage: Stage[Any],
    owners: Sequence[Owner],
    live: Sequence[Item],
    outcomes: Sequence[Outcome],
    fold: Fold,
    at: datetime,
    claimed_at: datetime,
    counts: Counter[tuple[Kind, str]],
) -> Sealed:
    """`claimed_at`: the time in the inbox rows as they were written; `at` may be later (no account's time runs back)."""
    changes = Changes()
    settled: dict[str, inbox.InboxOutcome] = {}
    for item, outcome in zip(live, outcomes, strict=True):
        if item.again and not isinstance(outcome, Retry):
            changes.delete(SCHEDULE, (stage.name, item.uid))
        if isinstance(outcome, Done):
            for table, row in outcome.inserts:
                changes.insert(table, row)
            for table, row in outcome.upserts:
                changes.upsert(table, row)
            for table, row in outcome.updates:
                changes.update(table, row)
            if outcome.calls:
                intent_rows(changes, stage, item, outcome.calls, at)
        elif isinstance(outcome, Rejected):
            settled[item.uid] = "rejected"
        else:
            settled[item.uid] = "retry"
            changes.upsert(SCHEDULE, _schedule_row(stage, item, outcome, at))
    await inbox.settle(connection, stage.name, settled)
    return await seal(
        connection,
        stage.name,
        owners,
        written=_inbox_blocks(stage, live, settled, claimed_at),
        blocks=chain(store.blocks_of(fold, owners[0].batch), changes.blocks()),
        messages=chain(_messages(stage, live, outcomes, at), buffer_levels(fold)),
        at=at,
        actor=stage.name,
        summary={f"{kind}:{code}" if code else kind: n for (kind, code), n in counts.items()},
        logs=[log for outcome in outcomes if isinstance(outcome, Done) and outcome.logs for log in outcome.logs],
    )


def _messages(stage: Stage[Any], live: Sequence[Item], outcomes: Sequence[Outcome], at: datetime) -> Iterator[Message]:
    for item, outcome in zip(live, outcomes, strict=True):
        if isinstance(outcome, Done):
            trace = item.received.traceparent if item.received else None
            for topic, key, event, event_id in outcome.emits:
                yield Message(topic.name, key.encode(), value_of(event), event_id, event.ce_type(), trace, None)
        elif isinstance(outcome, Rejected) and stage.reads is None:
            yield dead_letter(stage, item, outcome, at)


def _schedule_row(stage: Stage[Any], item: Item, retry: Retry, at: datetime) -> tuple[Any, ...]:
    # in hex: a header may hold any bytes, JSON may not
    headers = [
        [name.encode().hex(), value.hex()]
        for name, value in item.record.headers
        if name != "attempt" and value is not None
    ]
    due = at + timedelta(seconds=retry.after_s)
    return (
        stage.name,
        item.uid,
        item.attempt + 1,
        stage.source.name,
        item.key,
        item.record.value or b"",
        headers,
        retry.code,
        due,
    )


def _inbox_blocks(
    stage: Stage[Any], live: Sequence[Item], settled: dict[str, inbox.InboxOutcome], at: datetime
) -> list[Block]:
    fresh = [item for item in live if not item.again]
    again = [item for item in live if item.again]
    return [
        columns(
            INBOX,
            op,
            stage.name,
            [item.uid for item in some],
            [item.attempt for item in some],
            [item.fingerprint for item in some],
            [settled.get(item.uid, "done") for item in some] if settled else "done",
            at,
        )
        for op, some in ((Op.INSERT, fresh), (Op.UPSERT, again))
        if some
    ]


def _label(outcome: Outcome) -> tuple[Kind, str]:
    if isinstance(outcome, Done):
        return ("done", "")
    return ("rejected" if isinstance(outcome, Rejected) else "retry", outcome.code)
