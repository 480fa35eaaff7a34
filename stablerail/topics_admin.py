"""Makes missing topics and reports drift: what the broker has that differs from topics/catalog.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import TopicAlreadyExistsError, for_code

from topics.catalog import TOPICS, Topic

VISIBLE_S_MAX: Final = 30.0
"""A broker that has made a topic shows it within milliseconds, unless the controller is changing."""


@dataclass(frozen=True)
class TopicState:
    """A declared topic as the broker has it."""

    topic: Topic
    exists: bool
    drift: tuple[str, ...] = ()
    """What differs, in words; empty when it is as declared."""


async def inspect(admin: AIOKafkaAdminClient, prefix: str, topics: Iterable[Topic] = TOPICS) -> list[TopicState]:
    """Every declared topic, in the catalog's order."""
    wanted = list(topics)
    present = set(await admin.list_topics())
    names = [topic.named(prefix) for topic in wanted if topic.named(prefix) in present]
    partitions: dict[str, int] = {}
    if names:
        for described in await admin.describe_topics(names):
            partitions[described["topic"]] = len(described["partitions"])
    configs = await _configs(admin, names)
    return [
        TopicState(topic, name in partitions, tuple(_drift(topic, partitions[name], configs.get(name, {}))))
        if (name := topic.named(prefix)) in partitions
        else TopicState(topic, exists=False)
        for topic in wanted
    ]


async def retentions(admin: AIOKafkaAdminClient, prefix: str) -> dict[str, int]:
    """Declared topics that the broker has, without prefix -> retention in milliseconds as the broker has it; below zero: for ever."""
    present = set(await admin.list_topics())
    names = {topic.named(prefix): topic.name for topic in TOPICS if topic.named(prefix) in present}
    found = await _configs(admin, list(names))
    return {names[name]: int(config["retention.ms"]) for name, config in found.items()}


async def _configs(admin: AIOKafkaAdminClient, names: list[str]) -> dict[str, dict[str, str]]:
    if not names:
        return {}
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    answers = await admin.describe_configs(resources)
    return {found[3]: {entry[0]: entry[1] for entry in found[4]} for answer in answers for found in answer.resources}


def _drift(topic: Topic, partitions: int, config: dict[str, str]) -> Iterable[str]:
    if partitions != topic.partitions:
        yield f"partitions {partitions}, declared {topic.partitions}"
    for name, value in topic.broker_config().items():
        if config.get(name) != value:
            yield f"{name} {config.get(name)}, declared {value}"


async def create_missing(
    admin: AIOKafkaAdminClient, prefix: str, replication_factor: int, topics: Iterable[Topic] = TOPICS
) -> list[Topic]:
    """Creates what is missing; what exists is left as it is. Returns what it made, once everybody can see it: a consumer
    that starts before that finds no partitions. Raises KafkaError when the broker refuses, TimeoutError when the topics
    do not appear."""
    missing = [state.topic for state in await inspect(admin, prefix, topics) if not state.exists]
    if not missing:
        return []
    answer = await admin.create_topics(
        [
            NewTopic(topic.named(prefix), topic.partitions, replication_factor, topic_configs=topic.broker_config())
            for topic in missing
        ]
    )
    others = set()
    for name, code, *reason in answer.topic_errors:
        error = for_code(code)
        if error is TopicAlreadyExistsError:
            others.add(name)
        elif code:
            raise error(f"{name}: {reason[0] if reason else ''}")
    async with asyncio.timeout(VISIBLE_S_MAX):
        while not all(state.exists for state in await inspect(admin, prefix, missing)):  # noqa: ASYNC110  (a broker)
            await asyncio.sleep(0.05)
    return [topic for topic in missing if topic.named(prefix) not in others]


@asynccontextmanager
async def admin(bootstrap: str) -> AsyncIterator[AIOKafkaAdminClient]:
    """A connected admin client. Raises KafkaError when no broker answers."""
    client = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    try:
        await client.start()
        yield client
    finally:
        await client.close()
