"""The deposit stages on a real PostgreSQL and a real chain that reorganises, without Kafka: what the scanner finds and the heads
are settled as a worker would, one transaction each, and what a commit wants to tell is kept.
"""

from __future__ import annotations

import secrets
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from types import SimpleNamespace
from typing import Any

import orjson

from agents.deposits import credit_deposits, finalize_deposits
from agents.deposits.finalize_deposits import ChainReader
from agents.deposits.policy import DepositPolicy
from agents.item import read_item
from agents.outcome import Stage
from agents.stage import Settled, settle
from agents.withdrawals.withdrawal import Status, Withdrawal, fingerprint, held, paid, rows_of, withdrawal_id
from chain.logs import TransferLog
from chain.rpc import Rpc
from chain.scan import ScanSettings, begin
from chain.scanner import scan_once
from ledger import book
from ledger.accounts import Account, AccountType, spendable
from ledger.commit import claim_owners, lock_writer, seal
from ledger.posting import Transaction, credit, debit
from ledger.record import Message
from ledger.rows import Changes, Connection
from ledger.store import blocks_of
from ledger.tables import CUSTODIAN_TRANSFERS, WALLETS
from stablerail.config import load_settings
from stablerail.dev.anvil import Anvil
from stablerail.dev.usdc import Usdc
from stablerail.verify import verify_all
from topics.envelope import headers_of, value_of
from topics.events import Chain, DepositNotified, Event, Evidence, HeadSeen

DEPTH = 6
USDC = 10**6
MINIMUM = USDC


def policy(**changes: Any) -> DepositPolicy:
    given: dict[str, Any] = {"minimum": MINIMUM, "chains_read": frozenset({"MATIC"}), **changes}
    return DepositPolicy(**given)


def now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Till:
    """Stages over one connection: a worker, as far as the database can tell."""

    connection: Connection
    epochs: dict[tuple[str, str], dict[tuple[str, int], int]] = field(default_factory=dict)
    told: list[Message] = field(default_factory=list)
    alerts: Counter[str] = field(default_factory=Counter)
    offsets: Any = field(default_factory=count)

    async def settle(self, stage: Stage[Any], *events: Event, partition: int = 0, attempt: int = 1) -> Settled:
        """One batch."""
        topic = stage.source.name
        records = [self._record(topic, partition, event, attempt) for event in events]
        items = [read_item(stage, one) for one in records]
        prepared = await stage.prepare([item.received for item in items if item.received])
        key = (topic, partition)
        epochs = self.epochs.setdefault((stage.name, f"{key}"), {})
        if not epochs:
            async with self.connection.transaction():
                epochs.update((await claim_owners(self.connection, stage.name, [key], now()))[0])
        settled = await settle(self.connection, stage, items, epochs, now(), prepared)
        self.told += settled.sealed.messages if settled.sealed else ()
        self.alerts.update(alert.code for alert in settled.alerts)
        return settled

    def _record(self, topic: str, partition: int, event: Event, attempt: int) -> Any:
        headers = headers_of(event.ce_type(), event_id=event.identity(), source="test", time=now())
        if attempt > 1:
            headers = [*headers, ("attempt", str(attempt).encode())]
        place = {"topic": topic, "partition": partition, "offset": next(self.offsets)}
        return SimpleNamespace(**place, timestamp=0, key=b"key", value=value_of(event), headers=headers)

    def said(self, topic: str, **wanted: Any) -> list[dict[str, Any]]:
        """What was told on a topic, with these fields."""
        found = [orjson.loads(message.value or b"") for message in self.told if message.topic == topic]
        return [event for event in found if all(event[name] == value for name, value in wanted.items())]

    async def wallet(self, chain: str = "MATIC", address: str | None = None) -> tuple[str, str]:
        """A customer with a wallet, as onboarding leaves them."""
        user, address = f"user-{uuid.uuid4().hex[:12]}", address or "0x" + secrets.token_hex(20)
        changes = Changes()
        changes.insert(WALLETS, (chain, address, user, user, now()))
        await self.commit(changes)
        return user, address

    async def commit(self, changes: Changes) -> None:
        async with self.connection.transaction():
            owners = await lock_writer(self.connection, "test")
            await seal(
                self.connection, "test", owners, blocks=changes.blocks(), messages=[], at=now(), actor="test", summary={}
            )  # fmt: skip

    async def post(self, *transactions: Transaction) -> None:
        """In a commit of its own, or in the transaction that the connection is in."""
        async with self.connection.transaction():
            owners = await lock_writer(self.connection, "test.book")
            results, fold = await book.settle(self.connection, transactions, now())
            assert all(isinstance(result, book.Posted) for result in results), results
            await seal(
                self.connection, "test.book", owners, blocks=blocks_of(fold, owners[0].batch), messages=[], at=fold.at,
                actor="test", summary={},
            )  # fmt: skip

    async def balance(self, account: Account) -> int:
        found = await self.connection.fetchval("SELECT balance::text FROM accounts WHERE id = $1", account.id)
        return int(found or 0)

    async def spend(self, user: str, amount: int) -> None:
        legs = (debit(Account("system", AccountType.TREASURY_CAPITAL_USDC), amount), credit(spendable(user), amount))
        await self.post(Transaction(uuid.uuid4().hex, "spent", user, legs))

    async def withdrawal(self, user: str, amount: int, status: Status = Status.SIGNING) -> Withdrawal:
        """One whose amount is held, in that state; the completed one is paid. By Circle: there are no signed transactions."""
        key = uuid.uuid4().hex
        id = withdrawal_id(user, key)
        made = Withdrawal(
            id, user, key, fingerprint("circle", "MATIC", "USDC", str(amount), "0x"), "circle", "MATIC", "USDC", amount,
            "0x" + "9" * 40, status.value, None, None, now(), now(),
            now() if status is Status.COMPLETED else None, 1,
        )  # fmt: skip
        hold = held(made)
        made = made._replace(hold_id=hold.id)
        await self.post(hold)
        if status is Status.COMPLETED:
            await self.post(paid(made))
        changes = Changes()
        (table, row), (history, line) = rows_of(made, "test")
        changes.insert(table, row)
        changes.insert(history, line)
        state = "COMPLETE" if status is Status.COMPLETED else "SENT"
        transfer = (id, "circle", "wallet", uuid.uuid4().hex, state, "", None, None, now(), now(), 1)
        changes.insert(CUSTODIAN_TRANSFERS, transfer)
        await self.commit(changes)
        return made

    async def rows(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await self.connection.fetch(query, *arguments)]

    async def statuses(self, address: str) -> list[tuple[str, int]]:
        return await self.rows(
            "SELECT status, generation FROM deposits WHERE recipient = $1 ORDER BY amount, n", address
        )


