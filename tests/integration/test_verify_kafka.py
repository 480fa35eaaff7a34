"""`verify --kafka` finds what is lost, changed or out of order in the topics, and what the inbox does not know of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import OffsetAndMetadata

from agents.deposits import credit_deposits
from agents.deposits.credit_deposits import DepositPolicy
from agents.item import former_uid, position_uid
from ledger.commit import Sealed, lock_writer, seal
from ledger.record import Message
from ledger.rows import Connection
from stablerail.config import load_settings
from stablerail.dev.kafka import Kafka
from stablerail.topics_admin import admin, create_missing
from stablerail.verify_kafka import verify_kafka
from tests.integration import test_cli
from tests.integration.test_cli import Result
from tests.support.in_process import SCHEMA, Ground, ground, read_topic, running, until
from tests.support.migrated import migrate
from tests.support.rebuild import connect, empty_database
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_FINALIZED, DEPOSITS_NOTIFIED, JOURNAL, Topic
from topics.envelope import headers_of, value_of
from topics.events import DepositNotified, Evidence

run, clean = test_cli.run, test_cli.clean

ADDRESS = "0x" + "1" * 40
STAGE = credit_deposits.stage(DepositPolicy(minimum=1, chains_read=frozenset()))
TOLD = (DEPOSITS_CREDITED, DEPOSITS_FINALIZED)
DEPOSITS = 3
WALLET = "INSERT INTO wallets VALUES ('ETH', $1, 'ada', 'w', now())"


async def told_of(at: Ground, number: int) -> None:
    event = DepositNotified(
        source="circle", transfer_id=f"t{number}", chain="ETH", tx_hash=f"0x{number:064x}", to=ADDRESS, asset="USDC",
        amount=number + 1, evidence=Evidence.COMPLETE,
    )  # fmt: skip
    headers = headers_of(event.ce_type(), event_id=f"e{number}", source="test", time=datetime.now(UTC))
    await at.send(DEPOSITS_NOTIFIED, ADDRESS.encode(), value_of(event), headers)


async def commit_offsets(at: Ground, offset: int) -> None:
    """As the workers of `deposits` would."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=at.bootstrap, group_id=f"stablerail-{at.prefix}deposits", enable_auto_commit=False
    )
    await consumer.start()
    try:
        place = TopicPartition(DEPOSITS_NOTIFIED.named(at.prefix), 0)
        consumer.assign([place])
        await consumer.commit({place: OffsetAndMetadata(offset, "")})
    finally:
        await consumer.stop()


async def until_settled(at: Ground, count: int) -> None:
    async def settled() -> bool:
        return bool(await at.observer.fetchval("SELECT count(*) = $1 FROM inbox", count))

    await until(settled, f"{count} outcomes")


