"""What the chain takes back, on a chain of this file's own that reorganises: credited at once, final or reversed later."""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from stablerail.dev.usdc import deploy
from tests.support.invariants import end_database
from tests.support.story import Sent, Story, apart, message, parts_environment, report, until
from tests.support.warm import WarmStack
from topics.catalog import CHAIN_HEADS, DEPOSITS_FINALIZED, DEPOSITS_NOTIFIED

pytestmark = pytest.mark.timeout(240)

DEPTH = 3
FIVE, NINE = 5_000_000, 9_000_000


@dataclass(frozen=True)
class Shore:
    """The workers of deposits and chains, on a chain that mines when told."""

    story: Story

    @property
    def anvil(self) -> Anvil:
        return self.story.usdc.anvil

    async def wallet(self, address: str | None = None) -> tuple[str, str]:
        """A customer with a wallet, as onboarding leaves them."""
        user, address = f"user-{uuid.uuid4().hex[:12]}", address or "0x" + secrets.token_hex(20)
        await self.story.rows(
            "INSERT INTO wallets (chain, address, user_id, wallet_id, created_at) VALUES ('MATIC', $1, $2, $2, now())",
            address,
            user,
        )
        return user, address

    async def paid(self, *transfers: tuple[str, int]) -> tuple[str, str]:
        """One transaction in a block of its own: its hash and raw form."""
        tx_hash = await self.story.usdc.transfer_many(transfers)
        await self.anvil.wait_mined(tx_hash)
        return tx_hash, await self.anvil.rpc("eth_getRawTransactionByHash", tx_hash)

    async def head(self) -> int:
        """One more block, whose head every stage has seen when this returns."""
        number = await self.anvil.mine()

        async def told() -> list[Sent]:
            return [
                Sent(record.partition, record.offset)
                for record in await self.story.records(CHAIN_HEADS)
                if json.loads(record.value)["number"] >= number
            ]

        await self.story.settled(CHAIN_HEADS, await until(told, f"head {number}"))
        return number

    async def statuses(self, address: str) -> list[str]:
        return [status for status, *_ in await self.story.deposits(address)]

    async def until_statuses(self, address: str, *statuses: str) -> None:
        async def reached() -> bool:
            return await self.statuses(address) == list(statuses)

        await until(reached, f"{statuses} at {address}")

    async def ends(self, user: str) -> list[tuple[str, str]]:
        """(outcome, amount) of every distinct deposits.finalized of the customer, in the topic's order."""
        found = {
            (dict(record.headers)["ce_id"], event["outcome"], event["amount"]): None
            for record in await self.story.records(DEPOSITS_FINALIZED)
            if (event := json.loads(record.value))["user_id"] == user
        }
        return [(outcome, amount) for _, outcome, amount in found]

    async def verified(self) -> None:
        code, printed = await self.story.command("verify")
        assert code == 0, printed.decode()


@pytest.fixture(scope="module")
def shore(kafka: Kafka, postgres: Postgres, scratch: Path, tools: Tools) -> Iterator[Shore]:
    name = f"shore_{uuid.uuid4().hex[:8]}"
    dsn = postgres.create_database(name)
    with Anvil(scratch / name / "anvil", tools) as anvil:
        usdc = apart(lambda: deploy(anvil, tools.contracts))
        environment = {
            **parts_environment(kafka, anvil, usdc),
            "STABLERAIL_DATABASE_URL": dsn,
            "STABLERAIL_TOPIC_PREFIX": f"{name}.",
        }
        stack = WarmStack(scratch / name, environment, settings={"STABLERAIL_SCAN_INTERVAL_S": "0.1"})

        async def up() -> None:
            await stack.prepare()
            stack.start(("deposits", "chains"))
            await stack.wait_ready(("deposits", "chains"), timeout_s=100)

        try:
            apart(up)
            yield Shore(Story(stack, usdc, dsn, kafka.bootstrap, f"{name}."))
        finally:
            stack.stop()
            end_database(postgres, name)


async def test_a_credit_whose_transaction_vanishes_is_first_orphaned_and_then_taken_back(shore: Shore) -> None:
    user, address = await shore.wallet()
    story = shore.story
    mirror, buffer = (
        await story.balance("system", "custody_usdc", "MATIC"),
        await story.balance("system", "system_buffer_usdc"),
    )
    await shore.paid((address, FIVE), (address, NINE), (address, FIVE))
    await shore.until_statuses(address, *["credited"] * 3)
    assert await story.balance(user) == 2 * FIVE + NINE
    await shore.anvil.rpc("anvil_reorg", 1, [])
    for _ in range(DEPTH - 1):
        await shore.head()
        # not deep enough for anyone to judge
        assert await shore.statuses(address) == ["credited"] * 3
    await shore.head()
    assert await shore.statuses(address) == ["orphaned"] * 3
    assert await story.balance(user) == 2 * FIVE + NINE
    assert await shore.ends(user) == []
    await shore.verified()
    await shore.head()
    assert await shore.statuses(address) == ["reversed"] * 3
    assert await story.balance(user) == 0
    assert await story.balance("system", "system_buffer_usdc") == buffer
    assert await story.balance("system", "custody_usdc", "MATIC") == mirror
    await shore.head()
    assert sorted(await shore.ends(user)) == [("reversed", "5.000000")] * 2 + [("reversed", "9.000000")]
    await shore.verified()


