"""Stages on a real PostgreSQL: a migrated database per test, a small stage, a broker with memory, and workers to crash.

A module takes the fixtures it needs by name: `databases, dsn = ledger_rig.databases, ledger_rig.dsn`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from aiokafka.errors import KafkaError
from structlog.testing import capture_logs

from agents.crash import Stop
from agents.delivery import Delivery
from agents.intake import Delivered
from agents.item import Item, read_item
from agents.outcome import Done, Emit, Outcome, Rejected, Retry, Stage
from agents.services import Services
from ledger.accounts import Account, AccountType, buffer, spendable
from ledger.commit import claim_owners
from ledger.journal import Relay
from ledger.posting import Transaction, credit, debit
from ledger.record import Message, unpack
from ledger.rows import Connection, write
from ledger.tables import APPEND_ONLY, JOURNALED
from ledger.verify import VIEWS, verify
from stablerail.config import load_settings
from stablerail.connections import connector
from stablerail.dev.postgres import Postgres
from stablerail.metrics import Metrics
from tests.support.invariants import end_database, may_break
from tests.support.migrated import template_of
from topics.catalog import Topic
from topics.envelope import Received, headers_of, value_of
from topics.events import Event, Text

AT = datetime(2026, 7, 1, 12, tzinfo=UTC)
WAIT_S = 100.0


async def until(condition: Callable[[], Any], what: str = "it", timeout_s: float = WAIT_S) -> None:
    """Waits for the condition. AssertionError when it does not come true."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"{what} did not happen within {timeout_s} s"
        await asyncio.sleep(0.01)


# -- databases ---------------------------------------------------------------------------------------------------------


@contextmanager
def database_of(postgres: Postgres) -> Iterator[str]:
    """A migrated database, whose invariants hold at the end."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    with ThreadPoolExecutor(1) as pool:
        template = pool.submit(asyncio.run, template_of(postgres.dsn)).result()
    yield postgres.create_database(name, template=template)
    end_database(postgres, name)


@pytest.fixture
def databases(postgres: Postgres, request: pytest.FixtureRequest) -> Iterator[Callable[[], str]]:
    """Makes migrated databases; they go with the test."""
    made_up: str = getattr(request.module, "ROWS_ARE_MADE_UP", "")

    def make() -> str:
        dsn = made.enter_context(database_of(postgres))
        if made_up:
            may_break(dsn, made_up)
        return dsn

    with ExitStack() as made:
        yield make


@pytest.fixture
def dsn(databases: Callable[[], str]) -> str:
    """A migrated database of this test."""
    return databases()


def connect_to(dsn: str, *, lock_timeout_s: float = 10.0, **server: str) -> Callable[[], Any]:
    """The product's own way to connect, but a test's process that stands still loses no transaction."""
    settings = load_settings(
        env_file=None, database_url=dsn, database_lock_timeout_s=lock_timeout_s, database_idle_timeout_s=WAIT_S
    )
    return connector(settings, **server)


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[Connection]:
    made: Connection = await connect_to(dsn)()
    yield made
    await made.close()


async def owner(dsn: str) -> Connection:
    """A connection as the owner of every table, without the application's role."""
    connection: Connection = await asyncpg.connect(dsn, server_settings={"search_path": "stablerail", "jit": "off"})
    return connection


async def unguard(connection: Connection) -> None:
    """What the owner must do before it can edit rows of the append-only tables."""
    for table in APPEND_ONLY:
        await connection.execute(f"ALTER TABLE {table.name} DISABLE TRIGGER append_only")


def records_read(monkeypatch: pytest.MonkeyPatch, query: str) -> list[list[bytes]]:
    """The records of each answer to it from now on."""
    fetch = asyncpg.Connection.fetch
    read: list[list[bytes]] = []

    async def watched(self: Any, asked: str, *args: Any) -> Any:
        rows = await fetch(self, asked, *args)
        if asked == query:
            read.append([row["record"] for row in rows])
        return rows

    monkeypatch.setattr(asyncpg.Connection, "fetch", watched)
    return read


async def dump(connection: Connection) -> dict[str, list[str]]:
    """Every journaled table's rows, as text, sorted."""
    return {
        table.name: [row[0] for row in await connection.fetch(f"SELECT t::text FROM {table.name} t ORDER BY 1")]
        for table in JOURNALED
    }


def differences(one: dict[str, list[str]], other: dict[str, list[str]]) -> dict[str, set[str]]:
    """Table -> rows that only one of two dumps has."""
    return {name: found for name in one if (found := set(one[name]) ^ set(other[name]))}


async def rebuild(connection: Connection, records: Sequence[tuple[int, bytes]]) -> None:
    """What a rebuild does: each record once, in the journal's order."""
    done: set[int] = set()
    for seq, packed in records:
        if seq not in done:
            done.add(seq)
            record = unpack(packed)
            async with connection.transaction():
                await write(connection, [*record.blocks, *record.proof])


