"""Circle Mint's deposits whose notifications never come are found in its list: once, whatever else tells of them and whoever dies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr

from agents.deposits import credit_deposits
from agents.deposits.credit_deposits import DepositPolicy
from agents.deposits.poll_circle import MINT, PollCircle, Polled
from agents.services import Services
from agents.sweeper import ABANDONED_S, Sweeper
from connectors.circle.client import CircleClient, MintClient
from connectors.circle.mint_webhooks import translate
from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.gate import Fault
from connectors.circle.sandbox.mint import TOPIC_ARNS, Topic
from connectors.errors import Unknown
from connectors.webhooks.source import Publish
from ledger.accounts import spendable
from ledger.verify import verify
from stablerail.config import load_settings
from stablerail.dev.kafka import Kafka
from stablerail.dev.processes import free_port
from stablerail.metrics import Metrics
from stablerail.wiring import build
from tests.support.in_process import Ground, ground, running, until
from tests.support.ledger_rig import balance
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_FINALIZED, DEPOSITS_NOTIFIED, WEBHOOKS_DLQ
from topics.envelope import headers_of, value_of

LIST = "/v1/businessAccount/transfers"
ADA = "ada"
TO = "0x8381470ed67c3802402dbbfa0058e8871f017a6f"

Transfer = dict[str, Any]


@dataclass
class Town:
    """Circle Mint, an address of Ada's there on ETH, which we do not read, and the ground that our processes stand on."""

    at: Ground
    circle: CircleSandbox
    client: MintClient
    polled: Polled = field(default_factory=lambda: Polled("testnet", {}, interval_s=0.05, product=MINT))

    def sent(self, amount: str = "25.00", status: str = "complete", **fields: Any) -> Transfer:
        """Somebody pays Ada; no subscription: nobody is notified."""
        return self.circle.sandbox.mint.put({**transfer(amount, status), **fields})

    def becomes(self, transfer: Transfer, **changes: Any) -> Transfer:
        return self.circle.sandbox.mint.put({**transfer, **changes})

    async def webhook(self, transfer: Transfer) -> None:
        """What the bridge publishes for the notification of the transfer as it is."""
        said = translate(notification(transfer), "testnet")
        assert isinstance(said, Publish)
        headers = headers_of(said.event.ce_type(), event_id=said.event_id, source=said.source, time=self.at.clock())
        await self.at.send(said.topic, said.key, value_of(said.event), headers)

    async def credited(self, amount: int) -> None:
        async def there() -> bool:
            return (await balance(self.at.observer, spendable(ADA)) or 0) == amount * 1_000_000

        await until(there, f"Ada has {amount}")

    async def transfers(self) -> dict[str, str]:
        return dict([tuple(row) for row in await self.at.observer.fetch("SELECT id, state FROM circle_transfers")])

    async def told(self) -> list[dict[str, bytes]]:
        return [dict(record.headers) for record in await self.at.told(DEPOSITS_NOTIFIED)]

    async def proven(self, deposits: int) -> None:
        """So many deposits, each credited once, and the invariants hold."""
        told = await self.at.told(DEPOSITS_CREDITED)
        assert len({dict(record.headers)["ce_id"] for record in told}) == deposits
        assert await self.at.observer.fetchval("SELECT count(*) FROM transactions WHERE kind = 'deposit'") == deposits
        assert await self.at.told(DEPOSITS_NOTIFIED.dlq) == []
        assert not [result for result in await verify(self.at.observer) if not result.holds]


def transfer(amount: str, status: str = "complete") -> Transfer:
    return {
        "id": str(uuid4()), "source": {"type": "blockchain", "chain": "ETH"},
        "destination": {"type": "wallet", "id": "12345", "address": TO}, "amount": {"amount": amount, "currency": "USD"},
        "transactionHash": f"0x{uuid4().hex * 2}", "status": status,
    }  # fmt: skip


def notification(transfer: Transfer) -> str:
    return json.dumps({"clientId": "c", "notificationType": "transfers", "version": 1, "transfer": transfer})