async def test_a_transaction_mined_in_another_block_stays_one_credit_and_is_final_there(shore: Shore) -> None:
    user, address = await shore.wallet()
    story = shore.story
    tx_hash, raw = await shore.paid((address, FIVE), (address, FIVE))
    await shore.until_statuses(address, "credited", "credited")
    ((before,),) = set(await story.rows("SELECT block_hash FROM deposits WHERE recipient = $1", address))
    # the block is replaced by two, and the transaction is in the second
    await shore.anvil.mine()
    await shore.anvil.rpc("anvil_reorg", 2, [[raw, 1]])
    receipt = await shore.anvil.wait_mined(tx_hash)
    assert receipt["blockHash"] != before
    for _ in range(DEPTH):
        assert set(await shore.statuses(address)) == {"credited"}
        await shore.head()
    await shore.until_statuses(address, "finalized", "finalized")
    assert await story.rows("SELECT DISTINCT block_hash FROM deposits WHERE recipient = $1", address) == [
        (receipt["blockHash"],)
    ]
    assert await story.deposits(address) == [("finalized", FIVE, 0, 1), ("finalized", FIVE, 1, 1)]
    assert await story.balance(user) == 2 * FIVE
    assert await shore.ends(user) == [("finalized", "5.000000")] * 2
    await shore.verified()


async def test_a_transaction_mined_again_after_its_reversal_is_credited_again_once(shore: Shore) -> None:
    user, address = await shore.wallet()
    story = shore.story
    _, raw = await shore.paid((address, FIVE), (address, FIVE))
    await shore.until_statuses(address, "credited", "credited")
    await shore.anvil.rpc("anvil_reorg", 1, [])
    for _ in range(DEPTH + 1):
        await shore.head()
    assert await shore.statuses(address) == ["reversed", "reversed"]
    assert await story.balance(user) == 0
    await shore.anvil.wait_mined(await shore.anvil.rpc("eth_sendRawTransaction", raw))
    await shore.until_statuses(address, "credited", "credited")
    assert await story.balance(user) == 2 * FIVE
    for _ in range(DEPTH):
        await shore.head()
    await shore.until_statuses(address, "finalized", "finalized")
    assert await story.deposits(address) == [("finalized", FIVE, 0, 2), ("finalized", FIVE, 1, 2)]
    assert await story.balance(user) == 2 * FIVE
    assert sorted(await shore.ends(user)) == [("finalized", "5.000000")] * 2 + [("reversed", "5.000000")] * 2
    await shore.verified()


async def test_a_transfer_told_before_it_is_mined_is_waited_for_as_long_as_finality_takes(shore: Shore) -> None:
    address, never = "0x" + secrets.token_hex(20), "0x" + secrets.token_hex(20)
    tx_hash, raw = await shore.paid((address, FIVE))  # nobody's wallet yet, and then not on the chain either
    await shore.anvil.rpc("anvil_reorg", 1, [])
    await shore.head()
    user, _ = await shore.wallet(address)
    victim, _ = await shore.wallet(never)
    story = shore.story
    told = [report(address, tx_hash=tx_hash, amount="5.00"), report(never, amount="5.00")]
    await story.produce(DEPOSITS_NOTIFIED, *[message(event["to"], event) for event in told])
    await shore.until_statuses(address, "credited")
    await shore.until_statuses(never, "credited")
    await shore.head()
    for _ in range(DEPTH - 1):
        assert await shore.statuses(address) == await shore.statuses(never) == ["orphaned"]
        await shore.head()
    assert await story.balance(user) == await story.balance(victim) == FIVE
    await shore.anvil.wait_mined(await shore.anvil.rpc("eth_sendRawTransaction", raw))
    await shore.until_statuses(address, "credited")
    for _ in range(DEPTH):
        await shore.head()
    await shore.until_statuses(address, "finalized")
    await shore.until_statuses(never, "reversed")
    assert await story.deposits(address) == [("finalized", FIVE, 0, 1)]
    assert (await story.balance(user), await story.balance(victim)) == (FIVE, 0)
    await shore.verified()


async def test_a_head_that_no_endpoint_has_reached_judges_nothing(shore: Shore) -> None:
    user, address = await shore.wallet()
    tx_hash, _ = await shore.paid((address, FIVE))
    await shore.until_statuses(address, "credited")
    await shore.anvil.rpc("anvil_reorg", 1, [])
    seen = await shore.head()
    heads = [
        {"chain": "MATIC", "chain_id": shore.anvil.chain_id, "number": number, "block_hash": tx_hash, "timestamp_s": 1}
        for number in (seen + DEPTH + 1, 2**63 - 1, 0)
    ]
    sent = await shore.story.produce(CHAIN_HEADS, *[message("MATIC", head) for head in heads])
    await shore.story.settled(CHAIN_HEADS, sent)
    assert await shore.statuses(address) == ["credited"]
    assert await shore.story.balance(user) == FIVE
