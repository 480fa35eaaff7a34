"""Brings what the oracle judges: the chain by raw JSON-RPC, the sandbox's own records by HTTP, the topics by a plain consumer, and
what the product says by its API and by SQL. No code of the product is used here either.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import aiohttp
import asyncpg
import msgpack
import zstandard
from aiokafka import AIOKafkaConsumer, TopicPartition

from tests.chaos.oracle import Told, Transfer, World

TRANSFER = "0xddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"
"""keccak256 of Transfer(address,address,uint256)"""
BALANCE_OF = "0x70a08231"
SCALE = 10**6


@dataclass(frozen=True)
class Places:
    """Where to ask."""

    rpc_url: str
    usdc: str
    signer: str
    circle_wallet: str
    circle_url: str
    api_url: str
    api_key: str
    dsn: str
    bootstrap: str
    prefix: str


async def world(at: Places) -> World:
    """What happened outside."""
    async with aiohttp.ClientSession() as session:

        async def rpc(method: str, *params: Any) -> Any:
            body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
            async with session.post(at.rpc_url, json=body) as answer:
                return (await answer.json())["result"]

        async with session.get(f"{at.circle_url}/_control/created") as answer:
            made = await answer.json()
        logs = await rpc("eth_getLogs", {"address": at.usdc, "fromBlock": "0x0", "topics": [TRANSFER]})
        moved = [
            Transfer(
                "MATIC",
                log["transactionHash"],
                _address(log["topics"][1]),
                _address(log["topics"][2]),
                int(log["data"], 16),
            )
            for log in logs
        ]
        customers = [one for one in made["wallets"] if one.get("refId") not in (None, "treasury")]
        owners = {_plain(one["address"]): one["refId"] for one in customers}
        read = {_plain(one["address"]) for one in customers if one["blockchain"] == "MATIC-AMOY"}
        ours = {at.signer.lower(), at.circle_wallet.lower()}
        inbound = [one for one in moved if one.to in read]
        outbound = [one for one in moved if one.sender in ours and one.to not in ours]
        for one in made["transactions"]:
            if one["blockchain"] == "MATIC-AMOY":
                continue  # the chain itself was asked
            amount = int(Decimal(one["amounts"][0]) * SCALE)
            went = Transfer(
                "SOL", one.get("txHash") or "", one["sourceAddress"], _plain(one["destinationAddress"]), amount
            )
            if one["transactionType"] == "INBOUND" and went.to in owners:
                inbound.append(went)
            elif one["transactionType"] == "OUTBOUND" and one["state"] == "COMPLETE":
                outbound.append(went)
        holdings = 0
        for wallet in read | ours:
            query = {"to": at.usdc, "data": BALANCE_OF + wallet[2:].rjust(64, "0")}
            holdings += int(await rpc("eth_call", query, "latest"), 16)
        nonce = int(await rpc("eth_getTransactionCount", at.signer, "latest"), 16)
    return World(inbound, outbound, owners, holdings, nonce)


def _address(topic: str) -> str:
    return "0x" + topic[-40:].lower()


def _plain(address: str) -> str:
    return address.lower() if address.startswith("0x") else address


# -- what the product says -------------------------------------------------------------------------------------------

BOOKS = {
    "a transaction does not sum to zero": (
        "SELECT e.transaction_id::text FROM entries e JOIN accounts a ON a.id = e.account_id GROUP BY e.transaction_id, a.asset"
        " HAVING sum(CASE e.direction WHEN 'd' THEN e.amount ELSE -e.amount END) <> 0"
    ),
    "a balance is not the sum of its entries": (
        "SELECT a.owner || '.' || a.type || ' ' || a.balance FROM accounts a LEFT JOIN entries e ON e.account_id = a.id"
        " GROUP BY a.id, a.owner, a.type, a.balance, a.version"
        " HAVING a.balance <> coalesce(sum(CASE e.direction WHEN 'd' THEN e.amount ELSE -e.amount END), 0)"
        " OR a.version <> count(e.version)"
    ),
    "an asset does not sum to zero": "SELECT asset FROM accounts GROUP BY asset HAVING sum(balance) <> 0",
}
LEFT = {
    "commit records are not journaled": "SELECT count(*) FROM outbox WHERE NOT journaled",
    "holds are open": "SELECT count(*) FROM holds WHERE state = 'open'",
}
LEFT_S_MAX = 60.0
"""How long a count of these is looked at again: the chain goes on, and what each of its blocks commits is on its way to the journal
for a moment. Also a partition may be claimed at any time."""


async def told(at: Places, users: Iterable[str]) -> Told:
    """What the product says of itself."""
    connection = await asyncpg.connect(at.dsn, server_settings={"search_path": "stablerail"})
    try:

        async def rows(query: str) -> list[tuple[Any, ...]]:
            return [tuple(row) for row in await connection.fetch(query)]

        books = [f"{what}: {row[0]}" for what, query in BOOKS.items() for row in await rows(query)]
        left = {what: await _left(rows, query) for what, query in LEFT.items()}
        deposits = await rows("SELECT tx_hash, recipient, amount::bigint, status FROM deposits")
        withdrawals = await rows(
            "SELECT replace(id::text, '-', ''), user_id, idempotency_key, status, amount::bigint, recipient FROM withdrawals"
        )
        orders = await rows("SELECT order_id, status, filled::bigint FROM orders")
        nonces = await rows(
            f"SELECT DISTINCT nonce, replace(withdrawal_id::text, '-', '') FROM attempts WHERE signer = '{at.signer.lower()}'"
        )
        ((custody,),) = await rows(
            "SELECT coalesce(sum(balance), 0)::bigint FROM accounts WHERE type = 'custody_usdc' AND shard = 'MATIC'"
        )
        credits = await rows(
            "SELECT replace(t.id::text, '-', ''), e.amount::bigint FROM transactions t JOIN entries e ON e.transaction_id = t.id"
            " JOIN accounts a ON a.id = e.account_id WHERE t.kind = 'deposit' AND a.type = 'usdc_balance'"
        )
    finally:
        await connection.close()
    said = await _topics(at)
    return Told(
        balances=await _balances(at, users),
        deposits=[(tx, _plain(to), amount, status) for tx, to, amount, status in deposits],
        withdrawals=withdrawals,
        orders={order: (status, filled) for order, status, filled in orders},
        nonces=nonces,
        custody=custody,
        books=books,
        credits=set(credits),
        left=left,
        **said,
    )


async def _left(rows: Callable[[str], Awaitable[list[tuple[Any, ...]]]], query: str) -> int:
    deadline = time.monotonic() + LEFT_S_MAX
    while True:
        ((number,),) = await rows(query)
        if not number or time.monotonic() > deadline:
            return int(number)
        await asyncio.sleep(0.05)


async def _balances(at: Places, users: Iterable[str]) -> dict[str, dict[str, int]]:
    found = {}
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {at.api_key}"}) as session:
        for user in users:
            async with session.get(f"{at.api_url}/v1/users/{user}/balances") as answer:
                body = await answer.json() if answer.status == 200 else {"balances": []}
            accounts: dict[str, Decimal] = {}
            for one in body["balances"]:
                accounts |= {name: Decimal(text) for name, text in one["accounts"].items()}
            held = accounts.get("pending_withdrawal", Decimal(0)) + accounts.get("pending_investment", Decimal(0))
            found[user] = {
                "available": int(accounts.get("usdc_balance", Decimal(0)) * SCALE),
                "held": int(held * SCALE),
                "exposure": int(accounts.get("fiat_exposure", Decimal(0)) * SCALE),
            }
    return found


async def _topics(at: Places) -> dict[str, Any]:
    credits: set[tuple[str, int]] = set()
    ends: defaultdict[str, set[str]] = defaultdict(set)
    orders: defaultdict[str, set[str]] = defaultdict(set)
    letters: Counter[tuple[str, int, int, bytes]] = Counter()
    journal: dict[int, list[tuple[int, str, str, int, int, int]]] = {}
    parts: defaultdict[int, list[bytes]] = defaultdict(list)
    consumer = AIOKafkaConsumer(bootstrap_servers=at.bootstrap, enable_auto_commit=False, auto_offset_reset="earliest")
    await consumer.start()
    try:
        names = ("deposits.credited", "withdrawals.settled", "orders.settled", "orders.rejected", "journal")
        topics = [f"{at.prefix}{name}" for name in names]
        topics += [t for t in await consumer.topics() if t.startswith(at.prefix) and t.endswith(".dlq")]
        for record in await _records(consumer, topics):
            name, headers = record.topic.removeprefix(at.prefix), dict(record.headers)
            if name == "journal":
                number = int.from_bytes(record.key)
                if number not in journal:
                    parts[number].append(record.value)
                    if int(headers.get("part", b"0")) + 1 == int(headers.get("parts", b"1")):
                        journal[number] = _owners(number, b"".join(parts.pop(number)))
                continue
            if name.endswith(".dlq"):
                if "dlq_offset" in headers:
                    place = int(headers["dlq_partition"]), int(headers["dlq_offset"])
                    letters[name.removesuffix(".dlq"), *place, record.value or b""] += 1
                continue
            event = json.loads(record.value)
            if name == "deposits.credited":
                credits.add((event["transaction_id"], int(Decimal(event["amount"]) * SCALE)))
            elif name == "withdrawals.settled":
                ends[event["withdrawal_id"]].add(event["outcome"])
            else:
                orders[event["order_id"]].add(event.get("outcome", "rejected"))
    finally:
        await consumer.stop()
    return {
        "said_credits": credits, "said_ends": dict(ends), "said_orders": dict(orders), "letters": letters,
        "journal": [row for rows in journal.values() for row in rows],
    }  # fmt: skip


def _owners(number: int, record: bytes) -> list[tuple[int, str, str, int, int, int]]:
    """Who made a commit, by its record: zstd of msgpack, the owner rows among the last of its blocks. A column is a list of
    PostgreSQL's, `{0,1}`, or one value for all rows, `=0`."""
    *_, proof = msgpack.unpackb(zstandard.ZstdDecompressor().decompress(record, max_output_size=2**28))
    found = []
    for table, _, columns in proof:
        if table == "owners":
            lists = [column[1:-1].split(",") for column in columns if column.startswith("{")]
            size = max(map(len, lists), default=1)
            rows = zip(*(_values(column, size) for column in columns[:5]), strict=True)
            found += [
                (number, stage, topic, int(part), int(epoch), int(place)) for stage, topic, part, epoch, place in rows
            ]
    return found


