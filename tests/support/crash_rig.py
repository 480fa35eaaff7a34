"""A rig for crash tests: workers of the movement `deposits` behind both proxies, deposits sent to them, what came of it.

A deposit is a message in `deposits.notified`. No chain is read. What the workers were sent, what the database holds and what was
told are compared as wholes: everything sent so far on this database and these topics, however many workers died on the way.
"""

from __future__ import annotations

import secrets
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Generic, Protocol, TypeVar

from aiokafka.admin import AIOKafkaAdminClient

from ledger.record import Message, unpack
from ledger.verify import verify
from stablerail.dev.stack import Stack
from tests.support.proxies import KafkaProxy, PostgresProxy
from tests.support.worker_rig import PATIENCE_S, WorkerRig, worker_rig
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_NOTIFIED, JOURNAL
from topics.envelope import headers_of, value_of
from topics.events import DepositCredited, DepositNotified, Evidence
from topics.partitioner import partition_of

DRAINED_S = 20.0
"""Less than the sweeper's 30 s: what the next owner should have finished must not come from there."""
STAGES = ("credit_deposits", "finalize_deposits")
_SETTLED_TABLES = """
SELECT d.tx_hash, d.amount::text, d.user_id, d.generation, count(t.id)
FROM deposits d LEFT JOIN transactions t ON t.reference = replace(d.id::text, '-', '') AND t.kind = 'deposit'
GROUP BY d.id
"""


@dataclass(frozen=True)
class Sent:
    """A deposit as the tests sent it."""

    tx_hash: str
    wallet: str
    amount: int
    partition: int
    offset: int


@dataclass(frozen=True)
class Found:
    """How far some deposits are: what each later step may rely on."""

    committed: bool = False
    journaled: bool = False
    """The broker has their commit record."""
    marked: bool = False
    """The database knows that."""
    told: bool = False
    acked: bool = False


