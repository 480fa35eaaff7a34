"""Stages in the test's process behind proxies, cut off at a boundary; there their database is lost, and rebuilt from the journal.

What outlives the database: Kafka with the topics and what the group had acknowledged (`offsets`), the chain, the partner. A
worker that is cut off reaches nothing any more from that moment on, as if it had been killed: the proxies are closed before
its tasks are.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import asyncpg
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from agents.crash import Stop
from agents.delivery import Delivery
from agents.emitter import Emitter
from agents.outcome import Stage
from agents.recovery import restoring
from agents.services import Services
from agents.sweeper import Sweeper
from ledger.journal import Relay
from ledger.migrate import upgrade
from ledger.rebuild import Restored
from ledger.record import unpack
from ledger.rows import Connection
from ledger.verify import verify
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from stablerail.metrics import Metrics
from stablerail.rebuild import alone_in, open_journal, rebuild_from
from stablerail.topics_admin import admin, create_missing
from tests.support.in_process import SCHEMA, Clock, Ground, fed, read_topic, until
from tests.support.ledger_rig import differences, dump
from tests.support.proxies import Frame, HttpProxy, KafkaProxy, Match, PostgresProxy, Proxy, Where
from tests.support.rebuild import connect
from topics.catalog import BUFFERS_LEVELS, JOURNAL, Topic
from topics.envelope import event_uid

PATIENCE_S = 100.0
Offsets = dict[tuple[str, int], int]


def commit_of(writer: str) -> Match:
    """The commit of this writer: a stage's batch, or `<stage>.intend` and the like of performers."""
    name, at_work = writer.encode(), set[int]()

    def match(frame: Frame) -> bool:
        if name in frame.raw and name + b"." not in frame.raw:
            at_work.add(frame.connection)
        if frame.kind not in ("COMMIT", "ROLLBACK"):
            return False
        ours = frame.connection in at_work and frame.kind == "COMMIT"
        at_work.discard(frame.connection)
        return ours and "insert into outbox" in " ".join(frame.before).lower()

    return match


@dataclass(frozen=True)
class Boundary:
    """What is held: a request or a reply. `after`: it is the first of its kind after this writer's commit, which is held until the
    hold is made. The proxy `ack` is the acknowledgement itself."""

    name: str
    proxy: Literal["postgres", "kafka", "outside", "ack"]
    where: Where
    match: Callable[[str], Match] = lambda _prefix: lambda _frame: True
    after: str = ""

    def __str__(self) -> str:
        return self.name


class Work(Protocol):
    """A stage under test, and what becomes of its inputs."""

    stage: str
    source: Topic
    told: Topic

    def started(self, services: Services, at: Ground, offsets: Acked, outside: str) -> AbstractAsyncContextManager[Any]:
        """Its parts at work, reading from where the group is. `outside`: the address of what is asked, a chain or a partner."""

    async def ask(self, at: Ground) -> None:
        """One batch of events that were not there before."""

    async def opened(self, at: Ground, connection: Connection) -> None:
        """Compares what a restore has closed, and opens it: all of it must agree."""

    async def ended(self, at: Ground) -> bool:
        """Whether everything that was ever asked for has come to its end."""

    async def check(self, at: Ground) -> None:
        """Each once, by the world's own record."""


@dataclass
class Acked:
    """What the group has acknowledged: the next offset of each partition. `stops` is where the acknowledgement is cut off."""

    bootstrap: str
    """Where the group reads: past the proxies, it tells nobody anything."""
    offsets: Offsets = field(default_factory=dict)
    stops: Where | None = None
    hit: asyncio.Event = field(default_factory=asyncio.Event)

    def ack(self, run: Any) -> None:
        if self.hit.is_set():
            return
        if self.stops != "request":
            self.offsets[(run.topic, run.partition)] = run.records[-1].offset + 1
        if self.stops is not None:
            self.hit.set()