def _values(column: str, size: int) -> list[str]:
    if column.startswith("{"):
        return [value.strip('"') for value in column[1:-1].split(",")]
    return [column.removeprefix("=")] * size


async def _records(consumer: AIOKafkaConsumer, topics: Iterable[str]) -> list[Any]:
    """Everything that they hold now."""
    parts = [part for topic in topics for part in await _partitions(consumer, topic)]
    ends = {part: end for part, end in (await consumer.end_offsets(parts)).items() if end}
    consumer.assign(list(ends))
    await consumer.seek_to_beginning(*ends)
    found: list[Any] = []
    while any([await consumer.position(part) < end for part, end in ends.items()]):
        for some in (await consumer.getmany(timeout_ms=300)).values():
            found.extend(some)
    return found


async def trace(at: Places, user: str, keys: Iterable[str]) -> list[str]:
    """The way of the money: the customer's ledger entries, and what was signed and asked for these."""
    connection = await asyncpg.connect(at.dsn, server_settings={"search_path": "stablerail"})
    wanted = list(keys)
    queries = {
        "entry": (
            "SELECT e.at, t.kind, a.type, e.direction, e.amount, e.version, t.reference FROM entries e"
            " JOIN accounts a ON a.id = e.account_id JOIN transactions t ON t.id = e.transaction_id"
            " WHERE a.owner = $1 ORDER BY e.at DESC, a.type, e.version DESC LIMIT 40", (user,),
        ),
        "attempt": (
            "SELECT w.idempotency_key, t.nonce, t.n, t.kind, t.status, t.tx_hash, t.block_number, t.error FROM attempts t"
            " JOIN withdrawals w ON w.id = t.withdrawal_id WHERE w.idempotency_key = ANY($1) ORDER BY t.nonce, t.n", (wanted,),
        ),
        "history": (
            "SELECT h.at, w.idempotency_key, h.version, h.status, h.code, h.actor FROM withdrawal_history h"
            " JOIN withdrawals w ON w.id = h.withdrawal_id WHERE w.idempotency_key = ANY($1) ORDER BY h.at", (wanted,),
        ),
        "call": (
            "SELECT c.stage, c.state, c.id, l.attempts, l.last_error FROM calls c LEFT JOIN leases l ON l.call_id = c.id"
            " WHERE c.state = 'open' LIMIT 10", (),
        ),
        "deposit": (
            "SELECT d.tx_hash, d.n, d.status, d.generation, d.amount, d.block_number, r.source, r.evidence, r.reported_at"
            " FROM deposits d LEFT JOIN deposit_reports r ON r.deposit_id = d.id WHERE d.tx_hash = ANY($1) ORDER BY r.reported_at",
            (wanted,),
        ),
        "order": ("SELECT * FROM orders WHERE order_id = ANY($1)", (wanted,)),
    }  # fmt: skip
    try:
        lines = []
        for what, (query, arguments) in queries.items():
            try:
                found = await connection.fetch(query, *arguments)
            except asyncpg.PostgresError as error:
                lines.append(f"{what}: {error}")
                continue
            lines += [f"{what} " + "  ".join(str(value) for value in row.values()) for row in found]
        return lines
    finally:
        await connection.close()


async def lag(at: Places, groups: Iterable[str], topics: Iterable[str]) -> int:
    """Events of these topics that their groups have not acknowledged."""
    waiting = 0
    for group in groups:
        consumer = AIOKafkaConsumer(bootstrap_servers=at.bootstrap, group_id=group, enable_auto_commit=False)
        await consumer.start()
        try:
            parts = [part for topic in topics for part in await _partitions(consumer, topic)]
            ends = await consumer.end_offsets(parts)
            for part, end in ends.items():
                done = await consumer.committed(part)
                if done is not None:
                    waiting += max(0, end - done)
        finally:
            await consumer.stop()
    return waiting


async def _partitions(consumer: AIOKafkaConsumer, topic: str) -> list[TopicPartition]:
    """An assigned consumer asks for no metadata by itself."""
    return [TopicPartition(topic, number) for number in await consumer._client._wait_on_metadata(topic)]
