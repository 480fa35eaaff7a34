"""Each invariant is broken by SQL in a copy of one database that holds a whole flow, and found there; in the original all hold.

The flow: customers with wallets, deposits that became final, one that was refused and is a dead letter, withdrawals signed, mined and
settled, orders of every end; the chain, and the journal topic, are those that it happened on.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from agents.emitter import Emitter
from agents.investing import release_orders, reserve_orders, settle_fills
from agents.item import read_item
from agents.outcome import Stage
from agents.recovery.store_dead_letters import stage as storing
from agents.stage import settle
from ledger.accounts import Account, AccountType
from ledger.commit import claim_owners
from ledger.journal import Relay
from ledger.migrate import upgrade
from ledger.orders import UNSHARDED
from ledger.posting import Transaction, credit, debit
from ledger.record import Message
from ledger.rows import Connection
from stablerail.config import Settings, load_settings
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from stablerail.topics_admin import admin, create_missing
from stablerail.verify import verify_all
from tests.support.deposit_rig import USDC, Shore, Till, now
from tests.support.in_process import until
from tests.support.invariants import end_database
from tests.support.ledger_rig import connect_to, owner, unguard
from tests.support.payouts import DEPTH, Payouts, payouts
from topics.catalog import DEPOSITS_NOTIFIED, JOURNAL
from topics.envelope import headers_of, value_of
from topics.events import DepositNotified, Event, Evidence, OrderCancelled, OrderFilled, OrderPlaced

pytestmark = pytest.mark.asyncio(loop_scope="module")

CUSTODY = Account("system", AccountType.CUSTODY_USDC, "USDC", "MATIC")
WORLD = Account("system", AccountType.WORLD_USDC)
HOUSE = 1_000_000_000_000
"""What the hot wallet holds before anything happens."""


@dataclass
class Whole:
    """A database that is copied: nobody is connected to it any more."""

    server: Postgres
    name: str
    settings: dict[str, Any]

    def of(self, dsn: str) -> Settings:
        return load_settings(env_file=None, database_url=dsn, **self.settings)

    @contextmanager
    def copy(self) -> Iterator[str]:
        name = f"test_{uuid.uuid4().hex[:12]}"
        try:
            yield self.server.create_database(name, template=self.name)
        finally:
            self.server.drop_database(name)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(postgres: Postgres, kafka: Kafka, scratch: Path, tools: Tools) -> AsyncIterator[Whole]:
    name, prefix = f"test_{uuid.uuid4().hex[:12]}", f"t{uuid.uuid4().hex[:10]}."
    dsn = postgres.create_database(name)
    try:
        await upgrade(dsn, "stablerail")
        opened: list[Connection] = []

        async def connect() -> Connection:
            opened.append(await connect_to(dsn)())
            return opened[-1]

        async with payouts(await connect(), connect, scratch / name, tools) as desk:
            await happen(desk, dsn)
            await journal(dsn, kafka.bootstrap, prefix)
            for one in opened:  # what is copied has nobody in it
                await one.close()
            await until(lambda: deserted(postgres.dsn, name), "the server has ended every session in it")
            settings = {
                "kafka_bootstrap": kafka.bootstrap, "topic_prefix": prefix, "rpc_urls": {"MATIC": [desk.anvil.rpc_url]},
                "usdc_contracts": {"MATIC": desk.usdc.address}, "chain_ids": {"MATIC": desk.anvil.chain_id},
                "finality_depths_blocks": {"MATIC": DEPTH},
            }  # fmt: skip
            yield Whole(postgres, name, settings)
    finally:
        end_database(postgres, name)


async def deserted(server: str, name: str) -> bool:
    """A session ends a moment after its connection, and no database is copied before."""
    connection = await owner(server)
    try:
        query = "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'"
        return bool(await connection.fetchval(query, name))
    finally:
        await connection.close()


async def happen(desk: Payouts, dsn: str) -> None:
    desk.now = now()
    till = Till(desk.connection)
    shore = Shore(till, desk.anvil, desk.usdc, desk.rpc, dsn=dsn)
    await refuse(till, shore.credit)
    await till.post(Transaction(uuid.uuid4().hex, "funded", "", (debit(CUSTODY, HOUSE), credit(WORLD, HOUSE))))
    users = []
    for amount in (5, 7):
        user, address = await shore.wallet()
        users.append(user)
        await shore.pay((address, amount * USDC), (address, USDC))
    await shore.final()
    for _ in range(2):
        await desk.sent()
    await desk.head(DEPTH + 1)
    await invest(till, users[0])


async def invest(till: Till, user: str) -> None:
    """One order that is open and filled in part, one filled, one cancelled, one that was too dear."""
    orders = {"open": "1", "bought": "1", "cancelled": "1", "dear": "1000"}
    placed = [OrderPlaced(order_id=one, user_id=user, amount=amount) for one, amount in orders.items()]
    await till.settle(reserve_orders.stage(), *placed)
    fills: list[Event] = [
        OrderFilled(order_id="open", fill_id="f1", amount="0.4"),
        OrderFilled(order_id="bought", fill_id="f1", amount="0.9", filled_total="0.9"),
    ]
    await till.settle(settle_fills.stage(UNSHARDED), *fills)
    cancel, _ = release_orders.stages()
    await till.settle(cancel, OrderCancelled(order_id="cancelled"))
    await till.settle(settle_fills.stage(UNSHARDED), OrderFilled(order_id="cancelled", fill_id="late", amount="0.1"))


async def refuse(till: Till, stage: Stage[Any]) -> None:
    """Two hours ago, and its letter is stored."""
    event = DepositNotified(
        source="outside", transfer_id="t", chain="MATIC", tx_hash="0x" + "c" * 64, to="0x" + "1" * 40, asset="USDC",
        amount=5 * USDC, evidence=Evidence.CONFIRMED,
    )  # fmt: skip
    headers = headers_of(event.ce_type(), event_id="t", source="test", time=now())
    (letter,) = await settled(till, stage, b"k", value_of(event), headers)
    assert letter.topic == DEPOSITS_NOTIFIED.dlq.name
    await settled(till, storing(DEPOSITS_NOTIFIED.dlq), letter.key, letter.value, letter.headers)


async def settled(till: Till, stage: Stage[Any], key: Any, value: Any, headers: Any) -> list[Message]:
    at, topic = now() - timedelta(hours=2), stage.source.name
    async with till.connection.transaction():
        epochs, _ = await claim_owners(till.connection, stage.name, [(topic, 1)], at)
    record: Any = SimpleNamespace(
        topic=topic, partition=1, offset=0, timestamp=0, key=key, value=value, headers=list(headers)
    )
    done = await settle(till.connection, stage, [read_item(stage, record)], epochs, at, None)
    assert done.sealed is not None
    return list(done.sealed.messages)


async def journal(dsn: str, bootstrap: str, prefix: str) -> None:
    """All of it, and as if it had been told."""
    async with admin(bootstrap) as client:
        await create_missing(client, prefix, 1, [JOURNAL])
    emitter = Emitter(bootstrap, prefix)
    await emitter.start()
    relay = Relay(connect_to(dsn), emitter.journal)
    await relay.journal()
    await relay.close()
    await emitter.stop()
    connection = await owner(dsn)
    await connection.execute("DELETE FROM outbox")
    await connection.close()


DEPOSIT = "(SELECT id FROM deposits WHERE status = 'finalized' ORDER BY id LIMIT 1)"
REFERENCE = f"(SELECT replace({DEPOSIT}::text, '-', ''))"
PAID = "(SELECT id FROM withdrawals WHERE status = 'completed' ORDER BY id LIMIT 1)"
AGAIN = (
    "INSERT INTO transactions (id, kind, reference, fingerprint, at, batch)"
    " SELECT gen_random_uuid(), kind, reference, gen_random_uuid(), at, batch FROM transactions WHERE kind = "
)
FIRST = "(SELECT id FROM accounts WHERE type = 'usdc_balance' ORDER BY id LIMIT 1)"
DAMAGE: dict[str, tuple[set[int], str]] = {
    "1: an entry's amount": ({1, 3, 11}, f"UPDATE entries SET amount = amount + 1 WHERE account_id = {FIRST} AND version = 1"),
    "2: money from nowhere": (
        {2, 3}, "UPDATE accounts SET balance = balance + 1 WHERE type = 'usdc_balance' AND owner = (SELECT min(user_id) FROM wallets)",
    ),
    "3: a customer's balance moved to another's": (
        {3}, "UPDATE accounts SET balance = balance + CASE WHEN owner = (SELECT min(user_id) FROM wallets) THEN -1 ELSE 1 END"
        " WHERE type = 'usdc_balance' AND owner IN (SELECT user_id FROM wallets)",
    ),
    "4: the mirror": (
        {3, 4}, "UPDATE accounts SET balance = balance + CASE type WHEN 'custody_usdc' THEN -1 ELSE 1 END"
        " WHERE type IN ('custody_usdc', 'world_usdc')",
    ),
    "5: a deposit is credited again": ({5, 11}, f"{AGAIN} 'deposit' AND reference = {REFERENCE}"),
    "5: a deposit without its row": ({5}, f"DELETE FROM deposits WHERE id = {DEPOSIT}"),
    "6: a deposit that nobody judges": (
        {6}, "INSERT INTO deposits SELECT (d.r).* FROM (SELECT jsonb_populate_record(d, jsonb_build_object('id', gen_random_uuid(),"
        " 'status', 'pending', 'generation', 0, 'updated_at', now() - interval '2 days', 'n', 9)) AS r FROM deposits d LIMIT 1) AS d",
    ),
    "7: a withdrawal is debited again": ({7, 11}, f"{AGAIN} 'withdrawal' AND reference = replace({PAID}::text, '-', '')"),
    "7: a paid withdrawal is released too": (
        {7, 11}, "INSERT INTO transactions (id, kind, reference, fingerprint, at, batch) SELECT gen_random_uuid(), 'withdrawal_release',"
        f" reference, gen_random_uuid(), at, batch FROM transactions WHERE kind = 'withdrawal' AND reference = replace({PAID}::text, '-', '')",
    ),
    "7: a paid withdrawal claims to have failed": ({7}, f"UPDATE withdrawals SET status = 'failed' WHERE id = {PAID}"),
    "8: a nonce that nobody signed": ({8}, "UPDATE lanes SET next_nonce = next_nonce + 1"),
    "8: a nonce of two withdrawals": ({8}, "UPDATE attempts SET nonce = 0, n = 1 + nonce"),
    "9: a commit that nobody told": (
        {9}, "INSERT INTO outbox (stage, topic, partitions, at, record) VALUES ('s', 't', '{0}', now() - interval '61 minutes', '')",
    ),
    "10: a refusal without its dead letter": ({10}, "DELETE FROM dead_letters"),
    "10: a repeat that is not scheduled": ({10}, "UPDATE inbox SET outcome = 'retry' WHERE outcome = 'rejected'"),
    "11: who did it": ({11}, "UPDATE audit SET actor = 'somebody' WHERE stage = 'settle_withdrawals' AND position = 2"),
    "11: the newest commit of a writer": (
        {11}, "DELETE FROM audit a USING owners o WHERE (a.stage, a.topic, a.partition, a.position) = (o.stage, o.topic, o.partition,"
        " o.position) AND o.stage = 'settle_withdrawals'",
    ),
    "12: a wallet of another customer": ({12}, "UPDATE wallets SET user_id = 'eve' WHERE address = (SELECT min(address) FROM wallets)"),
    "12: an event was never seen": ({12}, "DELETE FROM inbox WHERE stage = 'finalize_deposits'"),
    "13: a call that nobody concludes": (
        {13}, "INSERT INTO calls (id, stage, partner, operation, idempotency_key, request, fingerprint, state, created_at)"
        " VALUES (gen_random_uuid(), 's', 'p', 'o', gen_random_uuid(), '{}', '', 'open', now() - interval '2 hours')",
    ),
    "14: an order is open again": ({14}, "UPDATE orders SET status = 'reserved', ended_at = NULL WHERE status = 'cancelled'"),
    "14: a hold of an open order is spent": (
        {14}, "UPDATE holds SET captured = captured + 1, remaining = remaining - 1 WHERE id = (SELECT hold_id FROM orders WHERE order_id = 'open')",
    ),
    "14: an order was filled for more": ({14}, "UPDATE orders SET filled = filled + 1 WHERE order_id = 'open'"),
    "14: a fill has no row": ({14}, "DELETE FROM order_fills WHERE fill_id = 'late'"),
    "14: an order has no row": ({14}, "DELETE FROM orders WHERE order_id = 'bought'"),
    "14: what is held for orders is not the balance": (
        {3, 14}, "UPDATE accounts SET balance = balance + CASE type WHEN 'pending_investment' THEN -1 ELSE 1 END"
        " WHERE type IN ('pending_investment', 'usdc_balance') AND owner = (SELECT user_id FROM orders LIMIT 1)",
    ),
}  # fmt: skip


async def broken(whole: Whole, dsn: str, *, rebuild: bool) -> dict[int, tuple[str, ...]]:
    results = await verify_all(whole.of(dsn), rebuild=dsn if rebuild else None)
    assert [one.number for one in results] == [*range(1, 12), *([12] if rebuild else []), 13, 14]
    return {one.number: one.offending for one in results if not one.holds}


async def test_all_hold_in_the_whole_flow_and_each_has_something_to_look_at(whole: Whole) -> None:
    with whole.copy() as dsn:
        results = await verify_all(whole.of(dsn), rebuild=dsn)
    assert [(one.number, one.offending) for one in results if not one.holds] == []
    assert [one.number for one in results if not one.checked] == [13], "nothing is overdue"


@pytest.mark.parametrize("name", DAMAGE)
async def test_damage_in_a_copy_is_found(whole: Whole, name: str) -> None:
    wanted, statement = DAMAGE[name]
    with whole.copy() as dsn:
        connection = await owner(dsn)
        await unguard(connection)
        done = await connection.execute(statement)
        await connection.close()
        assert not done.endswith(" 0"), "the damage was done"
        found = await broken(whole, dsn, rebuild=12 in wanted)
    assert found.keys() == wanted, found
