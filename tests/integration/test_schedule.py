"""Events that a stage wants later, on real PostgreSQL and Kafka: the row, the repeat, and what waits behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from typing import Any

import pytest

from agents.outcome import Done, Emit, Outcome, Rejected, Retry, Stage
from agents.services import Services
from agents.sweeper import Sweeper
from ledger.rows import Connection
from ledger.verify import verify
from stablerail.dev.kafka import Kafka
from tests.support.in_process import SCHEMA, Ground, ground, running, until
from tests.support.rebuild import differences, empty_database, rebuild
from topics.catalog import KYC_APPROVED, WALLETS_REQUESTED
from topics.envelope import Received, event_uid, headers_of, value_of
from topics.events import Chain, KycApproved, WalletsRequested

SOURCE = KYC_APPROVED
ANSWERS = WALLETS_REQUESTED
STAGE = "answer_things"

Rule = Callable[[Received], Outcome | None]


def answer_things(rule: Rule, *, ordered: bool = False) -> Stage[None]:
    """A stage that asks the test's rule, and otherwise repeats what it heard under the attempt that was settled."""

    async def load(_connection: Connection, _events: Sequence[Received], _prepared: Any, _at: datetime) -> None:
        return None

    def decide(received: Received, _facts: None) -> Outcome:
        event = received.event
        assert isinstance(event, KycApproved)
        other = rule(received)
        if other is not None:
            return other
        answer = WalletsRequested(user_id=f"{event.applicant_id} {received.attempt}", chains=(Chain.ETH,))
        return Done(emits=(Emit(ANSWERS, "all", answer, f"answer {received.id}"),))

    return Stage(name=STAGE, source=SOURCE, load=load, decide=decide, ordered=ordered)


def later_until(attempt: int, after_s: float = 60.0) -> Rule:
    return lambda received: Retry("not_yet", after_s) if received.attempt < attempt else None


