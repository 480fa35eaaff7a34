"""Deposits that nobody tells us of are found in Circle's list: once, whatever else reports them and whoever dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr

from agents.deposits import credit_deposits
from agents.deposits.credit_deposits import DepositPolicy
from agents.deposits.lookups import Lookups, circle_listing
from agents.deposits.policy import outstanding_of
from agents.deposits.poll_circle import PollCircle, Polled
from agents.services import Services
from agents.sweeper import ABANDONED_S, Sweeper
from connectors.circle.client import CircleClient, CircleWallet
from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.control import InjectedTransfer, inject_transfer
from connectors.circle.sandbox.gate import Fault
from connectors.circle.sandbox.state import Transaction
from connectors.circle.sandbox.tokens import USDC_TOKENS, usdc_token_id
from connectors.circle.webhooks import translate
from connectors.errors import Unavailable
from connectors.webhooks.source import Publish
from ledger.accounts import spendable
from ledger.verify import verify
from stablerail.config import load_settings
from stablerail.dev.kafka import Kafka
from stablerail.metrics import Metrics
from stablerail.wiring import build
from tests.support.in_process import SCHEMA, Ground, ground, running, until
from tests.support.ledger_rig import balance
from tests.support.rebuild import differences, empty_database, rebuild
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_FINALIZED, DEPOSITS_NOTIFIED, WEBHOOKS_DLQ
from topics.envelope import headers_of, value_of

LIST = "/v1/w3s/transactions"
ADA = "ada"


@dataclass
class Town:
    """Circle, a wallet of Ada's on SOL there, and the ground that our processes stand on."""

    at: Ground
    circle: CircleSandbox
    client: CircleClient
    wallet: CircleWallet
    polled: Polled = field(default_factory=lambda: Polled("testnet", USDC_TOKENS, interval_s=0.05))

    def sent(self, amount: str = "25", *states: str, **fields: Any) -> Transaction:
        """Somebody pays Ada; no subscription: every webhook is dropped."""
        body = {"wallet_id": self.wallet.id, "amount": amount, **fields}
        if states:
            body["states"] = states
        transfer = InjectedTransfer.model_validate(body, by_name=True)
        return inject_transfer(self.circle.sandbox.state, self.circle.sandbox.deliveries, transfer)

    def becomes(self, transaction: Transaction, **changes: Any) -> Transaction:
        return self.circle.sandbox.state.change(transaction.id, **changes)

    async def webhook(self, transaction: Transaction) -> None:
        """What the bridge publishes for Circle's notification of the transaction as it is."""
        body = {
            "subscriptionId": "s", "notificationId": str(uuid4()), "notificationType": "transactions.inbound",
            "notification": transaction.shown(), "version": 2,
        }  # fmt: skip
        said = translate(body, "testnet", USDC_TOKENS)
        assert isinstance(said, Publish)
        headers = headers_of(said.event.ce_type(), event_id=said.event_id, source=said.source, time=self.at.clock())
        await self.at.send(said.topic, said.key, value_of(said.event), headers)

    async def balance(self) -> int:
        return await balance(self.at.observer, spendable(ADA)) or 0

    async def credited(self, amount: int) -> None:
        async def there() -> bool:
            return await self.balance() == amount

        await until(there, f"Ada has {amount}")

    async def outstanding(self) -> int:
        """What Ada's counter holds of deposits that are credited and not final."""
        query = "SELECT value::bigint FROM counters WHERE name = $1"
        return await self.at.observer.fetchval(query, outstanding_of(ADA)) or 0

    async def statuses(self) -> dict[str, str]:
        """Whole USDC -> what became of that deposit."""
        query = "SELECT (amount / 1000000)::bigint::text, status FROM deposits"
        return dict([tuple(row) for row in await self.at.observer.fetch(query)])

    async def transfers(self) -> dict[str, str]:
        return dict([tuple(row) for row in await self.at.observer.fetch("SELECT id, state FROM circle_transfers")])

    async def proven(self, deposits: int) -> None:
        """So many deposits, each credited once, and the invariants hold."""
        told = await self.at.told(DEPOSITS_CREDITED)
        assert len({dict(record.headers)["ce_id"] for record in told}) == deposits
        assert await self.at.observer.fetchval("SELECT count(*) FROM deposits") == deposits
        assert await self.at.observer.fetchval("SELECT count(*) FROM transactions WHERE kind = 'deposit'") == deposits
        assert not [result for result in await verify(self.at.observer) if not result.holds]


