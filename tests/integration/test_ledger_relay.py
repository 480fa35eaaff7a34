"""The relay on a real PostgreSQL: every commit record reaches the journal, whoever publishes it and whatever breaks."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import asyncpg
import msgpack
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from agents.emitter import PART_BYTES_MAX, Emitter
from ledger.commit import Sealed, lock_writer, seal
from ledger.journal import Relay
from ledger.record import Message, unpack
from ledger.rows import Connection
from ledger.sql import load
from stablerail.dev.kafka import Kafka
from stablerail.topics_admin import admin, create_missing
from tests.support import ledger_rig
from tests.support.ledger_rig import AT, connect_to, owner
from topics.catalog import DEPOSITS_CREDITED, JOURNAL
from topics.partitioner import partition_of

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection


class Broker:
    """Keeps what it was sent; may fail after or before it has it, or wait."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, bytes]] = []
        self.untold: list[int] = []
        """With each turn: the lowest number whose messages may not have left."""
        self.lose_answers = 0
        self.refuse = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()
        """Somebody publishes, or waits at the gate with what it wants to publish."""

    async def publish(self, records: Sequence[tuple[int, bytes]], untold: int) -> None:
        self.asked.set()
        await self.gate.wait()
        if self.refuse:
            self.refuse -= 1
            raise KafkaError("away")
        self.sent += records
        self.untold.append(untold)
        if self.lose_answers:
            self.lose_answers -= 1
            raise KafkaError("no answer")

    def seqs(self) -> list[int]:
        return [seq for seq, _ in self.sent]


def relay_of(dsn: str, broker: Broker) -> Relay:
    """Nobody ends its turn while the test stands still: it would publish once more, as it must."""
    connect = connect_to(dsn, synchronous_commit="off", idle_in_transaction_session_timeout="0")
    return Relay(connect, broker.publish, (KafkaError,))


async def commit(connection: Connection, writer: str = "cli", size: int = 0) -> Sealed:
    async with connection.transaction():
        owners = await lock_writer(connection, writer)
        messages = [Message("t", None, bytes(itertools.islice(itertools.cycle(range(251)), size)))]
        return await seal(connection, writer, owners, blocks=[], messages=messages, at=AT, actor="x", summary={})


async def left(connection: Connection) -> list[tuple[int, bool]]:
    return [tuple(row) for row in await connection.fetch("SELECT seq, journaled FROM outbox ORDER BY seq")]


async def test_several_callers_share_one_turn(dsn: str, connection: Connection) -> None:
    broker = Broker()
    relay = relay_of(dsn, broker)
    made = [await commit(connection) for _ in range(6)]
    broker.gate.clear()
    calls = [asyncio.create_task(relay.journal([(s.seq, s.record)])) for s in made[:3]]
    await broker.asked.wait()
    made.append(await commit(connection))  # after the first turn's look
    calls += [asyncio.create_task(relay.journal([(s.seq, s.record)])) for s in made[3:]]
    await asyncio.sleep(0)  # each of them has given its record and waits for its turn
    broker.gate.set()
    await asyncio.gather(*calls)
    assert broker.seqs() == [s.seq for s in made]
    assert broker.sent == [(s.seq, s.record) for s in made]
    assert len([size for size in relay.group_sizes if size]) == 2, "one turn for six, one for what came meanwhile"
    assert await left(connection) == [(s.seq, True) for s in made]
    relay.emitted([s.seq for s in made])
    await relay.close()
    assert await left(connection) == []


async def test_the_journal_is_told_below_which_number_all_messages_have_left(dsn: str, connection: Connection) -> None:
    broker = Broker()
    relay, other = relay_of(dsn, broker), relay_of(dsn, broker)
    one, two, three = [await commit(connection) for _ in range(3)]
    await relay.journal()
    relay.emitted([one.seq, three.seq])
    four = await commit(connection)
    await relay.journal()
    relay.emitted([two.seq])
    await commit(connection)
    await other.journal()  # does not know yet that the second's have left: its row is there
    six = await commit(connection)
    relay.emitted([four.seq, four.seq + 1])
    await relay.journal()
    assert broker.untold == [one.seq, two.seq, two.seq, six.seq]
    await relay.close()
    await other.close()


