"""A rig for crash tests of withdrawals: the movement's worker behind proxies, real USDC on a chain of its own, and what came of it.

Customers ask by Kafka; blocks and heads come when the test lets them (`blocks`). What was asked for, what the chain's own
Transfer logs show, what the ledger holds and what was told are compared as wholes: everything asked for so far, however
many workers died on the way.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from eth_account import Account as Keys

from agents.emitter import Emitter
from chain.rpc import Rpc
from ledger.accounts import buffer, spendable
from ledger.journal import Relay
from ledger.posting import Transaction, credit, debit
from ledger.rows import Changes
from ledger.verify import verify
from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from stablerail.dev.stack import Stack
from stablerail.dev.usdc import Usdc, deploy
from tests.support.invariants import end_database
from tests.support.ledger_rig import connect_to
from tests.support.payouts import store
from tests.support.proxies import HttpProxy, KafkaProxy, PostgresProxy
from tests.support.worker_rig import WorkerRig, opened
from topics.catalog import CHAIN_HEADS, WITHDRAWALS_REQUESTED, WITHDRAWALS_SETTLED
from topics.envelope import headers_of, value_of
from topics.events import Event, HeadSeen, Rail, WithdrawalRequested, WithdrawalSettled

CHAIN = "MATIC"
DEPTH = 2
BLOCK_S = 0.1
FUNDS = 1_000_000_000_000
STAGES = (
    "accept_withdrawals",
    "sign_transactions",
    "sign_waiting",
    "broadcast_transactions",
    "track_confirmations",
    "raise_fees",
    "top_up_lanes",
    "settle_withdrawals",
    "transfer_by_custodian",
    "settle_transfers",
)
WOKEN = ("sign_waiting", "track_confirmations", "raise_fees", "top_up_lanes")
"""By a head."""
PASSWORD = "correct horse battery staple"
R = TypeVar("R", bound="WithdrawalRig")


@dataclass(frozen=True)
class Asked:
    """A withdrawal as it was asked for."""

    key: str
    user_id: str
    to: str
    amount: int
    outcome: str = "completed"
    """As it must end."""


class WithdrawalRig(WorkerRig):
    """Its workers go through a third proxy, to the chain."""

    movement = "withdrawals"
    rail = Rail.CHAIN.value

    def __init__(
        self, stack: Stack, prefix: str, anvil: Anvil, usdc: Usdc, proxies: tuple[PostgresProxy, KafkaProxy, HttpProxy]
    ) -> None:
        postgres, kafka, self.rpc = proxies
        super().__init__(stack, prefix, postgres, kafka)
        self.anvil, self.usdc = anvil, usdc
        self.asked: list[Asked] = []
        self.heads = 0
        """That were told."""
        self.raises = False
        """Whether transactions are lost here, and sped up."""
        self._key = secrets.token_bytes(32)
        self.signer: str = Keys.from_key(self._key).address.lower()
        self._users = [f"user-{number}" for number in range(3)]
        self._told: list[WithdrawalSettled] = []

    # -- workers -----------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, str]:
        """A command's, which goes past the proxies."""
        rpc_urls = {"STABLERAIL_RPC_URLS": json.dumps({CHAIN: [self.anvil.rpc_url]})}
        return {**os.environ, **self._stack.environment, **rpc_urls}

    def worker_environment(self) -> dict[str, str]:
        return {**super().worker_environment(), "STABLERAIL_RPC_URLS": json.dumps({CHAIN: [self.rpc.url]})}

    async def until_owned(self) -> None:
        """Until every partition of every stage has an owner, and the journal has that."""

        async def owned() -> bool:
            rows = await self.database.fetch("SELECT stage, count(*) FROM owners GROUP BY 1")
            partitions = {stage: count for stage, count in rows if stage in STAGES}
            return partitions == dict.fromkeys(STAGES, CHAIN_HEADS.partitions) and await self.is_idle()

        await self.until(owned, "a worker owns every partition")

    # -- what happens ------------------------------------------------------------------------------------------------

    async def ask(self, count: int = 3) -> list[Asked]:
        """Withdrawals of one customer as one record batch: one fetch, one run, one transaction."""
        return await self.send([self.wanted(number) for number in range(count)])

    def wanted(self, number: int, outcome: str = "completed") -> Asked:
        """The next withdrawal but `number`."""
        user = self._users[len(self.asked) % len(self._users)]
        to, amount = "0x" + secrets.token_hex(20), 1_000_000 + len(self.asked) + number
        return Asked(secrets.token_hex(8), user, to, amount, outcome)

    async def send(self, made: list[Asked]) -> list[Asked]:
        batch = self._producer.create_batch()
        for one in made:
            event = WithdrawalRequested(
                user_id=one.user_id,
                idempotency_key=one.key,
                chain=CHAIN,
                asset="USDC",
                amount=f"{one.amount / 1e6:.6f}",
                to=one.to,
                rail=self.rail,
            )
            headers = headers_of(event.ce_type(), event_id=event.identity(), source="test", time=datetime.now(UTC))
            batch.append(key=one.user_id.encode(), value=value_of(event), timestamp=None, headers=headers)
        await (await self._producer.send_batch(batch, WITHDRAWALS_REQUESTED.named(self.prefix), partition=0))
        self.asked += made
        return made

    async def head(self) -> None:
        """One block, and a worker of `chains` tells of it."""
        number = await self.anvil.mine()
        block = await self.anvil.rpc("eth_getBlockByNumber", hex(number), False)
        event = HeadSeen(
            chain=CHAIN, chain_id=self.anvil.chain_id, number=number, block_hash=block["hash"],
            timestamp_s=int(block["timestamp"], 16),
        )  # fmt: skip
        await self._tell(event)
        self.heads += 1

    async def heads_settled(self) -> bool:
        """Whether every head so far was settled by every stage that it wakes: none of them meets what is asked for next."""
        settled = await self.database.fetch(
            "SELECT stage, count(*) FROM inbox WHERE stage = ANY($1) GROUP BY stage", list(WOKEN)
        )
        return {stage for stage, count in settled if count >= self.heads} == set(WOKEN)

    async def _tell(self, event: Event) -> None:
        headers = headers_of(event.ce_type(), event_id=event.identity(), source="test", time=datetime.now(UTC))
        await self._producer.send_and_wait(
            CHAIN_HEADS.named(self.prefix), value_of(event), key=CHAIN.encode(), headers=headers
        )

    @asynccontextmanager
    async def blocks(self) -> AsyncIterator[None]:
        """Blocks come while this lasts."""
        ended = asyncio.Event()

        async def come() -> None:
            while not ended.is_set():
                await self.head()
                await asyncio.sleep(BLOCK_S)

        coming = asyncio.create_task(come())
        try:
            yield
        finally:
            ended.set()
            await asyncio.gather(coming, return_exceptions=True)

    # -- looking -----------------------------------------------------------------------------------------------------

    async def told(self) -> Sequence[WithdrawalSettled]:
        """Everything in `withdrawals.settled` so far, repeats too."""
        self._told += [WithdrawalSettled.model_validate_json(record.value) for record in await self.news()]
        return tuple(self._told)

    # -- judging -----------------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Everything that was ever asked for is paid once, or given back, as wanted, and told; ends quiet."""
        async with self.blocks():
            await self.until(self._all_told, "every withdrawal is told as settled")
            await self.ask(1)  # the next is served, and its turns of the relay clear what has left
            await self.until(self._all_told, "the next withdrawal is told as settled")
        await self.until(self.heads_settled, "every head is settled")
        await self.until(self.is_idle, "the journal has everything")
        told: dict[str, set[tuple[Any, ...]]] = {}
        for event in await self.told():
            told.setdefault(event.withdrawal_id, set()).add((event.user_id, event.to, event.amount, event.outcome))
        assert sorted(end for ends in told.values() for end in ends) == sorted(
            (one.user_id, one.to, f"{one.amount / 1e6:.6f}", one.outcome) for one in self.asked
        ), "each ended once, and every repeat says the same"
        paid = [one for one in self.asked if one.outcome == "completed"]
        assert await self._paid() == Counter((one.to, one.amount) for one in paid), "the chain's Transfer logs"
        await self.check_sender()
        spent = Counter[str]()
        for one in paid:
            spent[one.user_id] += one.amount
        rows = await self.database.fetch("SELECT owner, type, balance::text FROM accounts WHERE owner <> 'system'")
        balances = {(owner, type): int(balance) for owner, type, balance in rows if int(balance)}
        assert balances == {(user, "usdc_balance"): FUNDS - spent[user] for user in self._users}
        assert await self.database.fetchval("SELECT count(*) FROM holds WHERE state = 'open'") == 0
        results = await verify(self.database)
        assert [result for result in results if not result.holds] == []
        assert [hold for hold in self.holds if not hold.is_hit] == [], "a hold that was never hit proves nothing"
        self.holds.clear()
        self.is_quiet = True

    async def _all_told(self) -> bool:
        return await self.ended() == len(self.asked)

    async def ended(self) -> int:
        """Of how many withdrawals the end was told."""
        return len({event.withdrawal_id for event in await self.told()})

    async def _paid(self) -> Counter[tuple[str, int]]:
        async with Rpc(self.anvil.rpc_url, self.anvil.chain_id) as rpc:
            logs = await rpc.logs(
                self.usdc.address.lower(), {one.to for one in self.asked}, 0, (await rpc.head()).number
            )
        assert {log.sender for log in logs} <= {self.payer}
        return Counter((log.to, log.amount) for log in logs)

    @property
    def payer(self) -> str:
        """The address that withdrawals leave from."""
        return self.signer

    async def check_sender(self) -> None:
        rows = await self.database.fetch(
            "SELECT nonce, n FROM attempts WHERE signer = $1 ORDER BY nonce, n", self.signer
        )
        used = sorted({nonce for nonce, _ in rows})
        assert used == list(range(len(used))), "nonces without a gap"
        assert self.raises or len(rows) == len(used), "one attempt each"
        assert int(await self.anvil.rpc("eth_getTransactionCount", self.signer, "latest"), 16) == len(used)

    # -- life --------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Schema, topics, customers with money, a hot wallet with USDC and gas, and the clients of the test's own."""
        await self._stack.prepare()
        keystore = self._stack.directory / "keystore.json"
        keystore.write_text(json.dumps(Keys.encrypt(self._key, PASSWORD, kdf="scrypt", iterations=16)))
        self._stack.environment["STABLERAIL_WITHDRAWAL_KEYSTORE"] = str(keystore)
        self._stack.environment["STABLERAIL_WITHDRAWAL_KEYSTORE_PASSWORD"] = PASSWORD
        await self.anvil.rpc("anvil_setBalance", self.signer, hex(10**21))
        await self.usdc.transfer(self.signer, FUNDS)
        await self.connect()
        writer = await connect_to(self.dsn)()
        gifts = [
            Transaction(secrets.token_hex(16), "gift", "", (debit(spendable(user), FUNDS), credit(buffer(), FUNDS)))
            for user in self._users
        ]
        await store(writer, Changes(), gifts, datetime.now(UTC))
        await writer.close()
        await self._journal()
        await self.start_clients(WITHDRAWALS_SETTLED)

    async def _journal(self) -> None:
        """What the test wrote: nobody else's relay is to find it."""
        emitter = Emitter(self.bootstrap, self.prefix)
        await emitter.start()
        relay = Relay(connect_to(self.dsn), emitter.journal)
        await relay.journal()
        await relay.close()
        await emitter.stop()
        await self.database.execute("DELETE FROM outbox")

    async def first_worker(self) -> None:
        """A worker, and a withdrawal through it, so that every topic has a leader before anything is held."""
        self.start_worker()
        await self.until_owned()
        await self.check()


