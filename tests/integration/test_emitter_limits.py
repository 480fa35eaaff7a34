"""What one commit may cause to be said, whatever its size, gets to a broker that limits batches."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from agents.emitter import Emitter
from ledger.record import Message
from stablerail.dev.kafka import Kafka
from stablerail.topics_admin import admin, create_missing
from tests.support.story import records
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_NOTIFIED, INPUT_BYTES_MAX, Topic

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("topic", "messages", "value_bytes"),
    [(DEPOSITS_CREDITED, 2_000, 700), (DEPOSITS_NOTIFIED.dlq, 9, INPUT_BYTES_MAX - 60_000)],
    ids=["many small ones of one key", "a few large dead letters"],
)
async def test_a_commits_messages_go_in_as_many_batches_as_the_broker_demands(
    kafka: Kafka, topic_prefix: str, topic: Topic, messages: int, value_bytes: int
) -> None:
    async with admin(kafka.bootstrap) as client:
        await create_missing(client, topic_prefix, 1, [topic])
    emitter = Emitter(kafka.bootstrap, topic_prefix)
    await emitter.start()
    try:
        said = [Message(topic.name, b"one key", b"%d" % n * value_bytes, f"id-{n}", "t") for n in range(10)]
        wanted = [said[n % 10]._replace(value=(said[n % 10].value or b"")[:value_bytes]) for n in range(messages)]
        await emitter.emit(wanted, "test", NOW)
    finally:
        await emitter.stop()
    assert [record.value for record in await records(kafka.bootstrap, topic.named(topic_prefix))] == [
        message.value for message in wanted
    ]
