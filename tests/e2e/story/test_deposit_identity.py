"""One deposit, one credit: whoever reports it, how often, in any order, in any words."""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import asyncpg
import base58
import pytest

from agents.deposits import credit_deposits
from agents.deposits.credit_deposits import DepositPolicy
from agents.item import read_item
from agents.outcome import Stage
from agents.stage import Settled, settle
from ledger.commit import claim_owners
from ledger.migrate import upgrade
from ledger.record import Message
from tests.support.story import Sent, Story, message, report, until
from topics.catalog import BUFFERS_LEVELS, DEPOSITS_CREDITED, DEPOSITS_FINALIZED, DEPOSITS_NOTIFIED, DEPOSITS_PARKED
from topics.envelope import headers_of
from topics.events import Chain

FIVE, NINE = 5_000_000, 9_000_000


# -- on the running product ------------------------------------------------------------------------------------------


async def test_a_deposit_told_by_webhook_three_times_by_scanner_and_by_an_outside_producer_is_one_credit(
    story: Story,
) -> None:
    user, wallets = await story.customer()
    address = wallets["MATIC"]
    # each of the sandbox's next two notifications (confirmed, complete) is delivered twice
    await story.control("deliveries", {"duplicate": 2})
    tx_hash = await story.usdc.transfer(address, 25_000_000)
    outside = report(address, tx_hash=tx_hash)
    sent = await story.produce(DEPOSITS_NOTIFIED, *[message(address, outside)] * 2)
    await story.finalized(address, 1)
    await story.settled(DEPOSITS_NOTIFIED, sent)
    query = (
        "SELECT DISTINCT source FROM deposit_reports r JOIN deposits d ON d.id = r.deposit_id WHERE d.recipient = $1"
    )

    async def all_reported() -> bool:
        await story.usdc.anvil.mine()
        return {source for (source,) in await story.rows(query, address)} == {"circle", "scanner", "partner"}

    await until(all_reported, "three reporters")

    async def all_told() -> bool:
        notified = [event for _, event in await story.events(DEPOSITS_NOTIFIED) if event.get("to") == address]
        return Counter(event["source"] for event in notified) >= Counter({"circle": 4, "scanner": 1, "partner": 2})

    await until(all_told, "everybody tells of it, Circle twice over")
    await story.settled(DEPOSITS_NOTIFIED, await _all_sent(story, address))
    assert await story.deposits(address) == [("finalized", 25_000_000, 0, 1)]
    assert await story.balance(user) == 25_000_000
    await _until_told(story, DEPOSITS_CREDITED, user, [25_000_000])
    await _until_told(story, DEPOSITS_FINALIZED, user, [25_000_000])


async def test_three_transfers_of_one_transaction_two_of_them_equal_are_three_credits(story: Story) -> None:
    user, wallets = await story.customer()
    address = wallets["MATIC"]
    await story.usdc.transfer_many([(address, FIVE), (address, NINE), (address, FIVE)])
    await story.finalized(address, 3)
    query = "SELECT count(*) FROM deposit_reports r JOIN deposits d ON d.id = r.deposit_id WHERE d.recipient = $1"

    async def both_reported_all() -> bool:
        return await story.rows(query, address) == [(6,)]

    await until(both_reported_all, "six reports")
    assert await story.deposits(address) == [
        ("finalized", FIVE, 0, 1),
        ("finalized", FIVE, 1, 1),
        ("finalized", NINE, 0, 1),
    ]
    assert await story.balance(user) == 2 * FIVE + NINE
    await _until_told(story, DEPOSITS_CREDITED, user, [FIVE, FIVE, NINE])


async def test_where_we_do_not_read_the_chain_completion_credits_equal_transfers_and_posts_the_mirror(
    story: Story,
) -> None:
    user, wallets = await story.customer()
    address, tx_hash = wallets["SOL"], None
    mirror = await story.balance("system", "custody_usdc", "SOL")
    ids = []
    for _ in range(2):
        transfer = await story.inject(Chain.SOL, address, "5", "CONFIRMED", **({"txHash": tx_hash} if tx_hash else {}))
        tx_hash = transfer["txHash"]
        ids.append(transfer["id"])

    async def both_known() -> bool:
        return len(await story.deposits(address)) == 2

    await until(both_known, "two deposits")
    # the second equal one rests on the vendor's count alone: not credited yet
    assert await story.deposits(address) == [("credited", FIVE, 0, 1), ("pending", FIVE, 1, 0)]
    assert await story.balance(user) == FIVE
    for transfer_id in ids:
        await story.control(f"transactions/{transfer_id}/state", {"state": "COMPLETE"})

    async def both_final() -> bool:
        return await story.deposits(address) == [("finalized", FIVE, 0, 1), ("finalized", FIVE, 1, 1)]

    await until(both_final, "two final deposits")
    assert await story.balance(user) == 2 * FIVE
    assert await story.balance("system", "custody_usdc", "SOL") == mirror + 2 * FIVE


