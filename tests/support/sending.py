"""Withdrawals that wait for a signature, on a real PostgreSQL and a real chain, and the two stages that sign and send them.

Without Kafka: events are settled by `run`, and what a stage emits is handed on by the test.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agents.item import read_item
from agents.outcome import Stage
from agents.stage import Settled, settle
from agents.withdrawals import (
    broadcast_transactions,
    raise_fees,
    settle_withdrawals,
    sign_transactions,
    top_up_lanes,
    track_confirmations,
)
from agents.withdrawals.desks import Desk, Desks
from agents.withdrawals.in_flight import InFlight, LaneKey, Sum
from agents.withdrawals.look import ChainWriter
from agents.withdrawals.raising import RaisePolicy
from agents.withdrawals.top_ups import TopUpPolicy
from agents.withdrawals.withdrawal import Lane, Status, Withdrawal, held, rows_of, transaction_ids, withdrawal_id
from chain.broadcaster import Broadcaster
from chain.fees import POLICIES, FeePolicy
from chain.hot_wallet import HotWallet, Look
from chain.rpc import Rpc
from chain.signer import KeySigner, Signer
from ledger.accounts import buffer, spendable
from ledger.commit import claim_owners
from ledger.posting import Transaction, credit, debit
from ledger.record import Message
from ledger.rows import Changes, Connection
from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools
from stablerail.dev.usdc import Usdc, deploy
from tests.support.ledger_rig import AT
from tests.support.payouts import store
from topics.catalog import CHAIN_HEADS, TRANSACTIONS_SIGNED, WITHDRAWALS_ACCEPTED
from topics.envelope import headers_of, value_of
from topics.events import Chain, HeadSeen, Rail, WithdrawalAccepted

SUMMED = """
SELECT x.chain, x.signer, f.*
FROM unnest($1::text[], $2::text[], $3::bigint[]) AS x(chain, signer, block)
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE n.unmined), coalesce(sum(n.wei), 0)::text, coalesce(sum(n.units), 0)::text
    FROM (
        SELECT bool_and(a.status <> 'mined') AS unmined,
               max(a.gas_limit * a.max_fee + coalesce(g.amount * 1000000000000, 0)) AS wei, max(w.amount) AS units
        FROM attempts a LEFT JOIN withdrawals w ON w.id = a.withdrawal_id
        LEFT JOIN gas_top_ups g ON a.kind = 'top_up' AND g.chain = a.chain AND g.signer = a.signer AND g.nonce = a.nonce
        WHERE a.chain = x.chain AND a.signer = x.signer AND a.status IN ('signed', 'broadcast', 'mined')
          AND (a.status <> 'mined' OR a.block_number > x.block)
        GROUP BY a.nonce
    ) AS n
) AS f
ORDER BY x.chain, x.signer
"""
"""Said once more, in one statement that keeps nothing."""

CHAIN = Chain.MATIC
COIN = 10**18
USDC = 10**6
DEPTH = 3


def withdrawal_of(user: str, amount: int, to: str, key: str, at: datetime) -> Withdrawal:
    """One that was accepted."""
    id = withdrawal_id(user, key)
    hold = transaction_ids(id)[0]
    return Withdrawal(
        id, user, key, "0" * 32, "chain", CHAIN.value, "USDC", amount, to, Status.SIGNING.value, None, hold, at, at,
        None, 1,
    )  # fmt: skip


def accepted(withdrawal: Withdrawal) -> Message:
    event = WithdrawalAccepted(
        withdrawal_id=withdrawal.id, user_id=withdrawal.user_id, rail=Rail.CHAIN, chain=CHAIN, asset="USDC",
        amount=withdrawal.amount, to=withdrawal.recipient,
    )  # fmt: skip
    return Message(WITHDRAWALS_ACCEPTED.name, CHAIN.encode(), value_of(event), withdrawal.id, event.ce_type())


class _Checked(InFlight):
    """Each answer is that of the one statement that sums everything; more only for what is in a block which the lane did not
    see yet."""

    async def of(
        self, connection: Connection, looks: Mapping[LaneKey, Look], lanes: Mapping[LaneKey, Lane]
    ) -> dict[LaneKey, Sum]:
        found = await super().of(connection, looks, lanes)
        for key, look in looks.items():
            ((_, _, unmined, wei, units),) = await connection.fetch(SUMMED, [key[0]], [key[1]], [look.block_number])
            summed = Sum(unmined, int(wei), int(units))
            if key not in lanes:
                continue  # nobody can hold its lock: another may have made it between the two statements
            assert all(one >= other for one, other in zip(found[key], summed, strict=True)), (key, found[key], summed)
            ahead = await connection.fetchval(
                "SELECT EXISTS (SELECT FROM attempts WHERE (chain, signer) = ($1, $2) AND nonce >= $3"
                " AND status NOT IN ('signed', 'broadcast'))",
                *(*key, look.nonce),
            )
            assert ahead or found[key] == summed, (key, found[key], summed)
        return found


@dataclass
class Process:
    """The stages as one worker process has them."""

    sign: Stage[Any]
    wait: Stage[Any]
    broadcast: Stage[Any]
    track: Stage[Any]
    raising: Stage[Any]
    settling: Stage[Any]
    desks: Desks
    topping: Stage[Any] | None = None
    epochs: dict[str, dict[tuple[str, int], int]] = field(default_factory=dict)


@dataclass
class Sending:
    connection: Connection
    connect: Callable[[], Awaitable[Connection]]
    anvil: Anvil
    usdc: Usdc
    signer: Signer
    now: datetime = AT
    rpcs: list[Rpc] = field(default_factory=list)
    """What the processes made from now on ask, the preferred first; none: the node."""
    in_flight_max: int = 16
    fees: FeePolicy = POLICIES[CHAIN]
    rule: RaisePolicy = field(default_factory=RaisePolicy)
    others: list[Signer] = field(default_factory=list)
    """Of the lanes beside the first."""
    gas: Signer | None = None
    """Of the account that gives them coins, by `top_ups`."""
    top_ups: TopUpPolicy | None = None
    is_low: list[bool] = field(default_factory=list)
    """What was told of the gas account, each time."""
    _opened: list[Any] = field(default_factory=list)
    _offsets: Any = field(default_factory=count)
    _asked: Any = field(default_factory=count)

    # -- before the stages -------------------------------------------------------------------------------------------

    async def fund(self, *, coins: int | None = None, usdc: int = 0, signer: Signer | None = None) -> None:
        """Sets a signer's coins, and sends it USDC; the first one's when none is named."""
        address = (signer or self.signer).address
        if coins is not None:
            await self.anvil.rpc("anvil_setBalance", address, hex(coins))
        if usdc:
            await self.usdc.transfer(address, usdc)
            await self.anvil.mine()

    async def ask(self, number: int = 1, amount: int = USDC, to: str | None = None) -> list[Withdrawal]:
        """Accepted withdrawals, a millisecond apart, of a customer who has the money."""
        user, made = f"user-{secrets.token_hex(4)}", []
        changes = Changes()
        for _ in range(number):
            self.now += timedelta(milliseconds=1)
            key = f"k{next(self._asked)}"
            one = withdrawal_of(user, amount, to or "0x" + secrets.token_hex(20), key, self.now)
            row, line = rows_of(one, "test")
            changes.insert(*row)
            changes.insert(*line)
            made.append(one)
        legs = (debit(spendable(user), amount * number), credit(buffer(), amount * number))
        await store(self.connection, changes, [Transaction(secrets.token_hex(16), "test", "", legs)])
        await store(self.connection, Changes(), [held(one) for one in made])
        return made

    # -- the stages --------------------------------------------------------------------------------------------------

    def process(self, rpcs: Sequence[Rpc] = ()) -> Process:
        """A worker, as it is after a start: it owns every partition from its first event on."""
        rpcs = list(rpcs) or self.rpcs or [self.rpc(self.anvil.rpc_url)]
        desks = Desks([self.desk(signer, rpcs) for signer in (self.signer, *self.others)])
        desks.in_flight = _Checked()
        sign, wait = sign_transactions.stages(desks)
        topping = None
        if self.gas is not None and self.top_ups is not None:
            desks.put(replace(self.desk(self.gas, rpcs), gives_gas=True))
            topping = top_up_lanes.stage(
                desks, {CHAIN: self.top_ups}, low=lambda _chain, is_low: self.is_low.append(is_low)
            )

        async def connect() -> Connection:
            self._opened.append(await self.connect())
            one: Connection = self._opened[-1]
            return one

        broadcast = broadcast_transactions.stage({CHAIN.value: Broadcaster(rpcs)}, connect)
        writer = ChainWriter(rpcs, self.usdc.address.lower(), DEPTH)
        return Process(
            sign,
            wait,
            broadcast,
            track_confirmations.stage({CHAIN.value: writer}, connect, lambda: self.now),
            raise_fees.stage(desks, {CHAIN: self.rule}),
            settle_withdrawals.stage(1),
            desks,
            topping,
        )

    def desk(self, signer: Signer, rpcs: Sequence[Rpc] = ()) -> Desk:
        """What signs for one lane."""
        token = self.usdc.address.lower()
        wallet = HotWallet(list(rpcs) or [self.rpc(self.anvil.rpc_url)], signer.address, token)
        return Desk(CHAIN, self.anvil.chain_id, signer, token, wallet, self.fees, self.in_flight_max)

    def rpc(self, url: str, timeout_s: float = 10) -> Rpc:
        self._opened.append(Rpc(url, self.anvil.chain_id, timeout_s))
        one: Rpc = self._opened[-1]
        return one

    async def run(
        self, process: Process, stage: Stage[Any], *messages: Message, attempt: int = 1, on: Connection | None = None
    ) -> Settled:
        """Settles events as one batch."""
        connection, key = on or self.connection, (stage.source.name, 0)
        if stage.name not in process.epochs:
            async with connection.transaction():
                process.epochs[stage.name], _ = await claim_owners(connection, stage.name, [key], self.now)
        again = [("attempt", str(attempt).encode())] if attempt > 1 else []
        items = [
            read_item(
                stage,
                SimpleNamespace(  # type: ignore[arg-type]
                    topic=key[0], partition=0, offset=next(self._offsets), timestamp=0, key=message.key,
                    value=message.value,
                    headers=[*headers_of(message.type, event_id=message.id, source="test", time=self.now), *again],
                ),
            )
            for message in messages
        ]  # fmt: skip
        prepared = await stage.prepare([item.received for item in items if item.received is not None])
        return await settle(connection, stage, items, process.epochs[stage.name], self.now, prepared)

    async def signed(self, process: Process, *withdrawals: Withdrawal) -> list[Message]:
        """What `sign_transactions` tells when these are accepted, in one batch."""
        return messages(await self.run(process, process.sign, *map(accepted, withdrawals)))

    async def head(self, process: Process) -> list[Message]:
        """What the stages that a block wakes tell under the newest one."""
        message = await self.newest()
        told = messages(await self.run(process, process.track, message))
        return [*told, *messages(await self.run(process, process.wait, message))]

    async def newest(self) -> Message:
        """The event of the newest block."""
        found = await self.rpc(self.anvil.rpc_url).head()
        event = HeadSeen(
            chain=CHAIN, chain_id=self.anvil.chain_id, number=found.number, block_hash=found.hash,
            timestamp_s=found.timestamp_s,
        )  # fmt: skip
        return Message(CHAIN_HEADS.name, CHAIN.encode(), value_of(event), secrets.token_hex(8), event.ce_type())

    async def sent(self, process: Process, told: Sequence[Message], attempt: int = 1) -> Settled:
        """`broadcast_transactions` on what was told for it, in one batch."""
        ours = [message for message in told if message.topic == TRANSACTIONS_SIGNED.name]
        return await self.run(process, process.broadcast, *ours, attempt=attempt)

    # -- what became of it -------------------------------------------------------------------------------------------

    async def statuses(self) -> dict[tuple[str, str | None], int]:
        """(withdrawal's status, its attempt's) -> how many."""
        rows = await self.connection.fetch(
            "SELECT w.status, a.status, count(*) FROM withdrawals w LEFT JOIN attempts a ON a.withdrawal_id = w.id"
            " GROUP BY 1, 2"
        )
        return {(one, other): number for one, other, number in rows}

    async def status(self, withdrawal: Withdrawal) -> tuple[str, str | None]:
        row = await self.connection.fetchrow("SELECT status, code FROM withdrawals WHERE id = $1", withdrawal.id)
        assert row is not None
        return row[0], row[1]

    async def nonces(self) -> list[int]:
        rows = await self.connection.fetch("SELECT nonce FROM attempts ORDER BY nonce, n")
        return [row[0] for row in rows]

    async def nonces_of(self, signer: Signer) -> list[int]:
        rows = await self.connection.fetch(
            "SELECT nonce FROM attempts WHERE signer = $1 ORDER BY nonce, n", signer.address
        )
        return [row[0] for row in rows]

    async def lane_of(self, signer: Signer) -> tuple[str, str]:
        """(status, reason)"""
        row = await self.connection.fetchrow("SELECT status, reason FROM lanes WHERE signer = $1", signer.address)
        return (row[0], row[1]) if row is not None else ("", "")

    async def lane(self) -> tuple[int, str, str]:
        """(next nonce, status, reason)"""
        row = await self.connection.fetchrow("SELECT next_nonce, status, reason FROM lanes")
        assert row is not None
        return row[0], row[1], row[2]

    async def in_pool(self) -> int:
        """How many of the signer's transactions the node keeps."""
        content = await self.anvil.rpc("txpool_content")
        ours = [content[pool] for pool in ("pending", "queued")]
        return sum(len(by.get(address, {})) for by in ours for address in by if address.lower() == self.signer.address)

    async def paid(self) -> list[tuple[str, int]]:
        """Every transfer out of the hot wallets, by the chain's own logs, in the chain's order."""
        rpc = self.rpc(self.anvil.rpc_url)
        logs = await rpc.logs(self.usdc.address.lower(), None, 0, (await rpc.head()).number)
        ours = {signer.address for signer in (self.signer, *self.others)}
        return [(log.to, log.amount) for log in logs if log.sender in ours]

    async def close(self) -> None:
        for one in self._opened:
            await one.close()