async def assert_holds(connection: Connection, *, emitted: bool = False) -> None:
    """Every invariant; those of ages (records, deposits, what drains) only where `emitted`: the rig's time is long ago, and
    nobody relays what `settle` alone commits."""
    ages = {invariant.number for invariant in VIEWS if invariant.ages}
    broken = [
        result for result in await verify(connection) if not result.holds and (emitted or result.number not in ages)
    ]
    assert broken == []


# -- a stage ------------------------------------------------------------------------------------------------------------


class Moved(Event):
    """What is to be done with a user's money; what was done with it."""

    type = "test.moves"
    user: Text
    amount: int
    move: Text
    note: str = ""

    def identity(self) -> str:
        return f"{self.user}:{self.amount}:{self.move}"


MOVES = Topic("test.moves", key="user", models=(Moved,))
TOLD = Topic("test.told", key="user", models=(Moved,))
POOL = Account("system", AccountType.SUSPENSE_USDC)


@dataclass
class Seen:
    """Facts: the users of the batch's decisions so far."""

    users: list[str] = field(default_factory=list)


def decide(received: Received, seen: Seen) -> Outcome:
    event = received.event
    assert isinstance(event, Moved)
    # how many decisions of this batch it has seen, so that a test can tell that it was decided again
    told = Moved(user=event.user, amount=len(seen.users), move="told", note=event.note)
    emits = (Emit(TOLD, event.user, told, f"{received.id}/told"),)
    key = uuid.uuid5(uuid.NAMESPACE_OID, f"{received.source}/{received.id}").hex
    user = spendable(event.user)
    match event.move:
        case "credit":
            legs = (debit(user, event.amount), credit(POOL, event.amount))
            return Done(postings=(Transaction(key, "test", key, legs),), emits=emits)
        case "spend":
            legs = (debit(POOL, event.amount), credit(user, event.amount))
            refused = Rejected("insufficient_funds", "spent already")
            return Done(postings=(Transaction(key, "test", key, legs),), emits=emits, if_refused=refused)
        case "spend_plainly":
            legs = (debit(POOL, event.amount), credit(user, event.amount))
            return Done(postings=(Transaction(key, "test", key, legs),), emits=emits)
        case "cross":
            other = spendable(event.note)
            legs = (debit(user, event.amount), debit(other, event.amount), credit(buffer(), 2 * event.amount))
            return Done(postings=(Transaction(key, "test", key, legs),), emits=emits)
        case "refuse":
            return Rejected("unwanted", "as asked")
        case "retry" if received.attempt <= event.amount:
            return Retry("not_yet", 0.0)
        case "crash":
            raise ZeroDivisionError("a bug")
    return Done(emits=emits)


def fold(seen: Seen, done: Done) -> None:
    seen.users += [emit.key for emit in done.emits]


async def load(_connection: Connection, _events: Sequence[Received], _prepared: Any, _at: datetime) -> Seen:
    return Seen()


STAGE: Stage[Seen] = Stage("test_stage", MOVES, load, decide, fold)
ORDERED = replace(STAGE, ordered=True)


def record(
    offset: int,
    user: str = "ada",
    amount: int = 1,
    move: str = "credit",
    *,
    note: str = "",
    id: str | None = None,
    partition: int = 0,
    attempt: int = 1,
    value: bytes | None = None,
    headers: list[tuple[str, bytes]] | None = None,
) -> Any:
    """A raw Kafka record of MOVES. Its id is its place, unless one is given."""
    event = Moved(user=user, amount=amount, move=move, note=note)
    own = headers_of(event.ce_type(), event_id=id or f"{partition}/{offset}", source="test", time=AT)
    return SimpleNamespace(
        topic=MOVES.name,
        partition=partition,
        offset=offset,
        timestamp=int(AT.timestamp() * 1000) + offset,
        key=user.encode(),
        value=value_of(event) if value is None else value,
        headers=headers if headers is not None else [*own, ("attempt", str(attempt).encode())],
    )


def items(*records: Any, stage: Stage[Any] = STAGE) -> list[Item]:
    return [read_item(stage, one) for one in records]


async def own(connection: Connection, *partitions: int, stage: str = STAGE.name) -> dict[tuple[str, int], int]:
    """Makes the connection's caller the owner; the epochs."""
    async with connection.transaction():
        epochs, _ = await claim_owners(connection, stage, [(MOVES.name, p) for p in partitions or (0,)], AT)
    return epochs


async def balance(connection: Connection, account: Account) -> int | None:
    found: str | None = await connection.fetchval("SELECT balance::text FROM accounts WHERE id = $1", account.id)
    return None if found is None else int(found)


# -- workers ------------------------------------------------------------------------------------------------------------


