"""Kafka, PostgreSQL and Circle away while deposits arrive: every deposit is credited once, and the ledger holds.

On a broker and a server of this file's own, which are stopped as a machine stops them. The deposits come the real way:
Circle's sandbox signs and sends webhooks, again and again until the bridge takes them. The worker of deposits reaches Kafka
through a proxy, so that a test can kill it between its commit and what it publishes; its traces, and the bridge's, go to a
collector of ours.
"""

from __future__ import annotations

import asyncio
import re
import signal
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from stablerail.dev.processes import tail
from stablerail.dev.stack import Stack
from stablerail.dev.usdc import Usdc
from tests.support.collector import Collector, Told, collector
from tests.support.proxies import KafkaProxy, produce
from tests.support.story import Story, message, parts_environment, report, until
from tests.support.warm import WarmStack
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_NOTIFIED
from topics.events import Chain

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

OUTAGE_S = 20.0
"""How long Kafka is away, at least."""
PROGRAMS = ("bridge", "onboarding", "deposits")
FIVE = 5_000_000


@dataclass
class Town:
    """The product, its vendor, and the parts that a test may stop."""

    story: Story
    kafka: Kafka
    postgres: Postgres
    proxy: KafkaProxy
    collector: Collector
    user: str = ""
    address: str = ""
    sent: int = 0

    @property
    def stack(self) -> Stack:
        return self.story.stack

    async def pay(self) -> dict[str, Any]:
        """One more deposit of five dollars to the customer, which Circle tells by webhook until it is taken."""
        self.sent += 1
        transfer: dict[str, Any] = await self.story.inject(Chain.SOL, self.address, "5", "CONFIRMED")
        return transfer

    async def webhooks(self, outcome: str) -> float:
        """How many of Circle's webhooks ended so at the bridge."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.stack.url('bridge')}/metrics") as answer:
            text = await answer.text()
        found = re.findall(rf'^stablerail_webhooks_total{{.*outcome="{outcome}",vendor="circle"}} (\S+)', text, re.M)
        return sum(map(float, found))

    async def all_credited(self) -> None:
        """Until every deposit is credited; then each is there once, told once, and the ledger holds."""

        async def credited() -> bool:
            return await self.story.balance(self.user) == FIVE * self.sent

        await until(credited, f"{self.sent} credits")
        rows = await self.story.deposits(self.address)
        assert rows == [("credited", FIVE, 0, 1)] * self.sent

        async def told() -> bool:
            events = [event for _, event in await self.story.events(DEPOSITS_CREDITED)]
            return len({event["transaction_id"] for event in events if event["to"] == self.address}) == self.sent

        await until(told, "everything is told")

    async def verified(self) -> None:
        code, printed = await self.story.command("verify", "ledger")
        assert code == 0, printed.decode()

    def start_deposits(self) -> None:
        self.stack.start(["deposits"], {"STABLERAIL_KAFKA_BOOTSTRAP": self.proxy.address})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def town(tools: Tools, scratch: Path, anvil: Anvil, usdc: Usdc) -> AsyncIterator[Town]:
    directory, name = scratch / "outages", "outages"
    with Kafka(directory / "kafka", tools) as kafka, Postgres(directory / "postgres", tools) as postgres:
        host, port = kafka.bootstrap.split(":")
        with KafkaProxy(host, int(port)) as proxy:
            async with collector() as told:
                dsn = postgres.create_database(name)
                parts = {
                    **parts_environment(kafka, anvil, usdc),
                    "STABLERAIL_DATABASE_URL": dsn,
                    "STABLERAIL_TOPIC_PREFIX": f"{name}.",
                }
                settings = {
                    "STABLERAIL_OTLP_TRACES_URL": told.url,
                    "OTEL_BSP_SCHEDULE_DELAY": "100",
                    "STABLERAIL_CALL_TIMEOUT_S": "1",
                    "STABLERAIL_CALL_LEASE_S": "2",
                    "STABLERAIL_CALL_RETRY_FIRST_S": "200ms",
                    "STABLERAIL_CALL_RETRY_MAX_S": "1",
                    "STABLERAIL_CALL_ATTEMPTS_MAX": "100",  # no call is given up while Circle is away
                    "STABLERAIL_BREAKER_OPEN_S": "1",
                }
                stack = WarmStack(directory / "stack", parts, settings=settings)
                made = Town(Story(stack, usdc, dsn, kafka.bootstrap, f"{name}."), kafka, postgres, proxy, told)
                try:
                    await stack.prepare()
                    stack.start_sandboxes()
                    stack.start(["bridge", "onboarding"])
                    made.start_deposits()
                    await stack.wait_ready(PROGRAMS)
                    await asyncio.to_thread(stack.wait_listening, ("circle", "sumsub"))
                    await stack.subscribe()
                    made.user, addresses = await made.story.customer()
                    made.address = addresses["SOL"]
                    yield made
                finally:
                    await asyncio.to_thread(stack.stop)


def chain_of(spans: list[Told]) -> list[Told]:
    """From the root on, each the parent of the next."""
    by_parent = {span.parent_id: span for span in spans}
    found, last = [], ""
    while last in by_parent:
        found.append(by_parent[last])
        last = found[-1].span_id
    return found


async def credit_of(town: Town, transfer: dict[str, Any]) -> str:
    """The traceparent of the credit's message."""

    async def told() -> str:
        for record, event in await town.story.events(DEPOSITS_CREDITED):
            if event["tx_hash"] == transfer["txHash"]:
                return dict(record.headers)["traceparent"].decode()
        return ""

    return await until(told, "the credit is told")