class CrashRig(WorkerRig):
    movement = "deposits"

    def __init__(self, stack: Stack, prefix: str, postgres: PostgresProxy, kafka: KafkaProxy) -> None:
        super().__init__(stack, prefix, postgres, kafka)
        self.sent: list[Sent] = []
        self._wallets = {f"0x{secrets.token_hex(20)}": f"user-{number}" for number in range(6)}
        self._told: dict[int, list[DepositCredited]] = defaultdict(list)
        self._journal: list[tuple[int, Sequence[Message]]] = []
        self._admin: AIOKafkaAdminClient

    @property
    def wallets(self) -> list[str]:
        return list(self._wallets)

    # -- workers -----------------------------------------------------------------------------------------------------

    async def epochs(self) -> dict[tuple[str, int], int]:
        rows = await self.database.fetch("SELECT stage, partition, epoch FROM owners WHERE stage = ANY($1)", STAGES)
        return {(stage, partition): epoch for stage, partition, epoch in rows}

    async def until_owned(self, since: Mapping[tuple[str, int], int]) -> None:
        """Until every partition of both stages has an owner newer than `since`, and the journal has it."""

        async def owned() -> bool:
            now = await self.epochs()
            every = [(stage, partition) for stage in STAGES for partition in range(DEPOSITS_NOTIFIED.partitions)]
            return all(now.get(key, 0) > since.get(key, 0) for key in every) and await self.is_idle()

        await self.until(owned, "a worker owns every partition")

    # -- sending -----------------------------------------------------------------------------------------------------

    async def deposit_together(self, count: int = 3) -> list[Sent]:
        """Deposits to one wallet as one record batch: one fetch, one run, one transaction."""
        wallet = self.wallets[0]
        partition = partition_of(wallet.encode(), DEPOSITS_NOTIFIED.partitions)
        return await self._send([wallet] * count, partition)

    async def deposit_everywhere(self, each: int = 2) -> list[Sent]:
        """Deposits to every wallet."""
        sent: list[Sent] = []
        for partition in range(DEPOSITS_NOTIFIED.partitions):
            wallets = [w for w in self.wallets if partition_of(w.encode(), DEPOSITS_NOTIFIED.partitions) == partition]
            if wallets:
                sent += await self._send(wallets * each, partition)
        return sent

    async def _send(self, wallets: Sequence[str], partition: int) -> list[Sent]:
        batch = self._producer.create_batch()
        events = []
        for number, wallet in enumerate(wallets):
            event = DepositNotified(
                source="circle", transfer_id=str(uuid.uuid4()), chain="MATIC", tx_hash=f"0x{secrets.token_hex(32)}",
                to=wallet, asset="USDC", amount=f"{len(self.sent) + number + 1}.25", evidence=Evidence.CONFIRMED,
            )  # fmt: skip
            headers = headers_of(
                event.ce_type(), event_id=event.transfer_id, source="circle/webhooks", time=datetime.now(UTC)
            )
            batch.append(key=wallet.encode(), value=value_of(event), timestamp=None, headers=headers)
            events.append(event)
        topic = DEPOSITS_NOTIFIED.named(self.prefix)
        stored = await (await self._producer.send_batch(batch, topic, partition=partition))
        sent = [
            Sent(event.tx_hash, event.to, event.amount, partition, stored.offset + number)
            for number, event in enumerate(events)
        ]
        self.sent += sent
        return sent

    # -- looking -----------------------------------------------------------------------------------------------------

    async def found(self, sent: Sequence[Sent]) -> Found:
        """How far these are; all of them must be equally far."""
        wanted = {each.tx_hash for each in sent}
        steps = await self._steps(sent)
        assert all(step in (set(), wanted) for step in steps), f"not one batch: {steps}"
        return Found(*map(bool, steps))

    async def until_at(self, found: Found, sent: Sequence[Sent], what: str) -> None:
        """Until all of them are just so far."""
        wanted = {each.tx_hash for each in sent}
        steps = [wanted if reached else set() for reached in astuple(found)]

        async def there() -> bool:
            return await self._steps(sent) == steps

        await self.until(there, what)

    async def _steps(self, sent: Sequence[Sent]) -> list[set[str]]:
        """Those that have done each step of `Found`."""
        wanted = {each.tx_hash for each in sent}
        committed = {hash_ for (hash_,) in await self.database.fetch("SELECT tx_hash FROM deposits")} & wanted
        left = await self.database.fetch("SELECT record FROM outbox WHERE NOT journaled")
        unmarked = _about(wanted, [message for (record,) in left for message in unpack(record).messages])
        journaled = _about(wanted, [message for _, messages in await self.journal() for message in messages])
        told = {event.tx_hash for events in (await self.told()).values() for event in events} & wanted
        offsets = await self.acknowledged()
        acked = {each.tx_hash for each in sent if offsets.get(each.partition, 0) > each.offset}
        return [committed, journaled, committed - unmarked, told, acked]

    async def committed(self, sent: Sequence[Sent]) -> int:
        """How many of these are in the database."""
        wanted = [each.tx_hash for each in sent]
        return int(await self.database.fetchval("SELECT count(*) FROM deposits WHERE tx_hash = ANY($1)", wanted))

    async def told(self) -> Mapping[int, Sequence[DepositCredited]]:
        """Everything in `deposits.credited` so far, by partition, in order, repeats too."""
        await self._read()
        return self._told

    async def journal(self) -> Sequence[tuple[int, Sequence[Message]]]:
        """(sequence number, messages) of every record in the journal so far, repeats too."""
        await self._read()
        return tuple(self._journal)

    async def _read(self) -> None:
        for record in await self.news():
            if record.topic == JOURNAL.named(self.prefix):
                self._journal.append((int.from_bytes(record.key), unpack(record.value).messages))
            else:
                self._told[record.partition].append(DepositCredited.model_validate_json(record.value))

    async def acknowledged(self) -> dict[int, int]:
        """Partition of deposits.notified -> the offset the group has committed."""
        offsets = await self._admin.list_consumer_group_offsets(self.group)
        topic = DEPOSITS_NOTIFIED.named(self.prefix)
        return {tp.partition: meta.offset for tp, meta in offsets.items() if tp.topic == topic}

    async def time_to_acknowledge(self) -> None:
        """Three heartbeats long, longer than Faust's commit interval: who acknowledges too early has done it then."""
        before = self.kafka.hits["Heartbeat"]

        async def beaten() -> bool:
            return self.kafka.hits["Heartbeat"] >= before + 3

        await self.until(beaten, "the worker's heart beats")

    async def members(self) -> int | None:
        """How many workers the group has; None while it is finding that out."""
        (answer,) = await self._admin.describe_consumer_groups([self.group])
        ((_, _, state, _, _, members, *_),) = answer.groups
        return len(members) if state in ("Stable", "Empty") else None

    async def open_transactions(self) -> int:
        """Sessions of workers that hold a transaction open and do nothing."""
        sql = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"
        )
        return int(await self.database.fetchval(sql))

    async def waits_for_lock(self) -> bool:
        """Whether a backend of this database waits for another's lock."""
        sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        return bool(await self.database.fetchval(sql))

    def _is_drained(self, last: int) -> Callable[[], Awaitable[bool]]:
        """Nothing up to that number, and nothing that the journal lacks. A partition may be claimed at any time, which is a commit."""
        left = "SELECT count(*) FROM outbox WHERE seq <= $1 OR NOT journaled"

        async def drained() -> bool:
            return not await self.database.fetchval(left, last)

        return drained

    # -- judging -----------------------------------------------------------------------------------------------------

    async def until_settled(self, timeout_s: float = PATIENCE_S) -> None:
        """Until everything sent was told and acknowledged."""
        wanted = {each.tx_hash for each in self.sent}
        ends: dict[int, int] = defaultdict(int)
        for each in self.sent:
            ends[each.partition] = max(ends[each.partition], each.offset + 1)

        async def settled() -> bool:
            told = {event.tx_hash for events in (await self.told()).values() for event in events}
            return wanted <= told and (await self.acknowledged()) == ends

        await self.until(settled, "everything is told and acknowledged", timeout_s)

    async def check(self) -> None:
        """Nothing is lost and nothing is there twice, in all that was ever sent; ends quiet."""
        await self.until_settled()
        last = await self.database.fetchval("SELECT max(seq) FROM outbox")
        await self.deposit_together(1)  # the next event is served, and its turn of the relay clears what has left
        await self.until_settled()
        await self.until(self._is_drained(last), "the outbox is drained", DRAINED_S)
        by_hash = {each.tx_hash: each for each in self.sent}
        rows = await self.database.fetch(_SETTLED_TABLES)
        expected = {(s.tx_hash, str(s.amount), self._wallets[s.wallet], 1, 1) for s in self.sent}
        assert {tuple(row) for row in rows} == expected, "deposits and their ledger credits are the inputs"
        assert len(rows) == len(expected) == len(self.sent)
        assert await self._balances() == self._expected_balances()
        self._check_told(by_hash)
        journaled = _about(set(by_hash), [message for _, messages in await self.journal() for message in messages])
        assert journaled == set(by_hash), "nobody was told what the journal does not have"
        results = await verify(self.database)
        assert all(result.holds for result in results), [result for result in results if not result.holds]
        assert [hold for hold in self.holds if not hold.is_hit] == [], "a hold that was never hit proves nothing"
        self.holds.clear()
        self.is_quiet = True

    def _check_told(self, by_hash: Mapping[str, Sent]) -> None:
        first: dict[str, dict[str, None]] = defaultdict(dict)
        transactions: dict[str, str] = {}
        for events in self._told.values():
            for event in events:
                first[event.to].setdefault(event.tx_hash)
                known = transactions.setdefault(event.tx_hash, event.transaction_id)
                assert known == event.transaction_id, "a repeat says the same"
                assert event.amount == by_hash[event.tx_hash].amount
        for wallet in self.wallets:
            sent = [each.tx_hash for each in self.sent if each.wallet == wallet]
            assert list(first[wallet]) == sent, f"order of {wallet}"

    async def _balances(self) -> dict[str, int]:
        sql = "SELECT owner || '.' || type, sum(balance)::text FROM accounts GROUP BY 1"
        return {name: int(balance) for name, balance in await self.database.fetch(sql)}

    def _expected_balances(self) -> dict[str, int]:
        totals: dict[str, int] = defaultdict(int)
        for each in self.sent:
            totals[f"{self._wallets[each.wallet]}.usdc_balance"] += each.amount
            totals["system.system_buffer_usdc"] -= each.amount
        return dict(totals)

    # -- life --------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Schema, topics, wallets, and the clients of the test's own, which go past the proxies."""
        await self._stack.prepare()
        await self.connect()
        await self.database.executemany(
            "INSERT INTO wallets VALUES ('MATIC', $1, $2, $1, now())", list(self._wallets.items())
        )
        self._admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await self._admin.start()
        await self.start_clients(DEPOSITS_CREDITED, JOURNAL)

    async def first_worker(self) -> None:
        """A worker, and deposits through it, so that every topic has a leader before anything is counted."""
        self.start_worker()
        await self.until_owned({})
        await self.deposit_everywhere()
        await self.check()

    async def close(self) -> None:
        await self._admin.close()
        await super().close()


def _about(hashes: set[str], messages: Iterable[Message]) -> set[str]:
    """Which of these transactions the messages tell of."""
    credited = [m for m in messages if m.topic == DEPOSITS_CREDITED.name]
    return {DepositCredited.model_validate_json(message.value or b"").tx_hash for message in credited} & hashes


class Quiet(Protocol):
    is_quiet: bool


R = TypeVar("R", bound=Quiet)


class Rigs(Generic[R]):
    """The rig that a module's tests share: each goes on with the worker that the one before left. One that failed leaves
    nobody knows what, so the next gets a new rig."""

    def __init__(self, make: Callable[[], AbstractAsyncContextManager[R]]) -> None:
        self._make = make
        self._stack = AsyncExitStack()
        self._rig: R | None = None

    async def quiet(self) -> R:
        if self._rig is None or not self._rig.is_quiet:
            await self.close()
            self._rig = await self._stack.enter_async_context(self._make())
        self._rig.is_quiet = False
        return self._rig

    async def close(self) -> None:
        self._rig = None
        await self._stack.aclose()


crash_rig = partial(worker_rig, CrashRig)
