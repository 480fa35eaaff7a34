"""The whole path of a withdrawal on real Kafka, PostgreSQL and a chain that reorganises: from the request to the end, paid once or
released once, by the chain's own Transfer logs."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agents.outcome import Stage
from agents.withdrawals import (
    accept_withdrawals,
    broadcast_transactions,
    settle_withdrawals,
    sign_transactions,
    track_confirmations,
)
from agents.withdrawals.desks import Desk, Desks
from agents.withdrawals.limits import WithdrawalPolicy
from agents.withdrawals.look import ChainWriter
from chain.broadcaster import Broadcaster
from chain.fees import POLICIES
from chain.hot_wallet import HotWallet
from chain.rpc import Rpc
from chain.signer import KeySigner
from ledger.rows import Connection
from ledger.verify import verify
from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.usdc import Usdc, calldata, deploy
from tests.support.in_process import Ground, ground, running, until
from tests.support.rpc_stub import LyingEndpoint
from tests.support.withdrawals import assert_whole, fund, has, settled, tell
from topics.catalog import (
    CHAIN_HEADS,
    TRANSACTIONS_BROADCAST,
    TRANSACTIONS_CONFIRMED,
    TRANSACTIONS_SIGNED,
    WITHDRAWALS_ACCEPTED,
    WITHDRAWALS_REQUESTED,
    WITHDRAWALS_SETTLED,
)
from topics.envelope import value_of
from topics.events import Chain, HeadSeen
from topics.money import SCALE

TOPICS = (
    WITHDRAWALS_REQUESTED, WITHDRAWALS_ACCEPTED, TRANSACTIONS_SIGNED, TRANSACTIONS_BROADCAST, TRANSACTIONS_CONFIRMED,
    WITHDRAWALS_SETTLED, CHAIN_HEADS,
)  # fmt: skip
CHAIN = Chain.MATIC
DEPTH = 6
WHOLE = 25


@dataclass
class Payer:
    at: Ground
    anvil: Anvil
    usdc: Usdc
    signer: KeySigner
    rpc: Rpc
    """For the test's own questions."""
    endpoints: list[LyingEndpoint]
    """What the stages ask, each with its `Rpc`."""
    rpcs: list[Rpc]
    stages: Callable[[Callable[[], Awaitable[Connection]]], tuple[Stage[Any], ...]]

    @asynccontextmanager
    async def worker(self, count: int = 6) -> AsyncIterator[None]:
        """A process that runs the first so many stages, until it is left."""
        async with AsyncExitStack() as stack:
            services = await stack.enter_async_context(self.at.process())
            for stage in self.stages(services.connect)[:count]:
                await stack.enter_async_context(running(stage, services, self.at))
            yield

    async def ask(self, key: str, to: str = "") -> tuple[str, str]:
        """A customer with the money asks; the withdrawal's id and the address."""
        to = to or "0x" + secrets.token_hex(20)
        await fund(self.at, key, WHOLE * SCALE)
        return await tell(self.at, key, key, to=to), to

    async def head(self, blocks: int = 1) -> None:
        """Mines so many blocks, each told of."""
        for _ in range(blocks):
            await self.anvil.mine(1)
            found = await self.rpc.head()
            event = HeadSeen(
                chain=CHAIN, chain_id=self.anvil.chain_id, number=found.number, block_hash=found.hash,
                timestamp_s=found.timestamp_s,
            )  # fmt: skip
            await self.at.send(CHAIN_HEADS, CHAIN.encode(), value_of(event))

    async def rows(self, query: str) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await self.at.observer.fetch(query)]

    async def until_rows(self, query: str, wanted: list[tuple[Any, ...]]) -> None:
        async def so() -> bool:
            return await self.rows(query) == wanted

        try:
            await until(so, f"{query}: {wanted}")
        except AssertionError:
            raise AssertionError(f"{query}: {await self.rows(query)}, wanted {wanted}") from None

    async def until_ended(self, count: int) -> None:
        """Heads come until so many withdrawals have ended."""

        async def ended() -> bool:
            await self.head()
            await asyncio.sleep(0.05)
            (found,) = await self.rows("SELECT count(*) FROM withdrawals WHERE settled_at IS NOT NULL")
            return bool(found[0] == count)

        try:
            await until(ended, f"{count} withdrawals have ended")
        except AssertionError:
            raise AssertionError(await self.rows("SELECT status, code, version FROM withdrawals")) from None

    async def paid(self) -> dict[str, int]:
        """Address -> payments of ours to it, by the chain's logs."""
        logs = await self.rpc.logs(self.usdc.address.lower(), None, 0, (await self.rpc.head()).number)
        paid: dict[str, int] = {}
        for log in logs:
            if log.sender == self.signer.address:
                assert log.amount == WHOLE * SCALE
                paid[log.to] = paid.get(log.to, 0) + 1
        return paid


@pytest.fixture
async def path(database: str, kafka: Kafka, topic_prefix: str, tmp_path: Path, tools: Tools) -> AsyncIterator[Payer]:
    async with paying(database, kafka, topic_prefix, tmp_path, tools, endpoints=2) as payer:
        yield payer