@pytest.fixture
async def town(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Town]:
    topics = [DEPOSITS_NOTIFIED, DEPOSITS_CREDITED, DEPOSITS_FINALIZED]
    config = SandboxConfig(rsa_bits=2048, rate_limits=False, sns_retry_delays_s=(0.01,) * 3)
    async with (
        ground(database, kafka.bootstrap, topic_prefix, topics, [WEBHOOKS_DLQ]) as at,
        CircleSandbox(config) as circle,
        MintClient(circle.base_url, SecretStr(TEST_API_KEY), timeout_s=20) as client,
    ):
        insert = "INSERT INTO wallets VALUES ('ETH', $1, $2, 'mint', $3)"
        await at.observer.execute(insert, TO, ADA, at.clock())
        yield Town(at, circle, client)


@asynccontextmanager
async def crediting(town: Town, services: Services) -> AsyncIterator[None]:
    policy = DepositPolicy(minimum=1_000_000, chains_read=frozenset({"MATIC"}))
    async with running(credit_deposits.stage(policy, None), services, town.at):
        yield


@asynccontextmanager
async def polling(town: Town, services: Services) -> AsyncIterator[PollCircle]:
    """A poller that has looked once before anything came in: a list without a cursor begins at its start."""
    poller = PollCircle(town.client, town.polled, services)
    await looked(poller)
    yield poller


async def looked(poller: PollCircle) -> None:
    connection = await poller._lone.lead()
    assert connection is not None
    await poller.round(connection)


async def test_a_deposit_whose_notification_amazon_gave_up_is_credited_once_and_one_that_comes_after_all_is_a_repeat(
    town: Town,
) -> None:
    mint = town.circle.sandbox.mint
    mint.base_url = town.circle.base_url
    away = f"http://127.0.0.1:{free_port()}/webhooks/circle"
    mint.subscriptions["s"] = [Topic(arn, away, status="confirmed") for arn in TOPIC_ARNS]
    async with town.at.process() as services, crediting(town, services), polling(town, services) as poller:
        sent = town.sent()
        answers = await mint.notify({"notificationType": "transfers", "version": 1, "transfer": sent}, "1", copies=1)
        assert answers == ["ClientConnectorError"] * 2
        for _ in range(3):
            await looked(poller)
        await town.credited(25)
        await until(lambda: town.at.told(DEPOSITS_FINALIZED), "Mint's word is finality on ETH")
        for _ in range(2):
            await town.webhook(sent)
        town.sent("3.00")
        await looked(poller)
        await town.credited(28)
        told = await town.told()
        assert len(told) == 4
        assert len({(each["ce_source"], each["ce_id"]) for each in told}) == 2, "the notification's own envelope"
        assert {each["ce_source"] for each in told} == {b"circle_mint"}
    await town.proven(2)


@pytest.mark.parametrize("poll_first", [False, True])
async def test_notification_and_list_together_are_one_credit(town: Town, poll_first: bool) -> None:
    async with town.at.process() as services, crediting(town, services), polling(town, services) as poller:
        sent = town.sent()
        for polls in (poll_first, not poll_first):
            if polls:
                await looked(poller)
            else:
                await town.webhook(sent)
            await town.credited(25)
        # what the notification brought and the stage has settled is not said again
        assert len(await town.told()) == (2 if poll_first else 1)
        other = town.sent("3.00")
        await asyncio.gather(town.webhook(other), looked(poller))
        await town.credited(28)
    await town.proven(2)