async def test_a_number_that_shows_long_after_higher_ones_have_left_is_found_and_told_of(
    dsn: str, connection: Connection
) -> None:
    """A turn looks no lower than it must, and never above what a transaction that still runs has taken."""
    broker = Broker()
    relay = relay_of(dsn, broker)
    slow = await connect_to(dsn)()
    running = slow.transaction()
    await running.start()
    late = await seal(
        slow, "slow", await lock_writer(slow, "slow"), blocks=[], messages=[], at=AT, actor="x", summary={}
    )
    for _ in range(3):
        sealed = await commit(connection)
        await relay.journal()
        relay.emitted([sealed.seq])
    assert relay._floor.seq <= late.seq < sealed.seq
    await running.commit()
    last = await commit(connection)
    await relay.journal()
    assert broker.seqs()[-2:] == [late.seq, last.seq]
    assert broker.untold[-1] == late.seq
    relay.emitted([late.seq, last.seq])
    async with asyncio.timeout(100):  # transactions of the server's other databases hold it back too
        while relay._floor.seq <= last.seq:
            sealed = await commit(connection)
            await relay.journal()
            relay.emitted([sealed.seq])
            await asyncio.sleep(0.01)
    assert broker.untold[-1] == sealed.seq
    await slow.close()
    await relay.close()


async def test_a_number_of_a_transaction_younger_than_all_that_have_ended_is_not_passed_over(
    dsn: str, connection: Connection
) -> None:
    """PostgreSQL's snapshot counts as running only what is older than the youngest that has ended."""
    broker = Broker()
    relay = relay_of(dsn, broker)
    for writer in ("older", "younger"):
        sealed = await commit(connection, writer)
        await relay.journal()
        relay.emitted([sealed.seq])
    await relay.tidy()
    older, younger = await connect_to(dsn)(), await connect_to(dsn)()
    running = younger.transaction()
    async with older.transaction():
        owners = await lock_writer(older, "older")
        await running.start()
        others = await lock_writer(younger, "younger")
        late = await seal(younger, "younger", others, blocks=[], messages=[], at=AT, actor="x", summary={})
        first = await seal(older, "older", owners, blocks=[], messages=[], at=AT, actor="x", summary={})
    assert late.seq < first.seq
    await relay.journal([(first.seq, first.record)])
    relay.emitted([first.seq])
    for _ in range(3):
        sealed = await commit(connection)
        await relay.journal([(sealed.seq, sealed.record)])
        relay.emitted([sealed.seq])
    await running.commit()
    await relay.journal([(late.seq, late.record)])
    assert late.seq in broker.seqs(), "it is told next, and a rebuild must find it"
    for one in (older, younger):
        await one.close()
    await relay.close()


async def test_records_that_another_process_left_go_too_and_those_it_took_are_not_waited_for(
    dsn: str, connection: Connection
) -> None:
    ours, theirs = Broker(), Broker()
    relay, other = relay_of(dsn, ours), relay_of(dsn, theirs)
    old, new = await commit(connection, "a"), await commit(connection, "b")
    await relay.journal([(new.seq, new.record)])
    assert ours.sent == [(old.seq, old.record), (new.seq, new.record)], "first what it may depend on"
    await other.journal([(old.seq, old.record)])
    assert theirs.sent == []
    assert other._fresh == {}
    await relay.journal([(new.seq, new.record)])  # told twice: harmless
    assert len(ours.sent) == 2
    await relay.close()
    await other.close()


