"""Whatever bytes reach a topic: a dead letter with a stable code, and the next event is served."""

from __future__ import annotations

import json
import os
import uuid

import base58
import pytest
from aiokafka.errors import MessageSizeTooLargeError

from stablerail.dev.stack import PROGRAMS
from tests.support.bad_messages import SAID_OF_GOOD, STAGES, Case, cases_of, good
from tests.support.hostile import NotUtf8, send_raw
from tests.support.story import Letter, Sent, Story, message, report, until
from topics.catalog import DEPOSITS_NOTIFIED, WALLETS_REQUESTED, Topic


@pytest.mark.parametrize("topic", STAGES, ids=lambda topic: topic.name)
async def test_every_bad_message_is_one_dead_letter_as_it_came_and_the_next_is_served(
    story: Story, topic: Topic
) -> None:
    cases = cases_of(topic)
    sent = []
    async with story.producer(max_request_size=2**21) as producer:
        for case in cases:
            at = await producer.send_and_wait(
                topic.named(story.prefix),
                case.value,
                case.key,
                headers=list(case.headers),
                timestamp_ms=case.timestamp_ms,
            )
            sent.append(Sent(at.partition, at.offset))
    for stage in STAGES[topic]:
        letters = await story.letters(topic, sent, stage)
        wrong = [
            (case.name, [letter.ours("code") for letter in found], [letter.ours("reason") for letter in found])
            for case, found in zip(cases, letters, strict=True)
            if [letter.ours("code") for letter in found] != [case.code] or not _as_it_came(found[0], case)
        ]
        assert wrong == []
    await _is_served(story, topic)


def _as_it_came(letter: Letter, case: Case) -> bool:
    theirs = [(name, value) for name, value in case.headers if not name.startswith("dlq_")]
    return (letter.value, letter.key, letter.theirs) == (case.value, case.key, theirs)


@pytest.mark.parametrize("topic", STAGES, ids=lambda topic: topic.name)
async def test_a_header_name_that_is_no_text_does_not_stop_its_partition(story: Story, topic: Topic) -> None:
    bad = (b"some key", b"{", [(NotUtf8(), b"\xff"), ("x", None)])
    async with story.producer() as producer:
        offset = await send_raw(producer, topic.named(story.prefix), 0, [bad, bad])
    for stage in STAGES[topic]:
        ((first,), (second,)) = await story.letters(topic, [Sent(0, offset), Sent(0, offset + 1)], stage)
        assert first.ours("code") == second.ours("code") == "not_json"
        assert first.theirs == [("ce\\xff\\xfe", b"\xff"), ("x", None)]
    await _is_served(story, topic)


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_compressed_batches_are_read(story: Story, codec: str) -> None:
    events = [report("0x" + "34" * 20, note="n" * 1_000) for _ in range(20)]
    sent = await story.produce(
        DEPOSITS_NOTIFIED, *[message(event["to"], event) for event in events], compression_type=codec, linger_ms=50
    )
    letters = await story.letters(DEPOSITS_NOTIFIED, sent)
    assert [letter.ours("code") for (letter,) in letters] == ["unknown_wallet"] * 20


async def test_what_unpacks_to_more_than_the_limit_is_refused_by_the_broker(story: Story) -> None:
    for topic in STAGES:
        with pytest.raises(MessageSizeTooLargeError):
            await story.produce(topic, {"key": b"k", "value": b" " * 5_000_000}, max_request_size=2**24)
        for codec in ("gzip", "zstd"):
            bomb = {"key": b"k", "value": b" " * 30_000_000}
            with pytest.raises(MessageSizeTooLargeError):
                await story.produce(topic, bomb, max_request_size=2**26, max_batch_size=2**26, compression_type=codec)


async def test_odd_but_readable_messages_are_served(story: Story) -> None:
    """Extra fields, headers of others, a trace that is none, another key than ours: no reason to refuse money."""
    user, wallets = await story.customer()
    contents = [
        report(wallets["SOL"], chain="SOL", tx_hash=_signature(), note={"deep": [1, 2, {"x": "\u0000"}]})
        for _ in range(4)
    ]
    headers: list[list[tuple[str, bytes | None]]] = [
        [("traceparent", b"\0")],
        [("traceparent", b"x" * 90_000), ("other", os.urandom(90_000))],
        [("ce_id", b"\xc3\xa9"), ("ce_source", "/ü".encode()), ("ce_time", b"\xff"), ("content-type", b"\xff")],
        [("ce_id", uuid.uuid4().bytes.hex().encode()), ("ce_id", uuid.uuid4().bytes.hex().encode()), ("x", None)],
    ]
    keys = [b"k", os.urandom(10_000), b"\xff", wallets["SOL"].encode()]
    messages = [
        {"key": key, "value": json.dumps(content).encode(), "headers": some}
        for key, content, some in zip(keys, contents, headers, strict=True)
    ]
    await story.produce(DEPOSITS_NOTIFIED, *messages)

    async def all_credited() -> bool:
        return await story.balance(user) == 4 * 25_000_000

    await until(all_credited, "four credits")
    direct = f"direct-{uuid.uuid4().hex}"
    request = {"user_id": direct, "chains": ["SOL", "SOL", "ETH"]}
    await story.produce(WALLETS_REQUESTED, message(direct, request, traceparent="\0", ce_id=direct * 5))

    async def provisioned() -> bool:
        return await story.rows("SELECT chain FROM wallets WHERE user_id = $1 ORDER BY 1", direct) == [
            ("ETH",),
            ("SOL",),
        ]

    await until(provisioned, "two wallets")


async def _is_served(story: Story, topic: Topic) -> None:
    """A good event to each partition of the topic has its effect, or is at least settled without a dead letter."""
    async with story.producer() as producer:
        sent = []
        for partition in range(topic.partitions):
            event = good(topic)
            at = await producer.send_and_wait(
                topic.named(story.prefix), json.dumps(event).encode(), b"good", partition=partition
            )
            sent.append(Sent(at.partition, at.offset))
    for stage in STAGES[topic]:
        codes = [[letter.ours("code") for letter in letters] for letters in await story.letters(topic, sent, stage)]
        assert codes == [SAID_OF_GOOD.get(topic, [])] * topic.partitions


def _signature() -> str:
    return base58.b58encode(os.urandom(64)).decode()


async def test_no_bad_input_was_taken_for_a_bug(story: Story) -> None:
    """Runs after the others of this file: no crash was counted, no worker was restarted."""
    assert await story.rows("SELECT stage, topic, count FROM crashes") == []
    for name in PROGRAMS:
        assert story.stack.children[name].returncode is None
