"""Wallet creation at Circle by the real onboarding worker: killed at each boundary of a call, and with a partner that fails.

Afterwards Circle's own record, the database and what was told agree: one wallet per chain, one idempotency key per call.
The tests share one product, each with a customer of its own; the worker that finishes one test serves the next.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from aiokafka import AIOKafkaProducer

from connectors.circle.chains import from_circle
from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.gate import Fault
from ledger.rows import Connection
from ledger.verify import verify
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from stablerail.dev.processes import Child
from stablerail.dev.stack import Stack
from tests.support.in_process import read_topic, until
from tests.support.invariants import end_database
from tests.support.proxies import (
    Frame,
    Hold,
    HttpProxy,
    KafkaProxy,
    PostgresProxy,
    commit_after,
    http_request,
    produce,
)
from tests.support.rebuild import connect
from tests.support.story import WALLET_CHAINS
from tests.support.warm import WarmStack
from topics.catalog import JOURNAL, KYC_APPROVED, WALLETS_PROVISIONED, WALLETS_REQUESTED
from topics.envelope import value_of
from topics.events import KycApproved, WalletsProvisioned

pytestmark = pytest.mark.asyncio(loop_scope="module")

CREATE = "/v1/w3s/developer/wallets"
LEASE_S = 2.0
"""What a killed performer's lease keeps others waiting."""
BREAKER_FAILURES = 3
BREAKER_OPEN_S = 1.5
PATIENCE_S = 100.0


@dataclass(frozen=True)
class Asked:
    at_s: float
    body: dict[str, Any]
    """Without the ciphertext, which is new each time."""