async def assert_one_trace(town: Town, transfer: dict[str, Any]) -> None:
    """Webhook, then credit, in one trace that the last message carries on."""
    _, trace_id, span_id, _ = (await credit_of(town, transfer)).split("-")

    async def whole() -> list[Told]:
        spans = chain_of(list({span.span_id: span for span in town.collector.of(trace_id)}.values()))
        return spans if len(spans) == 2 else []

    webhook, credit = await until(whole, "both spans are at the collector")
    assert (webhook.service, webhook.name) == ("stablerail-bridge", "webhook circle")
    assert webhook.attributes["webhook.outcome"] == "published"
    assert (credit.service, credit.name) == ("stablerail-deposits", "credit_deposits deposits.credited")
    assert credit.attributes["messaging.destination.name"] == DEPOSITS_CREDITED.name
    assert credit.span_id == span_id
    assert webhook.started_ns <= credit.started_ns <= credit.ended_ns
    [record] = [
        record
        for record, event in await town.story.events(DEPOSITS_NOTIFIED)
        if event["tx_hash"] == transfer["txHash"] and event["evidence"] == "confirmed"
    ]
    assert dict(record.headers)["traceparent"] == f"00-{trace_id}-{webhook.span_id}-01".encode()


async def test_a_webhook_and_its_credit_are_one_trace(town: Town) -> None:
    transfer = await town.pay()
    await town.all_credited()
    await assert_one_trace(town, transfer)


async def test_a_trace_survives_a_crash_between_the_commit_and_what_it_publishes(town: Town) -> None:
    hold = town.proxy.hold(produce(DEPOSITS_CREDITED.named(town.story.prefix)), "request")
    transfer = await town.pay()
    await hold.wait_hit_async()
    assert await town.story.balance(town.user) == FIVE * town.sent, "it is committed, and nobody was told"
    town.stack.children["deposits"].kill()
    assert not hold.release()
    town.start_deposits()
    await town.all_credited()
    await assert_one_trace(town, transfer)


