"""Topics on a real broker: made as declared, by any number of programs at once."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka.errors import KafkaError

from stablerail.dev.kafka import Kafka
from stablerail.topics_admin import admin, create_missing, inspect
from topics.catalog import DEPOSITS_NOTIFIED, JOURNAL, TOPICS


async def test_programs_that_start_at_once_make_each_topic_once_and_as_declared(
    kafka: Kafka, topic_prefix: str
) -> None:
    async def start() -> list[str]:
        async with admin(kafka.bootstrap) as client:
            return [topic.name for topic in await create_missing(client, topic_prefix, 1)]

    made = await asyncio.gather(start(), start(), start())
    assert set().union(*made) == {topic.name for topic in TOPICS}
    async with admin(kafka.bootstrap) as client:
        states = await inspect(client, topic_prefix)
        assert [state.topic for state in states] == list(TOPICS)
        assert [state for state in states if not state.exists or state.drift] == []
        assert await create_missing(client, topic_prefix, 1) == []


async def test_what_is_missing_is_told(kafka: Kafka, topic_prefix: str) -> None:
    async with admin(kafka.bootstrap) as client:
        await create_missing(client, topic_prefix, 1, [JOURNAL])
        states = await inspect(client, topic_prefix, [JOURNAL, DEPOSITS_NOTIFIED])
    assert [(state.topic.name, state.exists) for state in states] == [("journal", True), ("deposits.notified", False)]


async def test_a_broker_that_refuses_is_an_error(kafka: Kafka, topic_prefix: str) -> None:
    async with admin(kafka.bootstrap) as client:
        with pytest.raises(KafkaError, match="journal"):
            await create_missing(client, topic_prefix, 3, [JOURNAL])  # one broker keeps no three copies


async def test_no_broker_is_an_error(kafka: Kafka) -> None:
    with pytest.raises(KafkaError):
        async with admin("127.0.0.1:1"):
            pass