@asynccontextmanager
async def withdrawal_rig(
    directory: Path,
    server: Postgres,
    broker: Kafka,
    tools: Tools,
    settings: Mapping[str, str],
    kind: type[R] = WithdrawalRig,  # type: ignore[assignment]
) -> AsyncIterator[R]:
    """A rig on a database, topics and a chain of its own, with a worker that is idle and owns everything."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    prefix = f"t{uuid.uuid4().hex[:10]}."
    host, port = broker.bootstrap.split(":")
    with Anvil(directory / name, tools) as anvil:
        usdc = await deploy(anvil, tools.contracts)
        parts = {
            "STABLERAIL_DATABASE_URL": server.create_database(name),
            "STABLERAIL_KAFKA_BOOTSTRAP": broker.bootstrap,
            "STABLERAIL_CHAIN_IDS": json.dumps({CHAIN: anvil.chain_id}),
            "STABLERAIL_USDC_CONTRACTS": json.dumps({CHAIN: usdc.address}),
            "STABLERAIL_FINALITY_DEPTHS_BLOCKS": json.dumps({CHAIN: DEPTH}),
            "STABLERAIL_WITHDRAWAL_CHAINS": CHAIN,
            "STABLERAIL_TOPIC_PREFIX": prefix,
        }
        try:
            with (
                PostgresProxy("127.0.0.1", server.port) as postgres,
                KafkaProxy(host, int(port)) as kafka,
                HttpProxy("127.0.0.1", anvil.port) as rpc,
            ):
                stack = Stack(directory / name, parts, settings={**parts, **settings})
                rig = kind(stack, prefix, anvil, usdc, (postgres, kafka, rpc))
                rig.raises = "STABLERAIL_WITHDRAWAL_SPEED_UP_BLOCKS" in settings  # a slow machine is enough then
                async with opened(rig):
                    yield rig
        finally:
            end_database(server, name)
