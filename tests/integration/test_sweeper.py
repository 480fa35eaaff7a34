"""What the sweeper finishes, and what it leaves alone, on real PostgreSQL and Kafka."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from agents.delivery import Services
from agents.sweeper import Sweeper
from ledger.commit import Sealed, lock_writer, seal
from ledger.record import Message
from stablerail.dev.kafka import Kafka
from tests.support.in_process import Ground, ground, until
from topics.catalog import WALLETS_PROVISIONED

WRITER = "somebody.conclude"


@pytest.fixture
async def at(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    async with ground(database, kafka.bootstrap, topic_prefix, [WALLETS_PROVISIONED]) as it:
        yield it


async def commit(at: Ground) -> Sealed:
    """A commit of a writer that consumes no topic, with one message to tell."""
    connection = await at.connect()
    try:
        async with connection.transaction():
            owners = await lock_writer(connection, WRITER)
            message = Message(WALLETS_PROVISIONED.name, b"ada", b"{}", "the only one", "io.test")
            now = at.clock()
            return await seal(
                connection, WRITER, owners, blocks=[], messages=[message], at=now, actor=WRITER, summary={}
            )
    finally:
        await connection.close()


async def tell(services: Services, sealed: Sealed) -> None:
    """What every writer does after its commit."""
    await services.relay.journal([(sealed.seq, sealed.record)])
    await services.emitter.emit(sealed.messages, sealed.stage, sealed.at)
    services.relay.emitted([sealed.seq])


async def outbox_is_empty(at: Ground) -> bool:
    return bool(await at.observer.fetchval("SELECT count(*) = 0 FROM outbox"))


async def test_what_an_idle_process_has_told_is_not_told_again_by_the_process_that_sweeps(at: Ground) -> None:
    async with at.process() as idle, at.process() as other:
        leader, own = Sweeper(other, interval_s=0.05), Sweeper(idle, interval_s=0.05)
        assert await leader._lead()
        await tell(idle, await commit(at))
        sweeping = asyncio.create_task(own.work())
        try:
            await until(lambda: outbox_is_empty(at), "the record's row is gone although nothing else is committed")
        finally:
            sweeping.cancel()
            await asyncio.gather(sweeping, return_exceptions=True)
        at.clock.forward(60)
        await leader.sweep()
        assert len(await at.told(WALLETS_PROVISIONED)) == 1


async def test_what_a_process_committed_and_never_told_is_told_once(at: Ground) -> None:
    await commit(at)
    async with at.process() as other:
        sweeper = Sweeper(other)
        await sweeper.sweep()
        assert await at.told(WALLETS_PROVISIONED) == [], "its owner may still be about to tell it"
        at.clock.forward(60)
        await sweeper.sweep()
        await sweeper.sweep()
        assert [record.value for record in await at.told(WALLETS_PROVISIONED)] == [b"{}"]
        assert await outbox_is_empty(at)
