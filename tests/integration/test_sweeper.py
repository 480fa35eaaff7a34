"""What the sweeper finishes for writers that are gone, on real PostgreSQL and Kafka."""

from __future__ import annotations

import asyncio
import os
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta

import orjson
import pytest

from agents.lone_writer import LoneWriter
from agents.services import Services
from agents.sweeper import ABANDONED_S, Sweeper
from ledger.accounts import Account, AccountType, buffer, spendable
from ledger.book import post
from ledger.commit import Sealed, lock_writer, seal
from ledger.errors import JournalBroken
from ledger.holds import capture, hold
from ledger.posting import Transaction, credit, debit
from ledger.record import Message, unpack
from ledger.rows import Block, Op, Table, block
from ledger.sql import load
from ledger.verify import verify
from stablerail.dev.kafka import Kafka
from tests.support.in_process import SCHEMA, Ground, ground, read_topic, until
from tests.support.ledger_rig import balance, records_read
from tests.support.rebuild import assemble, differences, empty_database, rebuild
from topics.catalog import JOURNAL, RECORD_BYTES_MAX, WALLETS_REQUESTED
from topics.envelope import value_of
from topics.events import Chain, WalletsRequested


@pytest.fixture
async def at(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    async with ground(database, kafka.bootstrap, topic_prefix, [WALLETS_REQUESTED]) as it:
        yield it


OF_TOMORROW = Table("of_tomorrow", ("id",), "id:text")
"""This program does not know it."""


async def commit(at: Ground, name: str, *others: Message, written: Sequence[Block] = ()) -> Sealed:
    """A commit with one message by a writer that does no more: nothing is journaled or emitted."""
    event = WalletsRequested(user_id=name, chains=(Chain.ETH,))
    messages = [Message(WALLETS_REQUESTED.name, b"k", value_of(event), name, event.ce_type()), *others]
    connection = await at.connect()
    try:
        async with connection.transaction():
            owners = await lock_writer(connection, "api")
            return await seal(
                connection, "api", owners, blocks=[], messages=messages, at=at.clock(), actor="test", summary={},
                written=written,
            )  # fmt: skip
    finally:
        await connection.close()


async def told(at: Ground) -> list[str]:
    return [WalletsRequested.model_validate_json(record.value).user_id for record in await at.told(WALLETS_REQUESTED)]


async def journaled(at: Ground) -> list[int]:
    return [seq for seq, _ in assemble(await read_topic(at.bootstrap, JOURNAL, at.prefix))]


async def waiting(at: Ground) -> int:
    count: int = await at.observer.fetchval("SELECT count(*) FROM outbox")
    return count


async def swept(at: Ground, names: list[str], records: list[Sealed]) -> None:
    """Each message was told, each record journaled, in their order, and nothing waits."""
    assert await told(at) == names
    assert await journaled(at) == [record.seq for record in records]
    assert await waiting(at) == 0
    assert not [result for result in await verify(at.observer) if not result.holds]


async def test_records_of_a_writer_that_died_after_its_commit_are_journaled_and_emitted(at: Ground) -> None:
    records = [await commit(at, name) for name in ("one", "two", "three")]
    at.clock.forward(ABANDONED_S + 1)
    async with at.process() as services:
        await Sweeper(services).sweep(await services.connect())
        await Sweeper(services).sweep(await services.connect())
    await swept(at, ["one", "two", "three"], records)


async def test_a_record_of_a_writer_that_died_before_it_emitted_is_emitted(at: Ground) -> None:
    records = [await commit(at, "one")]
    async with at.process() as gone:
        await gone.relay.journal([(records[0].seq, records[0].record)])
    assert (await told(at), await waiting(at)) == ([], 1)
    at.clock.forward(ABANDONED_S + 1)
    async with at.process() as services:
        await Sweeper(services).sweep(await services.connect())
    await swept(at, ["one"], records)


async def test_what_a_newer_program_left_is_told_also_where_its_tables_are_not_known(at: Ground) -> None:
    """It was rolled back after its writer had died."""
    record = await commit(at, "one", written=[block(OF_TOMORROW, Op.INSERT, [("1",)])])
    with pytest.raises(JournalBroken):
        unpack(record.record)
    at.clock.forward(ABANDONED_S + 1)
    async with at.process() as services:
        await Sweeper(services).sweep(await services.connect())
    await swept(at, ["one"], [record])


async def test_records_that_were_left_are_read_some_at_a_time(at: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred of them may be more than a process has room for."""
    monkeypatch.setattr("ledger.journal.BYTES_AT_ONCE", 1)
    records = [await commit(at, name) for name in ("one", "two")]
    at.clock.forward(ABANDONED_S + 1)
    async with at.process() as services:
        sweeper, connection = Sweeper(services), await services.connect()
        await sweeper.sweep(connection)
        assert await told(at) == ["one"]
        await sweeper.sweep(connection)
    await swept(at, ["one", "two"], records)


async def test_what_a_living_writer_has_just_committed_is_left_to_it(at: Ground) -> None:
    record = await commit(at, "one")
    async with at.process() as services:
        await Sweeper(services).sweep(await services.connect())
        assert (await told(at), await waiting(at)) == ([], 1)
        await finish(services, record)
        await services.relay.tidy()
        at.clock.forward(ABANDONED_S + 1)
        await Sweeper(services).sweep(await services.connect())
    await swept(at, ["one"], [record])


async def finish(services: Services, record: Sealed) -> None:
    """What a writer does after its commit."""
    await services.relay.journal([(record.seq, record.record)])
    await services.emitter.emit(record.messages, record.stage, record.at)
    services.relay.emitted([record.seq])


async def test_an_idle_worker_leaves_nothing_for_the_sweeper_to_repeat(at: Ground) -> None:
    record = await commit(at, "one")
    async with at.process() as services:
        await finish(services, record)
        assert await waiting(at) == 1
        task = asyncio.create_task(Sweeper(services, interval_s=0.05).work())
        try:
            await until(lambda: nothing_waits(at), "the emitted record is gone")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    await swept(at, ["one"], [record])


async def nothing_waits(at: Ground) -> bool:
    return await waiting(at) == 0


async def test_two_sweepers_at_once_lose_nothing_and_repeat_at_most(at: Ground) -> None:
    names = [f"n{number}" for number in range(20)]
    records = [await commit(at, name) for name in names]
    at.clock.forward(ABANDONED_S + 1)
    async with at.process() as one, at.process() as two:
        await asyncio.gather(Sweeper(one).sweep(await one.connect()), Sweeper(two).sweep(await two.connect()))
    assert list(dict.fromkeys(await told(at))) == names
    assert await journaled(at) == [record.seq for record in records]
    assert await waiting(at) == 0


async def test_another_sweeper_leads_when_the_first_is_gone(at: Ground) -> None:
    async with at.process() as second:
        async with at.process() as first:
            assert await Sweeper(first)._lone.lead() is not None
            standby = Sweeper(second)
            assert await standby._lone.lead() is None

        async def leads() -> bool:  # PostgreSQL lets the lock go when it notices that the connection ended
            return await standby._lone.lead() is not None

        await until(leads, "the other leads")


async def test_what_a_lone_writer_left_is_told_by_the_next_leader_before_its_own(
    at: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(*_: object) -> None:
        raise ConnectionError("killed")

    def wish(name: str) -> Message:
        event = WalletsRequested(user_id=name, chains=(Chain.ETH,))
        return Message(WALLETS_REQUESTED.name, b"k", value_of(event), name, event.ce_type())

    async with at.process() as first:
        gone = LoneWriter("watch", first)
        assert await gone.lead() is not None
        monkeypatch.setattr(first.emitter, "emit", dies)
        with pytest.raises(ConnectionError):
            await gone.commit([], [wish("one")], {})
    async with at.process() as second:
        heir = LoneWriter("watch", second)
        await until(heir.lead, "it leads")
        await heir.commit([], [wish("two")], {})
        await second.relay.tidy()
    assert (await told(at), await waiting(at)) == (["one", "two"], 0)


async def test_what_a_lone_writer_left_is_read_some_at_a_time(at: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ledger.journal.BYTES_AT_ONCE", 1)
    read = records_read(monkeypatch, load("ledger", "sql/journal.sql").left_by_partitions)
    for name in ("one", "two", "three"):
        await commit(at, name)
    async with at.process() as services:
        heir = LoneWriter("api", services)
        await until(heir.lead, "it leads")
        await services.relay.tidy()
    assert (await told(at), await waiting(at)) == (["one", "two", "three"], 0)
    assert [len(some) for some in read] == [1, 1, 1, 0]


async def test_a_record_in_parts_that_was_journaled_twice_is_rebuilt_once(at: Ground) -> None:
    letters = [Message(WALLETS_REQUESTED.dlq.name, b"k", os.urandom(1_000_000), headers=[]) for _ in range(9)]
    small, large = await commit(at, "one"), await commit(at, "two", *letters)
    assert len(large.record) > RECORD_BYTES_MAX
    async with at.process() as services:
        await finish(services, small)
        await finish(services, large)
        await services.emitter.journal([(large.seq, large.record)], large.seq)  # its mark was lost
        await finish(services, await commit(at, "three"))
        await services.relay.tidy()
    async with empty_database(at.dsn) as empty:
        report = await rebuild(at.bootstrap, at.prefix, empty, SCHEMA)
        assert (report.records, report.repeats) == (3, 1)
        assert await differences(at.dsn, empty) == {}
    assert len(await at.told(WALLETS_REQUESTED.dlq)) == len(letters)


async def test_what_a_hold_still_holds_goes_back_when_its_time_has_come(
    at: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.sweeper.DUE_MAX", 2)
    ada, pending = spendable("ada"), Account("ada", AccountType.PENDING_WITHDRAWAL)
    connection = await at.connect()
    until = at.clock() + timedelta(hours=1)
    holds = [
        hold(f"{n:032x}", "hold", f"w{n}", source=ada, pending=pending, amount=10, expires_at=until)
        for n in range(1, 6)
    ]
    part = capture("c" * 32, "capture", "w1", hold_id=holds[0].id, amount=4, legs=(debit(buffer(), 4),))
    fund = Transaction("f" * 32, "top_up", "", (debit(ada, 50), credit(buffer(), 50)))
    first = (await post(connection, "api", [fund, *holds, part], at.clock())).sealed
    assert first is not None
    async with at.process() as services:
        await services.relay.journal([(first.seq, first.record)])
        services.relay.emitted([first.seq])
        sweeper = Sweeper(services)
        assert not await sweeper.sweep(connection)
        assert await balance(connection, ada) == 0, "not yet"
        at.clock.forward(3_601)
        assert [await sweeper.sweep(connection) for _ in range(4)] == [True, True, False, False], "some at a time"
        assert (await balance(connection, ada), await balance(connection, pending)) == (46, 0)
        assert await connection.fetchval("SELECT count(*) FROM holds WHERE state = 'expired'") == 5
        await services.relay.tidy()
    assert len(await journaled(at)) == 4
    assert await waiting(at) == 0
    assert not [result for result in await verify(at.observer) if not result.holds]
    await connection.close()


async def scheduled(at: Ground, values: Sequence[bytes], headers: Sequence[tuple[str, bytes]] = ()) -> None:
    """Retries of these values, due one after the other, all of them by now."""
    packed = orjson.dumps([[name.encode().hex(), value.hex()] for name, value in headers]).decode()
    now = at.clock()
    await at.observer.executemany(
        "WITH event AS (INSERT INTO inbox SELECT 'any', id, 1, id, 'retry', $5 FROM gen_random_uuid() AS id RETURNING event_id)"
        " INSERT INTO schedule (stage, event_id, attempt, topic, key, value, headers, code, available_at)"
        " SELECT 'any', event_id, 2, $1, $2, $3, $4, 'not_yet', $5 FROM event",
        [
            (WALLETS_REQUESTED.name, b"k", value, packed, now - timedelta(seconds=len(values) - number))
            for number, value in enumerate(values)
        ],
    )


async def sweep_all(at: Ground) -> int:
    """Looks as long as there may be more; how many commits it took."""
    async with at.process() as services:
        sweeper, connection = Sweeper(services), await services.connect()
        while await sweeper.sweep(connection):
            pass
        await services.relay.tidy()
    records = assemble(await read_topic(at.bootstrap, JOURNAL, at.prefix))
    return len([record for _, packed in records if (record := unpack(packed)).messages])


async def values(at: Ground) -> list[bytes]:
    return [record.value for record in await at.told(WALLETS_REQUESTED)]


async def test_due_events_too_large_for_one_record_are_sent_in_several_commits(at: Ground) -> None:
    due = [b64encode(os.urandom(735_000)) for _ in range(45)]
    await scheduled(at, due)
    assert await sweep_all(at) > 1
    assert await values(at) == due
    assert await waiting(at) == 0


async def test_due_events_that_compress_well_make_no_record_that_nobody_can_unpack(at: Ground) -> None:
    due = [b"%d%s" % (number, b" " * 980_000) for number in range(95)]
    await scheduled(at, due)
    assert await sweep_all(at) > 1
    assert await values(at) == due


async def test_headers_of_due_events_count_too_and_one_event_always_goes(
    at: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.sweeper.DUE_BYTES_MAX", 1)
    await scheduled(at, [b"", b"", b""], [("ce_id", b"x")])
    assert await sweep_all(at) == 3
    assert await values(at) == [b"", b"", b""]