@asynccontextmanager
async def serving(stage: Stage[Any], services: Services, at: Ground, acked: Acked) -> AsyncIterator[Delivery]:
    """The stage at work on all partitions of its topic, from what the group has acknowledged on."""
    topic = stage.source.named(at.prefix)
    keys = [(topic, partition) for partition in range(stage.source.partitions)]
    offsets = {key: acked.offsets.get(key, 0) for key in keys}
    consumer = AIOKafkaConsumer(bootstrap_servers=acked.bootstrap, group_id=None, fetch_max_wait_ms=20)
    async with fed(stage, services, consumer, offsets, acked.ack) as delivery:
        yield delivery


class Losing:
    """`at` is the database of now, past the proxies."""

    def __init__(self, server: Postgres, broker: Kafka, work: Work, outside: tuple[str, int]) -> None:
        self._server, self._broker, self._work, self._outside = server, broker, work, outside
        self._prefix = f"t{uuid.uuid4().hex[:10]}."
        self._acked = Acked(broker.bootstrap)
        self._made: list[str] = []
        self._old = ""
        self._turn = 0
        self.is_quiet = True
        """As tests/support/crash_rig.py has it."""
        self.clock = Clock()
        self.at: Ground

    # -- life --------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def opened(self, topics: Sequence[Topic]) -> AsyncIterator[None]:
        """With database, topics, and a first batch that came to its end; then an old backup is taken."""
        self._empty, name = self._name(), self._name()
        await upgrade(self._server.create_database(self._empty), SCHEMA)
        self._server.create_database(name, template=self._empty)
        async with admin(self._broker.bootstrap) as client:
            all_of_them = [*topics, *(topic.dlq for topic in topics), JOURNAL, BUFFERS_LEVELS]
            await create_missing(client, self._prefix, 1, all_of_them)
        self._producer = AIOKafkaProducer(bootstrap_servers=self._broker.bootstrap, acks="all")
        await self._producer.start()
        try:
            await self._reach(name)
            await self._work.ask(self.at)
            await self._finish()
            await self.at.observer.close()
            self._old = self._name()
            self._server.create_database(self._old, template=name)
            await self._reach(name)
            yield
        finally:
            await self.at.observer.close()
            await self._producer.stop()
            for made in self._made:
                self._server.drop_database(made)

    def _name(self) -> str:
        self._made.append(f"test_{uuid.uuid4().hex[:12]}")
        return self._made[-1]

    async def _reach(self, name: str) -> None:
        dsn = self._server.dsn_of(name)
        observer = await asyncpg.connect(dsn, server_settings={"search_path": SCHEMA, "timezone": "UTC"})
        self.at = Ground(dsn, self._broker.bootstrap, self._prefix, observer, self._producer, self.clock)

    # -- the loss ----------------------------------------------------------------------------------------------------

    async def lose_at(self, boundary: Boundary) -> None:
        """A batch is asked for; at the boundary worker and database are gone. Rebuilt from nothing and from the old backup they are
        the same, and hold what was told and acknowledged; the next worker brings everything to its end, once."""
        await self._cut_off_at(boundary)
        lost = self.at.dsn
        fresh, forward = self._name(), self._name()
        self._server.create_database(fresh, template=self._empty)
        self._server.create_database(forward, template=self._old)
        journal = await read_topic(self.at.bootstrap, JOURNAL, self._prefix)
        restored = await asyncio.gather(self._rebuilt(fresh), self._rebuilt(forward))
        assert restored[0].applied > restored[1].applied > 0, "the old backup had some of it"
        while restored[0].records != restored[1].records:  # what the worker had sent came to the topic meanwhile
            restored = await asyncio.gather(self._rebuilt(fresh), self._rebuilt(forward))
        old, new, other = await asyncio.gather(
            *(self._dump(dsn) for dsn in (lost, self._dsn(fresh), self._dsn(forward)))
        )
        assert differences(new, other) == {}
        await self._check_rebuilt(journal, old, new)
        await self.at.observer.close()
        self._turn += 1
        goes_on, other = (fresh, forward) if self._turn % 2 else (forward, fresh)
        for name in (urlsplit(lost).path[1:], other):
            self._server.drop_database(name)
            self._made.remove(name)
        await self._reach(goes_on)
        connection = await self.at.connect()
        try:
            (made, *_) = [one for one, name in zip(restored, (fresh, forward), strict=True) if name == goes_on]
            assert await restoring.close(
                connection, self.clock(), "ann", first_seq=made.first_seq, records=made.records
            )  # fmt: skip
            await self._work.opened(self.at, connection)
        finally:
            await connection.close()
        await self._finish()
        self.is_quiet = True

    def _dsn(self, name: str) -> str:
        return self._server.dsn_of(name)

    async def _rebuilt(self, name: str) -> Restored:
        async with (
            alone_in(self._dsn(name), SCHEMA) as connection,
            open_journal(self._broker.bootstrap, self._prefix) as reader,
        ):
            return await rebuild_from(connection, reader, lambda *_: None)

    async def _dump(self, dsn: str) -> dict[str, list[str]]:
        connection = await connect(dsn, SCHEMA)
        try:
            return await dump(connection)
        finally:
            await connection.close()

    async def _check_rebuilt(
        self, journal: Sequence[Any], lost: dict[str, list[str]], rebuilt: dict[str, list[str]]
    ) -> None:
        """What was acknowledged and told is in it, and nothing that the lost one had not. `journal`: from before the rebuild, which
        may have read more."""
        assert set(rebuilt["audit"]) <= set(lost["audit"]), "no commit that never was"
        waiting = {row[0] for row in await self.at.observer.fetch("SELECT seq FROM outbox WHERE NOT journaled")}
        if waiting <= {int.from_bytes(record.key) for record in journal}:
            assert differences(lost, rebuilt) == {}, "everything had reached the journal"
        settled = [row for row in rebuilt["inbox"] if row.startswith(f"({self._work.stage},")]
        acked = {
            event_uid_of(record)
            for record in await read_topic(self.at.bootstrap, self._work.source, self._prefix)
            if record.offset < self._acked.offsets.get((record.topic, record.partition), 0)
        }
        assert acked <= {row.split(",")[1].replace("-", "") for row in settled}, (
            "what was acknowledged is in the rebuilt database"
        )
        journaled = {message.id for record in journal for message in unpack(record.value).messages}
        assert await self._told() <= journaled, "what was told is in the journal"

    async def _told(self) -> set[str]:
        told = await read_topic(self.at.bootstrap, self._work.told, self._prefix)
        return {dict(record.headers)["ce_id"].decode() for record in told}

    # -- workers -----------------------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """A worker brings everything that was ever asked for to its end."""
        self._acked.stops, self._acked.hit = None, asyncio.Event()
        async with (
            self.at.process() as services,
            self._work.started(services, self.at, self._acked, "{}:{}".format(*self._outside)),
        ):
            sweeper = Sweeper(services, abandoned_s=0.0)  # of writers that have no next owner
            await sweeper.sweep(await services.connect())
            await until(lambda: self._work.ended(self.at), "everything came to its end", PATIENCE_S)
            ends = await self._ends()
            await until(lambda: _same(self._acked.offsets, ends), "everything is acknowledged", PATIENCE_S)
            await services.relay.journal()
            await sweeper.sweep(await services.connect())
        await self._work.check(self.at)
        broken = [result for result in await verify(self.at.observer) if not result.holds]
        assert broken == []

    async def _ends(self) -> Offsets:
        records = await read_topic(self.at.bootstrap, self._work.source, self._prefix)
        ends: Offsets = {}
        for record in records:
            ends[(record.topic, record.partition)] = record.offset + 1
        return ends

    async def _cut_off_at(self, boundary: Boundary) -> None:
        self._acked.stops = boundary.where if boundary.proxy == "ack" else None
        self._acked.hit = asyncio.Event()
        server, (host, port) = urlsplit(self.at.dsn), self._broker.bootstrap.split(":")
        async with AsyncExitStack() as stack:
            postgres = stack.enter_context(PostgresProxy("127.0.0.1", server.port or 0))
            kafka = stack.enter_context(KafkaProxy(host, int(port)))
            outside = stack.enter_context(HttpProxy(*self._outside))
            proxies: dict[str, Proxy] = {"postgres": postgres, "kafka": kafka, "outside": outside}
            address = f"{server.username}:{server.password}@{postgres.address}"
            behind = Ground(
                server._replace(netloc=address).geturl(), kafka.address, self._prefix, self.at.observer,
                self._producer, self.clock,
            )  # fmt: skip
            async with self._doomed(behind, proxies, outside.address):
                await self._hit(boundary, proxies)

    async def _hit(self, boundary: Boundary, proxies: dict[str, Proxy]) -> None:
        """Returns when the worker stands at the boundary."""
        if boundary.after:
            first = proxies["postgres"].hold(commit_of(boundary.after), "request")
            await self._work.ask(self.at)
            await first.wait_hit_async(PATIENCE_S)
            await until(self._is_idle, "what was committed before is journaled", PATIENCE_S)
            hold = proxies[boundary.proxy].hold(boundary.match(self._prefix), boundary.where)
            assert first.release()
        elif boundary.proxy == "ack":
            await self._work.ask(self.at)
            await asyncio.wait_for(self._acked.hit.wait(), PATIENCE_S)
            return
        else:
            hold = proxies[boundary.proxy].hold(boundary.match(self._prefix), boundary.where)
            await self._work.ask(self.at)
        await hold.wait_hit_async(PATIENCE_S)

    async def _is_idle(self) -> bool:
        return not await self.at.observer.fetchval("SELECT count(*) FROM outbox WHERE NOT journaled")

    @asynccontextmanager
    async def _doomed(self, at: Ground, proxies: dict[str, Proxy], outside: str) -> AsyncIterator[None]:
        """A worker at work; when it is left it is gone, and with it what it had not sent."""
        opened: list[Connection] = []

        async def connect(**settings: str) -> Connection:
            opened.append(await at.connect(**settings))
            return opened[-1]

        emitter = Emitter(at.bootstrap, at.prefix)
        await emitter.start()
        relay = Relay(lambda: connect(synchronous_commit="off"), emitter.journal)
        services = Services(
            connect=connect, relay=relay, emitter=emitter, observer=Metrics(), stop=Stop(ends=False), clock=at.clock
        )
        before = await self._epochs()
        try:
            async with self._work.started(services, at, self._acked, outside):
                await until(lambda: self._is_owned(before), "the worker owns every partition", PATIENCE_S)
                yield
                for proxy in proxies.values():
                    await asyncio.to_thread(proxy.refuse, True)
        finally:
            for connection in opened:
                connection.terminate()
            await _silenced(emitter)

    async def _epochs(self) -> Offsets:
        rows = await self.at.observer.fetch(
            "SELECT topic, partition, epoch FROM owners WHERE stage = $1", self._work.stage
        )
        return {(topic, partition): epoch for topic, partition, epoch in rows}

    async def _is_owned(self, before: Offsets) -> bool:
        now = await self._epochs()
        bumped = [key for key, epoch in now.items() if epoch > before.get(key, 0)]
        return len(bumped) == self._work.source.partitions and await self._is_idle()


async def _silenced(emitter: Emitter) -> None:
    """A producer whose process is gone: it sends nothing on, where `stop` would wait until it had."""
    producer: Any = emitter._producer
    if producer is not None:
        producer._sender.sender_task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await producer.stop()


def event_uid_of(record: Any) -> str:
    """As the inbox has it."""
    headers = dict(record.headers)
    return event_uid(headers["ce_source"].decode(), headers["ce_id"].decode())


async def _same(one: Any, other: Any) -> bool:
    return bool(one == other)
