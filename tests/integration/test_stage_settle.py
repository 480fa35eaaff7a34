"""One batch, one transaction, on a real PostgreSQL: repeats, reused ids, refusals, retries, and what is committed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from agents.fuse import Fuse, FuseBlown
from agents.item import former_uid
from agents.outcome import Done, Emit, Outcome, Stage
from agents.stage import REFUSALS_MAX, Settled, SplitBatch, settle
from ledger.accounts import Account, AccountType, buffer, spendable
from ledger.commit import Sealed, lock_owners
from ledger.errors import Fenced, PostingRefused, RecordTooLarge
from ledger.holds import capture, hold
from ledger.posting import Transaction, credit, debit
from ledger.record import unpack
from ledger.reversals import reversal
from ledger.rows import Connection
from tests.support import ledger_rig
from tests.support.ledger_rig import AT, ORDERED, STAGE, TOLD, Moved, assert_holds, balance, decide, items, own, record
from topics.catalog import BUFFERS_LEVELS, INPUT_BYTES_MAX
from topics.envelope import Received

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection


async def run(connection: Connection, *records: Any, stage: Stage[Any] = STAGE, **options: Any) -> Settled:
    epochs = await own(connection, *{one.partition for one in records}, stage=stage.name)
    return await settle(connection, stage, items(*records, stage=stage), epochs, AT, None, **options)


def told(settled: Settled) -> list[tuple[str, Any]]:
    """(event id, decisions it had seen) of what is emitted, codes of dead letters."""
    assert settled.sealed is not None
    return [
        (m.id, int(m.value.split(b'"amount":')[1].split(b",")[0])) if m.id else ("dead", dict(m.headers)["dlq_code"])
        for m in settled.sealed.messages
        if m.topic != BUFFERS_LEVELS.name
    ]


async def test_a_batch_is_settled_in_one_commit_and_each_event_sees_the_ones_before(connection: Connection) -> None:
    settled = await run(connection, record(0, amount=5), record(1, "bob", 7), record(2, move="refuse"), record(3))
    assert settled.outcomes == {("done", ""): 3, ("rejected", "unwanted"): 1, ("repeat", ""): 0}
    assert told(settled) == [("0/0/told", 0), ("0/1/told", 1), ("dead", b"unwanted"), ("0/3/told", 2)]
    assert await balance(connection, spendable("ada")) == 6
    assert await connection.fetchval("SELECT count(*) FROM outbox") == 2  # the claim and the batch
    summary = await connection.fetchval("SELECT summary::text FROM audit WHERE position = 2")
    assert summary == '{"done": 3, "rejected:unwanted": 1}'
    await assert_holds(connection)


async def test_a_redelivered_batch_does_nothing(connection: Connection) -> None:
    await run(connection, record(0), record(1))
    again = await run(connection, record(0), record(1))
    assert again.sealed is None
    assert again.outcomes == {("repeat", ""): 2}
    assert again.refused == []
    mixed = await run(connection, record(1), record(2))
    assert mixed.outcomes == {("done", ""): 1, ("repeat", ""): 1}
    assert await balance(connection, spendable("ada")) == 3
    await assert_holds(connection)


async def test_the_same_event_twice_in_a_batch_counts_once(connection: Connection) -> None:
    settled = await run(connection, record(0, id="x"), record(1, id="x"), record(2, id="x", partition=1))
    assert settled.outcomes == {("done", ""): 1, ("repeat", ""): 2}
    assert await balance(connection, spendable("ada")) == 1


@pytest.mark.parametrize("first_there", [False, True])
@pytest.mark.parametrize("other_first", [False, True])
async def test_an_id_that_is_used_for_something_else_is_refused_and_its_true_owner_is_not(
    connection: Connection, first_there: bool, other_first: bool
) -> None:
    true, other = record(0, amount=5, id="x"), record(7, amount=9, id="x", partition=1)
    if first_there:
        await run(connection, true)
        settled = await run(connection, *([other, true] if other_first else [true, other]))
        assert settled.outcomes == {("rejected", "event_id_reused"): 1, ("repeat", ""): 1}
    else:
        settled = await run(connection, true, other)
        assert settled.outcomes == {("rejected", "event_id_reused"): 1, ("done", ""): 1, ("repeat", ""): 0}
    assert await balance(connection, spendable("ada")) == 5
    again = await run(connection, true, other)
    assert again.outcomes == {("repeat", ""): 2}
    await assert_holds(connection)


async def test_a_reused_id_at_a_later_attempt_is_journaled_as_it_is_stored(connection: Connection) -> None:
    """As a letter that somebody redrives all the same."""
    await run(connection, record(0, id="x"))
    other = record(7, amount=9, id="x", attempt=2)
    settled = await run(connection, other)
    assert settled.outcomes == {("rejected", "event_id_reused"): 1, ("repeat", ""): 0}
    assert settled.sealed is not None
    (block,) = [block for block in unpack(settled.sealed.record).blocks if block.table.name == "inbox"]
    assert block.columns[2].strip("{=}") == "2"
    stored = await connection.fetchval(
        "SELECT attempt FROM inbox WHERE event_id <> ALL($1)", [items(record(0, id="x"))[0].uid]
    )
    assert stored == 2
    assert (await run(connection, other)).outcomes == {("repeat", ""): 1}


async def test_what_cannot_be_read_is_a_dead_letter_with_its_bytes(connection: Connection) -> None:
    settled = await run(
        connection,
        record(0, value=b"\xff{"),
        record(1, headers=[("ce_id", b"\xff"), ("x", b"\x00\xff"), ("dlq_code", b"forged")]),
        record(2),
    )
    assert settled.sealed is not None
    letters = [m for m in settled.sealed.messages if m.topic == "test.moves.dlq"]
    assert [(m.key, m.value) for m in letters] == [(b"ada", b"\xff{"), (b"ada", record(1).value)]
    headers = dict(letters[1].headers or ())
    assert headers["x"] == b"\x00\xff"
    assert headers["dlq_code"] == b"bad_envelope"
    assert (headers["dlq_topic"], headers["dlq_partition"], headers["dlq_offset"]) == (b"test.moves", b"0", b"1")
    assert headers["dlq_first_at"] == b"2026-07-01T12:00:00.001000+00:00"
    assert headers["dlq_stage"] == b"test_stage"
    assert (await run(connection, record(0, value=b"\xff{"))).outcomes == {("repeat", ""): 1}


def unreadable(offset: int, value: bytes | None = b"\xff{", *, key: bytes | None = b"ada", said: str = "1") -> Any:
    made = record(offset, headers=[("said", said.encode())])
    made.key, made.value = key, value
    return made


@pytest.mark.parametrize("at_once", [False, True])
async def test_what_stands_where_something_else_stood_is_an_event_of_its_own(
    connection: Connection, at_once: bool
) -> None:
    """A topic was made anew, or lost its end: nobody can read what stands at its places now, or its ids are others'."""
    await run(connection, record(9, id="x"))
    stood = [unreadable(0), unreadable(1, None), unreadable(2), record(3, amount=7, id="x")]
    stands = [
        unreadable(0, b"\xfe"),
        unreadable(1, None, key=None),
        unreadable(2, said="2"),
        record(3, amount=8, id="x"),
    ]
    reused = ("rejected", "event_id_reused")
    if at_once:
        settled = await run(connection, *stood, *stands)
        assert settled.outcomes == {("rejected", "not_json"): 6, reused: 2, ("repeat", ""): 0}
    else:
        await run(connection, *stood)
        settled = await run(connection, *stands)
        assert settled.outcomes == {("rejected", "not_json"): 3, reused: 1, ("repeat", ""): 0}
    assert (await run(connection, *stood, *stands)).outcomes == {("repeat", ""): 8}
    assert await connection.fetchval("SELECT count(*) FROM inbox WHERE outcome = 'rejected'") == 8
    assert await balance(connection, spendable("ada")) == 1