@dataclass
class World:
    """The worker's surroundings: Circle, and a proxy before each thing it talks to."""

    stack: Stack
    circle: CircleSandbox
    postgres: PostgresProxy
    kafka: KafkaProxy
    http: HttpProxy
    observer: Connection
    producer: Any
    bootstrap: str
    prefix: str
    asked: list[Asked] = field(default_factory=list)
    """Every request for wallets that left a worker."""
    lines: int = 0

    def topic(self, name: str) -> str:
        return self.prefix + name

    async def worker(self) -> Child:
        """A worker that has its partitions: the one that runs, or a new one."""
        child = self.stack.children.get("onboarding")
        if child is None or child.returncode is not None:
            self.stack.start(("onboarding",))
            await self.stack.wait_ready(("onboarding",), PATIENCE_S)
        return self.stack.children["onboarding"]

    def begin(self) -> None:
        """A test's: what was late before it does not count."""
        self.lines = len(self._again())

    def again(self) -> int:
        """How often since then a worker has put a call off that Circle had not answered, or not in time: each is asked once more, and
        Circle has heard of it before or, where it was late even to say it, not. On a busy machine either may be late."""
        return len(self._again()) - self.lines

    def _again(self) -> list[str]:
        log = self.stack.directory / "onboarding.log"
        return [line for line in log.read_text().splitlines() if "call.again_later" in line] if log.exists() else []

    def was_asked(self, user: str, times: int) -> bool:
        """Circle has heard of the user so often, and of what was put off perhaps once more."""
        return times <= len(self.asked_for(user)) <= times + self.again()

    def asked_for(self, user: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.body["metadata"][0]["refId"] == user]

    def fail(self, **fault: Any) -> None:
        """The next calls for wallets meet this."""
        self.circle.sandbox.gate.faults.append(Fault(path=CREATE, **fault))

    async def approve(self, user: str, vendor_event: str) -> None:
        """A message in kyc.approved, as from a producer outside the project: its id is the vendor's event."""
        event = KycApproved(
            user_id=user,
            vendor="sumsub",
            applicant_id=user,
            vendor_event_id=f"{user}:{vendor_event}",
            approved_at="now",
        )
        await self.producer.send_and_wait(self.topic(KYC_APPROVED.name), value_of(event), key=user.encode())

    async def count(self, query: str, *arguments: Any) -> int:
        found: int = await self.observer.fetchval(query, *arguments)
        return found

    async def told(self) -> list[tuple[str, WalletsProvisioned]]:
        """(event id, event) of wallets.provisioned, repeats too."""
        records = await read_topic(self.bootstrap, WALLETS_PROVISIONED, self.prefix)
        return [(dict(r.headers)["ce_id"].decode(), WalletsProvisioned.model_validate_json(r.value)) for r in records]

    async def provisioned(self, user: str) -> dict[str, WalletsProvisioned]:
        """Waits for the news; it by event id."""

        async def found() -> dict[str, WalletsProvisioned]:
            return {event_id: event for event_id, event in await self.told() if event.user_id == user}

        news: dict[str, WalletsProvisioned] = await until(found, f"wallets.provisioned of {user}", PATIENCE_S)
        return news

    def at_circle(self) -> dict[str, dict[str, tuple[str, str]]]:
        """Circle's record: user -> chain -> (wallet id, address). Fails when a customer has two wallets on a chain."""
        found: dict[str, dict[str, tuple[str, str]]] = {}
        for wallet in self.circle.sandbox.state.wallets.values():
            chain = from_circle(wallet.blockchain, "testnet")
            assert chain is not None
            assert wallet.ref_id is not None
            assert chain.value not in found.setdefault(wallet.ref_id, {}), "a second wallet on a chain"
            found[wallet.ref_id][chain.value] = (wallet.id, wallet.address)
        return found

    async def in_database(self, user: str) -> dict[str, tuple[str, str]]:
        rows = await self.observer.fetch("SELECT chain, wallet_id, address FROM wallets WHERE user_id = $1", user)
        return {chain: (wallet_id, address) for chain, wallet_id, address in rows}

    async def calls(self, user: str, state: str = "%") -> int:
        query = "SELECT count(*) FROM calls WHERE request -> 'user_ids' ? $1 AND state LIKE $2"
        return await self.count(query, user, state)

    async def check(self, user: str) -> None:
        """Circle, the database and the news agree; whatever was asked, it was under one key with one body."""
        (news,) = (await self.provisioned(user)).values()
        at_circle = self.at_circle()[user]
        assert set(at_circle) == {chain.value for chain in WALLET_CHAINS}
        assert {w.chain.value: (w.wallet_id, w.address) for w in news.wallets} == at_circle
        assert await self.in_database(user) == at_circle
        assert len({json.dumps(asked.body, sort_keys=True) for asked in self.asked_for(user)}) == 1
        assert len(self.circle.sandbox.state.wallet_sets) == 1
        assert (await self.calls(user), await self.calls(user, "concluded")) == (1, 1)
        assert await self.count("SELECT count(*) FROM leases") == 0
        assert not [result for result in await verify(self.observer) if not result.holds]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(postgres: Postgres, kafka: Kafka, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    dsn = postgres.create_database(name)
    async with built(dsn, kafka.bootstrap, f"t{uuid.uuid4().hex[:10]}.", tmp_path_factory.mktemp("calls")) as it:
        yield it
    end_database(postgres, name)


@asynccontextmanager
async def built(dsn: str, bootstrap: str, prefix: str, directory: Path) -> AsyncIterator[World]:
    server, broker = urlsplit(dsn), urlsplit(f"//{bootstrap}")
    assert server.hostname
    assert server.port
    assert broker.hostname
    assert broker.port
    async with AsyncExitStack() as stack:
        circle = await stack.enter_async_context(CircleSandbox(SandboxConfig(rate_limits=False)))
        circle_port = urlsplit(circle.base_url).port
        assert circle_port
        postgres = stack.enter_context(PostgresProxy(server.hostname, server.port))
        kafka = stack.enter_context(KafkaProxy(broker.hostname, broker.port))
        http = stack.enter_context(HttpProxy("127.0.0.1", circle_port))
        through = server._replace(netloc=f"{server.netloc.rpartition('@')[0]}@{postgres.address}").geturl()
        settings = {
            "STABLERAIL_TOPIC_PREFIX": prefix,
            "STABLERAIL_CIRCLE_API_URL": http.url,
            "STABLERAIL_CALL_TIMEOUT_S": "1.5",
            "STABLERAIL_CALL_LEASE_S": str(LEASE_S),
            "STABLERAIL_CALL_POLL_INTERVAL_S": "0.1",
            "STABLERAIL_CALL_RETRY_FIRST_S": "0.1",
            "STABLERAIL_CALL_MEMBERS_MAX": "1",
            "STABLERAIL_CALL_RATE_PER_S": "50",
            "STABLERAIL_BREAKER_FAILURES_MAX": str(BREAKER_FAILURES),
            "STABLERAIL_BREAKER_OPEN_S": str(BREAKER_OPEN_S),
            "STABLERAIL_KAFKA_SESSION_TIMEOUT_S": "2",
        }
        parts = {"STABLERAIL_KAFKA_BOOTSTRAP": bootstrap, "STABLERAIL_DATABASE_URL": dsn}
        product = WarmStack(directory, parts, settings=settings)
        await product.prepare()
        product.environment["STABLERAIL_DATABASE_URL"] = through
        product.environment["STABLERAIL_KAFKA_BOOTSTRAP"] = kafka.address
        producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all")
        await producer.start()
        stack.push_async_callback(producer.stop)
        observer = await connect(dsn, "stablerail")
        stack.push_async_callback(observer.close)
        stack.push_async_callback(asyncio.to_thread, product.stop)
        it = World(product, circle, postgres, kafka, http, observer, producer, bootstrap, prefix)
        http.hold(recorder(it.asked))
        yield it


def recorder(into: list[Asked]) -> Callable[[Frame], bool]:
    """A match that holds nothing and keeps what was asked."""
    is_create = http_request("POST", CREATE)

    def look(frame: Frame) -> bool:
        if is_create(frame):
            body = json.loads(frame.raw.partition(b"\r\n\r\n")[2])
            del body["entitySecretCiphertext"]
            into.append(Asked(frame.at_s, body))
        return False

    return look


@dataclass(frozen=True)
class Boundary:
    """Where the worker is killed, and what must be true there."""

    hold: Callable[[World], Hold]
    calls: int
    """Calls in the database."""
    asked: int
    """Requests that left the worker."""
    acted: bool
    """Whether Circle has made the wallets."""
    concluded: bool
    requests: int
    """How often Circle is asked in the end."""


def at_circle(where: Any) -> Callable[[World], Hold]:
    """Whatever is asked until the kill: on a busy machine the worker may ask again before it."""
    return lambda w: w.http.hold(http_request("POST", CREATE), where, and_later=True)


def at_commit(text: str, where: Any) -> Callable[[World], Hold]:
    return lambda w: w.postgres.hold(commit_after(text), where)


BOUNDARIES = {
    "after the event's commit, which the worker was not told of": Boundary(
        at_commit("INSERT INTO call_members", "reply"), calls=0, asked=0, acted=False, concluded=False, requests=1
    ),
    "after the intent's commit, which the worker was not told of": Boundary(
        at_commit("INSERT INTO calls", "reply"), calls=1, asked=0, acted=False, concluded=False, requests=1
    ),
    "after the intent, before Circle heard of it": Boundary(
        at_circle("request"), calls=1, asked=1, acted=False, concluded=False, requests=1
    ),
    "after Circle acted, without its reply": Boundary(
        at_circle("reply"), calls=1, asked=1, acted=True, concluded=False, requests=2
    ),
    "after Circle's reply, before the conclusion's commit": Boundary(
        at_commit("INSERT INTO wallets", "request"), calls=1, asked=1, acted=True, concluded=False, requests=2
    ),
    "after the conclusion's commit, which the worker was not told of": Boundary(
        at_commit("INSERT INTO wallets", "reply"), calls=1, asked=1, acted=True, concluded=True, requests=1
    ),
    "after the conclusion, before it was told": Boundary(
        lambda w: w.kafka.hold(produce(w.topic(WALLETS_PROVISIONED.name))),
        calls=1, asked=1, acted=True, concluded=True, requests=1,
    ),
    "after it was told, without the broker's ack": Boundary(
        lambda w: w.kafka.hold(produce(w.topic(WALLETS_PROVISIONED.name)), "reply"),
        calls=1, asked=1, acted=True, concluded=True, requests=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("boundary", BOUNDARIES.values(), ids=BOUNDARIES.keys())
async def test_a_worker_killed_there_leaves_one_set_of_wallets(
    world: World, boundary: Boundary, request: pytest.FixtureRequest
) -> None:
    user = f"killed-{list(BOUNDARIES).index(request.node.callspec.id)}"
    worker = await world.worker()
    world.begin()
    heard = world.circle.sandbox.gate.calls[f"POST {CREATE}"]
    hold = boundary.hold(world)
    await world.approve(user, "review-1")
    await hold.wait_hit_async(PATIENCE_S)
    worker.kill()
    assert not hold.release()
    await world.observer.execute("BEGIN; LOCK TABLE wallets, calls; COMMIT")  # until its transactions have ended
    assert await world.calls(user) == boundary.calls
    assert world.was_asked(user, boundary.asked)
    assert (user in world.at_circle()) == boundary.acted
    assert len(await world.in_database(user)) == (4 if boundary.concluded else 0)
    if boundary.concluded:  # the sweeper finishes what a performer left half a minute ago
        await world.observer.execute("UPDATE outbox SET at = at - interval '1 minute'")

    await world.worker()
    await world.check(user)
    lost = boundary.asked if not boundary.acted else 0
    assert world.was_asked(user, boundary.requests + lost)
    calls = world.circle.sandbox.gate.calls[f"POST {CREATE}"] - heard
    assert boundary.requests <= calls <= boundary.requests + world.again()


async def test_nobody_is_called_before_the_intent_is_in_the_journal(world: World) -> None:
    user = "early"
    worker = await world.worker()
    world.begin()
    intent = world.postgres.hold(commit_after("INSERT INTO calls"))
    await world.approve(user, "review-1")
    await intent.wait_hit_async(PATIENCE_S)
    journal = world.kafka.hold(produce(world.topic(JOURNAL.name)))  # the next record is the intent's
    assert intent.release()
    await journal.wait_hit_async(PATIENCE_S)

    async def taken() -> bool:
        return await world.count("SELECT count(*) FROM leases") == 1

    await until(taken, "a performer has taken the call")
    await asyncio.sleep(0.5)  # five times as long as a performer waits between two looks
    worker.kill()
    assert not journal.release()
    assert world.asked_for(user) == []

    await world.worker()
    await world.check(user)
    assert world.was_asked(user, 1)


async def test_an_approval_told_again_and_by_another_event_makes_one_call(world: World) -> None:
    user = "twice"
    await world.worker()
    world.begin()
    settled = "SELECT count(*) FROM inbox WHERE stage = 'request_wallets'"
    before = await world.count(settled)
    for vendor_event in ("review-1", "review-1", "review-2", "review-3"):
        await world.approve(user, vendor_event)

    async def all_settled() -> bool:
        return await world.count(settled) == before + 3

    await until(all_settled, "the approvals are settled", PATIENCE_S)
    await world.check(user)
    assert world.was_asked(user, 1)
    records = await read_topic(world.bootstrap, WALLETS_REQUESTED, world.prefix)
    assert [record.key for record in records].count(user.encode()) == 1


FAULTS: dict[str, dict[str, Any]] = {
    "500 before it acted": {"kind": "status", "status": 500},
    "500 after it acted": {"kind": "status", "status": 500, "acts": True},
    "429": {"kind": "status", "status": 429},
    "no answer": {"kind": "hang"},
    "a lost reply": {"kind": "lost_reply"},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
async def test_a_call_that_failed_is_made_again_as_it_was(
    world: World, fault: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    user = f"failed-{list(FAULTS).index(request.node.callspec.id)}"
    await world.worker()
    world.begin()
    world.fail(**fault)
    await world.approve(user, "review-1")
    await world.check(user)
    assert world.was_asked(user, 1)
    assert len(world.asked_for(user)) >= 2


async def test_a_definite_refusal_is_a_dead_letter_per_chain_and_the_next_customer_is_served(world: World) -> None:
    await world.worker()
    world.begin()
    world.circle.sandbox.state.refused = {"refused"}
    await world.approve("refused", "review-1")

    async def letters() -> Any:
        found = await read_topic(world.bootstrap, WALLETS_REQUESTED.dlq, world.prefix)
        mine = [dict(each.headers) for each in found if json.loads(each.value)["user_id"] == "refused"]
        return len(mine) == len(WALLET_CHAINS) and mine

    for headers in await until(letters, "the dead letters", PATIENCE_S):
        assert (headers["dlq_code"], headers["dlq_stage"]) == (b"partner_refused", b"provision_wallets")
    assert world.was_asked("refused", 7)  # all chains, their halves, each alone
    assert await world.calls("refused", "concluded") == len(WALLET_CHAINS)
    assert "refused" not in world.at_circle()
    assert await world.in_database("refused") == {}

    world.begin()
    await world.approve("served", "review-1")
    await world.check("served")
    assert world.was_asked("served", 1)


async def test_a_partner_that_keeps_failing_is_left_alone_for_a_while(world: World) -> None:
    user = "patient"
    await world.worker()
    world.begin()
    world.fail(kind="status", status=503, times=BREAKER_FAILURES)
    await world.approve(user, "review-1")
    await world.check(user)
    times_s = [asked.at_s for asked in world.asked_for(user)]
    assert BREAKER_FAILURES < len(times_s) <= 1 + world.again()
    assert times_s[-1] - times_s[-2] >= BREAKER_OPEN_S - 0.1