async def test_an_event_id_with_other_contents_is_one_dead_letter_without_effect(story: Story) -> None:
    user, wallets = await story.customer()
    address, event_id = wallets["SOL"], uuid.uuid4().hex
    first = report(address, chain="SOL", tx_hash=base58.b58encode(uuid.uuid4().bytes * 4).decode(), amount="5.00")
    other = first | {"amount": "500.00"}
    sent = await story.produce(
        DEPOSITS_NOTIFIED,
        message(address, first, ce_id=event_id, ce_source="partner"),
        message(address, other, ce_id=event_id, ce_source="partner"),
        message(address, first, ce_id=event_id, ce_source="partner"),
    )
    good, reused, again = await story.letters(DEPOSITS_NOTIFIED, sent)
    assert (good, again) == ([], [])
    (letter,) = reused
    assert letter.ours("code") == "event_id_reused"
    assert letter.value == json.dumps(other).encode()
    assert await story.balance(user) == FIVE


async def test_what_cannot_be_credited_is_a_dead_letter_as_it_came(story: Story) -> None:
    user, wallets = await story.customer()
    cases = [
        ("unsupported_token", {"asset": "MATIC"}),
        ("unsupported_token", {"asset": "circle:native"}),
        ("unknown_wallet", {"to": "0x" + "12" * 20}),
    ]
    contents = [report(wallets["MATIC"]) | changes for _, changes in cases]
    sent = await story.produce(
        DEPOSITS_NOTIFIED,
        *[message(content["to"], content, ce_id=uuid.uuid4().hex, ce_source="desk", note="k") for content in contents],
    )
    letters = await story.letters(DEPOSITS_NOTIFIED, sent)
    for (code, _), content, (letter,) in zip(cases, contents, letters, strict=True):
        assert letter.ours("code") == code
        assert letter.ours("stage") == "credit_deposits"
        assert (letter.key, letter.value) == (content["to"].encode(), json.dumps(content).encode())
        assert [name for name, _ in letter.theirs] == ["ce_id", "ce_source", "note"]
    assert await story.balance(user) == 0
    assert await story.deposits(wallets["MATIC"]) == []


async def test_circles_native_coin_is_a_dead_letter_and_dust_is_kept_in_suspense(story: Story) -> None:
    user, wallets = await story.customer()
    await story.inject(Chain.SOL, wallets["SOL"], "0.99", "COMPLETE")
    coin = await story.inject(Chain.SOL, wallets["SOL"], "3", "COMPLETE", tokenId=str(uuid.uuid4()))

    async def code() -> str | None:
        for record, event in await story.events(DEPOSITS_NOTIFIED.dlq):
            if event.get("transfer_id") == coin["id"]:
                return dict(record.headers)["dlq_code"].decode()
        return None

    async def parked() -> bool:
        return await story.deposits(wallets["SOL"]) == [("parked", 990_000, 0, 0)]

    assert await until(code, "the coin's dead letter") == "unsupported_token"
    await until(parked, "the dust in suspense")
    assert await story.balance(user) == 0

    async def told() -> list[tuple[str, str]]:
        events = [event for _, event in await story.events(DEPOSITS_PARKED) if event["user_id"] == user]
        return [(event["amount"], event["reason"]) for event in events]

    assert await until(told, "the news of it") == [("0.990000", "below_minimum")]


async def _all_sent(story: Story, address: str) -> list[Sent]:
    """Where everything stands that was said of the address."""
    told = await story.events(DEPOSITS_NOTIFIED)
    return [Sent(record.partition, record.offset) for record, event in told if event.get("to") == address]


async def _until_told(story: Story, topic: Any, user: str, wanted: list[int]) -> None:
    """A commit is told a moment after it can be seen."""

    async def all_of_them() -> list[int]:
        found = sorted(await _told(story, topic, user))
        return found if len(found) >= len(wanted) else []

    assert await until(all_of_them, f"{topic.name} of {user}") == wanted


async def _told(story: Story, topic: Any, user: str) -> list[int]:
    """Amounts that the topic tells of the customer, by distinct event."""
    events = {
        dict(record.headers)["ce_id"]: event for record, event in await story.events(topic) if event["user_id"] == user
    }
    return [int(event["amount"].replace(".", "")) for event in events.values()]