@pytest.fixture
async def town(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Town]:
    topics = [DEPOSITS_NOTIFIED, DEPOSITS_CREDITED, DEPOSITS_FINALIZED]
    async with (
        ground(database, kafka.bootstrap, topic_prefix, topics, [WEBHOOKS_DLQ]) as at,
        CircleSandbox(SandboxConfig(rsa_bits=2048, rate_limits=False)) as circle,
        CircleClient(circle.base_url, SecretStr(TEST_API_KEY), SecretStr(TEST_ENTITY_SECRET), timeout_s=20) as client,
    ):
        wallet_set = await client.create_wallet_set(str(uuid4()), "customers")
        (wallet,) = await client.create_wallets(str(uuid4()), wallet_set, ["SOL-DEVNET"], [(ADA, ADA)])
        insert = "INSERT INTO wallets VALUES ('SOL', $1, $2, $3, $4)"
        await at.observer.execute(insert, wallet.address, ADA, wallet.id, at.clock())
        yield Town(at, circle, client, wallet)


@asynccontextmanager
async def crediting(town: Town, services: Services) -> AsyncIterator[None]:
    bound = {"SOL": 1_000_000_000}
    policy = DepositPolicy(minimum=1_000_000, chains_read=frozenset({"MATIC"}), outstanding_max=bound)
    listing = circle_listing(town.client, "testnet", USDC_TOKENS)
    stage = credit_deposits.stage(policy, Lookups(listing, policy.chains_read, services.connect))
    async with running(stage, services, town.at):
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


async def test_a_deposit_whose_every_webhook_was_dropped_is_credited_once(town: Town) -> None:
    async with town.at.process() as services, crediting(town, services), polling(town, services) as poller:
        sent = town.sent("25", "CONFIRMED")
        await looked(poller)
        await town.credited(25_000_000)
        town.becomes(sent, state="COMPLETE")
        for _ in range(3):
            await looked(poller)
        await until(lambda: town.at.told(DEPOSITS_FINALIZED), "the custodian's word is finality on SOL")
        assert len(await town.at.told(DEPOSITS_NOTIFIED)) == 2, "one for each state"
        assert await town.balance() == 25_000_000
        await services.relay.tidy()
    await town.proven(1)
    async with empty_database(town.at.dsn) as empty:
        await rebuild(town.at.bootstrap, town.at.prefix, empty, SCHEMA)
        assert list(await differences(town.at.dsn, empty)) == ["wallets"], "which the test wrote by itself"


@pytest.mark.parametrize("poll_first", [False, True])
async def test_webhook_and_list_together_are_one_credit(town: Town, poll_first: bool) -> None:
    async with town.at.process() as services, crediting(town, services), polling(town, services) as poller:
        sent = town.sent()
        for polls in (poll_first, not poll_first):
            if polls:
                await looked(poller)
            else:
                await town.webhook(sent)
            await town.credited(25_000_000)
        # what the webhook brought and the stage has settled is not said again
        assert len(await town.at.told(DEPOSITS_NOTIFIED)) == (2 if poll_first else 1)
        other = town.sent("3")
        await asyncio.gather(town.webhook(other), looked(poller))
        await town.credited(28_000_000)
    await town.proven(2)