async def test_what_the_release_before_settled_by_its_place_alone_is_a_repeat(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was settled, and not acknowledged; or somebody reads the topic again."""
    stood = [unreadable(0), record(3, amount=7, id="x")]
    with monkeypatch.context() as before:
        before.setattr("agents.item.position_uid", former_uid)
        await run(connection, record(9, id="x"), *stood)
    again = await run(connection, *stood, record(10))
    assert again.outcomes == {("done", ""): 1, ("repeat", ""): 2}
    stands = [unreadable(0, b"\xfe"), record(3, amount=8, id="x")]
    settled = await run(connection, *stands)
    assert settled.outcomes == {("rejected", "not_json"): 1, ("rejected", "event_id_reused"): 1, ("repeat", ""): 0}
    assert (await run(connection, *stands, *stood)).outcomes == {("repeat", ""): 4}
    await assert_holds(connection)


async def test_a_refused_posting_is_undone_and_what_follows_is_decided_again(connection: Connection) -> None:
    settled = await run(
        connection,
        record(0, amount=10),
        record(1, amount=8, move="spend"),
        record(2, amount=8, move="spend"),
        record(3, "bob", 1),
        record(4, amount=2, move="spend"),
    )
    assert settled.outcomes == {("done", ""): 4, ("rejected", "insufficient_funds"): 1, ("repeat", ""): 0}
    dead = ("dead", b"insufficient_funds")
    assert told(settled) == [("0/0/told", 0), ("0/1/told", 1), dead, ("0/3/told", 2), ("0/4/told", 3)]
    assert await balance(connection, spendable("ada")) == 0
    await assert_holds(connection)


async def test_a_refusal_that_no_rule_names_is_a_dead_letter_with_the_ledgers_code(connection: Connection) -> None:
    settled = await run(connection, record(0, amount=1, move="spend_plainly"))
    assert settled.outcomes == {("rejected", "insufficient_funds"): 1, ("repeat", ""): 0}
    assert await connection.fetchval("SELECT count(*) FROM accounts") == 0


def refused_as(meaning: Any) -> Stage[Any]:
    """A stage for whose `spend_plainly` a refusal means this."""

    def decide_with(received: Received, facts: Any) -> Outcome:
        done = decide(received, facts)
        assert isinstance(received.event, Moved)
        if isinstance(done, Done) and received.event.move == "spend_plainly":
            return done._replace(if_refused=meaning(received))
        return done

    return replace(STAGE, decide=decide_with)


def answered(received: Received) -> Callable[[PostingRefused], Outcome]:
    """A refusal is an answer with its code, and what was not there goes to bob instead."""
    event = received.event
    assert isinstance(event, Moved)

    def meaning(refusal: PostingRefused) -> Outcome:
        told = Moved(user=event.user, amount=7, move="told", note=refusal.code)
        legs = (debit(spendable("bob"), event.amount), credit(buffer(), event.amount))
        return Done(
            (Transaction(received.uid, "test", "", legs),), emits=(Emit(TOLD, event.user, told, f"{received.id}/no"),)
        )

    return meaning


async def test_a_refusal_may_be_an_answer_that_posts_and_the_events_after_it_see_that(connection: Connection) -> None:
    batch = [
        record(0, amount=5, move="spend_plainly"), record(1, "bob", 5, move="spend"), record(2, "bob", 1, move="spend"),
        record(3, amount=2), record(4, amount=2, move="spend_plainly"),
    ]  # fmt: skip
    stage = refused_as(answered)
    settled = await run(connection, *batch, stage=stage)
    assert settled.outcomes == {("done", ""): 4, ("rejected", "insufficient_funds"): 1, ("repeat", ""): 0}
    assert settled.refused == [False, False, True, False, False]
    dead = ("dead", b"insufficient_funds")
    assert told(settled) == [("0/0/no", 7), ("0/1/told", 1), dead, ("0/3/told", 2), ("0/4/told", 3)]
    assert [await balance(connection, spendable(user)) for user in ("ada", "bob")] == [0, 0]
    again = await run(connection, *batch, stage=stage)
    assert again.outcomes == {("repeat", ""): 5}
    await assert_holds(connection)


async def test_an_answer_that_is_refused_too_is_a_dead_letter(connection: Connection) -> None:
    def same(received: Received) -> Callable[[PostingRefused], Outcome]:
        def meaning(_refusal: PostingRefused) -> Outcome:
            legs = (credit(spendable("bob"), 9), debit(buffer(), 9))
            return Done((Transaction(received.uid, "test", "", legs),), if_refused=meaning)

        return meaning

    settled = await run(connection, record(0, move="spend_plainly"), record(1), stage=refused_as(same))
    assert settled.outcomes == {("rejected", "insufficient_funds"): 1, ("done", ""): 1, ("repeat", ""): 0}
    assert await balance(connection, spendable("ada")) == 1
    await assert_holds(connection)


async def test_too_many_refusals_ask_for_smaller_batches(connection: Connection) -> None:
    spends = [record(n, move="spend") for n in range(REFUSALS_MAX + 1)]
    with pytest.raises(SplitBatch):
        await run(connection, *spends)
    assert await connection.fetchval("SELECT count(*) FROM inbox") == 0
    assert (await run(connection, *spends[:-1])).outcomes[("rejected", "insufficient_funds")] == REFUSALS_MAX


async def test_a_fuse_that_blows_keeps_the_batch_from_being_committed(connection: Connection) -> None:
    with pytest.raises(FuseBlown):
        await run(connection, record(0), *(record(n, move="refuse") for n in (1, 2)), approve=Fuse(1.0, 1).check)
    assert await connection.fetchval("SELECT count(*) FROM inbox") == 0
    assert await balance(connection, spendable("ada")) is None


async def test_a_bug_in_a_decision_leaves_nothing(connection: Connection) -> None:
    with pytest.raises(ZeroDivisionError):
        await run(connection, record(0), record(1, move="crash"))
    assert await connection.fetchval("SELECT count(*) FROM inbox") == 0


async def test_whoever_lost_the_partition_is_stopped_before_anything(connection: Connection) -> None:
    old = await own(connection, 0, 1)
    await own(connection, 1)
    with pytest.raises(Fenced) as fenced:
        await settle(connection, STAGE, items(record(0), record(0, partition=1)), old, AT, None)
    assert fenced.value.lost == (("test.moves", 1),)
    assert await connection.fetchval("SELECT count(*) FROM inbox") == 0
    async with connection.transaction():
        with pytest.raises(Fenced):
            await lock_owners(connection, STAGE.name, {("test.moves", 9): 1})


async def test_an_event_that_waited_for_days_is_settled_in_the_end(connection: Connection) -> None:
    """One that is looked at every five seconds, as long as its lane is closed, has more than thirty thousand attempts by then."""
    epochs = await own(connection)
    waits = record(0, amount=31_999, move="retry", id="a", attempt=31_999)
    settled = await settle(connection, STAGE, items(waits), epochs, AT, None)
    assert settled.outcomes[("retry", "not_yet")] == 1
    attempt = await connection.fetchval("SELECT attempt FROM schedule")
    again = record(1, amount=31_999, move="retry", id="a", attempt=attempt)
    settled = await settle(connection, STAGE, items(again), epochs, AT, None)
    assert settled.outcomes[("done", "")] == 1
    assert await connection.fetchval("SELECT count(*) FROM schedule") == 0


async def test_a_retry_is_kept_in_the_schedule_with_its_bytes_and_comes_again(connection: Connection) -> None:
    odd = [*record(0).headers, ("x", b"\x00\xff")]
    first = record(0, amount=1, move="retry", headers=odd)
    settled = await run(connection, first)
    assert settled.outcomes == {("retry", "not_yet"): 1, ("repeat", ""): 0}
    row = await connection.fetchrow("SELECT attempt, topic, key, value, code, available_at FROM schedule")
    assert row is not None
    assert tuple(row) == (2, "test.moves", b"ada", first.value, "not_yet", AT)
    assert (await run(connection, first)).outcomes == {("repeat", ""): 1}, "a redelivery is no repeat of ours"
    await connection.execute("DELETE FROM schedule")  # as the sweeper does
    again = record(9, amount=1, move="retry", headers=[h for h in odd if h[0] != "attempt"] + [("attempt", b"2")])
    again.headers = [("ce_id", b"0/0") if h[0] == "ce_id" else h for h in again.headers]
    both = await run(connection, first, again)
    assert both.outcomes == {("done", ""): 1, ("repeat", ""): 1}, "the repeat counts, in whatever order they stand"
    assert (await run(connection, again, first)).outcomes == {("repeat", ""): 2}
    await assert_holds(connection)


@pytest.mark.parametrize(("size", "code"), [(85_000, "retry"), (89_900, "rejected")])
async def test_what_its_topic_could_not_take_again_does_not_wait_for_it(
    connection: Connection, size: int, code: str
) -> None:
    """The broker would refuse it for ever, and everything that is due behind it."""
    first = record(0, amount=1, move="retry")
    first.value, first.headers = first.value.ljust(INPUT_BYTES_MAX), [*first.headers, ("x", bytes(size))]
    settled = await run(connection, first)
    assert {kind for kind, why in settled.outcomes if why} == {code}
    if code == "rejected":
        assert told(settled) == [("dead", b"too_large")]
        assert await connection.fetchval("SELECT count(*) FROM schedule") == 0


async def test_later_events_of_a_waiting_key_wait_behind_it_where_order_is_kept(connection: Connection) -> None:
    waiting = record(0, amount=1, move="retry", id="a")
    settled = await run(connection, waiting, record(1, id="b"), record(2, "bob", id="c"), stage=ORDERED)
    assert settled.outcomes == {
        ("retry", "not_yet"): 1, ("retry", "parked"): 1, ("done", ""): 1, ("repeat", ""): 0,
    }  # fmt: skip
    later = await run(connection, record(3, id="d"), stage=ORDERED)
    assert later.outcomes[("retry", "parked")] == 1
    due = [r[0] for r in await connection.fetch("SELECT code FROM schedule ORDER BY available_at")]
    assert due == ["not_yet", "parked", "parked"]
    await connection.execute("DELETE FROM schedule")
    repeats = [
        record(5, amount=1, move="retry", id="a", attempt=2), record(6, id="b", attempt=2),
        record(7, id="d", attempt=2),
    ]  # fmt: skip
    settled = await run(connection, *repeats, stage=ORDERED)
    assert [event_id for event_id, _ in told(settled)] == ["a/told", "b/told", "d/told"]
    await assert_holds(connection)


async def test_the_ledgers_times_never_run_backwards(connection: Connection) -> None:
    await run(connection, record(0))
    epochs = await own(connection)
    behind = AT - timedelta(hours=1)
    await settle(connection, STAGE, items(record(1)), epochs, behind, None)
    rows = await connection.fetch("SELECT at FROM entries WHERE account_id = $1 ORDER BY version", spendable("ada").id)
    assert [row[0] for row in rows] == [AT, AT]


async def test_a_transaction_that_was_posted_already_is_found_when_looking_carefully(connection: Connection) -> None:
    await run(connection, record(0, amount=5, id="x"))
    await connection.execute("DELETE FROM inbox")  # as after an inbox row's retention
    settled = await run(connection, record(1, amount=5, id="x"), careful=True)
    assert settled.outcomes[("done", "")] == 1
    await connection.execute("DELETE FROM inbox")
    other = await run(connection, record(2, amount=6, id="x"), careful=True)
    assert other.outcomes[("rejected", "transaction_reused")] == 1
    assert await balance(connection, spendable("ada")) == 5
    await assert_holds(connection)


async def test_the_commit_record_holds_every_row_and_message(connection: Connection) -> None:
    settled = await run(connection, record(0, amount=5), record(1, move="refuse"))
    sealed = settled.sealed
    assert isinstance(sealed, Sealed)
    kept = unpack(sealed.record)
    tables = sorted(block.table.name for block in kept.blocks)
    assert tables == ["accounts", "entries", "inbox", "transactions"]
    assert [block.table.name for block in kept.proof] == ["audit", "owners"]
    assert [(m.topic, m.key, m.value, m.id) for m in kept.messages] == [
        (m.topic, m.key, m.value, m.id) for m in sealed.messages
    ]
    assert [m.kafka_headers("s", AT) for m in kept.messages] == [m.kafka_headers("s", AT) for m in sealed.messages]
    stored = await connection.fetchval("SELECT record FROM outbox WHERE seq = $1", sealed.seq)
    assert stored == sealed.record


async def test_a_record_over_the_limit_is_not_committed(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = await own(connection)
    monkeypatch.setattr("ledger.commit.RECORD_BYTES_MAX", 100)
    with pytest.raises(RecordTooLarge):
        await settle(connection, STAGE, items(record(0)), epochs, AT, None)
    assert await connection.fetchval("SELECT count(*) FROM inbox") == 0


async def test_rows_of_a_decision_are_written_once_each(connection: Connection) -> None:
    from ledger.tables import WALLET_REQUESTS

    row = ("ada", "ETH", "requested", AT, None, None)
    ready = ("ada", "ETH", "ready", AT, AT, None)

    def decide(received: Any, _facts: Any) -> Done:
        if received.event.move == "make":
            return Done(inserts=((WALLET_REQUESTS, row),))
        return Done(upserts=((WALLET_REQUESTS, ready),))

    stage = replace(STAGE, decide=decide)
    await run(connection, record(0, move="make"), record(1, move="change"), stage=stage)
    assert [tuple(r) for r in await connection.fetch("SELECT * FROM wallet_requests")] == [ready]


async def test_a_stage_holds_captures_and_reverses_and_a_repeat_from_elsewhere_is_known(connection: Connection) -> None:
    ada, pending = spendable("ada"), Account("ada", AccountType.PENDING_WITHDRAWAL)
    steps = [
        Transaction("1" * 32, "test", "", (debit(ada, 9), credit(buffer(), 9))),
        hold("2" * 32, "test", "", source=ada, pending=pending, amount=9),
        capture("3" * 32, "test", "", hold_id="2" * 32, amount=9, legs=(debit(buffer(), 9),)),
        reversal("4" * 32, "test", "", of="3" * 32, amount=4),
    ]

    def decide_step(received: Received, _facts: Any) -> Done:
        assert isinstance(received.event, Moved)
        return Done(postings=(steps[received.event.amount],))

    stage = replace(STAGE, decide=decide_step)
    epochs = await own(connection)
    first = await settle(connection, stage, items(*(record(n, amount=n) for n in range(3))), epochs, AT, None)
    assert first.outcomes[("done", "")] == 3
    # another event with the same money id: the hold has ended, and it was it that ended it
    again = await settle(connection, stage, items(record(8, amount=2), record(9, amount=3)), epochs, AT, None)
    assert again.outcomes[("done", "")] == 2
    batch = items(*(record(10 + n, amount=n) for n in range(4)))
    again = await settle(connection, stage, batch, epochs, AT, None, careful=True)
    assert again.outcomes[("done", "")] == 4
    assert [await balance(connection, account) for account in (ada, pending)] == [4, 0]
    await assert_holds(connection)