# -- every order, against PostgreSQL ---------------------------------------------------------------------------------


@dataclass
class Desk:
    """credit_deposits on a database of its own, one partition, without Kafka: each batch is a commit."""

    connection: Any
    stage: Stage[Any]
    epochs: dict[tuple[str, int], int] = field(default_factory=dict)
    offsets: Iterator[int] = field(default_factory=itertools.count)
    partition: int = 0

    def record(self, content: dict[str, Any], event_id: str, source: str) -> Any:
        headers = headers_of("io.stablerail.deposits.notified.v1", event_id=event_id, source=source, time=_now())
        return SimpleNamespace(
            topic="deposits.notified", partition=self.partition, offset=next(self.offsets), timestamp=1_700_000_000_000,
            key=content["to"].encode(), value=json.dumps(content).encode(), headers=headers,
        )  # fmt: skip

    async def settle(self, records: Sequence[Any], *, careful: bool = False) -> Settled:
        items = [read_item(self.stage, record) for record in records]
        return await settle(self.connection, self.stage, items, self.epochs, _now(), None, careful=careful)

    async def count(self, query: str) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await self.connection.fetch(query)]


def _now() -> datetime:
    return datetime.now(UTC)


WALLET = "0x" + "ab" * 20


@pytest.fixture
async def desk(database: str) -> AsyncIterator[Desk]:
    await upgrade(database, "stablerail")
    connection = await asyncpg.connect(database, server_settings={"search_path": "stablerail"})
    try:
        await connection.execute("INSERT INTO wallets VALUES ('MATIC', $1, 'alice', 'wallet-1', now())", WALLET)
        stage = credit_deposits.stage(DepositPolicy(minimum=1_000_000, chains_read=frozenset({"MATIC"})))
        epochs, _ = await claim_owners(connection, stage.name, [("deposits.notified", 0)], _now())
        yield Desk(connection, stage, epochs)
    finally:
        await connection.close()


def _six(desk: Desk, number: int) -> list[Any]:
    """Three transfers of one transaction, as both reporters tell them."""
    tx_hash, block = f"0x{number:064x}", f"0x{number + 2**200:064x}"
    found = []
    for place, amount in enumerate(("5.00", "9.00", "5.00")):
        common = {"version": 1, "chain": "MATIC", "tx_hash": tx_hash, "to": WALLET, "asset": "USDC", "amount": amount}
        for source, evidence in (("circle", "complete"), ("scanner", "confirmed")):
            own: dict[str, Any] = {"source": source, "transfer_id": f"{source}-{number}-{place}", "evidence": evidence}
            if source == "scanner":
                own |= {"transfer_id": f"{block}:{place}", "block_hash": block, "block_number": 7, "log_index": place}
            found.append(desk.record(common | own, own["transfer_id"], source))
    return found


def _of_deposits(messages: Iterable[Message]) -> list[Message]:
    """Without what is told of the buffer."""
    return [message for message in messages if message.topic != BUFFERS_LEVELS.name]


ORDERS = list(itertools.permutations(range(6)))


@pytest.mark.parametrize("batch_events", [1, 4, 6])
async def test_all_720_orders_of_six_reports_of_three_transfers_are_three_credits(
    desk: Desk, batch_events: int
) -> None:
    """All orders side by side, each a transaction of its own: the n-th batch brings the n-th reports of every order."""
    messages: list[Message] = []
    told = [[reports[place] for place in order] for order in ORDERS for reports in [_six(desk, ORDERS.index(order))]]
    for first in range(0, 6, batch_events):
        batch = [record for reports in told for record in reports[first : first + batch_events]]
        for start in range(0, len(batch), 2_000):
            settled = await desk.settle(batch[start : start + 2_000])
            assert settled.sealed is not None
            messages.extend(_of_deposits(settled.sealed.messages))
    assert await desk.count("SELECT amount::bigint, n, status, generation, count(*) FROM deposits GROUP BY 1, 2, 3, 4 ORDER BY 1, 2") == [
        (FIVE, 0, "credited", 1, 720),
        (FIVE, 1, "credited", 1, 720),
        (NINE, 0, "credited", 1, 720),
    ]  # fmt: skip
    assert len({message.id for message in messages}) == len(messages) == 3 * 720
    total = 720 * (2 * FIVE + NINE)
    assert await desk.count("SELECT owner, balance::bigint FROM accounts ORDER BY owner") == [
        ("alice", total),
        ("system", -total),
    ]


