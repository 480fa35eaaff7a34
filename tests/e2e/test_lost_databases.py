"""The database lost at every boundary of a stage, rebuilt from nothing and from an old backup with the journal.

What was acknowledged, told, sent or called is in the rebuilt one; what was not is delivered again; nothing else is. Of each kind of
stage one: deposits are credited (the ledger alone), withdrawals are signed and sent (a chain), wallets are asked for (a partner).
The tests of a stage share its topics, its chain or partner, and the old backup; each loss adds to the ones before.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from pydantic import SecretStr

from agents.acting import Acting
from agents.deposits import credit_deposits
from agents.onboarding import provision_wallets
from agents.onboarding.circle_wallets import CircleWallets
from agents.onboarding.wallet_calls import WalletDeeds
from agents.recovery import restoring
from agents.recovery.comparing import compare_circle, compare_lane
from agents.services import Services
from agents.withdrawals.withdrawal import Withdrawal
from chain.signer import KeySigner
from connectors.circle.chains import from_circle
from connectors.circle.client import CircleClient
from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from ledger.accounts import spendable
from ledger.rows import Changes, Connection
from ledger.tables import WALLETS
from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from stablerail.dev.usdc import deploy
from stablerail.metrics import Metrics
from tests.support import deposit_rig
from tests.support.crash_rig import Rigs
from tests.support.in_process import Ground, read_topic
from tests.support.lost_database import Acked, Boundary, Losing, commit_of, serving
from tests.support.payouts import store
from tests.support.proxies import Match, http_request, produce
from tests.support.sending import COIN, Sending, accepted, sending
from tests.support.wallet_rig import CHAINS, POLICY
from topics.catalog import (
    DEPOSITS_CREDITED,
    DEPOSITS_NOTIFIED,
    JOURNAL,
    TRANSACTIONS_BROADCAST,
    TRANSACTIONS_SIGNED,
    WALLETS_PROVISIONED,
    WALLETS_REQUESTED,
    WITHDRAWALS_ACCEPTED,
    Topic,
)
from topics.envelope import headers_of, value_of
from topics.events import (
    Chain,
    DepositCredited,
    DepositNotified,
    Event,
    Evidence,
    WalletsProvisioned,
    WalletsRequested,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def tell(at: Ground, topic: Topic, key: str, *told: tuple[str, bytes, str, str]) -> None:
    """(type, value, id, source) of each message, as one record batch: one run, one transaction."""
    batch = at.producer.create_batch()
    for type_, value, id_, source in told:
        headers = headers_of(type_, event_id=id_, source=source, time=datetime.now(UTC))
        batch.append(key=key.encode(), value=value, timestamp=None, headers=headers)
    await (await at.producer.send_batch(batch, topic.named(at.prefix), partition=0))


def said(event: Event, source: str = "test") -> tuple[str, bytes, str, str]:
    return event.ce_type(), value_of(event), event.identity(), source


def journal(prefix: str) -> Match:
    return produce(prefix + JOURNAL.name)


def telling(topic: Topic) -> Callable[[str], Match]:
    return lambda prefix: produce(prefix + topic.name)


def of(writer: str) -> Callable[[str], Match]:
    return lambda _prefix: commit_of(writer)


def of_a_stage(name: str, told: Topic) -> Iterator[Boundary]:
    """In the order in which a worker comes to them."""
    yield Boundary("before the commit", "postgres", "request", of(name))
    yield Boundary("committed, the reply lost", "postgres", "reply", of(name))
    yield Boundary("before the journal", "kafka", "request", journal, name)
    yield Boundary("journaled, the reply lost", "kafka", "reply", journal, name)
    yield Boundary("before telling", "kafka", "request", telling(told))
    yield Boundary("told, the reply lost", "kafka", "reply", telling(told))
    yield Boundary("before the acknowledgement", "ack", "request")
    yield Boundary("acknowledged", "ack", "reply")


# -- the ledger alone ----------------------------------------------------------------------------------------------------


class Deposits:
    stage, source, told = "credit_deposits", DEPOSITS_NOTIFIED, DEPOSITS_CREDITED

    def __init__(self) -> None:
        self._wallet = "0x" + secrets.token_hex(20)
        self._sent: dict[str, int] = {}

    @asynccontextmanager
    async def started(self, services: Services, at: Ground, acked: Acked, outside: str) -> AsyncIterator[None]:
        stage = credit_deposits.stage(deposit_rig.policy(chains_read=frozenset()))
        async with serving(stage, services, at, acked):
            yield

    async def ask(self, at: Ground) -> None:
        if not self._sent:
            connection = await at.connect()
            changes = Changes()
            changes.insert(WALLETS, ("MATIC", self._wallet, "ada", "wallet-of-ada", datetime.now(UTC)))
            await store(connection, changes)
            await connection.close()
        events = []
        for _ in range(3):
            event = DepositNotified(
                source="circle", transfer_id=str(uuid.uuid4()), chain="MATIC", tx_hash=f"0x{secrets.token_hex(32)}",
                to=self._wallet, asset="USDC", amount=f"{len(self._sent) + 1}.25", evidence=Evidence.CONFIRMED,
            )  # fmt: skip
            self._sent[event.tx_hash] = event.amount
            events.append(event)
        await tell(at, DEPOSITS_NOTIFIED, self._wallet, *(said(one, "circle/webhooks") for one in events))

    async def opened(self, at: Ground, connection: Connection) -> None:
        gates = await restoring.closed_gates(connection)
        await restoring.open_compared(connection, [], gates, [], at.clock(), "ann")

    async def ended(self, at: Ground) -> bool:
        if await at.observer.fetchval("SELECT count(*) FROM deposits") < len(self._sent):
            return False
        return (await self._credited(at)).keys() == self._sent.keys()

    async def check(self, at: Ground) -> None:
        rows = await at.observer.fetch(
            "SELECT d.tx_hash, d.amount::bigint, count(t.id) FROM deposits d"
            " LEFT JOIN transactions t ON t.reference = replace(d.id::text, '-', '') AND t.kind = 'deposit' GROUP BY d.id"
        )
        assert {tuple(row) for row in rows} == {(tx_hash, amount, 1) for tx_hash, amount in self._sent.items()}
        balance = await at.observer.fetchval("SELECT balance FROM accounts WHERE id = $1", spendable("ada").id)
        assert balance == sum(self._sent.values())
        assert {tx_hash: amount for tx_hash, (amount, _) in (await self._credited(at)).items()} == self._sent

    async def _credited(self, at: Ground) -> dict[str, tuple[int, str]]:
        found: dict[str, tuple[int, str]] = {}
        for record in await read_topic(at.bootstrap, DEPOSITS_CREDITED, at.prefix):
            event = DepositCredited.model_validate_json(record.value)
            told = (event.amount, event.transaction_id)
            assert found.setdefault(event.tx_hash, told) == told, "a repeat says the same"
        return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deposits(postgres: Postgres, kafka: Kafka) -> AsyncIterator[Rigs[Losing]]:
    @asynccontextmanager
    async def made() -> AsyncIterator[Losing]:
        losing = Losing(postgres, kafka, Deposits(), ("127.0.0.1", 9))
        async with losing.opened([DEPOSITS_NOTIFIED, DEPOSITS_CREDITED]):
            yield losing

    rigs = Rigs(made)
    yield rigs
    await rigs.close()


@pytest.mark.parametrize("boundary", [*of_a_stage("credit_deposits", DEPOSITS_CREDITED)], ids=str)
async def test_a_database_lost_while_deposits_are_credited_comes_back_with_each_credited_once(
    deposits: Rigs[Losing], boundary: Boundary
) -> None:
    await (await deposits.quiet()).lose_at(boundary)


# -- a chain -------------------------------------------------------------------------------------------------------------


class Payments:
    """Signed and sent by one worker; the chain mines when all are in its pool."""

    stage, source, told = "sign_transactions", WITHDRAWALS_ACCEPTED, TRANSACTIONS_SIGNED

    def __init__(self, desk: Sending) -> None:
        self._desk = desk
        self._asked: list[Withdrawal] = []

    @asynccontextmanager
    async def started(self, services: Services, at: Ground, acked: Acked, outside: str) -> AsyncIterator[None]:
        self._desk.connect = services.connect
        process = self._desk.process([self._desk.rpc(f"http://{outside}")])
        sent = Acked(acked.bootstrap)  # what is sent comes again from its first record: it is the same bytes
        async with serving(process.sign, services, at, acked), serving(process.broadcast, services, at, sent):
            yield

    async def ask(self, at: Ground) -> None:
        self._desk.connection = await at.connect()
        made = await self._desk.ask(3)
        await self._desk.connection.close()
        async with at.process() as services:
            await services.relay.journal()  # what is told was in the journal before
        self._asked += made
        messages = [accepted(one) for one in made]
        told = [(one.type, one.value or b"", one.id, "test") for one in messages]
        await tell(at, WITHDRAWALS_ACCEPTED, "MATIC", *told)

    async def opened(self, at: Ground, connection: Connection) -> None:
        (lane,), gates = await restoring.closed_lanes(connection), await restoring.closed_gates(connection)
        found = await compare_lane(connection, lane, [self._desk.rpc(self._desk.anvil.rpc_url)])
        assert (found.code, found.unknown) == ("", ()), "the database has forgotten nothing that the chain has"
        await restoring.open_compared(connection, [lane], gates, [found.log("ann")], at.clock(), "ann")

    async def ended(self, at: Ground) -> bool:
        rows = await at.observer.fetch("SELECT status, count(*) FROM withdrawals GROUP BY status")
        return dict(tuple(row) for row in rows) == {"confirming": len(self._asked)}

    async def check(self, at: Ground) -> None:
        await self._desk.anvil.mine()
        assert sorted(await self._desk.paid()) == sorted((one.recipient, one.amount) for one in self._asked)
        rows = await at.observer.fetch(
            "SELECT nonce, count(DISTINCT withdrawal_id) FROM attempts GROUP BY 1 ORDER BY 1"
        )
        assert [tuple(row) for row in rows] == [(nonce, 1) for nonce in range(len(self._asked))], "no nonce paid twice"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def payments(postgres: Postgres, kafka: Kafka, scratch: Path, tools: Tools) -> AsyncIterator[Rigs[Losing]]:
    @asynccontextmanager
    async def made() -> AsyncIterator[Losing]:
        with Anvil(scratch / f"anvil-{secrets.token_hex(4)}", tools) as anvil:
            usdc = await deploy(anvil, tools.contracts)
            signer = KeySigner(secrets.token_bytes(32))
            async with sending(None, None, anvil, usdc, signer) as desk:  # type: ignore[arg-type]
                desk.in_flight_max = 1_000
                await desk.fund(coins=1_000 * COIN)
                losing = Losing(postgres, kafka, Payments(desk), ("127.0.0.1", anvil.port))
                topics = [WITHDRAWALS_ACCEPTED, TRANSACTIONS_SIGNED, TRANSACTIONS_BROADCAST]
                async with losing.opened(topics):
                    yield losing

    rigs = Rigs(made)
    yield rigs
    await rigs.close()


def sent(_prefix: str) -> Match:
    return http_request("POST", body_contains="eth_sendRawTransaction")


@pytest.mark.parametrize(
    "boundary",
    [
        *of_a_stage("sign_transactions", TRANSACTIONS_SIGNED),
        Boundary("before the node has it", "outside", "request", sent),
        Boundary("the node has it, the reply lost", "outside", "reply", sent),
        Boundary("sent, before the commit that tells", "postgres", "request", of("broadcast_transactions")),
    ],
    ids=str,
)
async def test_a_database_lost_while_withdrawals_are_signed_and_sent_comes_back_with_each_paid_once(
    payments: Rigs[Losing], boundary: Boundary
) -> None:
    await (await payments.quiet()).lose_at(boundary)


# -- a partner -----------------------------------------------------------------------------------------------------------


class Wallets:
    stage, source, told = "provision_wallets", WALLETS_REQUESTED, WALLETS_PROVISIONED

    def __init__(self, circle: CircleSandbox) -> None:
        self._circle = circle
        self._users: list[str] = []

    def _client(self, address: str) -> CircleClient:
        return CircleClient(address, SecretStr(TEST_API_KEY), SecretStr(TEST_ENTITY_SECRET))

    @asynccontextmanager
    async def started(self, services: Services, at: Ground, acked: Acked, outside: str) -> AsyncIterator[None]:
        stage = provision_wallets.stage()
        async with self._client(f"http://{outside}") as client, serving(stage, services, at, acked) as delivery:
            circle = CircleWallets(client, "testnet", None, services.connect, services.clock)
            deeds = WalletDeeds(circle, POLICY.members_max, POLICY.attempts_max, Metrics())
            task = asyncio.create_task(Acting(stage, deeds, services, delivery.wake, POLICY).work())
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def ask(self, at: Ground) -> None:
        users = [f"user-{secrets.token_hex(4)}" for _ in range(3)]
        self._users += users
        events = [WalletsRequested(user_id=user, chains=CHAINS) for user in users]
        await tell(at, WALLETS_REQUESTED, "users", *map(said, events))

    async def opened(self, at: Ground, connection: Connection) -> None:
        (gate,) = await restoring.closed_gates(connection)
        async with self._client(self._circle.base_url) as client:
            found = await compare_circle(connection, gate, client, "testnet", None)
        assert (found.code, found.unknown) == ("", ()), "the database has forgotten nothing that Circle has"
        await restoring.open_compared(connection, [], [gate], [found.log("ann")], at.clock(), "ann")

    async def ended(self, at: Ground) -> bool:
        states = await at.observer.fetch("SELECT DISTINCT state FROM calls")
        if {row[0] for row in states} != {"concluded"}:
            return False
        records = await read_topic(at.bootstrap, WALLETS_PROVISIONED, at.prefix)
        return {WalletsProvisioned.model_validate_json(one.value).user_id for one in records} == {*self._users}

    async def check(self, at: Ground) -> None:
        each = Counter((user, chain) for user in self._users for chain in CHAINS)
        made = Counter[tuple[str, Chain]]()
        for wallet in self._circle.sandbox.state.wallets.values():
            chain = from_circle(wallet.blockchain, "testnet")
            assert chain is not None
            made[wallet.ref_id or "", chain] += 1
        assert made == each, "each was made once"
        rows = await at.observer.fetch("SELECT user_id, chain FROM wallets")
        assert Counter((user, Chain(chain)) for user, chain in rows) == each


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def wallets(postgres: Postgres, kafka: Kafka) -> AsyncIterator[Rigs[Losing]]:
    @asynccontextmanager
    async def made() -> AsyncIterator[Losing]:
        async with CircleSandbox(SandboxConfig(rate_limits=False, rsa_bits=2048)) as circle:
            url = urlsplit(circle.base_url)
            losing = Losing(postgres, kafka, Wallets(circle), (url.hostname or "", url.port or 0))
            async with losing.opened([WALLETS_REQUESTED, WALLETS_PROVISIONED]):
                yield losing

    rigs = Rigs(made)
    yield rigs
    await rigs.close()


def asked(_prefix: str) -> Match:
    return http_request("POST", "/v1/w3s/developer/wallets")


INTENT, END = "provision_wallets.intend", "provision_wallets.conclude"


@pytest.mark.parametrize(
    "boundary",
    [
        Boundary("before the wish is committed", "postgres", "request", of("provision_wallets")),
        Boundary("before the acknowledgement of the wish", "ack", "request"),
        Boundary("before the intent is committed", "postgres", "request", of(INTENT)),
        Boundary("before the intent is in the journal", "kafka", "request", journal, INTENT),
        Boundary("the intent is in the journal, the reply lost", "kafka", "reply", journal, INTENT),
        Boundary("before Circle has heard", "outside", "request", asked),
        Boundary("Circle has made them, the reply lost", "outside", "reply", asked),
        Boundary("before the end is committed", "postgres", "request", of(END)),
        Boundary("before the end is in the journal", "kafka", "request", journal, END),
        Boundary("the end is in the journal, the reply lost", "kafka", "reply", journal, END),
        Boundary("before telling", "kafka", "request", telling(WALLETS_PROVISIONED)),
        Boundary("told, the reply lost", "kafka", "reply", telling(WALLETS_PROVISIONED)),
    ],
    ids=str,
)
async def test_a_database_lost_while_wallets_are_asked_for_comes_back_with_each_made_once(
    wallets: Rigs[Losing], boundary: Boundary
) -> None:
    await (await wallets.quiet()).lose_at(boundary)