async def test_the_way_of_a_webhook_into_the_ledger_is_measured(town: Town) -> None:
    before = await town.webhooks("published")
    await town.pay()
    await town.all_credited()
    async with aiohttp.ClientSession() as session, session.get(f"{town.stack.url('deposits')}/metrics") as answer:
        metrics = await answer.text()
    value = dict(re.findall(r"^(stablerail_\S+) (\S+)$", metrics, re.M))
    credited = float(value['stablerail_deposits_total{outcome="credited",source="circle"}'])
    assert credited >= 1
    assert float(value["stablerail_webhook_to_ledger_seconds_count"]) == credited

    async def counted() -> bool:  # the bridge counts what it has published when it has been told so
        return await town.webhooks("published") > before

    await until(counted, "the webhook is counted")
    # perhaps more than once: Circle sends again what a busy bridge answers late
    body = b'{"notificationType": "transactions.inbound"}'
    headers = {"X-Circle-Signature": "AAAA", "X-Circle-Key-Id": str(uuid.uuid4())}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{town.stack.url('bridge')}/webhooks/circle", data=body, headers=headers) as refused,
    ):
        assert refused.status == 401
    assert await town.webhooks("refused") == 1


async def test_kafka_away_while_deposits_arrive(town: Town) -> None:
    """503 to Circle, which sends again; what was committed is told when Kafka is back."""
    hold = town.proxy.hold(produce(DEPOSITS_CREDITED.named(town.story.prefix)), "request")
    await town.pay()
    await hold.wait_hit_async()  # committed, about to be published
    refused = await town.webhooks("unavailable")
    await asyncio.to_thread(town.kafka.stop)
    away = asyncio.get_running_loop().time()
    hold.drop()  # the worker's producer finds nobody to send it to
    for _ in range(5):
        await town.pay()

    async def felt() -> bool:
        long = asyncio.get_running_loop().time() - away >= OUTAGE_S
        return long and await town.webhooks("unavailable") >= refused + 5

    await until(felt, "the bridge has refused all of them")
    assert town.stack.children["deposits"].returncode is None
    await asyncio.to_thread(town.kafka.start)
    await town.all_credited()
    await town.verified()


async def test_postgresql_stopped_at_once_while_deposits_arrive(town: Town) -> None:
    log = town.stack.children["deposits"].log
    before = town.sent
    await asyncio.gather(*(town.pay() for _ in range(15)))

    async def some() -> bool:
        return len(await town.story.deposits(town.address)) > before

    await until(some, "the first of them is credited")
    await asyncio.to_thread(town.postgres.stop_immediately)
    await asyncio.gather(*(town.pay() for _ in range(10)))

    async def felt() -> bool:
        assert town.stack.children["deposits"].returncode is None, tail(log)
        return "database.retry" in log.read_text()

    await until(felt, "the worker waits for its database")
    await asyncio.to_thread(town.postgres.start)
    await town.all_credited()
    await town.verified()
    assert town.stack.children["deposits"].returncode is None


async def test_circle_away_delays_wallets_and_no_deposit(town: Town) -> None:
    """A customer's wallets are asked for until they come, once; whoever else tells of deposits is heard."""
    story, circle = town.story, town.stack.children["circle"]
    user = f"user-{uuid.uuid4().hex[:12]}"
    circle.send_signal(signal.SIGSTOP)
    try:
        await town.stack.approve(user)

        async def asked_again() -> bool:
            sql = "SELECT 1 FROM calls c JOIN leases l ON l.call_id = c.id WHERE c.state = 'open' AND l.attempts > 1"
            return bool(await story.rows(sql))

        await until(asked_again, "Circle is asked more than once")
        others = report(town.address, chain="SOL", tx_hash="5" * 88, amount="5.00")
        await story.produce(DEPOSITS_NOTIFIED, message(town.address, others))
        town.sent += 1
        await town.all_credited()
    finally:
        circle.send_signal(signal.SIGCONT)

    async def has_wallets() -> bool:
        return len(await story.rows("SELECT 1 FROM wallets WHERE user_id = $1", user)) == 4

    await until(has_wallets, "the wallets")
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{town.stack.url('circle')}/_control/created") as answer,
    ):
        created = (await answer.json())["wallets"]
    assert len([wallet for wallet in created if wallet.get("refId") == user]) == 4