async def use_nonce(desk: Sending, signer: Signer, nonce: int) -> None:
    """As somebody who has the signer's key would; it is in the pool then, in place of what was there."""
    await desk.anvil.rpc("anvil_impersonateAccount", signer.address)
    fee = hex(2 * max(desk.fees.max_fee_cap, 1))
    await desk.anvil.rpc("eth_sendTransaction", {
        "from": signer.address, "to": "0x" + secrets.token_hex(20), "value": "0x1", "nonce": hex(nonce), "gas": "0x5208",
        "maxFeePerGas": fee, "maxPriorityFeePerGas": fee,
    })  # fmt: skip


def messages(settled: Settled) -> list[Message]:
    return list(settled.sealed.messages) if settled.sealed is not None else []


@pytest.fixture(scope="module")
def chain(scratch: Path, tools: Tools) -> Iterator[Anvil]:
    with Anvil(scratch / "anvil-sending", tools) as anvil:
        yield anvil


@pytest.fixture(scope="module")
def token(chain: Anvil, tools: Tools) -> Usdc:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, deploy(chain, tools.contracts)).result()


@asynccontextmanager
async def sending(
    connection: Connection,
    connect: Any,
    anvil: Anvil,
    usdc: Usdc,
    signer: Signer | None = None,
    others: Sequence[Signer] = (),
) -> AsyncIterator[Sending]:
    """Hot wallets of its own, each with 10 coins and 1,000 USDC, on a chain that mines when it is told to."""
    await anvil.rpc("evm_setAutomine", False)
    made = Sending(connection, connect, anvil, usdc, signer or KeySigner(secrets.token_bytes(32)), others=list(others))
    for one in (made.signer, *made.others):
        await made.fund(coins=10 * COIN, usdc=1_000 * USDC, signer=one)
    try:
        yield made
    finally:
        await made.close()
        await anvil.rpc("anvil_dropAllTransactions")
