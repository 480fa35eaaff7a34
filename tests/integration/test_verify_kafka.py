"""`verify --kafka` finds what is lost, changed or out of order in the topics, and what the inbox does not know of them."""

from __future__ import annotations

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
from stablerail.config import load_settings
from stablerail.dev.kafka import Kafka
from stablerail.topics_admin import admin, create_missing
from stablerail.verify_kafka import verify_kafka
from tests.support.in_process import Ground, ground, read_topic, running, until
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_FINALIZED, DEPOSITS_NOTIFIED, JOURNAL, Topic
from topics.envelope import headers_of, value_of
from topics.events import DepositNotified, Evidence

ADDRESS = "0x" + "1" * 40
STAGE = credit_deposits.stage(DepositPolicy(minimum=1, chains_read=frozenset()))
TOLD = (DEPOSITS_CREDITED, DEPOSITS_FINALIZED)
DEPOSITS = 3


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


@pytest.fixture
async def at(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    """Three deposits of one address, credited one after the other, and one record that nobody can read."""
    async with ground(database, kafka.bootstrap, topic_prefix, [DEPOSITS_NOTIFIED, *TOLD]) as made:
        await made.observer.execute("INSERT INTO wallets VALUES ('ETH', $1, 'ada', 'w', now())", ADDRESS)
        async with made.process() as services, running(STAGE, services, made):
            for number in range(DEPOSITS):
                await told_of(made, number)

                async def settled(count: int = number + 1) -> bool:
                    return bool(await made.observer.fetchval("SELECT count(*) = $1 FROM inbox", count))

                await until(settled, "the deposit's outcome")
            await made.send(DEPOSITS_NOTIFIED, b"k", b"not an event", [("ce_id", b"x")])

            async def refused() -> bool:
                return bool(await made.observer.fetchval("SELECT count(*) = $1 FROM inbox", DEPOSITS + 1))

            await until(refused, "the refusal")
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