@dataclass
class Shore:
    """A till, and a chain that mines when told."""

    till: Till
    anvil: Anvil
    usdc: Usdc
    rpc: Rpc
    policy: DepositPolicy = field(default_factory=policy)
    watched: set[str] = field(default_factory=set)
    dsn: str = ""

    def __post_init__(self) -> None:
        token = self.usdc.address.lower()
        self.settings = ScanSettings(token, span_max_blocks=1_000, overlap_blocks=DEPTH)
        self.state = begin(0, self.settings)
        self.reader = ChainReader((self.rpc,), token, DEPTH)
        self.use(self.policy)

    def use(self, policy: DepositPolicy) -> None:
        """From now on the stages work under this policy."""
        self.policy = policy
        self.credit = credit_deposits.stage(policy)

        async def connect() -> Connection:
            return self.till.connection

        self.finalize = finalize_deposits.stage({"MATIC": self.reader}, policy, connect)

    async def wallet(self) -> tuple[str, str]:
        user, address = await self.till.wallet()
        self.watched.add(address)
        return user, address

    async def pay(self, *transfers: tuple[str, int]) -> tuple[str, str]:
        """One transaction in a block of its own: its hash and raw form."""
        tx_hash = await self.usdc.transfer_many(transfers)
        await self.anvil.wait_mined(tx_hash)
        return tx_hash, await self.anvil.rpc("eth_getRawTransactionByHash", tx_hash)

    async def scan(self) -> Settled | None:
        """What the scanner finds, settled."""
        found = await scan_once(self.rpc, self.state, self.watched, self.settings)
        self.state = found.state
        return await self.till.settle(self.credit, *map(reported, found.transfers)) if found.transfers else None

    async def head(self, blocks: int = 1) -> None:
        """So many more blocks, the scanner's look at them, then the newest head."""
        number = await self.anvil.mine(blocks)
        await self.scan()
        block = await self.rpc.head()
        await self.till.settle(
            self.finalize,
            HeadSeen(
                chain=Chain.MATIC, chain_id=1, number=number, block_hash=block.hash, timestamp_s=block.timestamp_s
            ),
        )

    async def verified(self) -> None:
        """Every invariant but that of the outbox, which nobody relays here; those that look at the chain too."""
        settings = load_settings(
            env_file=None, database_url=self.dsn, rpc_urls={"MATIC": [self.anvil.rpc_url]},
            usdc_contracts={"MATIC": self.usdc.address}, chain_ids={"MATIC": self.anvil.chain_id},
            finality_depths_blocks={"MATIC": DEPTH},
        )  # fmt: skip
        results = await verify_all(settings)
        assert {4, 6} <= {result.number for result in results}
        broken = [result for result in results if not result.holds and result.number != 9]
        assert not broken, broken

    async def final(self) -> None:
        """Everything that is on the chain now is judged, what is gone is taken back."""
        await self.head(DEPTH)
        await self.head()


def reported(log: TransferLog) -> DepositNotified:
    """As watch_chain says it."""
    return DepositNotified(
        source="scanner", transfer_id=f"{log.block_hash}:{log.log_index}", chain="MATIC", tx_hash=log.tx_hash, to=log.to,
        asset="USDC", amount=log.amount, evidence=Evidence.CONFIRMED, block_hash=log.block_hash,
        block_number=log.block_number, log_index=log.log_index, sender=log.sender,
    )  # fmt: skip


async def sums(
    till: Till, types: Sequence[str] = ("custody_usdc", "suspense_usdc", "shortfall_usdc")
) -> dict[str, int]:
    rows = await till.rows(
        "SELECT type, sum(balance)::text FROM accounts WHERE type = ANY($1::text[]) GROUP BY type", list(types)
    )
    return dict.fromkeys(types, 0) | {type: int(sum) for type, sum in rows}