@pytest.fixture
async def at(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    """Three deposits of one address, credited one after the other, and one record that nobody can read."""
    async with ground(database, kafka.bootstrap, topic_prefix, [DEPOSITS_NOTIFIED, *TOLD]) as made:
        await made.observer.execute(WALLET, ADDRESS)
        async with made.process() as services, running(STAGE, services, made):
            for number in range(DEPOSITS):
                await told_of(made, number)
                await until_settled(made, number + 1)
            await made.send(DEPOSITS_NOTIFIED, b"k", b"not an event", [("ce_id", b"x")])
            await until_settled(made, DEPOSITS + 1)
        await commit_offsets(made, DEPOSITS + 1)
        yield made


async def broken(at: Ground, later: timedelta = timedelta(minutes=2)) -> dict[int, tuple[str, ...]]:
    """Asked in two minutes' time, when every commit must have left."""
    settings = load_settings(env_file=None, database_url=at.dsn, kafka_bootstrap=at.bootstrap, topic_prefix=at.prefix)
    results = await verify_kafka(settings, at.observer, timedelta(hours=2), 9, datetime.now(UTC) + later)
    assert all(result.checked for result in results), results
    return {result.number: result.offending for result in results if result.offending}


async def test_what_was_settled_and_told_holds_and_an_event_without_outcome_or_long_uncommitted_is_found(
    at: Ground,
) -> None:
    assert await broken(at) == {}
    transaction = at.observer.transaction()
    await transaction.start()
    await at.observer.execute(
        "DELETE FROM inbox WHERE outcome = 'done' AND event_id = (SELECT max(event_id::text)::uuid FROM inbox WHERE outcome = 'done')"
    )
    (found,) = (await broken(at))[10]
    assert found.startswith("credit_deposits has no outcome of ")
    await transaction.rollback()
    (unread,) = [one for one in await at.told(DEPOSITS_NOTIFIED) if one.value == b"not an event"]
    ids = (position_uid(unread), former_uid(unread))
    await at.observer.execute("UPDATE inbox SET event_id = $2::uuid WHERE event_id = $1::uuid", *ids)
    assert await broken(at) == {}, "settled by the release before, which knew it by its place alone"
    await at.observer.execute("UPDATE inbox SET event_id = $1::uuid WHERE event_id = $2::uuid", *ids)
    await told_of(at, 3)
    assert await broken(at) == {}, "it has just come"
    (waits,) = (await broken(at, timedelta(minutes=30)))[13]
    assert "deposits: 1 events of" in waits
    await commit_offsets(at, DEPOSITS + 2)
    (lost,) = (await broken(at))[10]
    assert lost.endswith(f"[0] offset {DEPOSITS + 1}"), "acknowledged, and nobody settled it"


@dataclass
class Copy:
    """What the topics hold, to be damaged."""

    journal: list[Any]
    told: list[Any]


def lose_a_record(copy: Copy) -> None:
    del copy.journal[-2]


def lose_the_last_record(copy: Copy) -> None:
    del copy.journal[-1]


def change_a_record(copy: Copy) -> None:
    copy.journal[-2].value = copy.journal[-1].value


def tell_a_record_twice_with_other_contents(copy: Copy) -> None:
    copy.journal.append(replace(copy.journal[1], value=copy.journal[2].value))


def make_a_record_unreadable(copy: Copy) -> None:
    copy.journal[-1].value = b"garbage"


def lose_a_message(copy: Copy) -> None:
    del copy.told[0]


def change_a_message(copy: Copy) -> None:
    copy.told[0].value += b" "


def swap_messages(copy: Copy) -> None:
    copy.told[0], copy.told[-1] = copy.told[-1], copy.told[0]


def add_a_message_without_a_key(copy: Copy) -> None:
    copy.journal.append(Raw(None, b"?", [], 0))


def add_a_message_with_an_odd_part(copy: Copy) -> None:
    copy.journal.append(Raw(copy.journal[-1].key, b"?", [("part", b"x")], 0))


DAMAGE: dict[Callable[[Copy], None], str] = {
    lose_a_record: "is not in the journal",
    lose_the_last_record: "is not in the journal",
    change_a_record: "is not in the journal",
    tell_a_record_twice_with_other_contents: "has two contents",
    make_a_record_unreadable: "not a commit record",
    lose_a_message: "is not in deposits.credited",
    change_a_message: "is not in deposits.credited",
    swap_messages: "in another order",
    add_a_message_without_a_key: "is no record of ours",
    add_a_message_with_an_odd_part: "is no record of ours",
}


@dataclass
class Raw:
    key: bytes | None
    value: bytes
    headers: Any
    partition: int


async def copied(at: Ground, topic: Topic) -> list[Any]:
    records = await read_topic(at.bootstrap, topic, at.prefix)
    return [Raw(one.key, one.value, list(one.headers), one.partition) for one in records]


async def test_every_damage_to_the_journal_and_to_what_was_told_is_found(at: Ground) -> None:
    for number, (damage, said) in enumerate(DAMAGE.items()):
        copy = Copy(await copied(at, JOURNAL), await copied(at, DEPOSITS_CREDITED))
        rest = {topic: await copied(at, topic) for topic in (DEPOSITS_FINALIZED, DEPOSITS_NOTIFIED.dlq)}
        damage(copy)
        other = replace(at, prefix=f"{at.prefix}{number}.")
        topics = {JOURNAL: copy.journal, DEPOSITS_CREDITED: copy.told, **rest}
        async with admin(at.bootstrap) as client:
            await create_missing(client, other.prefix, 1, topics)
        for topic, records in topics.items():
            for one in records:
                await other.producer.send_and_wait(
                    topic.named(other.prefix), one.value, key=one.key, headers=one.headers, partition=one.partition
                )
        settings = load_settings(
            env_file=None, database_url=at.dsn, kafka_bootstrap=at.bootstrap, topic_prefix=other.prefix
        )
        now = datetime.now(UTC) + timedelta(minutes=2)
        emitted, _, _ = await verify_kafka(settings, at.observer, timedelta(hours=2), 9, now)
        assert any(said in row for row in emitted.offending), (damage.__name__, emitted.offending)


async def test_a_commit_that_the_database_lost_or_changed_is_found_by_the_journal(at: Ground) -> None:
    for statement in (
        "DELETE FROM audit WHERE (stage, topic, partition, position) IN"
        " (SELECT stage, topic, partition, max(position) FROM audit GROUP BY 1, 2, 3)",
        "UPDATE audit SET head = 'x' WHERE position = 2",
    ):
        transaction = at.observer.transaction()
        await transaction.start()
        await at.observer.execute("ALTER TABLE audit DISABLE TRIGGER append_only")
        await at.observer.execute(statement)
        assert any("is not the database's" in row for row in (await broken(at))[9])
        await transaction.rollback()


async def settle(at: Ground, count: int) -> None:
    """Whatever is in the topic, by a worker of this database."""
    async with at.process() as services, running(STAGE, services, at):
        await until_settled(at, count)


async def commit(connection: Connection, at: Ground, *messages: Message) -> Sealed:
    async with connection.transaction():
        owners = await lock_writer(connection, "api")
        return await seal(
            connection, "api", owners, blocks=[], messages=messages, at=at.clock(), actor="x", summary={}
        )  # fmt: skip


@pytest.fixture
async def restored(at: Ground, run: Callable[..., Result]) -> AsyncIterator[Ground]:
    """The database was lost and is restored; one worker of the lost one works on for a while, and the journal gets its records late."""
    async with empty_database(at.dsn) as dsn:
        await migrate(dsn, SCHEMA)
        names = {"kafka_bootstrap": at.bootstrap, "topic_prefix": at.prefix}
        done = await asyncio.to_thread(run, "rebuild", "--take-over", database_url=dsn, **names)
        assert done.exit_code == 0, done.output
        observer = await connect(dsn, SCHEMA)
        await observer.execute(WALLET, ADDRESS)
        made = replace(at, dsn=dsn, observer=observer)
        await told_of(at, 3)
        await settle(at, DEPOSITS + 2)
        async with at.process() as services:  # it dies before it tells
            untold = Message(DEPOSITS_CREDITED.name, b"k", b"{}", "never", "deposits.credited")
            await commit(await services.connect(), at, untold)
            await services.relay.journal()
        await settle(made, DEPOSITS + 2)
        await commit_offsets(at, DEPOSITS + 2)
        yield made
        await observer.close()


async def test_records_that_a_lost_database_sends_late_are_no_alarm_and_losses_of_the_restored_one_are(
    at: Ground, restored: Ground
) -> None:
    assert await broken(restored) == {}
    for statement, said in (
        # of the history, and of its own
        ("DELETE FROM audit WHERE stage = 'credit_deposits' AND position = 2", "position 2 is not the database's"),
        (
            "DELETE FROM audit WHERE stage = 'credit_deposits' AND position = (SELECT position - 1 FROM owners WHERE"
            " stage = 'credit_deposits' AND partition = 0)",
            "is not the database's",
        ),
        ("UPDATE audit SET head = 'x' WHERE stage = 'credit_deposits' AND position = 2", "is not in the journal"),
    ):
        transaction = restored.observer.transaction()
        await transaction.start()
        await restored.observer.execute("ALTER TABLE audit DISABLE TRIGGER append_only")
        await restored.observer.execute(statement)
        assert any(said in row for row in (await broken(restored))[9]), statement
        await transaction.rollback()
    await told_of(at, 4)
    await settle(at, DEPOSITS + 3)
    await commit_offsets(at, DEPOSITS + 3)
    found = await broken(restored)
    assert found.keys() == {10}, "what the lost one settled and acknowledged, the restored one never gets"
    assert found[10][0].endswith(f"[0] offset {DEPOSITS + 2}")
    connection = await restored.connect()
    sealed = await commit(connection, restored)
    await connection.close()
    await restored.observer.execute("DELETE FROM outbox WHERE seq = $1", sealed.seq)
    assert any("is not in the journal" in row for row in (await broken(restored))[9])