async def test_a_reused_event_id_that_is_delivered_again_is_one_dead_letter(desk: Desk) -> None:
    content = report(WALLET)
    first = desk.record(content, "e-1", "partner")
    other = desk.record(content | {"amount": "500.00"}, "e-1", "partner")
    dead: list[Message] = []
    for batch in ([first], [other], [other], [first, other]):
        settled = await desk.settle(batch)
        dead.extend(_of_deposits(settled.sealed.messages) if settled.sealed else [])
    (credited, letter) = dead
    assert credited.topic == DEPOSITS_CREDITED.name
    assert dict(letter.headers or ())["dlq_code"] == b"event_id_reused"
    assert await desk.count("SELECT balance::bigint FROM accounts WHERE owner = 'alice'") == [(25_000_000,)]


async def test_both_contents_of_a_reused_event_id_in_one_batch_are_one_effect_and_one_dead_letter(desk: Desk) -> None:
    content = report(WALLET)
    records = [desk.record(content | {"amount": amount}, "e-1", "partner") for amount in ("5.00", "6.00", "5.00")]
    settled = await desk.settle(records)
    assert settled.sealed is not None
    assert Counter(message.topic for message in _of_deposits(settled.sealed.messages)) == {
        DEPOSITS_CREDITED.name: 1,
        DEPOSITS_NOTIFIED.dlq.name: 1,
    }
    assert await desk.count("SELECT balance::bigint FROM accounts WHERE owner = 'alice'") == [(FIVE,)]
    assert (await desk.settle(records)).sealed is None


async def test_a_vendors_count_of_equal_transfers_is_not_enough_on_a_chain_we_read(desk: Desk) -> None:
    common = {
        "version": 1,
        "chain": "MATIC",
        "tx_hash": "0x" + "77" * 32,
        "to": WALLET,
        "asset": "USDC",
        "amount": "5.00",
    }

    def told(source: str, transfer_id: str, **fields: Any) -> Any:
        content = common | {"source": source, "transfer_id": transfer_id, "evidence": "confirmed", **fields}
        return desk.record(content, f"{transfer_id} {content['evidence']}", source)

    query = "SELECT n, status FROM deposits ORDER BY n"
    for evidence in ("confirmed", "complete"):
        await desk.settle([told("circle", "a", evidence=evidence), told("circle", "b", evidence=evidence)])
        assert await desk.count(query) == [(0, "credited"), (1, "pending")]
    place = {"block_hash": "0x" + "88" * 32, "block_number": 7}
    for index in (3, 4):
        await desk.settle([told("scanner", f"{place['block_hash']}:{index}", log_index=index, **place)])
    assert await desk.count(query) == [(0, "credited"), (1, "credited")]
    assert await desk.count("SELECT balance::bigint FROM accounts WHERE owner = 'alice'") == [(2 * FIVE,)]


async def test_an_attempt_that_a_producer_claims_opens_no_settled_event_again(desk: Desk) -> None:
    record = desk.record(report(WALLET, amount="5.00"), "e-1", "partner")
    assert (await desk.settle([record])).sealed is not None
    for attempt in (b"1", b"2", b"31999"):
        record.headers = [*record.headers, ("attempt", attempt)]
        assert (await desk.settle([record])).sealed is None


async def test_two_workers_that_settle_one_deposit_at_once_credit_it_once(desk: Desk, database: str) -> None:
    """A producer with keys of its own spreads one deposit over partitions, and so over workers."""
    other = await asyncpg.connect(database, server_settings={"search_path": "stablerail"})
    try:
        epochs, _ = await claim_owners(other, desk.stage.name, [("deposits.notified", 1)], _now())
        desks = (desk, Desk(other, desk.stage, epochs, partition=1))
        for number in range(20):
            tx_hash = f"0x{number:064x}"
            batches = [
                [one.record(report(WALLET, tx_hash=tx_hash, source=source, amount="5.00"), f"{number}", source)]
                for one, source in zip(desks, ("circle", "partner"), strict=True)
            ]
            outcomes = await asyncio.gather(
                *(one.settle(batch) for one, batch in zip(desks, batches, strict=True)), return_exceptions=True
            )
            for one, batch, outcome in zip(desks, batches, outcomes, strict=True):
                if isinstance(outcome, asyncpg.UniqueViolationError):
                    assert (await one.settle(batch, careful=True)).sealed is not None
                else:
                    assert isinstance(outcome, Settled)
    finally:
        await other.close()
    assert await desk.count("SELECT count(*), sum(generation)::int FROM deposits") == [(20, 20)]
    assert await desk.count("SELECT count(*) FROM deposit_reports") == [(40,)]
    assert await desk.count("SELECT balance::bigint FROM accounts WHERE owner = 'alice'") == [(20 * FIVE,)]