@asynccontextmanager
async def paying(
    database: str, kafka: Kafka, topic_prefix: str, tmp_path: Path, tools: Tools, endpoints: int
) -> AsyncIterator[Payer]:
    async with AsyncExitStack() as stack:
        anvil = stack.enter_context(Anvil(tmp_path, tools))
        at = await stack.enter_async_context(ground(database, kafka.bootstrap, topic_prefix, TOPICS))
        usdc = await deploy(anvil, tools.contracts)
        signer = KeySigner(secrets.token_bytes(32))
        await anvil.rpc("anvil_setBalance", signer.address, hex(10**20))
        await usdc.transfer(signer.address, 100_000 * SCALE)
        await anvil.rpc("evm_setAutomine", False)
        token = usdc.address.lower()
        liars = [await stack.enter_async_context(LyingEndpoint(anvil.rpc_url)) for _ in range(endpoints)]
        rpcs = [await stack.enter_async_context(Rpc(liar.url, anvil.chain_id)) for liar in liars]
        own = await stack.enter_async_context(Rpc(anvil.rpc_url, anvil.chain_id))
        desk = Desk(CHAIN, anvil.chain_id, signer, token, HotWallet(rpcs, signer.address, token), POLICIES[CHAIN])
        policy = WithdrawalPolicy(
            tokens={CHAIN.value: token}, minimum=SCALE, maximum=10**12, user_day=10**13, network_day=10**14
        )
        writer = ChainWriter(rpcs, token, DEPTH)

        def stages(connect: Callable[[], Awaitable[Connection]]) -> tuple[Stage[Any], ...]:
            return (
                accept_withdrawals.stage(policy),
                *sign_transactions.stages(Desks([desk])),
                broadcast_transactions.stage({CHAIN.value: Broadcaster(rpcs)}, connect),
                track_confirmations.stage({CHAIN.value: writer}, connect, at.clock),
                settle_withdrawals.stage(1),
            )

        yield Payer(at, anvil, usdc, signer, own, liars, rpcs, stages)


async def test_a_request_becomes_a_payment_or_its_money_comes_back(path: Payer) -> None:
    blocked = "0x" + secrets.token_hex(20)
    await path.usdc.blacklist(blocked)
    await path.anvil.mine(1)
    async with path.worker():
        asked = [await path.ask(f"user-{n}") for n in range(4)]
        back, _ = await path.ask("bob", blocked)
        await path.until_rows("SELECT status FROM attempts", [("broadcast",)] * 5)
        await path.until_ended(5)
        ends = await settled(path.at, 5)
        assert await has(path.at, "bob") == (WHOLE, 0)
    await assert_whole(path.at)
    assert {id: (end.outcome, end.code) for id, end in ends.items()} == {
        **{id: ("completed", None) for id, _ in asked},
        back: ("failed", "blacklisted"),
    }
    assert await path.paid() == {to: 1 for _, to in asked}
    assert {end.tx_hash for end in ends.values()} == {row[0] for row in await path.rows("SELECT tx_hash FROM attempts")}


@pytest.mark.timeout(240)
async def test_reorgs_that_drop_move_and_conflict_end_each_withdrawal_once(path: Payer) -> None:
    """Of three payments of one block the first is mined elsewhere, the second dropped, the third dropped in favour of a block
    in which its recipient is refused."""
    wanted: dict[str, tuple[str, str | None]] = {}
    paid: set[str] = set()
    async with path.worker():
        for depth in range(1, 6):
            trio = [await path.ask(f"user-{depth}-{n}") for n in range(3)]
            await path.until_rows("SELECT count(*) FROM attempts WHERE status = 'broadcast'", [(3,)])
            await path.head()
            await path.until_rows("SELECT count(*) FROM attempts WHERE status = 'mined'", [(3,)])
            await path.head(depth - 1)
            ((raw,),) = await path.rows(f"SELECT raw FROM attempts WHERE withdrawal_id = '{trio[0][0]}'")
            refusal = {
                "from": path.usdc.owner, "to": path.usdc.address, "data": calldata("blacklist(address)", trio[2][1]),
                "gas": hex(200_000),
            }  # fmt: skip
            await path.anvil.rpc("anvil_reorg", depth, [[refusal, 0], ["0x" + raw.hex(), depth - 1]])
            await path.until_ended(3 * depth)
            wanted |= {id: ("completed", None) for id, _ in trio[:2]} | {trio[2][0]: ("failed", "blacklisted")}
            paid |= {to for _, to in trio[:2]}
            assert await path.paid() == dict.fromkeys(paid, 1)
        ends = await settled(path.at, len(wanted))
    await assert_whole(path.at)
    assert {id: (end.outcome, end.code) for id, end in ends.items()} == wanted
    assert await path.rows("SELECT count(*), count(DISTINCT nonce), max(nonce) FROM attempts") == [(15, 15, 14)]


async def test_a_worker_that_is_gone_between_signature_and_sending_is_followed_by_one_that_sends(path: Payer) -> None:
    async with path.worker(3):
        asked = [await path.ask(f"user-{n}") for n in range(3)]
        await path.until_rows("SELECT status FROM attempts", [("signed",)] * 3)
    signed = await path.rows("SELECT tx_hash FROM attempts ORDER BY nonce")
    async with path.worker():
        await path.until_ended(3)
        assert [r for r in await verify(path.at.observer) if not r.holds] == []
    assert await path.rows("SELECT tx_hash FROM attempts WHERE status = 'confirmed' ORDER BY nonce") == signed
    assert await path.paid() == {to: 1 for _, to in asked}