@pytest.fixture
async def at(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    async with ground(database, kafka.bootstrap, topic_prefix, [SOURCE, ANSWERS]) as it:
        yield it


async def ask(at: Ground, name: str, key: bytes = b"k", extra: Sequence[tuple[str, bytes]] = ()) -> str:
    """Sends an event whose applicant is `name`; its id in the inbox."""
    event = KycApproved(user_id="thing", vendor="test", applicant_id=name, vendor_event_id=name, approved_at="now")
    headers = headers_of(KycApproved.ce_type(), event_id=name, source="test", time=at.clock())
    await at.send(SOURCE, key, value_of(event), [*headers, *extra])
    return event_uid("test", name)


async def answers(at: Ground) -> list[str]:
    """`<applicant> <attempt>` of each answer, in the order they were told."""
    return [WalletsRequested.model_validate_json(record.value).user_id for record in await at.told(ANSWERS)]


async def inbox(at: Ground) -> dict[str, tuple[int, str]]:
    rows = await at.observer.fetch("SELECT replace(event_id::text, '-', ''), attempt, outcome FROM inbox")
    return {uid: (attempt, outcome) for uid, attempt, outcome in rows}


async def scheduled(at: Ground) -> dict[str, tuple[int, str]]:
    query = "SELECT replace(event_id::text, '-', ''), attempt, code FROM schedule"
    return {uid: (attempt, code) for uid, attempt, code in await at.observer.fetch(query)}


async def settled(at: Ground, expected: dict[str, tuple[int, str]]) -> None:
    async def same() -> bool:
        return await inbox(at) == expected

    await until(same, f"the inbox holds {expected}")


async def sweep(services: Services, at: Ground) -> None:
    """One round of a worker's sweeper, at the clock's time. What was settled before has left by then: the clock makes it old."""
    await until(lambda: everything_left(services, at), "what was settled has left")
    await Sweeper(services).sweep(await services.connect())


async def everything_left(services: Services, at: Ground) -> bool:
    await services.relay.tidy()
    return not await at.observer.fetchval("SELECT count(*) FROM outbox")


async def clean(at: Ground) -> None:
    """The invariants hold, and the journal holds all of it."""
    assert not [result for result in await verify(at.observer) if not result.holds]
    async with empty_database(at.dsn) as empty:
        await rebuild(at.bootstrap, at.prefix, empty, SCHEMA)
        assert await differences(at.dsn, empty) == {}


async def test_an_event_for_later_waits_in_the_schedule_until_it_is_due_and_comes_again_with_its_attempt(
    at: Ground,
) -> None:
    async with at.process() as services, running(answer_things(later_until(3)), services, at):
        uid = await ask(at, "one")
        await settled(at, {uid: (1, "retry")})
        assert await scheduled(at) == {uid: (2, "not_yet")}

        await sweep(services, at)
        assert await scheduled(at) == {uid: (2, "not_yet")}, "it is not due yet"

        at.clock.forward(61)
        await sweep(services, at)
        await settled(at, {uid: (2, "retry")})
        assert await scheduled(at) == {uid: (3, "not_yet")}

        at.clock.forward(61)
        await sweep(services, at)
        await settled(at, {uid: (3, "done")})
    assert await scheduled(at) == {}
    assert await answers(at) == ["one 3"]
    attempts = [dict(record.headers).get("attempt") for record in await at.told(SOURCE)]
    assert attempts == [None, b"2", b"3"]
    await clean(at)


async def test_a_redelivery_of_the_original_changes_nothing_while_its_repeat_waits_or_after_it(at: Ground) -> None:
    rule = later_until(2)
    async with at.process() as services, running(answer_things(rule), services, at):
        uid = await ask(at, "one")
        await settled(at, {uid: (1, "retry")})
    due = await at.observer.fetchval("SELECT available_at FROM schedule")

    at.clock.forward(10)
    async with at.process() as services, running(answer_things(rule), services, at) as delivery:
        other = await ask(at, "two")  # behind the original in its partition: when it is settled, the original was seen
        await settled(at, {uid: (1, "retry"), other: (1, "retry")})
        assert await at.observer.fetchval("SELECT min(available_at) FROM schedule") == due
        at.clock.forward(61)
        await sweep(services, at)
        await settled(at, {uid: (2, "done"), other: (2, "done")})
        assert len(delivery.positions) == 1

    async with at.process() as services, running(answer_things(rule), services, at):
        third = await ask(at, "three")
        await settled(at, {uid: (2, "done"), other: (2, "done"), third: (1, "retry")})
    assert await answers(at) == ["one 2", "two 2"]
    await clean(at)


async def test_key_value_and_headers_of_any_bytes_come_back_as_they_were(at: Ground) -> None:
    odd = bytes(range(256))
    extra = [
        ("odd", odd),
        ("odd", b""),
        ("ünï", b"\xff\x00"),
        ("traceparent", b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01"),
    ]
    async with at.process() as services, running(answer_things(later_until(2)), services, at):
        uid = await ask(at, "one", key=odd, extra=extra)
        await settled(at, {uid: (1, "retry")})
        await clean(at)
        at.clock.forward(61)
        await sweep(services, at)
        await settled(at, {uid: (2, "done")})
    records = await at.told(SOURCE)
    original = next(record for record in records if "attempt" not in dict(record.headers))
    (repeat,) = [record for record in records if "attempt" in dict(record.headers)]
    assert (repeat.key, repeat.value) == (original.key, original.value)
    assert [*original.headers, ("attempt", b"2")] == list(repeat.headers)
    (answer,) = await at.told(ANSWERS)
    assert dict(answer.headers)["traceparent"] == extra[3][1]


async def test_events_of_a_key_wait_in_their_order_behind_the_one_that_is_parked(at: Ground) -> None:
    def rule(received: Received) -> Outcome | None:
        assert isinstance(received.event, KycApproved)
        first = received.event.applicant_id == "a1"
        return Retry("not_yet", 60.0) if first and received.attempt < 3 else None

    async with at.process() as services, running(answer_things(rule, ordered=True), services, at):
        a1 = await ask(at, "a1", key=b"a")
        a2 = await ask(at, "a2", key=b"a")
        b1 = await ask(at, "b1", key=b"b")
        a3 = await ask(at, "a3", key=b"a")
        await settled(at, {a1: (1, "retry"), a2: (1, "retry"), b1: (1, "done"), a3: (1, "retry")})
        assert await scheduled(at) == {a1: (2, "not_yet"), a2: (2, "parked"), a3: (2, "parked")}

        at.clock.forward(61)
        await sweep(services, at)  # all three are due: the first wants to wait again, and the others behind it
        await settled(at, {a1: (2, "retry"), a2: (2, "retry"), b1: (1, "done"), a3: (2, "retry")})
        assert await scheduled(at) == {a1: (3, "not_yet"), a2: (3, "parked"), a3: (3, "parked")}

        at.clock.forward(61)
        await sweep(services, at)
        await settled(at, {a1: (3, "done"), a2: (3, "done"), b1: (1, "done"), a3: (3, "done")})
    assert await answers(at) == ["b1 1", "a1 3", "a2 3", "a3 3"]
    assert await scheduled(at) == {}
    await clean(at)


async def test_an_event_that_comes_while_the_parked_ones_are_on_their_way_again_does_not_overtake_them(
    at: Ground,
) -> None:
    def rule(received: Received) -> Outcome | None:
        assert isinstance(received.event, KycApproved)
        return Retry("not_yet", 60.0) if received.event.applicant_id == "a1" and received.attempt < 2 else None

    async with at.process() as services, running(answer_things(rule, ordered=True), services, at):
        a1, a2 = await ask(at, "a1"), await ask(at, "a2")
        await settled(at, {a1: (1, "retry"), a2: (1, "retry")})
        await until(lambda: everything_left(services, at), "what was settled has left")
        at.clock.forward(61)
        async with at.process() as sweeping:
            emit = sweeping.emitter.emit
            late: list[str] = []

            async def slow(*arguments: Any) -> None:
                late.append(await ask(at, "a3"))  # the sweeper has committed and not sent yet
                await until(lambda: in_inbox(at, late[0]), "the newcomer is settled")
                await emit(*arguments)

            sweeping.emitter.emit = slow  # type: ignore[method-assign,assignment]
            await Sweeper(sweeping).sweep(await sweeping.connect())
        assert (await inbox(at))[late[0]][0] == 1
        await until(lambda: in_inbox(at, a2, 2), "the parked ones are settled")
        at.clock.forward(61)
        await sweep(services, at)
        await until(lambda: in_inbox(at, late[0], 2), "the newcomer's repeat is settled")
    assert await answers(at) == ["a1 2", "a2 2", "a3 2"]


async def in_inbox(at: Ground, uid: str, attempt: int = 1) -> bool:
    return (await inbox(at)).get(uid, (0, ""))[0] >= attempt


async def test_unordered_stages_let_later_events_of_a_key_pass(at: Ground) -> None:
    def rule(received: Received) -> Outcome | None:
        return Retry("not_yet", 60.0) if received.id == "one" and received.attempt < 2 else None

    async with at.process() as services, running(answer_things(rule), services, at):
        one, two = await ask(at, "one"), await ask(at, "two")
        await settled(at, {one: (1, "retry"), two: (1, "done")})
        at.clock.forward(61)
        await sweep(services, at)
        await settled(at, {one: (2, "done"), two: (1, "done")})
    assert await answers(at) == ["two 1", "one 2"]


async def test_a_repeat_may_end_as_a_dead_letter_that_tells_its_attempts(at: Ground) -> None:
    def rule(received: Received) -> Outcome | None:
        return Retry("not_yet", 60.0) if received.attempt < 2 else Rejected("never", "enough")

    async with at.process() as services, running(answer_things(rule), services, at):
        uid = await ask(at, "one")
        await settled(at, {uid: (1, "retry")})
        at.clock.forward(61)
        await sweep(services, at)
        await settled(at, {uid: (2, "rejected")})
    (letter,) = await at.told(SOURCE.dlq)
    headers = dict(letter.headers)
    assert (headers["dlq_code"], headers["dlq_attempts"]) == (b"never", b"2")
    assert await scheduled(at) == {}
    await clean(at)


async def test_two_sweepers_at_once_send_what_is_due_once(at: Ground) -> None:
    async with at.process() as services, running(answer_things(later_until(2)), services, at):
        uids = [await ask(at, f"n{number}") for number in range(10)]
        await settled(at, dict.fromkeys(uids, (1, "retry")))
        at.clock.forward(61)
        await until(lambda: everything_left(services, at), "what was settled has left")
        async with at.process() as one, at.process() as two:
            await asyncio.gather(Sweeper(one).sweep(await one.connect()), Sweeper(two).sweep(await two.connect()))
        await settled(at, dict.fromkeys(uids, (2, "done")))
    repeats = [record for record in await at.told(SOURCE) if "attempt" in dict(record.headers)]
    assert len(repeats) == len(uids)
    assert await answers(at) == [f"n{number} 2" for number in range(10)]
    await clean(at)