async def test_what_is_on_its_way_is_followed_to_its_end_and_what_leaves_or_fails_is_nobodys_deposit(
    town: Town,
) -> None:
    secret = SecretStr(TEST_ENTITY_SECRET)
    async with (
        town.at.process() as services,
        crediting(town, services),
        polling(town, services) as poller,
        CircleClient(town.circle.base_url, SecretStr(TEST_API_KEY), secret) as wallets,
    ):
        slow, fails = town.sent("25.00", "running"), town.sent("7.00", "pending")
        leaves = {"type": "blockchain", "address": TO, "chain": "ETH"}
        town.sent("9.00", source={"type": "wallet", "id": "12345"}, destination=leaves)
        await looked(poller)
        assert await town.transfers() == {
            f"circle_mint:{slow['id']}": "running",
            f"circle_mint:{fails['id']}": "pending",
        }
        # hours later others have come in, and the list does not reach back to them
        await town.at.observer.execute("UPDATE circle_transfers SET created_at = created_at - interval '3 hours'")
        for each, status in ((slow, "complete"), (fails, "failed")):
            made = datetime.fromisoformat(each["createDate"]) - timedelta(hours=3)
            town.becomes(each, status=status, createDate=made.isoformat())
        town.at.clock.forward(2 * town.polled.overlap.total_seconds())
        beside = PollCircle(wallets, Polled("testnet", {}), services)
        await looked(beside)
        await looked(poller)
        await town.credited(25)
        await looked(poller)
        calls = town.circle.sandbox.gate.calls
        assert (calls[f"GET {LIST}/{{id}}"], calls["GET /v1/w3s/transactions/{id}"]) == (2, 0), "each of its own"
        assert await town.transfers() == {}, "what has ended is forgotten"
        cursors = await town.at.observer.fetch("SELECT source FROM source_cursors ORDER BY source")
        assert [row[0] for row in cursors] == ["circle", "circle_mint"]
    await town.proven(1)


async def test_what_was_forgotten_before_the_first_look_is_found_with_a_longer_overlap(town: Town) -> None:
    before = (town.at.clock() - timedelta(days=20)).isoformat()
    known, forgotten = town.sent("25.00", createDate=before), town.sent("7.00", createDate=before)
    async with town.at.process() as first, crediting(town, first), polling(town, first):
        await town.webhook(known)
        await town.credited(25)
    town.polled = replace(town.polled, overlap=timedelta(days=30))
    async with town.at.process() as second, crediting(town, second), polling(town, second):
        await town.credited(32)
        assert await town.transfers() == {f"circle_mint:{each['id']}": "complete" for each in (known, forgotten)}
        assert len(await town.told()) == 2, "what is known is not said again"
    await town.proven(2)


class Died(Exception):
    """The process ends on this line."""