async def test_what_another_process_deletes_between_a_turns_two_looks_was_told_and_is_passed_over(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mark was lost, then its messages left, and whoever deletes such a row does not wait for the relay row."""
    broker = Broker()
    relay = relay_of(dsn, broker)
    gone, stays = await commit(connection), await commit(connection)
    fetch, looks = asyncpg.Connection.fetch, load("ledger", "sql/journal.sql")

    async def fetch_late(self: Any, query: str, *args: Any) -> Any:
        if query == looks.records:
            await connection.execute("DELETE FROM outbox WHERE seq = $1", gone.seq)
        return await fetch(self, query, *args)

    monkeypatch.setattr(asyncpg.Connection, "fetch", fetch_late)
    await relay.journal()
    assert broker.seqs() == [stays.seq]
    gone = await commit(connection)
    await relay.journal()
    assert broker.seqs() == [stays.seq], "all that waited has gone"
    monkeypatch.undo()
    assert await left(connection) == [(stays.seq, True)]
    await relay.close()


@pytest.mark.parametrize("lost", [0, 1])
async def test_what_others_left_is_read_and_published_some_at_a_time_in_one_turn(
    lost: int, dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it may be more than a process has room for."""
    made = [await commit(connection) for _ in range(5)]
    monkeypatch.setattr("ledger.journal.BYTES_AT_ONCE", max(len(one.record) for one in made) * 5 // 2)
    broker, parts = Broker(), []

    async def publish(records: Sequence[tuple[int, bytes]], untold: int) -> None:
        parts.append([made.index(next(one for one in made if one.seq == seq)) for seq, _ in records])
        broker.lose_answers = lost if len(parts) == 2 else 0
        await broker.publish(records, untold)

    relay = Relay(connect_to(dsn, synchronous_commit="off"), publish, (KafkaError,))
    await relay.journal([(made[3].seq, made[3].record)])
    turn = [[0, 1], [2, 3], [4]]
    assert parts == (turn[:2] + turn if lost else turn)
    assert set(broker.untold) == {made[0].seq}
    assert list(relay.group_sizes) == [5]
    assert await left(connection) == [(one.seq, True) for one in made]
    await relay.close()


async def test_two_relays_at_once_publish_every_record_once_and_each_writers_in_order(
    dsn: str, connection: Connection
) -> None:
    broker = Broker()

    async def work(writer: str) -> list[int]:
        relay, own = relay_of(dsn, broker), await connect_to(dsn)()
        seqs = []
        for _ in range(40):
            sealed = await commit(own, writer)
            seqs.append(sealed.seq)
            await relay.journal([(sealed.seq, sealed.record)])
            assert sealed.seq in broker.seqs(), "it is there when journal returns"
        await relay.close()
        await own.close()
        return seqs

    written = await asyncio.gather(*(work(f"w{n}") for n in range(3)))
    assert sorted(broker.seqs()) == sorted(seq for seqs in written for seq in seqs), "each once"
    for seqs in written:
        assert [seq for seq in broker.seqs() if seq in seqs] == seqs
    assert [seq for seq, journaled in await left(connection) if not journaled] == []


@pytest.mark.parametrize("what", ["refuse", "lose_answers"])
async def test_a_publish_that_fails_is_done_again(what: str, dsn: str, connection: Connection) -> None:
    broker = Broker()
    relay = relay_of(dsn, broker)
    one, two = await commit(connection), await commit(connection)
    setattr(broker, what, 2)
    await relay.journal([(one.seq, one.record), (two.seq, two.record)])
    assert list(dict.fromkeys(broker.seqs())) == [one.seq, two.seq]
    assert len(broker.sent) == (2 if what == "refuse" else 6)
    assert await left(connection) == [(one.seq, True), (two.seq, True)]
    await relay.close()


async def kill_turn(dsn: str) -> None:
    """Its transaction is open and holds the relay row."""
    watching = await owner(dsn)
    killed = await watching.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND application_name = 'stablerail' AND state = 'idle in transaction'"
    )
    await watching.close()
    assert [tuple(row) for row in killed] == [(True,)]


async def test_a_connection_killed_during_the_turn_repeats_the_records(dsn: str, connection: Connection) -> None:
    broker = Broker()
    relay = relay_of(dsn, broker)
    sealed = await commit(connection)
    broker.gate.clear()
    call = asyncio.create_task(relay.journal([(sealed.seq, sealed.record)]))
    await broker.asked.wait()
    await kill_turn(dsn)
    broker.gate.set()
    await call
    assert broker.seqs() == [sealed.seq, sealed.seq], "the mark was lost with the connection"
    assert await left(connection) == [(sealed.seq, True)]
    await relay.close()


@pytest.mark.parametrize("told", [True, False])
async def test_what_is_journaled_may_be_told_before_it_is_marked_and_the_mark_may_be_lost(
    told: bool, dsn: str, connection: Connection
) -> None:
    broker = Broker()
    relay = relay_of(dsn, broker)
    sealed = await commit(connection)
    broker.gate.clear()
    call = asyncio.create_task(relay.journal([(sealed.seq, sealed.record)], marked=False))
    await broker.asked.wait()
    await kill_turn(dsn)
    broker.gate.set()
    await call  # does not wait for the mark, which fails
    assert await left(connection) == [(sealed.seq, False)]
    if told:
        relay.emitted([sealed.seq])
    await relay.journal()
    assert broker.seqs() == ([sealed.seq] if told else [sealed.seq, sealed.seq]), "what was told needs no mark any more"
    assert await left(connection) == ([] if told else [(sealed.seq, True)])
    await relay.close()


async def test_whoever_wants_it_marked_waits_also_where_another_call_published_it(
    dsn: str, connection: Connection
) -> None:
    broker = Broker()
    relay = relay_of(dsn, broker)
    sealed = await commit(connection)
    records = [(sealed.seq, sealed.record)]
    broker.gate.clear()
    calls = [asyncio.create_task(relay.journal(records, marked=marked)) for marked in (False, True)]
    await broker.asked.wait()
    await kill_turn(dsn)
    broker.gate.set()
    await asyncio.gather(*calls)
    assert await left(connection) == [(sealed.seq, True)]
    assert broker.seqs() == [sealed.seq, sealed.seq]
    await relay.close()


async def test_who_is_cancelled_while_it_is_marked_takes_the_mark_from_nobody(dsn: str, connection: Connection) -> None:
    broker = Broker()
    relay = relay_of(dsn, broker)
    sealed = await commit(connection)
    records = [(sealed.seq, sealed.record)]
    waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    holding, watching = await owner(dsn), await owner(dsn)
    async with asyncio.timeout(100), holding.transaction():
        await holding.fetch("SELECT FROM outbox FOR UPDATE")
        cancelled = asyncio.create_task(relay.journal(records))
        other = asyncio.create_task(relay.journal(records))
        while not await watching.fetchval(waits):
            await asyncio.sleep(0.01)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
    await other
    assert broker.seqs() == [sealed.seq]
    assert await left(connection) == [(sealed.seq, True)]
    await relay.close()
    await holding.close()
    await watching.close()


async def test_with_a_new_connection_a_turn_looks_at_all_rows_again(
    databases: Callable[[], str], dsn: str, connection: Connection
) -> None:
    """It may be to a server that counts from somewhere else."""
    broker, addresses = Broker(), [databases(), dsn]

    async def connect() -> Connection:
        made: Connection = await connect_to(addresses.pop(), synchronous_commit="off")()
        return made

    relay = Relay(connect, broker.publish, (KafkaError,))
    await relay.journal()
    relay._floor.seq = 1_000
    other: Connection = await connect_to(addresses[0])()
    sealed = await commit(other)
    assert relay._connection is not None
    relay._connection.terminate()
    await relay.journal()
    assert broker.sent == [(sealed.seq, sealed.record)]
    await relay.close()
    await other.close()


async def test_a_lost_mark_repeats_a_record_and_loses_none(dsn: str, connection: Connection) -> None:
    broker = Broker()
    relay = relay_of(dsn, broker)
    first = await commit(connection)
    await relay.journal([(first.seq, first.record)])
    await connection.execute("UPDATE outbox SET journaled = false")  # as a crash of the server may (synchronous_commit)
    second = await commit(connection)
    await relay.journal([(second.seq, second.record)])
    assert broker.seqs() == [first.seq, first.seq, second.seq]
    await relay.close()


async def test_an_error_that_is_none_of_the_known_ones_is_not_hidden(dsn: str, connection: Connection) -> None:
    async def broken(_records: Sequence[tuple[int, bytes]], _untold: int) -> None:
        raise ZeroDivisionError

    relay = Relay(connect_to(dsn), broken)
    sealed = await commit(connection)
    with pytest.raises(ZeroDivisionError):
        await relay.journal([(sealed.seq, sealed.record)])
    assert await left(connection) == [(sealed.seq, False)]
    await relay.close()


# -- on Kafka -----------------------------------------------------------------------------------------------------------


async def read_all(
    kafka: Kafka, topic: str, partition: int, wanted: int
) -> list[tuple[bytes, bytes, dict[str, bytes]]]:
    if not wanted:
        return []
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    consumer.assign([TopicPartition(topic, partition)])
    found = []
    async with asyncio.timeout(100):
        while len(found) < wanted:
            one = await consumer.getone()
            found.append((one.key, one.value, dict(one.headers)))
    await consumer.stop()
    return found


async def test_a_record_larger_than_a_message_goes_to_the_journal_in_parts(
    kafka: Kafka, topic_prefix: str, dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with admin(kafka.bootstrap) as client:
        await create_missing(client, topic_prefix, 1, [JOURNAL])
    emitter = Emitter(kafka.bootstrap, topic_prefix)
    await emitter.start()
    relay = Relay(connect_to(dsn), emitter.journal, (KafkaError,))
    noise = random.Random(7).randbytes  # zstd must not shrink it
    monkeypatch.setattr("ledger.record.msgpack.packb", _with(noise(PART_BYTES_MAX * 2 + 12_345)))
    large = await commit(connection)
    monkeypatch.undo()
    small = await commit(connection)
    await relay.journal([(large.seq, large.record), (small.seq, small.record)])
    assert len(large.record) > 2 * PART_BYTES_MAX
    found = await read_all(kafka, JOURNAL.named(topic_prefix), 0, 4)
    assert [int.from_bytes(key, "big") for key, _, _ in found] == [large.seq] * 3 + [small.seq]
    assert [(h.get("part"), h.get("parts")) for _, _, h in found] == [
        (b"0", b"3"), (b"1", b"3"), (b"2", b"3"), (None, None),
    ]  # fmt: skip
    assert b"".join(value for _, value, _ in found[:3]) == large.record
    assert unpack(found[3][1]).stage == "cli"
    await relay.close()
    await emitter.stop()


def _with(noise: bytes):  # type: ignore[no-untyped-def]
    pack = msgpack.Packer().pack

    def packb(value: object) -> bytes:
        if isinstance(value, list) and len(value) == 2:  # the content
            return pack([value[0], [["t", None, noise, "", "", None, None]]])
        return pack(value)

    return packb


async def test_messages_of_a_batch_keep_their_order_within_each_partition(kafka: Kafka, topic_prefix: str) -> None:
    async with admin(kafka.bootstrap) as client:
        await create_missing(client, topic_prefix, 1, [DEPOSITS_CREDITED])
    emitter = Emitter(kafka.bootstrap, topic_prefix)
    await emitter.start()
    sent = [Message(DEPOSITS_CREDITED.name, b"k%d" % (n % 5), b"%d" % n, f"id{n}", "type") for n in range(300)]
    for start in range(0, 300, 100):
        await emitter.emit(sent[start : start + 100], "/test", AT)
    await emitter.emit([], "/test", AT)
    await emitter.stop()
    by_key: dict[bytes, list[int]] = {}
    for partition in range(DEPOSITS_CREDITED.partitions):
        wanted = [m for m in sent if partition_of(m.key, DEPOSITS_CREDITED.partitions) == partition]
        for key, value, headers in await read_all(kafka, DEPOSITS_CREDITED.named(topic_prefix), partition, len(wanted)):
            by_key.setdefault(key, []).append(int(value))
            assert headers["ce_id"] == b"id" + value
            assert headers["ce_source"] == b"/test"
    assert all(numbers == sorted(numbers) for numbers in by_key.values())
    assert sorted(n for numbers in by_key.values() for n in numbers) == list(range(300))