async def test_two_equal_transfers_of_one_transaction_in_the_list_are_two_deposits(town: Town) -> None:
    async with town.at.process() as services, crediting(town, services), polling(town, services) as poller:
        first = town.sent("25")
        second = town.sent("25", txHash=first.tx_hash)
        await looked(poller)
        await town.webhook(second)
        await town.webhook(first)
        await town.credited(50_000_000)
    await town.proven(2)


async def test_circle_is_away_and_what_came_in_meanwhile_is_credited_when_it_is_back(town: Town) -> None:
    async with town.at.process() as services, crediting(town, services), polling(town, services) as poller:
        faults = town.circle.sandbox.gate.faults
        faults += [Fault(LIST, "status", status=500, times=2), Fault(LIST, "status", status=429)]
        faults += [Fault(LIST, "lost_reply"), Fault(LIST, "status", status=401)]
        working = asyncio.create_task(poller.work())
        try:
            town.sent()
            await town.credited(25_000_000)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
        assert not faults or all(fault.times == 0 for fault in faults)
        assert services.stop.reason is None
    await town.proven(1)


class Died(Exception):
    """The process ends on this line."""


@pytest.mark.parametrize("on", ["journal", "emit"])
async def test_a_poller_that_dies_after_its_commit_has_lost_nothing(
    town: Town, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(*_: Any) -> None:
        raise Died

    async with town.at.process() as first, polling(town, first) as poller:
        town.sent()
        with monkeypatch.context() as patch:
            patch.setattr(*((first.relay, "journal", dies) if on == "journal" else (first.emitter, "emit", dies)))
            with pytest.raises(Died):
                await looked(poller)
    assert await town.at.told(DEPOSITS_NOTIFIED) == []
    assert len(await town.transfers()) == 1
    town.at.clock.forward(ABANDONED_S + 1)
    async with town.at.process() as second, crediting(town, second):
        await Sweeper(second).sweep(await second.connect())
        async with polling(town, second):
            await town.credited(25_000_000)
    assert len(await town.at.told(DEPOSITS_NOTIFIED)) == 1
    await town.proven(1)


async def test_a_poller_that_dies_before_its_commit_finds_it_again(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    async def dies(*_: Any) -> None:
        raise Died

    async with town.at.process() as first, polling(town, first) as poller:
        town.sent()
        monkeypatch.setattr(poller._lone, "commit", dies)
        with pytest.raises(Died):
            await looked(poller)
    async with town.at.process() as second, crediting(town, second), polling(town, second):
        await town.credited(25_000_000)
    await town.proven(1)


async def test_one_poller_is_at_work_and_another_takes_over(town: Town) -> None:
    async with town.at.process() as second:
        standby = PollCircle(town.client, town.polled, second)
        async with town.at.process() as first, polling(town, first):
            assert await standby._lone.lead() is None
        await until(standby._lone.lead, "the other leads")


async def test_pages_are_read_to_their_end_and_what_shows_up_late_is_found(town: Town) -> None:
    async with town.at.process() as services, crediting(town, services), polling(town, services) as poller:
        for number in range(103):
            town.sent(str(number + 1))
        await looked(poller)
        await town.credited(sum(range(104)) * 1_000_000)
        assert len(await town.transfers()) == 103
        # made before the last one of the list, and shown only now
        late = town.sent("1000")
        town.becomes(late, create_date=late.create_date - timedelta(minutes=5))
        await looked(poller)
        await town.credited((sum(range(104)) + 1000) * 1_000_000)
    await town.proven(104)


async def test_a_transaction_that_ends_long_after_it_was_made_is_followed_to_its_end(town: Town) -> None:
    overlap = town.polled.overlap.total_seconds()
    async with town.at.process() as services, crediting(town, services), polling(town, services) as poller:
        slow, dropped = town.sent("25", "CONFIRMED"), town.sent("7", "CONFIRMED")
        await looked(poller)
        await town.credited(32_000_000)
        # hours later others have come in, and the list does not reach back to it
        for transaction in (slow, dropped):
            town.becomes(transaction, create_date=transaction.create_date - timedelta(hours=3))
        await town.at.observer.execute("UPDATE circle_transfers SET created_at = created_at - interval '3 hours'")
        town.becomes(slow, state="COMPLETE")
        town.at.clock.forward(2 * overlap)
        calls = town.circle.sandbox.gate.calls
        await looked(poller)
        await until(lambda: town.at.told(DEPOSITS_FINALIZED), "it is final")
        assert await town.transfers() == {dropped.id: "CONFIRMED"}, "what has ended is forgotten"
        assert calls[f"GET {LIST}/{{id}}"] == 2
        await looked(poller)
        assert calls[f"GET {LIST}/{{id}}"] == 2, "what has not moved in three hours is not asked for every time"
        town.at.clock.forward(3600)
        del town.circle.sandbox.state.transactions[dropped.id]
        await looked(poller)
        assert await town.transfers() == {dropped.id: "CONFIRMED"}, "Circle does not know it any more: nothing is said"
    await town.proven(2)


async def test_a_transaction_that_circle_cannot_tell_of_keeps_no_other_one_from_its_end(town: Town) -> None:
    async with town.at.process() as services, crediting(town, services), polling(town, services) as poller:
        mute, refused, other = (town.sent(amount, "CONFIRMED") for amount in ("1", "2", "4"))
        await looked(poller)
        await town.credited(7_000_000)
        for transaction in (mute, refused, other):
            town.becomes(transaction, state="COMPLETE", create_date=transaction.create_date - timedelta(hours=3))
        for number, transaction in enumerate((mute, refused, other)):
            aged = "UPDATE circle_transfers SET created_at = created_at - interval '3 hours', looked_at = looked_at + $2 WHERE id = $1"
            await town.at.observer.execute(aged, transaction.id, timedelta(milliseconds=number))
        faults = town.circle.sandbox.gate.faults
        faults.append(Fault(f"{LIST}/{mute.id}", "status", status=500, times=10**9))
        faults.append(Fault(f"{LIST}/{refused.id}", "status", status=400, times=10**9))
        town.at.clock.forward(2 * town.polled.overlap.total_seconds())
        for _ in range(2):
            with pytest.raises(Unavailable):
                await looked(poller)
        await until(lambda: town.at.told(DEPOSITS_FINALIZED), "the other one is final")
        assert await town.transfers() == {mute.id: "CONFIRMED", refused.id: "CONFIRMED"}
        calls = town.circle.sandbox.gate.calls[f"GET {LIST}/{{id}}"]
        town.circle.sandbox.gate.faults.clear()
        await looked(poller)
        assert town.circle.sandbox.gate.calls[f"GET {LIST}/{{id}}"] == calls + 1, "what was refused waits its time"
        assert await town.transfers() == {refused.id: "CONFIRMED"}
    await town.proven(3)


@pytest.mark.parametrize("end", ["FAILED", "DENIED", "CANCELLED", "CANCELED"])
async def test_a_credit_whose_transaction_fails_is_taken_back_once(town: Town, end: str) -> None:
    async with town.at.process() as services, crediting(town, services), polling(town, services) as poller:
        told, listed = town.sent("25", "CONFIRMED"), town.sent("7", "CONFIRMED")
        await town.webhook(told)
        await looked(poller)
        await town.credited(32_000_000)
        assert await town.outstanding() == 32_000_000
        for transaction in (told, listed):
            town.becomes(transaction, state=end)
        for _ in range(2):
            await town.webhook(town.circle.sandbox.state.transactions[told.id])
        await town.credited(7_000_000)
        for _ in range(2):
            await looked(poller)
        await town.credited(0)
        # what comes late, once more and in the wrong order
        for _ in range(2):
            await town.webhook(told)
        await town.webhook(town.circle.sandbox.state.transactions[listed.id])
        town.sent("3", "CONFIRMED")
        await looked(poller)
        await town.credited(3_000_000)
        assert await town.statuses() == {"25": "reversed", "7": "reversed", "3": "credited"}
        assert await town.outstanding() == 3_000_000
        assert len(await town.at.told(DEPOSITS_FINALIZED)) == 2
        assert await town.at.told(WEBHOOKS_DLQ) == await town.at.told(DEPOSITS_NOTIFIED.dlq) == []
    await town.proven(3)


async def test_what_failed_is_not_credited_by_a_word_of_before_that_comes_late(town: Town) -> None:
    async with town.at.process() as services, crediting(town, services), polling(town, services) as poller:
        before = town.sent("25", "CONFIRMED")
        failed = town.becomes(before, state="FAILED")
        await town.webhook(failed)
        await town.webhook(before)
        await looked(poller)
        town.sent("3", "CONFIRMED")
        await looked(poller)
        await town.credited(3_000_000)
        assert await town.statuses() == {"25": "vanished", "3": "credited"}
        told = await town.at.told(DEPOSITS_CREDITED)
        assert len(told) == 1
    assert not [result for result in await verify(town.at.observer) if not result.holds]


async def test_what_is_not_understood_is_kept_once_and_stops_nothing(town: Town) -> None:
    async with town.at.process() as services, crediting(town, services), polling(town, services) as poller:
        town.sent("1.0000001")
        town.sent("2", "PENDING_RISK_SCREENING")
        odd = town.sent("3")
        town.becomes(odd, tx_hash="\0 not a hash")
        town.sent("4")
        for _ in range(3):
            await looked(poller)
        await town.credited(4_000_000)
        letters = await town.at.told(WEBHOOKS_DLQ)
        assert [dict(letter.headers)["code"] for letter in letters] == [b"wrong_schema", b"wrong_schema"]
        assert {letter.key for letter in letters} == {b"circle"}
    await town.proven(1)


async def test_the_deposits_worker_polls_where_circles_credentials_are_set(town: Town) -> None:
    metrics = Metrics()
    common: dict[str, Any] = {"env_file": None, "kafka_bootstrap": town.at.bootstrap, "database_url": town.at.dsn}
    credentials = {"circle_api_key": TEST_API_KEY, "circle_entity_secret": TEST_ENTITY_SECRET}
    tokens = {"SOL": usdc_token_id("SOL-DEVNET")}
    settings = load_settings(
        **common,
        **credentials,
        circle_api_url=town.circle.base_url,
        circle_poll_interval_s=0.05,
        circle_usdc_token_ids=tokens,
    )
    async with town.at.process() as services, crediting(town, services):
        assert (await build("deposits", load_settings(**common), services, metrics)).workers == []
        movement = await build("deposits", settings, services, metrics)
        (work,) = movement.workers
        working = asyncio.create_task(work())
        try:
            await until(lambda: polled(metrics), "the list was read")
            town.sent()
            await town.credited(25_000_000)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            for close in movement.closing:
                await close()
    await town.proven(1)


async def polled(metrics: Metrics) -> bool:
    return bool(metrics.registry.get_sample_value("stablerail_circle_polled_timestamp_seconds", {"source": "circle"}))


async def test_a_time_of_circles_that_is_ahead_carries_nobody_over_what_is_to_come(town: Town) -> None:
    async with town.at.process() as services, crediting(town, services), polling(town, services) as poller:
        town.becomes(town.sent("1"), create_date=town.at.clock() + timedelta(days=400))
        await looked(poller)
        town.sent("2")
        await looked(poller)
        await town.credited(3_000_000)
        since: datetime = await town.at.observer.fetchval("SELECT since FROM source_cursors")
        assert since < town.at.clock() + timedelta(minutes=1)
    await town.proven(2)