async def test_a_poller_that_dies_between_two_pages_finds_the_older_ones_again(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest come first: had the cursor gone with them, the overlap would not reach back to what was on the second page."""
    async with town.at.process() as first, polling(town, first) as poller:
        start = town.at.clock()
        town.at.clock.forward(2 * 3600)
        for minutes in range(1, 61):
            town.sent("1.00", createDate=(start + timedelta(minutes=minutes)).isoformat())
        page = town.client.inbound_page

        async def dies(*, since: datetime | None = None, after: str | None = None) -> list[Transfer]:
            if after is not None:
                raise Died
            return await page(since=since)

        with monkeypatch.context() as patch:
            patch.setattr(town.client, "inbound_page", dies)
            with pytest.raises(Died):
                await looked(poller)
        assert len(await town.transfers()) == 50
    async with town.at.process() as second, crediting(town, second), polling(town, second):
        await town.credited(60)
        assert len(await town.told()) == 60
    await town.proven(60)


async def test_a_list_that_goes_on_nowhere_is_read_again_after_a_pause(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with town.at.process() as services, polling(town, services) as poller:
        for _ in range(50):
            town.sent("1.00")
        page = town.client.inbound_page

        async def first_page(*, since: datetime | None = None, after: str | None = None) -> list[Transfer]:
            return await page(since=since)

        monkeypatch.setattr(town.client, "inbound_page", first_page)
        with pytest.raises(Unknown):
            async with asyncio.timeout(10):
                await looked(poller)


async def test_a_poller_that_dies_after_its_commit_has_lost_nothing(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(*_: Any) -> None:
        raise Died

    async with town.at.process() as first, polling(town, first) as poller:
        sent = town.sent()
        with monkeypatch.context() as patch:
            patch.setattr(first.emitter, "emit", dies)
            with pytest.raises(Died):
                await looked(poller)
    assert await town.told() == []
    town.at.clock.forward(ABANDONED_S + 1)
    async with town.at.process() as second, crediting(town, second):
        await Sweeper(second).sweep(await second.connect())
        await town.webhook(sent)
        async with polling(town, second):
            await town.credited(25)
    await town.proven(1)


async def test_what_is_not_understood_is_kept_once_and_stops_nothing(town: Town) -> None:
    async with town.at.process() as services, crediting(town, services), polling(town, services) as poller:
        start = town.at.clock()
        town.at.clock.forward(120)
        odd: dict[int, Transfer] = {
            2: {"id": None},  # the last of the first page, which the second one goes on from
            5: {"amount": {"amount": "1.0000001", "currency": "USD"}},
            7: {"transactionHash": "\0 not a hash"},
            9: {"status": "screened"},
            11: {"source": None},
        }
        for second in range(52):
            made = (start + timedelta(seconds=second)).isoformat()
            town.circle.sandbox.mint.put({**transfer("1.00"), "createDate": made, **odd.get(second, {})})
        for _ in range(3):
            await looked(poller)
        await town.credited(52 - len(odd))
        letters = await town.at.told(WEBHOOKS_DLQ)
        assert [dict(letter.headers)["code"] for letter in letters] == [b"wrong_schema"] * 4
        assert {(letter.key, dict(letter.headers)["path"]) for letter in letters} == {
            (b"circle_mint", f"GET {LIST}".encode())
        }
    await town.proven(52 - len(odd))


async def test_mint_is_away_or_refuses_the_key_and_what_came_in_meanwhile_is_credited_afterwards(town: Town) -> None:
    async with town.at.process() as services, crediting(town, services), polling(town, services) as poller:
        faults = town.circle.sandbox.gate.faults
        faults += [Fault(LIST, "status", status=500), Fault(LIST, "status", status=429), Fault(LIST, "lost_reply")]
        faults.append(Fault(LIST, "status", status=401, times=10**9))
        working = asyncio.create_task(poller.work())

        async def refused() -> bool:
            return services.unready == {"poll_circle.mint": "partner_refused"}

        async def ready() -> bool:
            return not services.unready

        try:
            town.sent()
            await until(refused, "a person must look")
            faults.clear()
            await town.credited(25)
            await until(ready, "it is ready again")
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
        assert services.stop.reason is None
    await town.proven(1)


async def test_one_poller_is_at_work_and_one_of_the_wallets_beside_it(town: Town) -> None:
    async with town.at.process() as second:
        standby = PollCircle(town.client, town.polled, second)
        wallets = PollCircle(town.client, Polled("testnet", {}), second)
        async with town.at.process() as first, polling(town, first):
            assert await standby._lone.lead() is None
            assert await wallets._lone.lead() is not None
        await until(standby._lone.lead, "the other leads")


async def test_the_deposits_worker_polls_where_mints_key_is_set(town: Town) -> None:
    metrics = Metrics()
    settings = load_settings(
        env_file=None,
        kafka_bootstrap=town.at.bootstrap,
        database_url=town.at.dsn,
        circle_mint_api_url=town.circle.base_url,
        circle_mint_api_key=TEST_API_KEY,
        circle_poll_interval_s=0.05,
    )

    async def polled() -> bool:
        name, labels = "stablerail_circle_polled_timestamp_seconds", {"source": "circle_mint"}
        return bool(metrics.registry.get_sample_value(name, labels))

    async with town.at.process() as services, crediting(town, services):
        movement = await build("deposits", settings, services, metrics)
        (work,) = movement.workers
        working = asyncio.create_task(work())
        try:
            await until(polled, "the list was read")
            town.sent()
            await town.credited(25)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            for close in movement.closing:
                await close()
    await town.proven(1)