class FakeEmitter:
    """Kafka's producer as the rig sees it: keeps what it got, in order; may be away, may be closed for a while."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.journaled: list[tuple[int, bytes]] = []
        self.failures = 0
        """The next so many journal calls fail after having sent, as a lost answer does."""
        self.gate = asyncio.Event()
        self.gate.set()

    async def emit(self, messages: Sequence[Message], _source: str, _at: datetime) -> None:
        if messages:
            await self.gate.wait()
            assert self.journaled, "nothing is told before it is journaled"
            self.messages += messages

    async def journal(self, records: Sequence[tuple[int, bytes]], _untold: int) -> None:
        self.journaled += records
        await asyncio.sleep(0)
        if self.failures:
            self.failures -= 1
            raise KafkaError("no answer")

    def told(self) -> list[tuple[str, str]]:
        """(topic, event id or dead-letter code) of every message, in order."""
        return [(m.topic, m.id or dict(m.headers or ())["dlq_code"].decode()) for m in self.messages]


@pytest.fixture(scope="module")
def filled(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[str]:
    """A database that the module's `fill` has filled, for all of its tests."""
    with database_of(postgres) as dsn:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, request.module.fill(dsn)).result()
        yield dsn


@pytest.fixture
async def books(filled: str) -> AsyncIterator[Connection]:
    """The filled books as whoever owns the database can edit them; nothing of it stays."""
    connection = await owner(filled)
    transaction = connection.transaction(isolation="repeatable_read")
    await transaction.start()
    await unguard(connection)
    yield connection
    await transaction.rollback()
    await connection.close()


async def broken(connection: Connection) -> set[int]:
    """Numbers of the invariants that do not hold."""
    return {result.number for result in await verify(connection) if not result.holds}


@dataclass
class Worker:
    """A Delivery that runs, and what it acknowledged: (partition, last offset)."""

    delivery: Delivery
    services: Services
    task: asyncio.Task[None]
    acked: list[tuple[int, int]] = field(default_factory=list)

    async def feed(self, *records: Any) -> None:
        """Offers the records, those of one partition in a row as one run."""
        run: list[Any] = []
        for one in records:
            if run and run[-1].partition != one.partition:
                await self._offer(run)
                run = []
            run.append(one)
        await self._offer(run)

    async def _offer(self, records: list[Any]) -> None:
        last = records[-1]
        run = SimpleNamespace(topic=last.topic, partition=last.partition, records=list(records))
        await self.delivery.offer(Delivered(run, lambda: self.acked.append((last.partition, last.offset))))

    async def until_acked(self, *places: tuple[int, int]) -> None:
        await until(lambda: set(places) <= set(self.acked), f"the acknowledgement of {places}")

    async def until_stopped(self) -> str:
        await until(lambda: self.services.stop.stopping, "the stop")
        assert self.services.stop.reason is not None
        return self.services.stop.reason

    def count(self, outcome: str) -> int:
        name = {"stage": self.delivery.stage.name, "outcome": outcome}
        observer: Any = self.services.observer
        return int(observer.registry.get_sample_value("stablerail_stage_events_total", name) or 0)

    async def end(self) -> None:
        """As a kill: what is in hand stays undone."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.services.relay._disconnect()
        if self.delivery._connection is not None:
            self.delivery._connection.terminate()


@dataclass
class Bench:
    """Workers of one database. They share the emitter unless they are given one."""

    dsn: str
    connection: Connection
    emitter: FakeEmitter
    workers: list[Worker] = field(default_factory=list)

    async def start(
        self,
        *partitions: int,
        stage: Stage[Any] = STAGE,
        lock_timeout_s: float = 10.0,
        emitter: Any = None,
        **changes: Any,
    ) -> Worker:
        connect = connect_to(self.dsn, lock_timeout_s=lock_timeout_s)
        broker = emitter or self.emitter
        relay = Relay(connect_to(self.dsn, synchronous_commit="off"), broker.journal, (KafkaError,))
        services = Services(
            connect=connect, relay=relay, emitter=broker, observer=Metrics(), stop=Stop(ends=False), **changes
        )
        delivery = Delivery(stage, services)
        worker = Worker(delivery, services, asyncio.create_task(delivery.work()))
        self.workers.append(worker)
        delivery.assigned({(MOVES.name, p) for p in partitions or (0,)})
        return worker

    async def outcomes(self) -> list[str]:
        rows = await self.connection.fetch("SELECT outcome FROM inbox ORDER BY at, outcome")
        return [row[0] for row in rows]


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    """Workers of this test's database; none is left running. Its connection is the owner's: it sees who waits for whom."""
    made = Bench(dsn, await owner(dsn), FakeEmitter())
    with capture_logs():  # rendering a traceback for people takes seconds
        yield made
        for worker in made.workers:
            await worker.end()
    await made.connection.close()
