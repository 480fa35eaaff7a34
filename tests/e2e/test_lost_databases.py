"""The database lost at every boundary of a stage, rebuilt from nothing and from an old backup with the journal.

What was acknowledged, told, sent or called is in the rebuilt one; what was not is delivered again; nothing else is. Of each kind of
stage one: deposits are credited (the ledger alone), withdrawals are signed and sent (a chain), wallets are asked for (a partner).
The tests of a stage share its topics, its chain or partner, and the old backup; each loss adds to the ones before.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
import pytest_asyncio

from agents.deposits import credit_deposits
from agents.recovery import restoring
from agents.services import Services
from ledger.accounts import spendable
from ledger.rows import Changes, Connection
from ledger.tables import WALLETS
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from tests.support import deposit_rig
from tests.support.crash_rig import Rigs
from tests.support.in_process import Ground, read_topic
from tests.support.lost_database import Acked, Boundary, Losing, commit_of, serving
from tests.support.payouts import store
from tests.support.proxies import Match, produce
from topics.catalog import (
    DEPOSITS_CREDITED,
    DEPOSITS_NOTIFIED,
    JOURNAL,
    Topic,
)
from topics.envelope import headers_of, value_of
from topics.events import DepositCredited, DepositNotified, Event, Evidence

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
async def deposit_rigs(postgres: Postgres, kafka: Kafka) -> AsyncIterator[Rigs[Losing]]:
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
    deposit_rigs: Rigs[Losing], boundary: Boundary
) -> None:
    await (await deposit_rigs.quiet()).lose_at(boundary)
